"""All that evaluation.py answers about a saved run."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_multitask, quick_run, write_csv, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import edit_json
from scipy import stats

import classifier
import evaluation
import multitask_classifier
import simcse
from engine.checkpoint import read_json, write_json
from model import MultitaskBERT
from tasks import TASKS

# The flags of each kind of run, beside the common ones.
RUNS = {
    "probe": "--option pretrain",
    "finetune": "--option finetune --pooling mean --sts_decoder cosine",
    "joint": "--option finetune --pair_encoding joint --precision bf16 --limit 10 --lr 5e-5",
    "lpft": "--task cfimdb --option lpft --pooling cls --lr 5e-5",
    # The last weights are not the best: the rate spoils the model.
    "spoiled": "--option finetune --tasks sst --epochs 6 --lr 0.02 --schedule constant --seed 5",
    "simcse": "--mode unsupervised --lr 5e-5 --nli {}",
}
SCRIPTS = {"lpft": classifier, "simcse": simcse}


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory) -> Path:
    """A folder of finished runs, one of each kind, by name."""
    folder = tmp_path_factory.mktemp("runs")
    rows = "".join(f"the film {i},a plot {i},the cat {i}\n" for i in range(12))
    (folder / "nli.csv").write_text("sent0,sent1,hard_neg\n" + rows, encoding="utf-8")
    for name, words in RUNS.items():
        flags = ["--batch_size", 7, *words.format(folder / "nli.csv").split()]
        SCRIPTS.get(name, multitask_classifier).main(quick_run(tiny, data, folder / name, *flags))
    return folder


@pytest.fixture
def probe_copy(runs, tmp_path) -> Path:
    """A copy of the run "probe" without its model, for a test to change."""
    shutil.copytree(runs / "probe", tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    return tmp_path / "run"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_evaluated_to_the_same_bits(runs, ask, tmp_path, monkeypatch, name):
    """In another folder and with other threads; probing too, which cached its embeddings."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    out, err = ask(runs / name)
    assert torch.get_num_threads() == threads
    answer, result = json.loads(out), read_json(runs / name / "result.json")
    assert answer["dev"] == result["dev"]
    assert answer.get("overall") == result.get("overall")
    assert err.endswith("result.json: the same metrics, bit for bit\n")
    assert name != "spoiled" or result["best_epoch"] < 6
    if name == "probe":  # a row of the confusion matrix on a line
        assert str(result["dev"]["sst"]["confusion"][0])[1:-1] in out


def test_other_data_other_metrics_and_missing_files_are_pointed_out(runs, tmp_path, ask, refused):
    other = write_data(tmp_path / "data", {"dev": 23, "test": 2}, seed=5)
    out, err = ask(runs / "finetune", "--data_dir", other)
    rows = {task: metrics["rows"] for task, metrics in json.loads(out)["dev"].items()}
    assert rows == {"sst": 23, "para": 23, "sts": 23} and "result.json" not in err
    run = shutil.copytree(runs / "lpft", tmp_path / "run")
    edit_json(run / "result.json", "dev", "cfimdb", accuracy=0.123)
    assert "DIFFERENT metrics" in ask(run)[1]
    edit_json(run / "config.json", "files", dev={"cfimdb": str(tmp_path / "gone.csv")})
    refused([run], "gone.csv: no such file")
    edit_json(run / "config.json", "files", dev={})
    refused([run], "names no dev file of cfimdb; give --data_dir")


@pytest.mark.parametrize("name", ["probe", "finetune", "lpft", "spoiled"])
@pytest.mark.parametrize(("split", "file"), [("dev", "dev"), ("test", "test-student")])
def test_a_file_gets_the_runs_predictions(runs, data, tmp_path, ask, refused, name, split, file):
    """Byte for byte, with a label column and without; metrics where there are labels."""
    for task, metrics in read_json(runs / name / "result.json")["dev"].items():
        path, out = data / TASKS[task].files.format(file), tmp_path / "new folder" / f"{task}.csv"
        flags = [runs / name, "--data", path, "--task", task, "--out", out]
        answer, _ = ask(*flags)
        assert answer == "" if split == "test" else json.loads(answer) == {task: metrics}
        predictions = runs / name / "predictions" / f"{task}-{split}-output.csv"
        assert out.read_bytes() == predictions.read_bytes()
        refused(flags, "exists and is not overwritten")


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


# In bf16, padding changes the rounding.
@pytest.mark.parametrize(("name", "tolerance"), [("finetune", 1e-4), ("joint", 2e-2)])
def test_texts_get_class_names_and_probabilities(runs, ask, name, tolerance):
    """One text: the tasks of one sentence; two: those of pairs."""
    model, texts = MultitaskBERT.from_pretrained(runs / name), ("a great film !", "the cat")
    model.dtype = getattr(torch, read_json(runs / name / "config.json")["precision"])
    one, two = (model.tokenizer([text], return_tensors="pt") for text in texts)
    sentence = (one["input_ids"], one["attention_mask"])
    pair = (*sentence, two["input_ids"], two["attention_mask"])
    with torch.no_grad():
        classes = model.predict_sentiment(*sentence)[0].softmax(dim=0).tolist()
        para = model.predict_paraphrase(*pair).sigmoid().item()
        sts = model.predict_similarity(*pair).item()
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    listed = ", ".join(f"{name} #" for name in names)
    answer = "paraphrase" if para > 0.5 else "not a paraphrase"
    both = f"para: {answer} (not a paraphrase #, paraphrase #)\nsts: #\n"
    for flags, words, numbers in (
        (["--text", texts[0]], f"sst: {names[np.argmax(classes)]} ({listed})\n", classes),
        (["--text", texts[0], "--text", texts[1]], both, [1 - para, para, sts]),
    ):
        out, _ = ask(runs / name, *flags)
        assert re.sub(r"-?\d+\.\d{4}", "#", out) == words
        shown = [float(number) for number in re.findall(r"-?\d+\.\d{4}", out)]
        assert shown == pytest.approx(numbers, abs=tolerance)


def test_texts_that_do_not_fit(runs, ask, refused):
    assert "1 truncated to the model's limit" in ask(runs / "lpft", "--text", "film " * 100)[1]
    pair = ["--text", "a", "--text", "b"]
    refused([runs / "lpft", *pair], "no task takes 2 --text; it has cfimdb")
    refused([runs / "simcse", "--text", "a"], "no task takes 1 --text")


# ---------------------------------------------------------------------------- leaderboard


def test_a_submission_holds_the_six_files(probe_copy, tmp_path, ask, refused):
    """Byte for byte, also one that the user put elsewhere, and the same archive each time."""
    files = {f"predictions/{p.name}": p.read_bytes() for p in probe_copy.glob("predictions/*")}
    mine = (probe_copy / "predictions/para-dev-output.csv").rename(tmp_path / "mine.csv")
    edit_json(probe_copy / "config.json", "arguments", para_dev_out=str(mine))
    for name in ("a.zip", "b.zip"):
        assert ask(probe_copy, "--submit", tmp_path / name)[0] == f"{tmp_path / name}\n"
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert len(files) == 6
    refused([probe_copy, "--submit", tmp_path / "a.zip"], "a.zip: exists and is not overwritten")


def end_with(prediction: str):
    """A change of a file's last prediction."""
    return lambda text: text[: text.rindex(" , ")] + f" , {prediction}\n"


FAULTS = {
    "order": ("sst-dev", lambda t: re.sub(r"(.+\n)(.+\n)$", r"\2\1", t), "line 16: 'ids-sst"),
    "missing row": ("sts-test", lambda t: re.sub(r".+\n$", "", t), "7 rows, but"),
    "text at the end": ("para-dev", lambda t: t + "x", "16 rows, but"),
    "header": ("para-dev", lambda t: t.replace("Is_Para", "Para"), "line 1: the header"),
    "class": ("sst-dev", end_with("5 "), "line 17: '5 '"),
    "probability": ("para-test", end_with("0.4 "), "line 9: '0.4 '"),
    "infinite": ("sts-dev", end_with("inf "), "line 17: 'inf '"),
    "no space at the end": ("sts-dev", end_with("2.5"), "line 17: '2.5'"),
}


@pytest.mark.parametrize(("name", "change", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_prediction_file_is_refused(probe_copy, tmp_path, refused, name, change, expected):
    path = probe_copy / "predictions" / f"{name}-output.csv"
    path.write_bytes(change(path.read_bytes().decode()).encode())
    refused([probe_copy, "--submit", tmp_path / "out.zip"], path, expected)
    assert not (tmp_path / "out.zip").exists()


def test_half_a_run_is_not_submitted(runs, probe_copy, tmp_path, ask, refused):
    """Rows left out by --limit, a missing file, other data, and a run without the tasks."""
    flags = ["--submit", tmp_path / "x.zip"]
    refused([runs / "joint", *flags], "had --limit 10, but")
    refused([runs / "lpft", *flags], "the run has cfimdb")
    other = write_data(tmp_path / "data", {"dev": 17, "test": 8})
    refused([probe_copy, *flags, "--data_dir", other], "16 rows, but")
    (probe_copy / "predictions" / "sts-test-output.csv").unlink()
    refused([probe_copy, *flags], "sts-test-output.csv: no such file")
    other = write_data(tmp_path / "data", {"dev": 16, "test": 8}, seed=1)
    ask(runs / "probe", *flags, "--data_dir", other)  # of the same ids


def write_dev_predictions(run: Path, task: str, predictions: list) -> None:
    path = run / "predictions" / f"{task}-dev-output.csv"
    header, *rows = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [f"{row.split(' , ')[0]} , {p} " for row, p in zip(rows, predictions, strict=True)]
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def test_a_comparison_tells_differences_from_noise(tiny, data, probe_copy, ask):
    """Against McNemar's exact test; one task differs much, one a little, one not at all."""
    _, datasets = load_multitask(tiny, data, "dev")
    right, para, _ = (dataset.labels.tolist() for dataset in datasets)
    wrong = [(label + 1) % 5 for label in right]
    other = shutil.copytree(probe_copy, probe_copy.parent / "other")
    write_dev_predictions(probe_copy, "sst", right[:14] + wrong[14:])
    write_dev_predictions(other, "sst", wrong[:14] + right[14:])
    write_dev_predictions(probe_copy, "para", para)
    write_dev_predictions(other, "para", [1 - para[0], *para[1:]])
    out, err = ask(probe_copy, "--compare", other)
    sst, para, sts = out.splitlines()
    assert sst.startswith("sst accuracy, 16 rows: 0.8750 - 0.1250 = +0.7500, 95% interval +0.")
    p = 3 * stats.binomtest(14, 16).pvalue  # of three tasks, the smallest p counts three times
    assert float(sst.split("p ")[1].split(":")[0]) == pytest.approx(p, abs=0.006)
    assert sst.endswith(": significant")
    assert para.startswith("para accuracy, 16 rows: 1.0000 - 0.9375 = +0.0625, 95% interval +0.0")
    assert para.endswith("p 1.0000: not significant")
    assert sts.endswith("= +0.0000, 95% interval +0.0000 to +0.0000, p 1.0000: not significant")
    assert "neither covers the variance between seeds" in err
    assert "0.1250 - 0.8750 = -0.7500" in ask(other, "--compare", probe_copy)[0]


def test_runs_of_different_rows_are_not_compared(runs, probe_copy, tmp_path, ask, refused):
    probe = runs / "probe"
    refused([probe, "--compare", runs / "lpft"], "have no task in common")
    refused([runs / "simcse", "--compare", probe], "sts-dev-output.csv: no such file")
    refused([probe, "--compare", tmp_path], "not a run folder")
    edit_json(probe_copy / "config.json", "arguments", limit=10)
    expected = f"{probe_copy} had --limit 10 and {probe} had --limit None"
    refused([probe_copy, "--compare", probe], expected)
    edit_json(probe_copy / "config.json", "arguments", limit=10**6)  # above the sizes of the files
    ask(probe_copy, "--compare", probe)
    ask(probe_copy, "--submit", tmp_path / "a.zip")


BAD_FLAGS = {
    "--task sst": "--task has no effect by itself",
    "--text a --data_dir d": "--data_dir has no effect with --text",
    "--data f.csv --task sst": "needs --task NAME and --out FILE",
    "--text a --text b --text c": "one sentence, or the two of a pair",
    "--text a --submit b.zip": "not allowed with",
}


def test_bad_flags(refused):
    for flags, expected in BAD_FLAGS.items():
        refused(["x", *flags.split()], expected)


def test_folders_and_tasks_that_are_not_there(runs, probe_copy, data, tmp_path, refused):
    refused([tmp_path / "nowhere"], "not a run folder")
    refused([runs / "probe" / "best"], "best: not a run folder")
    refused([probe_copy], "without best/")
    flags = [runs / "probe", "--data", data / "ids-sst-dev.csv", "--out", tmp_path / "o.csv"]
    for name in ("cfimdb", "nli"):
        expected = f"--task {name}: the run has no head for it; it has sst, para, sts"
        refused([*flags, "--task", name], expected)
    refused([*flags, "--task", "para"], "sentence1", "ids-sst-dev.csv")
    assert not (tmp_path / "o.csv").exists()


def test_an_incomplete_record_is_refused(runs, probe_copy, refused):
    path = probe_copy / "config.json"
    for key in ("arguments", "hardware", "precision", "device", "batch_size", "limit"):
        config = read_json(runs / "probe/config.json")
        del (config if key in config else config["arguments"])[key]
        write_json(path, config)
        refused([probe_copy, "--compare", runs / "probe"], path)
