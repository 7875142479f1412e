"""The command line: quick help, and one line for each thing that a user may get wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import classifier
import multitask_classifier

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"classifier": classifier, "multitask_classifier": multitask_classifier}


def refused(run_script, module, flags, *expected) -> str:
    """Run a script that must fail: exit code 2, one line on standard error that has `expected`."""
    code, _, err = run_script(module, *flags)
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{Path(sys.argv[0]).name}: error: ") or "error: " in lines[0]
    for text in expected:
        assert str(text) in lines[0]
    return lines[0]


@pytest.mark.parametrize("name", [*SCRIPTS, "simcse"])
def test_help_imports_nothing_heavy(name):
    code = f"""
import sys
import {name}
try:
    {name}.main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
assert not {{"torch", "numpy", "scipy", "sklearn", "tokenizers"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_training_loads_no_compiler(tiny, data, tmp_path):
    """PyTorch's takes as long to import as PyTorch; some of its calls would do that unasked."""
    code = f"""
import sys
import classifier
given = ["--model", {str(tiny)!r}, "--data_dir", {str(data)!r}, "--epochs", "1", "--run_dir"]
classifier.main([*given, {str(tmp_path / "run")!r}, "--option", "finetune"])
assert "torch" in sys.modules and not {{"torch._dynamo", "sympy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_real_process_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "classifier.py")),
            *("--data_dir", "nowhere", "--model", "all-MiniLM-L6-v2"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "classifier.py: error: nowhere/ids-sst-train.csv: no such file: fetch the course's data"
        " with ./setup.sh --data, or try the sample with --data_dir data/sample"
    ]
    assert list(tmp_path.iterdir()) == []


BAD_FLAGS = [
    (["--lr", "0"], "--lr: 0 is out of range; expected a number above 0"),
    (["--lr", "-1e-3"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "1e39"], "--lr: 1e39 is out of range; expected a number above 0 and at most 1e+06"),
    (["--run_dir", "n" * 300], "cannot be used (File name too long)"),
    (["--run_dir", "caf\udce9"], "is not UTF-8; rename it"),
    (["--lr", "fast"], "'fast' is not a number"),
    (["--epochs", "0"], "--epochs: 0 is out of range; expected a whole number at least 1"),
    (["--seed", "1" * 400], "--seed"),
    (["--epochs", "1.5"], "'1.5' is not a whole number"),
    (["--batch_size", "-8"], "--batch_size"),
    (["--hidden_dropout_prob", "1"], "expected a number at least 0 and below 1"),
    (["--hidden_dropout_prob", "-0.1"], "--hidden_dropout_prob"),
    (["--head_lr", "0"], "--head_lr"),
    (["--weight_decay", "-1"], "--weight_decay"),
    (["--clip", "-1"], "--clip"),
    (["--warmup", "1"], "--warmup"),
    (["--accumulate", "0"], "--accumulate"),
    (["--limit", "0"], "--limit"),
    (["--seed", "-1"], "--seed"),
    (["--patience", "-1"], "--patience"),
    (["--eval_every", "-1"], "--eval_every"),
    (["--option", "both"], "--option"),
    (["--pooling", "max"], "--pooling"),
    (["--precision", "fp16"], "--precision"),
    (["--no_such_flag"], "--no_such_flag"),
    (["--use_gpu", "--device", "cpu"], "--use_gpu contradicts --device cpu"),
    (["--option", "pretrain", "--lr", "1e-3", "--head_lr", "1e-3"], "give one of them"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flags", "expected"), BAD_FLAGS, ids=lambda v: str(v)[:40])
def test_bad_flags(run_script, script, flags, expected):
    refused(run_script, SCRIPTS[script], flags, expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tasks", "sst,nli"], "--tasks nli: no such task; there are sst, cfimdb, para, sts"),
        (["--tasks", "sst,sst"], "name each task once"),
        (["--pair_encoding", "joint", "--sts_decoder", "dot"], "leave out --*_decoder"),
        (["--sts_decoder", "linear"], "--sts_decoder"),
        (["--tasks", "sst", "--para_decoder", "dot"], "--para_decoder: para is not in --tasks sst"),
        (["--tasks", "sst", "--sts_train", "x"], "--sts_train: sts is not in --tasks sst"),
        (["--sampling", "random"], "--sampling"),
        (["--no_test", "--sts_test", "x"], "--sts_test contradicts --no_test"),
        (["--no_test", "--sst_test_out", "x"], "--sst_test_out contradicts --no_test"),
    ],
)
def test_bad_flags_of_the_multitask_script(run_script, flags, expected):
    refused(run_script, multitask_classifier, flags, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_use_gpu_without_a_gpu(run_script, tiny, data):
    flags = ["--use_gpu", "--model", tiny, "--data_dir", data]
    refused(run_script, multitask_classifier, flags, "--use_gpu", "finds no such device")


@pytest.fixture
def job(tiny, data, tmp_path):
    """Flags of a job that would run, over copies of the model and data that a test may break."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    flags = ["--model", tmp_path / "model", "--data_dir", tmp_path / "data"]
    return [*flags, "--run_dir", tmp_path / "run"]


def overwrite(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(path: Path, **values) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    overwrite(path, json.dumps({**config, **values}))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, path)


FAULTS = {
    "no data folder": (lambda d: shutil.rmtree(d / "data"), "ids-sst-train.csv: no such file"),
    "dev file missing": (lambda d: (d / "data/sts-dev.csv").unlink(), "sts-dev.csv: no such file"),
    "test file empty": (
        lambda d: overwrite(d / "data/quora-test-student.csv", ""),
        "quora-test-student.csv: empty",
    ),
    "commas": (
        lambda d: overwrite(d / "data/sts-train.csv", ",id,sentence1\n0,a,b\n"),
        "sts-train.csv, line 1: no tab",
    ),
    "label out of range": (
        lambda d: overwrite(
            d / "data/ids-sst-dev.csv", "\tid\tsentence\tsentiment\n0\ta\tfilm\t5\n"
        ),
        "ids-sst-dev.csv, line 2: sentiment is '5'; expected a whole number from 0 to 4",
    ),
    "not utf-8": (
        lambda d: overwrite(
            d / "data/ids-sst-dev.csv", b"\tid\tsentence\tsentiment\n0\ta\tfi\xfflm\t1\n"
        ),
        "ids-sst-dev.csv, line 2: not UTF-8",
    ),
    "no config": (lambda d: (d / "model/config.json").unlink(), "config.json: missing"),
    "foreign config": (
        lambda d: change_config(d / "model/config.json", model_type="roberta"),
        "config.json: model_type is 'roberta'",
    ),
    "config not json": (
        lambda d: overwrite(d / "model/config.json", "{"),
        "config.json: not valid JSON",
    ),
    "config of an absurd width": (
        lambda d: change_config(d / "model/config.json", intermediate_size=10**20),
        "config.json: intermediate_size is 100000000000000000000, expected",
    ),
    "config beyond the memory": (
        lambda d: change_config(d / "model/config.json", max_position_embeddings=10**8),
        "embeddings.position_embeddings.weight has shape (48, 32)",
    ),
    "room for two tokens": (
        lambda d: change_config(d / "model/config.json", max_position_embeddings=2),
        "its limit is 2 tokens",
    ),
    "config of another width": (
        lambda d: change_config(d / "model/config.json", intermediate_size=65),
        "encoder.layer.0.intermediate.dense.bias has shape (64,)",
    ),
    "truncated weights": (
        lambda d: truncate(d / "model/model.safetensors"),
        "model.safetensors: not a whole weight file",
    ),
    "missing tensor": (
        lambda d: drop_tensor(d / "model/model.safetensors"),
        "encoder.layer.1.output.dense.bias is missing",
    ),
    "tokenizer of another model": (
        lambda d: overwrite(
            d / "model/vocab.txt",
            (d / "model/vocab.txt").read_text(encoding="utf-8") + "extra\n",
        ),
        "they are not of one model",
    ),
    "no weights": (lambda d: (d / "model/model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda d: (d / "model/vocab.txt").unlink(), "no tokenizer"),
    "model is a file": (
        lambda d: (shutil.rmtree(d / "model"), overwrite(d / "model", "x")),
        "a file; give the folder",
    ),
    "used run folder": (
        lambda d: ((d / "run").mkdir(), overwrite(d / "run" / "notes.txt", "mine")),
        "run: already in use",
    ),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_of_files_and_folders(run_script, job, tmp_path, fault, expected):
    fault(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refused(run_script, multitask_classifier, job, expected)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_an_unknown_hub_id_without_network(run_script, job, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    job[1] = "bert-base-uncased"
    line = refused(run_script, multitask_classifier, job, "bert-base-uncased")
    assert "--model all-MiniLM-L6-v2" in line
    job[1] = "runs/typo"
    refused(run_script, multitask_classifier, job, "--model runs/typo: no such folder")
    job[1] = "not//valid"
    refused(run_script, multitask_classifier, job, "neither a folder nor a valid hub id")


def test_an_existing_prediction_file_is_not_overwritten(run_script, job, tmp_path):
    mine = tmp_path / "mine.csv"
    overwrite(mine, "precious")
    refused(run_script, multitask_classifier, [*job, "--sts_dev_out", mine], "mine.csv: exists")
    assert mine.read_text(encoding="utf-8") == "precious"
    new = tmp_path / "new.csv"
    flags = [*job, "--sts_dev_out", new, "--para_dev_out", new]
    refused(run_script, multitask_classifier, flags, "new.csv: clashes with another output")
    flags = [*job, "--sts_dev_out", mine / "x.csv"]
    refused(run_script, multitask_classifier, flags, "mine.csv is not a folder")


def test_prediction_files_do_not_clash_with_the_run_or_each_other(run_script, job, tmp_path):
    run = tmp_path / "run"
    for clash in (run, run / "best", run / "config.json", run / "predictions/para-dev-output.csv"):
        refused(run_script, multitask_classifier, [*job, "--sst_dev_out", clash], "clashes with")
    flags = ["--sst_dev_out", tmp_path / "a", "--sst_test_out", tmp_path / "a" / "b"]
    refused(run_script, multitask_classifier, [*job, *flags], "clashes with another output")
    flags = ["--sst_dev_out", tmp_path / ("n" * 300)]
    refused(run_script, multitask_classifier, [*job, *flags], "File name too long")


def test_a_reader_of_standard_output_that_leaves_ends_the_script_quietly(job):
    command = [sys.executable, str(ROOT / "multitask_classifier.py"), *map(str, job)]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    script.stdout.close()
    err = script.communicate()[1].decode()
    assert "Traceback" not in err
    assert script.returncode == 141


def test_prediction_files_go_where_the_user_says(run_script, job, tmp_path):
    out = tmp_path / "elsewhere" / "sst.csv"
    flags = [*job, "--epochs", 1, "--sst_dev_out", out]
    flags += ["--sst_train", tmp_path / "data" / "ids-sst-dev.csv"]
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    assert len(out.read_text(encoding="utf-8").splitlines()) == 17
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert config["rows"]["train"]["sst"] == 16
    assert not (tmp_path / "run/predictions/sst-dev-output.csv").exists()


def test_without_the_test_files(run_script, job, tmp_path):
    """With --no_test they need not be there, and nothing is predicted for them."""
    for path in (tmp_path / "data").glob("*test*"):
        path.unlink()
    code, _, err = run_script(multitask_classifier, *job, "--epochs", 1, "--no_test")
    assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "run/predictions").iterdir())
    assert names == [f"{task}-dev-output.csv" for task in ("para", "sst", "sts")]
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert sorted(result["predictions"]) == ["para_dev", "sst_dev", "sts_dev"]


def test_limit_long_empty_and_unlabelled_sentences(run_script, job, tmp_path):
    rows = ["0\ta\t" + "film " * 4000 + "\t1", "1\tb\t\t3", "2\tc\tfilm\t", "3\td\tfilm\t0"]
    overwrite(
        tmp_path / "data/ids-sst-train.csv",
        "\tid\tsentence\tsentiment\n" + "\n".join(rows) + "\n",
    )
    code, out, err = run_script(multitask_classifier, *job, "--limit", 3, "--epochs", 1)
    assert code == 0, err
    line = next(line for line in out.splitlines() if "ids-sst-train.csv" in line)
    assert line.endswith("3 rows, 1 without a label left out, 1 truncated to the model's limit")
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert {n for rows in config["rows"].values() for n in rows.values()} == {3}
