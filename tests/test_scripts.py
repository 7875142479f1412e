"""The training scripts: each thing a user may get wrong is one line, and nothing is written."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_csv
from huggingface_hub import constants
from model_files import edit_json, edit_tensors, names

import classifier
import multitask_classifier
import simcse
from engine.checkpoint import read_json

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [classifier, multitask_classifier, simcse]


def refused(run_script, module, flags, *expected) -> str:
    """Run a script that must fail: exit code 2, one line on standard error that has `expected`."""
    code, _, err = run_script(module, *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith(f"{module.__name__}.py: error: ")
    for text in expected:
        assert str(text) in err
    return err


@pytest.fixture
def job(tiny, data, tmp_path) -> list:
    """Flags of a job that would run, over copies of model and data that a test may break."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    nli = "sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8
    (tmp_path / "data" / "nli_for_simcse.csv").write_text(nli, encoding="utf-8")
    flags = ["--model", tmp_path / "model", "--data_dir", tmp_path / "data"]
    return [*flags, "--run_dir", tmp_path / "run", "--epochs", 1]


# ---------------------------------------------------------------------------- flags


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "--lr": ["0", "-1", "nan", "1e39"],
        "--batch_size": ["0", "-8", "2.5"],
        "--hidden_dropout_prob": ["1", "-0.1"],
        "--weight_decay": ["-1", "inf"],
        "--clip": ["-1"],
        "--warmup": ["1"],
        "--accumulate": ["0"],
        "--limit": ["0"],
        "--seed": ["-1", "9" * 20],
        "--patience": ["-1"],
        "--eval_every": ["-1"],
        "--save_every": ["10h"],
        "--schedule": ["cosine"],
        "--precision": ["fp16"],
        "--device": ["tpu"],
    }.items(),
)
def test_a_value_out_of_range_names_its_flag(run_script, script, flag, values):
    for value in values:
        refused(run_script, script, [flag, value], f"argument {flag}: ", value)


SUPERVISED = [
    (["--option", "both"], "--option"),
    (["--head_lr", "0"], "--head_lr"),
    (["--option", "pretrain", "--lr", "1e-3", "--head_lr", "1e-3"], "give one of them"),
]
MULTITASK = [
    (["--tasks", "sst,nli"], "--tasks nli: no such task; there are sst, cfimdb, para, sts"),
    (["--tasks", "sst,sst"], "name each task once"),
    (["--tasks", "sst", "--para_decoder", "dot"], "--para_decoder: para is not in --tasks sst"),
    (["--tasks", "sst", "--sts_train", "x"], "--sts_train: sts is not in --tasks sst"),
    (["--no_test", "--sts_test", "x"], "--sts_test contradicts --no_test"),
    (["--no_test", "--sst_test_out", "x"], "--sst_test_out contradicts --no_test"),
    (["--sts_decoder", "max"], "--sts_decoder"),
    (["--sampling", "random"], "--sampling"),
]
CASES = [(script, case) for script in TRAINING[:2] for case in SUPERVISED]
CASES += [(multitask_classifier, case) for case in MULTITASK]
CASES += [(s, (["--use_gpu", "--device", "cpu"], "--use_gpu contradicts")) for s in TRAINING]
CASES += [(classifier, (["--no_test", "--test", "x"], "--test contradicts --no_test"))]
CASES += [(classifier, (["--task", "sts"], "--task"))]


@pytest.mark.parametrize(("script", "case"), CASES, ids=lambda value: str(value)[:50])
def test_flags_that_contradict_each_other_are_refused(run_script, script, case):
    refused(run_script, script, *case)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sts_decoder", "linear"], ["'linear' of sts"]),
        (["--pair_encoding", "joint", "--sts_decoder", "dot"], ["'dot' of sts"]),
        (["--run_dir", "n" * 300], ["--run_dir", "File name too long"]),
    ],
)
def test_flags_that_do_not_fit_the_model_or_the_disk_are_refused(
    run_script, job, tmp_path, flags, expected
):
    before = sorted(tmp_path.rglob("*"))
    refused(run_script, multitask_classifier, [*job, *flags], *expected)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.__name__)
def test_use_gpu_without_a_gpu(run_script, job, script):
    refused(run_script, script, [*job, "--use_gpu"], "--use_gpu", "finds no such device")


# ---------------------------------------------------------------------------- files and folders


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


SST = b"\tid\tsentence\tsentiment\n0\ta\tfilm\t"
NAN_BIAS = {"pooler.dense.bias": torch.full((32,), math.nan)}
# What is wrong -> how to make it so in the folder of a job, and what the message says.
FAULTS = {
    "no data": (lambda d: shutil.rmtree(d / "data"), "ids-sst-train.csv: no such file"),
    "no dev file": (lambda d: (d / "data/sts-dev.csv").unlink(), "sts-dev.csv: no such file"),
    "label out of range": (
        lambda d: replace(d / "data/ids-sst-dev.csv", SST + b"5\n"),
        "ids-sst-dev.csv, line 2: sentiment is '5'; expected a whole number from 0 to 4",
    ),
    "config of another width": (
        lambda d: edit_json(d / "model/config.json", intermediate_size=65),
        "encoder.layer.0.intermediate.dense.bias has shape (64,)",
    ),
    "weight is NaN": (
        lambda d: edit_tensors(d / "model/model.safetensors", **NAN_BIAS),
        "model.safetensors: pooler.dense.bias contains NaN",
    ),
    "tokenizer of another model": (
        lambda d: append(d / "model/vocab.txt", "extra\n"),
        "they are not of one model",
    ),
    "no weights": (lambda d: (d / "model/model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda d: (d / "model/vocab.txt").unlink(), "no tokenizer"),
    "model is a file": (
        lambda d: (shutil.rmtree(d / "model"), replace(d / "model", b"x")),
        "a file; give the folder",
    ),
    "run folder in use": (
        lambda d: ((d / "run").mkdir(), replace(d / "run" / "notes.txt", b"mine")),
        "run: in use",
    ),
    "run folder is a file": (lambda d: replace(d / "run", b"mine"), "run: is a file"),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_file_is_named_and_nothing_is_written(
    run_script, job, tmp_path, fault, expected
):
    fault(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refused(run_script, multitask_classifier, job, expected)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", [classifier, simcse], ids=lambda script: script.__name__)
def test_a_broken_row_is_named_by_the_other_scripts_too(run_script, job, tmp_path, script):
    name = "nli_for_simcse.csv" if script is simcse else "ids-sst-test-student.csv"
    append(tmp_path / "data" / name, '"half a row\n')
    refused(run_script, script, job, tmp_path / "data" / name, "line")
    assert names(tmp_path) == ["data", "model"]


def test_an_unknown_model_without_network(run_script, job, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    expected = ["--model bert-base-uncased: ", "--model all-MiniLM-L6-v2"]
    for script in TRAINING:
        refused(run_script, script, [*job, "--model", "bert-base-uncased"], *expected)
    assert not (tmp_path / "run").exists()


def test_a_real_process_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "classifier.py"), "--data_dir", "nowhere"]
    command += ["--model", "all-MiniLM-L6-v2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr == (
        "classifier.py: error: nowhere/ids-sst-train.csv: no such file: fetch the course's data"
        " with ./setup.sh --data, or try the sample with --data_dir data/sample\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- output files


def test_an_existing_prediction_file_is_not_overwritten(run_script, job, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_bytes(b"precious")
    refused(run_script, multitask_classifier, [*job, "--sts_dev_out", mine], "mine.csv: exists")
    refused(run_script, classifier, [*job, "--dev_out", mine], "mine.csv: exists")
    refused(run_script, multitask_classifier, [*job, "--sts_dev_out", mine / "x.csv"], "mine.csv")
    assert mine.read_bytes() == b"precious"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("new.csv", "new.csv"),
        ("new.csv", "./other/../new.csv"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("run", None),
        ("run/best", None),
        ("run/config.json", None),
        ("run/predictions/para-dev-output.csv", None),
        (".", None),
    ],
)
def test_output_files_do_not_clash_with_each_other_or_the_run(
    run_script, job, tmp_path, first, second
):
    flags = ["--sst_dev_out", tmp_path / first]
    if second is not None:
        flags += ["--para_test_out", f"{tmp_path}/{second}"]
    refused(run_script, multitask_classifier, [*job, *flags], tmp_path)
    assert names(tmp_path) == ["data", "model"]


def test_files_are_read_and_written_where_the_user_says(run_script, job, tmp_path):
    out = tmp_path / "elsewhere" / "sst.csv"
    flags = ["--sst_dev_out", out, "--sst_train", tmp_path / "data" / "ids-sst-dev.csv"]
    code, _, err = run_script(multitask_classifier, *job, *flags)
    assert code == 0, err
    assert len(out.read_text(encoding="utf-8").splitlines()) == 17
    config, result = (read_json(tmp_path / "run" / f"{n}.json") for n in ("config", "result"))
    assert config["rows"]["train"]["sst"] == 16
    assert config["files"]["train"]["sst"] == str(tmp_path / "data" / "ids-sst-dev.csv")
    assert result["predictions"]["sst_dev"] == str(out)
    assert not (tmp_path / "run/predictions/sst-dev-output.csv").exists()


def test_without_test_files(run_script, job, tmp_path):
    """With --no_test they need not exist, and nothing is predicted for them."""
    for path in (tmp_path / "data").glob("*test*"):
        path.unlink()
    code, _, err = run_script(multitask_classifier, *job, "--no_test")
    assert code == 0, err
    expected = [f"{task}-dev-output.csv" for task in ("para", "sst", "sts")]
    assert names(tmp_path / "run" / "predictions") == expected
    result = read_json(tmp_path / "run" / "result.json")
    assert sorted(result["predictions"]) == ["para_dev", "sst_dev", "sts_dev"]


# ---------------------------------------------------------------------------- odd data, imports


def test_long_empty_and_unlabelled_sentences_and_a_limit(run_script, job, tmp_path):
    rows = [["a", "film " * 4000, 1], ["b", "", 3], ["c", "film", ""], ["d", "film", 0]]
    write_csv(tmp_path / "data/ids-sst-train.csv", ["id", "sentence", "sentiment"], rows)
    code, out, err = run_script(multitask_classifier, *job, "--limit", 3)
    assert code == 0, err
    line = next(line for line in out.splitlines() if "ids-sst-train.csv" in line)
    assert "3 rows" in line
    assert "1 without a label" in line
    assert "1 truncated to the model's limit" in line
    config = read_json(tmp_path / "run" / "config.json")
    assert {n for rows in config["rows"].values() for n in rows.values()} == {3}


def test_training_imports_no_compiler(tiny, data, tmp_path):
    """PyTorch's compiler takes as long to import as PyTorch; some calls would do so unasked."""
    flags = ["--model", tiny, "--data_dir", data, "--run_dir", tmp_path / "run", "--limit", 8]
    flags += ["--epochs", 1, "--option", "finetune"]
    code = f"""
import json, sys
import classifier
classifier.main(json.loads({json.dumps(json.dumps([str(flag) for flag in flags]))}))
assert "torch" in sys.modules and not {{"torch._dynamo", "sympy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()
