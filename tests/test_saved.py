"""evaluation.py: the figures of a run again, and what else can be asked of it."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_csv, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score

import classifier
import evaluation
import multitask_classifier
import scoring
import simcse
from checkpoint import UserError
from datasets import read
from saved import read_record
from tasks import TASKS, MultitaskBERT

ROOT = Path(__file__).resolve().parent.parent
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
    place = tmp_path_factory.mktemp("runs")
    rows = "".join(f"the film {i},a plot {i},the cat {i}\n" for i in range(12))
    (place / "nli.csv").write_text("sent0,sent1,hard_neg\n" + rows, encoding="utf-8")
    for name, (script, flags) in RUNS.items():
        flags = ["--model", tiny, "--data_dir", data, "--epochs", 2, "--batch_size", 7, *flags]
        if script is simcse:
            flags += ["--nli", place / "nli.csv"]
        script.main([str(flag) for flag in [*flags, "--run_dir", place / name]])
    return place


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def ask(run_script, *flags) -> tuple[str, str]:
    """What evaluation.py answers, and what it says beside."""
    code, out, err = run_script(evaluation, *flags)
    assert code == 0, err
    return out, err


def refused(run_script, *flags) -> str:
    """The one line with which evaluation.py refuses."""
    code, out, err = run_script(evaluation, *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("evaluation.py: error: ")
    return err


# ---------------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", RUNS)
def test_the_same_figures_to_the_bit(runs, run_script, name):
    out, err = ask(run_script, runs / name)
    answer, result = json.loads(out), result_of(runs / name)
    assert answer["dev"] == result["dev"]
    assert answer.get("overall") == result.get("overall")
    assert err.endswith("result.json: the same figures, to the bit\n")


def test_kept_embeddings_are_looked_up_again(tiny, data, tmp_path, run_script):
    """They were made in other batches, so that those computed anew would be others to rounding."""
    flags = ["--model", tiny, "--data_dir", data, "--epochs", 1, "--features", tmp_path / "kept"]
    for name, size in (("first", 3), ("second", 16)):
        more = ["--batch_size", size, "--run_dir", tmp_path / name]
        assert run_script(classifier, *flags, *more)[0] == 0
        out, _ = ask(run_script, tmp_path / name)
        assert json.loads(out)["dev"] == result_of(tmp_path / name)["dev"]


def test_in_a_process_of_its_own_elsewhere(runs, tmp_path):
    """From another folder, with another number of threads; --help imports nothing heavy."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import evaluation
try:
    evaluation.main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
assert not {{"torch", "numpy", "scipy", "sklearn", "tokenizers"}} & set(sys.modules)
import torch
torch.set_num_threads({torch.get_num_threads() + 1})
evaluation.main([{str(runs / "probe")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "--compare OTHER" in done.stdout
    assert done.stderr.endswith("result.json: the same figures, to the bit\n")


def test_data_from_another_folder(runs, tmp_path, run_script):
    other = write_data(tmp_path / "data", {"dev": 23, "test": 2}, seed=5)
    out, err = ask(run_script, runs / "finetune", "--data_dir", other)
    found = json.loads(out)["dev"]
    assert {task: figures["rows"] for task, figures in found.items()} == dict.fromkeys(found, 23)
    assert "result.json" not in err
    model = MultitaskBERT.from_pretrained(runs / "finetune")
    examples, _ = read(other / "ids-sst-dev.csv", TASKS["sst"])
    batch = model.tokenizer([e.texts[0] for e in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.predict_sentiment(batch["input_ids"], batch["attention_mask"])
    expected = accuracy_score([e.label for e in examples], logits.argmax(dim=-1))
    assert found["sst"]["accuracy"] == expected


def test_a_file_that_has_gone(runs, tmp_path, run_script):
    shutil.copytree(runs / "lpft", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["files"]["dev"]["cfimdb"] = str(tmp_path / "gone.csv")
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "gone.csv: no such file" in refused(run_script, tmp_path / "run")
    del config["files"]["dev"]["cfimdb"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "names no dev file of cfimdb; give --data_dir" in refused(run_script, tmp_path / "run")


# ---------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("name", ["probe", "finetune", "lpft"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_predictions_of_a_file_are_those_of_the_run(runs, data, tmp_path, run_script, name, split):
    """To the byte, with a label column and without; figures where there are labels."""
    for task in result_of(runs / name)["dev"]:
        path = data / TASKS[task].files.format({"dev": "dev", "test": "test-student"}[split])
        out = tmp_path / "new folder" / f"{task}.csv"
        flags = [runs / name, "--data", path, "--task", task, "--out", out]
        answer, _ = ask(run_script, *flags)
        expected = runs / name / "predictions" / f"{task}-{split}-output.csv"
        assert out.read_bytes() == expected.read_bytes()
        figures = {task: result_of(runs / name)["dev"][task]}
        assert (json.loads(answer) if answer else {}) == (figures if split == "dev" else {})
        assert "exists, and is not overwritten" in refused(run_script, *flags)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=30)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(texts, min_size=1, max_size=9))
def test_any_sentences_in_any_row(runs, tmp_path, rows):
    """Each gets the prediction that it gets alone, beside its id."""
    path, out = tmp_path / "any.csv", tmp_path / "out.csv"
    out.unlink(missing_ok=True)
    write_csv(path, ["id", "sentence"], [[f"r{i}", text] for i, text in enumerate(rows)])
    flags = ["--data", path, "--task", "sst", "--out", out]
    evaluation.main([str(flag) for flag in [runs / "finetune", *flags]])
    model = MultitaskBERT.from_pretrained(runs / "finetune")
    lines = ["id \t Predicted_Sentiment "]
    for i, text in enumerate(rows):
        batch = model.tokenizer([text], truncation=True, return_tensors="pt")
        logits = model.predict_sentiment(batch["input_ids"], batch["attention_mask"])
        lines.append(f"r{i} , {logits.argmax().item()} ")
    assert out.read_text(encoding="utf-8").split("\n") == [*lines, ""]


@pytest.mark.parametrize("name", ["finetune", "joint"])
def test_texts_and_their_probabilities(runs, run_script, name):
    """One text: the tasks of one sentence; two: those of pairs."""
    model = MultitaskBERT.from_pretrained(runs / name)
    precision = json.loads((runs / name / "config.json").read_text(encoding="utf-8"))["precision"]
    model.precision = getattr(torch, precision)
    batch = model.tokenizer(["a great film !"], return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    other = model.tokenizer(["the cat"], return_tensors="pt")
    pair = (ids, mask, other["input_ids"], other["attention_mask"])
    with torch.no_grad():
        classes = model.predict_sentiment(ids, mask)[0].softmax(dim=0).tolist()
        para = model.predict_paraphrase(*pair).sigmoid().item()
        sts = model.predict_similarity(*pair).item()

    out, _ = ask(run_script, runs / name, "--text", "a great film !")
    shown = ", ".join(f"{i}: {p:.4f}" for i, p in enumerate(classes))
    assert out == f"sst: {np.argmax(classes)} ({shown})\n"
    out, _ = ask(run_script, runs / name, "--text", "a great film !", "--text", "the cat")
    first, second = out.splitlines()
    assert first == f"para: {float(round(para))} (0: {1 - para:.4f}, 1: {para:.4f})"
    assert second.startswith("sts: ")
    assert float(second.removeprefix("sts: ")) == pytest.approx(sts, abs=1e-5)


def test_texts_that_do_not_fit(runs, run_script):
    _, err = ask(run_script, runs / "lpft", "--text", "film " * 100)
    assert "1 truncated to the model's limit" in err
    line = refused(run_script, runs / "lpft", "--text", "a", "--text", "b")
    assert "no task for 2 --text; it has cfimdb" in line
    assert "no task for 1 --text" in refused(run_script, runs / "simcse", "--text", "a")


# ---------------------------------------------------------------------------- the leaderboard


def test_what_is_submitted(runs, tmp_path, run_script):
    """The six files, to the byte; twice the same archive."""
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
    assert "a.zip: exists, and is not overwritten" in line


def test_a_limit_above_the_files_sizes_is_none(copy, runs, tmp_path, run_script):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["arguments"]["limit"] = 10**6
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ask(run_script, copy, "--submit", tmp_path / "a.zip")
    ask(run_script, copy, "--compare", runs / "probe")
    config["arguments"]["limit"] = 10
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refused(run_script, copy, "--compare", runs / "probe")
    assert f"{copy} had --limit 10, {runs / 'probe'} had --limit None" in line


def swap(text: str, one: str, other: str) -> str:
    assert one in text
    return text.replace(one, other, 1)


def reorder(text: str) -> str:
    header, *rows = text.splitlines(keepends=True)
    return "".join([header, *rows[::-1]])


FAULTS = {
    "order": ("sst-dev", reorder, "line 2: 'ids-sst-dev.csv-15 , "),
    "missing row": ("sts-test", lambda t: t[: t[:-1].rindex("\n") + 1], "7 rows, but"),
    "row too many": ("sts-test", lambda t: t + "x , 1.0 \n", "9 rows, but"),
    "cut off": ("para-dev", lambda t: t[:-1], "15 rows, but"),
    "foreign id": (
        "sst-dev",
        lambda t: swap(t, "csv-3 ,", "csv-x ,"),
        "line 5",
    ),
    "header": ("para-dev", lambda t: swap(t, "Predicted_Is", "Is"), "line 1: the header is"),
    "header of another task": (
        "para-dev",
        lambda t: swap(t, "Is_Paraphrase", "Similiary"),
        "line 1",
    ),
    "line ends": ("sst-test", lambda t: t.replace("\n", "\r\n"), "line 1: the header is"),
    "class": ("sst-dev", lambda t: swap(t, t.split(" , ")[1][0] + " \n", "5 \n"), "line 2: '5 '"),
    "class as a score": ("sst-dev", lambda t: t[:-2] + ".0 \n", "line 17"),
    "no rounded probability": ("para-test", lambda t: t.replace(".0 \n", ".4 \n"), "line 2"),
    "whole probability": ("para-test", lambda t: t.replace(".0 \n", " \n"), "line 2"),
    "not a number": ("sts-dev", lambda t: t[:-5] + "x \n", "line 17"),
    "infinite": ("sts-dev", lambda t: t[: t.rindex(" , ")] + " , inf \n", "line 17: 'inf '"),
    "no space at the end": ("sts-dev", lambda t: t[:-2] + "\n", "line 17"),
}


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """A copy of a run, for a test to break."""
    shutil.copytree(runs / "probe", tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "change", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_of_what_is_submitted(copy, tmp_path, run_script, name, change, expected):
    path = copy / "predictions" / f"{name}-output.csv"
    path.write_bytes(change(path.read_bytes().decode()).encode())
    line = refused(run_script, copy, "--submit", tmp_path / "out.zip")
    assert f"{path}" in line
    assert expected in line
    assert not (tmp_path / "out.zip").exists()


def test_submissions_of_half_a_run(runs, copy, tmp_path, run_script):
    """Rows left out by --limit, no file, other data, and a run without the tasks."""
    for name, expected in (("joint", "had --limit 10, but"), ("lpft", "names no dev file of sst")):
        assert expected in refused(run_script, runs / name, "--submit", tmp_path / "x.zip")
    other = write_data(tmp_path / "data", {"dev": 16, "test": 8}, seed=1)
    ask(run_script, copy, "--submit", tmp_path / "same ids.zip", "--data_dir", other)
    other = write_data(tmp_path / "more", {"dev": 17, "test": 8})
    line = refused(run_script, copy, "--submit", tmp_path / "x.zip", "--data_dir", other)
    assert "16 rows, but" in line
    (copy / "predictions" / "sts-test-output.csv").unlink()
    line = refused(run_script, copy, "--submit", tmp_path / "x.zip")
    assert "sts-test-output.csv: no predictions" in line


def test_predictions_that_lie_elsewhere(tiny, data, tmp_path, run_script):
    out = tmp_path / "mine.csv"
    flags = ["--model", tiny, "--data_dir", data, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_script(multitask_classifier, *flags, "--para_dev_out", out)[0] == 0
    ask(run_script, tmp_path / "run", "--submit", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.read("predictions/para-dev-output.csv") == out.read_bytes()


# ---------------------------------------------------------------------------- comparing


def rewrite(run: Path, task: str, predictions: list) -> None:
    """Other dev predictions for a run."""
    path = run / "predictions" / f"{task}-dev-output.csv"
    header, *rows = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [f"{row.split(' , ')[0]} , {p} " for row, p in zip(rows, predictions, strict=True)]
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def test_a_comparison_tells_more_than_noise_from_noise(runs, data, copy, run_script):
    """Against McNemar's exact test; one task differs much, one a little, one not at all."""
    gold = {
        task: [e.label for e in read(data / TASKS[task].files.format("dev"), TASKS[task])[0]]
        for task in ("sst", "para", "sts")
    }
    other = copy.parent / "other"
    shutil.copytree(copy, other)
    right = [int(label) for label in gold["sst"]]
    wrong = [(label + 1) % 5 for label in right]
    rewrite(copy, "sst", right[:14] + wrong[14:])
    rewrite(other, "sst", wrong[:14] + right[14:])
    rewrite(copy, "para", [float(label) for label in gold["para"]])
    rewrite(other, "para", [1.0 - gold["para"][0], *gold["para"][1:]])
    out, err = ask(run_script, copy, "--compare", other)
    sst, para, sts = out.splitlines()
    assert sst.startswith("sst accuracy, 16 rows: 0.8750 - 0.1250 = +0.7500, 95% interval +0.")
    p = 3 * stats.binomtest(14, 16).pvalue  # of three tasks, the smallest p counts thrice
    assert float(sst.split("p ")[1].split(":")[0]) == pytest.approx(p, abs=0.006)
    assert sst.endswith(": more than noise")
    assert para.startswith("para accuracy, 16 rows: 1.0000 - 0.9375 = +0.0625, 95% interval +0.0")
    assert para.endswith("p 1.0000: no more than noise")
    assert sts.endswith("= +0.0000, 95% interval +0.0000 to +0.0000, p 1.0000: no more than noise")
    assert "what another seed would change is in neither" in err
    out, _ = ask(run_script, other, "--compare", copy)
    assert "0.1250 - 0.8750 = -0.7500" in out


def test_comparisons_that_cannot_be(runs, tmp_path, run_script):
    line = refused(run_script, runs / "probe", "--compare", runs / "lpft")
    assert "have no task in common" in line
    line = refused(run_script, runs / "probe", "--compare", runs / "joint")
    assert "they predicted other rows" in line
    line = refused(run_script, runs / "simcse", "--compare", runs / "probe")
    assert "sts-dev-output.csv: no predictions" in line
    assert "no run folder" in refused(run_script, runs / "probe", "--compare", tmp_path)


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "the following arguments are required: run"),
        (["x", "--task", "sst"], "--task does nothing by itself"),
        (["x", "--text", "a", "--data_dir", "d"], "--data_dir does nothing with --text"),
        (["x", "--export", "onnx", "--device", "cpu"], "--device does nothing with --export"),
        (["x", "--data", "f.csv", "--task", "sst"], "needs --task NAME and --out FILE"),
        (["x", "--text", "a", "--text", "b", "--text", "c"], "one sentence, or the two of a pair"),
        (["x", "--text", "a", "--submit", "b.zip"], "not allowed with"),
        (["x", "--export", "tflite"], "--export"),
    ],
)
def test_bad_flags(run_script, flags, expected):
    assert expected in refused(run_script, *flags)


def test_folders_and_tasks_that_are_not_there(runs, data, tmp_path, run_script):
    assert "no run folder" in refused(run_script, tmp_path / "nowhere")
    assert "best: a model, not a run" in refused(run_script, runs / "probe" / "best")
    flags = ["--data", data / "ids-sst-dev.csv", "--out", tmp_path / "o.csv"]
    for name in ("cfimdb", "nli"):
        line = refused(run_script, runs / "probe", *flags, "--task", name)
        assert f"--task {name}: the run has no head for it; there are sst, para, sts" in line
    line = refused(run_script, runs / "probe", *flags, "--task", "para")
    assert "no column 'sentence1'" in line
    assert not (tmp_path / "o.csv").exists()
    shutil.copytree(runs / "probe", tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    assert "has no best/ yet" in refused(run_script, tmp_path / "run")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_record_is_refused(copy, data):
    """Anything in any place of config.json: a record, or one line."""
    path = copy / "config.json"
    sound = copy / "sound.json"
    if not sound.exists():
        shutil.copy(path, sound)
    config = json.loads(sound.read_text(encoding="utf-8"))
    keys = [("arguments",), ("files",), ("precision",), ("device",), ("hardware",)]
    keys += [("arguments", "batch_size"), ("arguments", "limit"), ("files", "dev")]
    *parents, last = data.draw(st.sampled_from(keys))
    inner = config
    for key in parents:
        inner = inner[key]
    inner[last] = data.draw(json_values)
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        record = read_record(copy)
    except UserError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    else:
        assert record.arguments["batch_size"] > 0
        assert record.arguments["limit"] is None or record.arguments["limit"] > 0
        assert record.threads > 0


def test_what_the_file_was_for_before_is_importable_from_it():
    assert evaluation.predict is scoring.predict
    assert evaluation.compare is scoring.compare
    with pytest.raises(AttributeError, match="no_such"):
        evaluation.no_such  # noqa: B018
