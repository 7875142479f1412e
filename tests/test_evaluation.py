"""Predictions, metrics and leaderboard files, and all that evaluation.py answers about a run."""

import json
import math
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_multitask, write_csv, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score

import classifier
import evaluation
import multitask_classifier
import simcse
from datasets import read_examples
from engine.checkpoint import read_json, write_json
from engine.errors import TrainingDiverged
from evaluation import (
    EmbeddingCache,
    baseline,
    constant_note,
    embed_batch,
    evaluate,
    overall_score,
    predict,
    summarize,
    task_metrics,
    write_predictions,
)
from model import MultitaskBERT
from tasks import TASKS

# ---------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def multitask(tiny, data):
    """A model with mean pooling, and its dev sets."""
    return load_multitask(tiny, data, "dev", pooling="mean")


LEADERBOARD_FILES = [
    ("sst", [[0.0, 9, 0, 0, 0], [0, 0, 0, 0, 1]], "id \t Predicted_Sentiment \n{} , 1 \n{} , 4 \n"),
    ("para", [[0.5], [-0.5]], "id \t Predicted_Is_Paraphrase \n{} , 1.0 \n{} , 0.0 \n"),
    ("sts", [[3.25], [-0.125]], "id \t Predicted_Similiary \n{} , 3.25 \n{} , -0.125 \n"),
]


@pytest.mark.parametrize(("task", "logits", "expected"), LEADERBOARD_FILES)
def test_leaderboard_files_byte_for_byte(tiny, data, tmp_path, task, logits, expected):
    _, datasets = load_multitask(tiny, data, "dev")
    dataset = next(dataset for dataset in datasets if dataset.name == task)
    dataset.examples = dataset.examples[:2]
    write_predictions(tmp_path / "new" / "out.csv", dataset, torch.tensor(logits))
    content = expected.format(*(example.id for example in dataset.examples))
    assert (tmp_path / "new" / "out.csv").read_bytes() == content.encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.csv"]


def test_predictions_do_not_depend_on_the_batch_size(multitask):
    model, datasets = multitask
    embed = partial(embed_batch, model)
    for dataset in datasets:
        batches = (dataset.batch(np.array([row])) for row in range(len(dataset)))
        alone = torch.cat([model.decode(dataset.name, embed(batch)) for batch in batches])
        for size in (1, 3, 64):
            logits = predict(model, dataset, size, embed)
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_cached_embeddings_equal_fresh_ones_and_are_computed_once(multitask):
    """Each needed row exactly once, however batches are drawn later."""
    model, datasets = multitask
    sts = datasets[2]
    cache = EmbeddingCache(model, batch_size=5)
    sequences = []
    hook = model.bert.register_forward_hook(lambda *given: sequences.append(len(given[1][0])))
    cache.add(sts, np.array([9, 2, 5, 11]))
    cache.add(datasets[0])
    assert sum(sequences) == 2 * 4 + 16
    for rows in ([5, 2, 9], [9, 5], [2, 11]):
        batch = sts.batch(np.array(rows))
        sequences.clear()
        found = cache(batch)
        assert not sequences
        with torch.no_grad():
            torch.testing.assert_close(found, embed_batch(model, batch), atol=1e-6, rtol=1e-5)
    hook.remove()


def test_outputs_and_losses_that_are_not_finite_are_refused(multitask):
    model, (sst, _, sts) = multitask

    def embed(batch):
        vectors = embed_batch(model, batch)
        vectors[torch.from_numpy(np.isin(batch.rows, [3, 7]))] = math.nan
        return vectors

    with pytest.raises(TrainingDiverged, match=r"2 rows are not finite \(.*ids-sst-dev\.csv-3,"):
        predict(model, sst, 5, embed)
    with pytest.raises(TrainingDiverged, match=r"sts-dev\.csv: the mean loss is inf"):
        task_metrics(sts, torch.full((16, 1), 1e30))


# ---------------------------------------------------------------------------- metrics


def test_metrics_are_of_all_rows_at_once(multitask):
    """Not means over batches, and in file order."""
    model, datasets = multitask
    logits = [predict(model, dataset, 7, partial(embed_batch, model)) for dataset in datasets]
    found = evaluate(datasets, logits)
    for dataset, of in zip(datasets, logits, strict=True):
        metrics = found["tasks"][dataset.name]
        assert metrics["rows"] == 16
        loss = dataset.task.labels.loss(of, dataset.labels).double().mean().item()
        assert metrics["loss"] == pytest.approx(loss)
        gold = [example.label for example in dataset.examples]
        if dataset.name == "sst":
            assert metrics["accuracy"] == accuracy_score(gold, of.argmax(1).numpy())
        if dataset.name == "sts":
            r = stats.pearsonr(gold, of[:, 0].double().numpy()).statistic
            assert metrics["pearson"] == pytest.approx(r, abs=1e-4)
    tasks = found["tasks"]
    score = (tasks["sst"]["accuracy"] + tasks["para"]["accuracy"]) / 3
    assert found["score"] == pytest.approx(score + (tasks["sts"]["pearson"] + 1) / 6)


def test_the_overall_score_is_the_courses():
    metrics = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.8}, "sts": {"pearson": 0.4}}
    assert overall_score(metrics) == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert overall_score({"sts": {"pearson": -1.0}}) == 0


def test_predictions_of_a_single_class_get_a_note():
    confusion = {
        "majority": [[5, 0], [2, 0]],
        "one class": [[0, 5], [0, 2]],
        "both": [[4, 1], [1, 1]],
    }
    notes = {name: constant_note({"confusion": of}) for name, of in confusion.items()}
    assert notes == {"majority": " (majority class)", "one class": " (one class only)", "both": ""}
    assert constant_note({"pearson": 0.0}) == ""
    metrics = {"accuracy": 5 / 7, "confusion": confusion["majority"]}
    assert "sst accuracy 0.714 (majority class), overall 0.714" in summarize({"sst": metrics})


def test_baselines_are_the_majority_class_and_the_untouched_encoder(multitask):
    """Whatever the model's own pooling, pairs are compared by mean pooling."""
    model, (sst, para, sts) = multitask
    labels = sst.labels.tolist()
    assert baseline(model, sst, 4) == ("majority class", max(map(labels.count, labels)) / 16)
    assert baseline(model, para, 4)[0] == "majority class"
    u, v = (model.encode([example.texts[i] for example in sts.examples]) for i in (0, 1))
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    expected = stats.pearsonr(cosines, sts.labels).statistic
    model.pooling = "pooler"
    name, value = baseline(model, sts, 4)
    model.pooling = "mean"
    assert name == "untouched encoder" and value == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------- saved runs

# Each kind of run: script, and flags beside the common ones.
RUNS = {
    "probe": (multitask_classifier, ["--option", "pretrain"]),
    "finetune": (
        multitask_classifier,
        ["--option", "finetune", "--pooling", "mean", "--sts_decoder", "cosine", "--lr", "1e-3"],
    ),
    "joint": (
        multitask_classifier,
        ["--option", "finetune", "--pair_encoding", "joint", "--precision", "bf16", "--limit", 10],
    ),
    "lpft": (classifier, ["--task", "cfimdb", "--option", "lpft", "--pooling", "cls"]),
    "simcse": (simcse, ["--mode", "unsupervised"]),
}


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory) -> Path:
    """A folder of finished runs, one of each kind, by name."""
    folder = tmp_path_factory.mktemp("runs")
    rows = "".join(f"the film {i},a plot {i},the cat {i}\n" for i in range(12))
    (folder / "nli.csv").write_text("sent0,sent1,hard_neg\n" + rows, encoding="utf-8")
    for name, (script, more) in RUNS.items():
        flags = ["--model", tiny, "--data_dir", data, "--epochs", 2, "--batch_size", 7, *more]
        if script is simcse:
            flags += ["--nli", folder / "nli.csv"]
        script.main([str(flag) for flag in [*flags, "--run_dir", folder / name]])
    return folder


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """A copy of a run without its model, for a test to change."""
    shutil.copytree(runs / "probe", tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    return tmp_path / "run"


def ask(run_script, *flags) -> tuple[str, str]:
    """What evaluation.py prints on standard output and on standard error."""
    code, out, err = run_script(evaluation, *flags)
    assert code == 0, err
    return out, err


def refused(run_script, *flags) -> str:
    """The line with which evaluation.py refuses."""
    code, out, err = run_script(evaluation, *flags)
    assert (code, out) == (2, "") and err.count("error: ") == 1, err
    line = err.splitlines()[-1]
    assert line.startswith("evaluation.py: error: ")
    return line


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_evaluated_to_the_same_bits(runs, run_script, tmp_path, monkeypatch, name):
    """In another folder and with other threads; probing too, which cached its embeddings."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    out, err = ask(run_script, runs / name)
    assert torch.get_num_threads() == threads
    answer, result = json.loads(out), read_json(runs / name / "result.json")
    assert answer["dev"] == result["dev"]
    assert answer.get("overall") == result.get("overall")
    assert err.endswith("result.json: the same metrics, bit for bit\n")
    if name == "probe":  # a row of the confusion matrix on a line
        assert str(result["dev"]["sst"]["confusion"][0])[1:-1] in out


def test_data_from_another_folder(runs, tmp_path, run_script):
    other = write_data(tmp_path / "data", {"dev": 23, "test": 2}, seed=5)
    out, err = ask(run_script, runs / "finetune", "--data_dir", other)
    found = json.loads(out)["dev"]
    assert {task: of["rows"] for task, of in found.items()} == {"sst": 23, "para": 23, "sts": 23}
    assert "result.json" not in err
    model = MultitaskBERT.from_pretrained(runs / "finetune")
    examples, *_ = read_examples(other / "ids-sst-dev.csv", TASKS["sst"])
    batch = model.tokenizer([e.texts[0] for e in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.predict_sentiment(batch["input_ids"], batch["attention_mask"])
    expected = accuracy_score([e.label for e in examples], logits.argmax(dim=-1))
    assert found["sst"]["accuracy"] == expected


def test_other_metrics_and_missing_files_are_pointed_out(runs, tmp_path, run_script):
    shutil.copytree(runs / "lpft", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    result = read_json(tmp_path / "run" / "result.json")
    result["dev"]["cfimdb"]["accuracy"] += 0.01
    write_json(tmp_path / "run" / "result.json", result)
    assert "DIFFERENT metrics" in ask(run_script, tmp_path / "run")[1]
    config = read_json(path)
    config["files"]["dev"]["cfimdb"] = str(tmp_path / "gone.csv")
    write_json(path, config)
    assert "gone.csv: no such file" in refused(run_script, tmp_path / "run")
    del config["files"]["dev"]["cfimdb"]
    write_json(path, config)
    assert "names no dev file of cfimdb; give --data_dir" in refused(run_script, tmp_path / "run")


@pytest.mark.parametrize("name", ["probe", "finetune", "lpft"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_predictions_of_a_file_are_those_of_the_run(runs, data, tmp_path, run_script, name, split):
    """Byte for byte, with a label column and without; metrics where there are labels."""
    result = read_json(runs / name / "result.json")["dev"]
    for task in result:
        path = data / TASKS[task].files.format("dev" if split == "dev" else "test-student")
        out = tmp_path / "new folder" / f"{task}.csv"
        flags = [runs / name, "--data", path, "--task", task, "--out", out]
        answer, _ = ask(run_script, *flags)
        expected = runs / name / "predictions" / f"{task}-{split}-output.csv"
        assert out.read_bytes() == expected.read_bytes()
        assert answer == "" if split == "test" else json.loads(answer) == {task: result[task]}
        assert "exists and is not overwritten" in refused(run_script, *flags)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=30)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(texts, min_size=1, max_size=9))
def test_any_sentence_gets_the_prediction_that_it_gets_alone(runs, tmp_path, rows):
    path, out = tmp_path / "any.csv", tmp_path / "out.csv"
    out.unlink(missing_ok=True)
    write_csv(path, ["id", "sentence"], [[f"r{i}", text] for i, text in enumerate(rows)])
    flags = [runs / "finetune", "--data", path, "--task", "sst", "--out", out]
    evaluation.main([str(flag) for flag in flags])
    model = MultitaskBERT.from_pretrained(runs / "finetune")
    lines = ["id \t Predicted_Sentiment "]
    for i, text in enumerate(rows):
        batch = model.tokenizer([text], truncation=True, return_tensors="pt")
        logits = model.predict_sentiment(batch["input_ids"], batch["attention_mask"])
        lines.append(f"r{i} , {logits.argmax().item()} ")
    assert out.read_text(encoding="utf-8").split("\n") == [*lines, ""]


def split_numbers(text: str) -> tuple[str, list[float]]:
    """The text with # in place of each number, and the numbers."""
    pattern = r"-?\d+\.\d{4}"
    return re.sub(pattern, "#", text), [float(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize("name", ["finetune", "joint"])
def test_texts_get_class_names_and_probabilities(runs, run_script, name):
    """One text: the tasks of one sentence; two: those of pairs."""
    model = MultitaskBERT.from_pretrained(runs / name)
    model.dtype = getattr(torch, read_json(runs / name / "config.json")["precision"])
    one, two = (model.tokenizer([t], return_tensors="pt") for t in ("a great film !", "the cat"))
    sentence = (one["input_ids"], one["attention_mask"])
    pair = (*sentence, two["input_ids"], two["attention_mask"])
    with torch.no_grad():
        classes = model.predict_sentiment(*sentence)[0].softmax(dim=0).tolist()
        para = model.predict_paraphrase(*pair).sigmoid().item()
        sts = model.predict_similarity(*pair).item()
    out, _ = ask(run_script, runs / name, "--text", "a great film !")
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    words, numbers = split_numbers(out)
    listed = ", ".join(f"{name} #" for name in names)
    assert words == f"sst: {names[np.argmax(classes)]} ({listed})\n"
    # In bf16, padding changes the rounding.
    assert numbers == pytest.approx(classes, abs=1e-4 if name == "finetune" else 5e-3)
    out, _ = ask(run_script, runs / name, "--text", "a great film !", "--text", "the cat")
    words, numbers = split_numbers(out)
    found = "paraphrase" if para > 0.5 else "not a paraphrase"
    assert words == f"para: {found} (not a paraphrase #, paraphrase #)\nsts: #\n"
    expected = [1 - para, para, sts]
    assert numbers == pytest.approx(expected, abs=1e-4 if name == "finetune" else 2e-2)


def test_texts_that_do_not_fit(runs, run_script):
    _, err = ask(run_script, runs / "lpft", "--text", "film " * 100)
    assert "1 truncated to the model's limit" in err
    line = refused(run_script, runs / "lpft", "--text", "a", "--text", "b")
    assert "no task takes 2 --text; it has cfimdb" in line
    assert "no task takes 1 --text" in refused(run_script, runs / "simcse", "--text", "a")


# ---------------------------------------------------------------------------- the leaderboard


def test_a_submission_holds_the_six_files(runs, tmp_path, run_script):
    """Byte for byte, and the same archive each time."""
    for name in ("a.zip", "b.zip"):
        out, _ = ask(run_script, runs / "probe", "--submit", tmp_path / name)
        assert out == f"{tmp_path / name}\n"
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
    folder = runs / "probe" / "predictions"
    assert found == {f"predictions/{path.name}": path.read_bytes() for path in folder.iterdir()}
    assert len(found) == 6
    line = refused(run_script, runs / "probe", "--submit", tmp_path / "a.zip")
    assert "a.zip: exists and is not overwritten" in line


def test_predictions_that_the_user_put_elsewhere_are_submitted(train, tmp_path, run_script):
    out = tmp_path / "mine.csv"
    train(multitask_classifier, tmp_path / "run", "--para_dev_out", out)
    ask(run_script, tmp_path / "run", "--submit", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.read("predictions/para-dev-output.csv") == out.read_bytes()


def swap(text: str, one: str, other: str) -> str:
    assert one in text
    return text.replace(one, other, 1)


def reverse_rows(text: str) -> str:
    header, *rows = text.splitlines(keepends=True)
    return "".join([header, *rows[::-1]])


FAULTS = {
    "order": ("sst-dev", reverse_rows, "line 2: 'ids-sst-dev.csv-15 , "),
    "missing row": ("sts-test", lambda t: t[: t[:-1].rindex("\n") + 1], "7 rows, but"),
    "cut off": ("para-dev", lambda t: t[:-1], "15 rows, but"),
    "foreign id": ("sst-dev", lambda t: swap(t, "csv-3 ,", "csv-x ,"), "line 5"),
    "header": ("para-dev", lambda t: swap(t, "Is_Paraphrase", "Similiary"), "line 1: the header"),
    "class": ("sst-dev", lambda t: swap(t, t.split(" , ")[1][0] + " \n", "5 \n"), "line 2: '5 '"),
    "probability": ("para-test", lambda t: t.replace(".0 \n", ".4 \n"), "line 2"),
    "infinite": ("sts-dev", lambda t: t[: t.rindex(" , ")] + " , inf \n", "line 17: 'inf '"),
    "no space at the end": ("sts-dev", lambda t: t[:-2] + "\n", "line 17"),
}


@pytest.mark.parametrize(("name", "change", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_prediction_file_is_not_submitted(
    copy, tmp_path, run_script, name, change, expected
):
    path = copy / "predictions" / f"{name}-output.csv"
    path.write_bytes(change(path.read_bytes().decode()).encode())
    line = refused(run_script, copy, "--submit", tmp_path / "out.zip")
    assert str(path) in line and expected in line
    assert not (tmp_path / "out.zip").exists()


def test_half_a_run_is_not_submitted(runs, copy, tmp_path, run_script):
    """Rows left out by --limit, a missing file, other data, and a run without the tasks."""
    for name, expected in (("joint", "had --limit 10, but"), ("lpft", "names no dev file of sst")):
        assert expected in refused(run_script, runs / name, "--submit", tmp_path / "x.zip")
    other = write_data(tmp_path / "data", {"dev": 16, "test": 8}, seed=1)
    ask(run_script, copy, "--submit", tmp_path / "same ids.zip", "--data_dir", other)
    other = write_data(tmp_path / "more", {"dev": 17, "test": 8})
    line = refused(run_script, copy, "--submit", tmp_path / "x.zip", "--data_dir", other)
    assert "16 rows, but" in line
    (copy / "predictions" / "sts-test-output.csv").unlink()
    line = refused(run_script, copy, "--submit", tmp_path / "x.zip")
    assert "sts-test-output.csv: no such file" in line


# ---------------------------------------------------------------------------- comparing


def set_limit(run: Path, limit: int) -> None:
    config = read_json(run / "config.json")
    config["arguments"]["limit"] = limit
    write_json(run / "config.json", config)


def write_dev_predictions(run: Path, task: str, predictions: list) -> None:
    path = run / "predictions" / f"{task}-dev-output.csv"
    header, *rows = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [f"{row.split(' , ')[0]} , {p} " for row, p in zip(rows, predictions, strict=True)]
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def test_a_comparison_tells_differences_from_noise(data, copy, run_script):
    """Against McNemar's exact test; one task differs much, one a little, one not at all."""
    gold = {
        task: [
            e.label for e in read_examples(data / TASKS[task].files.format("dev"), TASKS[task])[0]
        ]
        for task in ("sst", "para")
    }
    other = copy.parent / "other"
    shutil.copytree(copy, other)
    right = [int(label) for label in gold["sst"]]
    wrong = [(label + 1) % 5 for label in right]
    write_dev_predictions(copy, "sst", right[:14] + wrong[14:])
    write_dev_predictions(other, "sst", wrong[:14] + right[14:])
    write_dev_predictions(copy, "para", [float(label) for label in gold["para"]])
    write_dev_predictions(other, "para", [1.0 - gold["para"][0], *gold["para"][1:]])
    out, err = ask(run_script, copy, "--compare", other)
    sst, para, sts = out.splitlines()
    assert sst.startswith("sst accuracy, 16 rows: 0.8750 - 0.1250 = +0.7500, 95% interval +0.")
    p = 3 * stats.binomtest(14, 16).pvalue  # of three tasks, the smallest p counts three times
    assert float(sst.split("p ")[1].split(":")[0]) == pytest.approx(p, abs=0.006)
    assert sst.endswith(": significant")
    assert para.startswith("para accuracy, 16 rows: 1.0000 - 0.9375 = +0.0625, 95% interval +0.0")
    assert para.endswith("p 1.0000: not significant")
    assert sts.endswith("= +0.0000, 95% interval +0.0000 to +0.0000, p 1.0000: not significant")
    assert "the variance between seeds is in neither" in err
    out, _ = ask(run_script, other, "--compare", copy)
    assert "0.1250 - 0.8750 = -0.7500" in out


def test_runs_that_predicted_different_rows_are_not_compared(runs, copy, tmp_path, run_script):
    line = refused(run_script, runs / "probe", "--compare", runs / "lpft")
    assert "have no task in common" in line
    line = refused(run_script, runs / "simcse", "--compare", runs / "probe")
    assert "sts-dev-output.csv: no such file" in line
    assert "not a run folder" in refused(run_script, runs / "probe", "--compare", tmp_path)
    set_limit(copy, 10)
    line = refused(run_script, copy, "--compare", runs / "probe")
    assert f"{copy} had --limit 10 and {runs / 'probe'} had --limit None" in line
    set_limit(copy, 10**6)  # above the sizes of the files
    ask(run_script, copy, "--compare", runs / "probe")
    ask(run_script, copy, "--submit", tmp_path / "a.zip")


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["x", "--task", "sst"], "--task has no effect by itself"),
        (["x", "--text", "a", "--data_dir", "d"], "--data_dir has no effect with --text"),
        (["x", "--data", "f.csv", "--task", "sst"], "needs --task NAME and --out FILE"),
        (["x", "--text", "a", "--text", "b", "--text", "c"], "one sentence, or the two of a pair"),
        (["x", "--text", "a", "--submit", "b.zip"], "not allowed with"),
    ],
)
def test_bad_flags(run_script, flags, expected):
    assert expected in refused(run_script, *flags)


def test_folders_and_tasks_that_are_not_there(runs, copy, data, tmp_path, run_script):
    assert "not a run folder" in refused(run_script, tmp_path / "nowhere")
    assert "best: not a run folder" in refused(run_script, runs / "probe" / "best")
    assert "without best/" in refused(run_script, copy)
    flags = ["--data", data / "ids-sst-dev.csv", "--out", tmp_path / "o.csv"]
    for name in ("cfimdb", "nli"):
        line = refused(run_script, runs / "probe", *flags, "--task", name)
        assert f"--task {name}: the run has no head for it; it has sst, para, sts" in line
    line = refused(run_script, runs / "probe", *flags, "--task", "para")
    assert "sentence1" in line and "ids-sst-dev.csv" in line
    assert not (tmp_path / "o.csv").exists()


KEYS = ["arguments", "hardware", "precision", "device", "batch_size", "limit"]


@pytest.mark.parametrize("damage", [*KEYS, "cut off", "not an object"])
def test_a_damaged_record_is_refused(runs, copy, run_script, damage):
    path = copy / "config.json"
    config = read_json(path)
    if damage in KEYS:
        del (config if damage in config else config["arguments"])[damage]
        write_json(path, config)
    else:
        path.write_text("[]" if damage == "not an object" else path.read_text()[:-9])
    assert str(path) in refused(run_script, copy, "--compare", runs / "probe")
