"""The training scripts: each thing a user may get wrong is one line, and nothing is written."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import quick_run
from model_files import edit_json, edit_tensors, names

import classifier
import multitask_classifier
import simcse
from engine.checkpoint import read_json
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [classifier, multitask_classifier, simcse]


@pytest.fixture
def refused(run_script):
    """`refused(script, flags, *expected)` must be exit code 2 and one line with all `expected`."""

    def check(script, flags, *expected):
        code, _, err = run_script(script, *flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith(f"{script.__name__}.py: error: ")
        assert all(str(text) in err for text in expected), err

    return check


@pytest.fixture
def job(tiny, data, tmp_path):
    """Flags of a job that would run, over copies of model and data that a test may break."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    nli = "sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8
    (tmp_path / "data" / "nli_for_simcse.csv").write_text(nli, encoding="utf-8")
    flags = ["--model", tmp_path / "model", "--data_dir", tmp_path / "data"]
    return [*flags, "--run_dir", tmp_path / "run", "--epochs", 1]


OUT_OF_RANGE = {"--lr": ["nan", "1e39"], "--batch_size": ["0", "2.5"], "--limit": ["0"]}
OUT_OF_RANGE |= {"--hidden_dropout_prob": ["1", "-0.1"], "--weight_decay": ["-1", "inf"]}
OUT_OF_RANGE |= {"--clip": ["-1", "much"], "--warmup": ["-1"], "--accumulate": ["0"]}
OUT_OF_RANGE |= {"--seed": ["-1", "9" * 20], "--patience": ["-1"], "--eval_every": ["-1"]}
OUT_OF_RANGE |= {"--schedule": ["cosine"], "--precision": ["fp16"], "--device": ["tpu"]}
WRONG = {
    "--lr 0": "argument --lr: '0' is not a number above 0 and at most 1e+06",
    "--warmup 1": "argument --warmup: '1' is not a number at least 0 and below 1",
    f"--epochs {'1' * 5000}": "is not a whole number",
    "--save_every 10h": "'10h' is neither steps (500) nor minutes (10m)",
    "--no_such_flag": "--no_such_flag",
    "--epoch 1": "--epoch",  # no abbreviations: what they mean would change
    "--epochs": "argument --epochs: expected one argument (--help lists the flags)",
    "--pooling max": "--pooling: invalid choice",
    "--run_dir caf\udce9": "is not UTF-8; rename it",
    "--use_gpu --device cpu": "--use_gpu contradicts --device cpu",
    "--final_only --patience 1": "--patience contradicts --final_only",
}


@pytest.mark.parametrize("script", TRAINING)
def test_a_wrong_flag_or_value_is_named(refused, run_script, monkeypatch, script):
    """Of several processes, which have the same command line, one reports it."""
    for flag, values in OUT_OF_RANGE.items():
        for value in values:
            refused(script, [flag, value], f"argument {flag}: ", value)
    for flags, expected in WRONG.items():
        refused(script, flags.split(), expected)
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over from another program
    monkeypatch.setenv("RANK", "1")
    refused(script, ["--epochs"], "--epochs")
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's: process 0 says it
    assert run_script(script, "--epochs") == (2, "", "")


def test_flags_may_stand_in_a_file(tmp_path, refused):
    """With comments; what follows it wins."""
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# measured on ...\n--epochs 5  # not 3\n\n--run_dir 'my run' --lr 1e-4\n")
    args = multitask_classifier.parse_args([f"@{recipe}", "--lr", "2e-4"])
    assert (args.epochs, args.run_dir, args.lr) == (5, Path("my run"), 2e-4)
    wrong = {
        b"epochs 5": "'epochs 5': not a flag",
        b"--epochz 5": "unrecognized arguments: --epochz 5",
        b"--model 'a": "No closing quotation",
        b"--run_dir x @%s" % bytes(recipe): "not a flag",
        b"--model caf\xe9": f"@{recipe}: not a text file in UTF-8",
    }
    for content, expected in wrong.items():
        recipe.write_bytes(content)
        refused(multitask_classifier, [f"@{recipe}"], expected)
    missing = f"@{tmp_path / 'none.txt'}"
    refused(multitask_classifier, [missing], f"{missing}: no such file; see recipes/")


def test_recipes_are_valid_and_that_of_the_paper_is_the_default():
    recipes = {path.stem: path for path in Path("recipes").glob("*.txt")}
    parsed = {n: vars(multitask_classifier.parse_args([f"@{p}"])) for n, p in recipes.items()}
    assert parsed["best"]["para_encoding"] == parsed["best-bert-base"]["para_encoding"] == "joint"
    default = vars(multitask_classifier.parse_args(["--option", "finetune"]))
    changed = {flag for flag in default if default[flag] != parsed["paper"][flag]}
    assert changed <= {"run_dir", "para_decoder", "sts_decoder"}  # named after the time; "dot"
    assert {TASKS[task].head for task in ("para", "sts")} == {parsed["paper"]["sts_decoder"]}


SUPERVISED = {
    "--option both": "--option",
    "--head_lr 0": "--head_lr",
    "--option pretrain --lr 1e-3 --head_lr 1e-3": "give one of them",
    "--option finetune --probe_epochs 3": "--probe_epochs is for --option lpft",
    "--option lpft --final_only": "needs --probe_epochs",
}
CONTRADICTIONS = {
    simcse: {
        "--temperature 0": "--temperature: '0' is not a number above 0",
        "--mode unsupervised --hard_negative_weight 2": "no hard negatives",
        "--batch_size 1": "two rows per batch",
        "--limit 1": "two rows per batch",
    },
    classifier: {
        **SUPERVISED,
        "--no_test --test x": "--test contradicts --no_test",
        "--task sts": "--task",
    },
    multitask_classifier: {
        **SUPERVISED,
        "--tasks sst,nli": "nli: no such task; there are sst, cfimdb, para, sts",
        "--tasks sst,sst": "name each task once",
        "--tasks sst --para_decoder dot": "--para_decoder: para is not in --tasks sst",
        "--no_test --sts_test x": "--sts_test contradicts --no_test",
        "--no_test --sst_test_out x": "--sst_test_out contradicts --no_test",
        "--sts_decoder max": "--sts_decoder",
        "--sampling random": "--sampling",
        "--option finetune --leave_out nli": "--leave_out nli: not in --tasks",
        "--leave_out sst": "--leave_out is for training BERT",
        "--surgery pcgrad": "--surgery is for training BERT",
        "--measure_conflict 5": "--measure_conflict is for training BERT",
        "--option finetune --conflict_rows 9": "--conflict_rows needs --measure_conflict N",
        "--option lpft --tasks sst --measure_conflict 9": "needs two tasks or more",
        "--option finetune --surgery sum --sampling annealed": "--sampling roundrobin",
    },
}


@pytest.mark.parametrize("script", CONTRADICTIONS)
def test_flags_that_contradict_each_other_or_have_no_effect_are_refused(refused, script):
    for flags, expected in CONTRADICTIONS[script].items():
        refused(script, flags.split(), expected)


@pytest.mark.parametrize("script", TRAINING)
def test_use_gpu_without_a_gpu(refused, job, script):
    refused(script, [*job, "--use_gpu"], "--use_gpu", "finds no such device")


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


NAN_BIAS = {"pooler.dense.bias": torch.full((32,), math.nan)}
DEV, TEST = "data/ids-sst-dev.csv", "data/ids-sst-test-student.csv"
# What the message says -> how to make it so in the folder of a job, or by flags.
FAULTS = {
    "sts-dev.csv: no such file": lambda d: (d / "data/sts-dev.csv").unlink(),
    f"{DEV}, line 18: sentiment is '5'": lambda d: append(d / DEV, "16\ta\tfilm\t5\n"),
    f"{TEST}, line 10": lambda d: append(d / TEST, '"half a row\n'),
    "bias has shape (64,)": lambda d: edit_json(d / "model/config.json", intermediate_size=65),
    "bias contains NaN": lambda d: edit_tensors(d / "model/model.safetensors", **NAN_BIAS),
    "they are not of one model": lambda d: append(d / "model/vocab.txt", "extra\n"),
    "no tokenizer": lambda d: (d / "model/vocab.txt").unlink(),
    "run: not empty": lambda d: (d / "run" / "mine").mkdir(parents=True),
}
UNFIT = {
    "'linear' of sts": "--sts_decoder linear",
    "'dot' of sts": "--pair_encoding joint --sts_decoder dot",
    "File name too long": f"--run_dir {'n' * 300}",
}


@pytest.mark.parametrize("expected", [*FAULTS, *UNFIT])
def test_a_fault_is_named_and_nothing_is_written(refused, job, tmp_path, expected):
    if expected in FAULTS:
        FAULTS[expected](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refused(multitask_classifier, [*job, *UNFIT.get(expected, "").split()], expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_real_process_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "classifier.py", "--data_dir", "nowhere"]
    command += ["--model", "all-MiniLM-L6-v2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr == (
        "classifier.py: error: nowhere/ids-sst-train.csv: no such file: fetch the course's data"
        " with ./setup.sh --data, or try the sample with --data_dir data/sample\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_prediction_file_is_not_overwritten(refused, job, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_bytes(b"precious")
    refused(multitask_classifier, [*job, "--sts_dev_out", mine], "mine.csv: exists")
    refused(classifier, [*job, "--dev_out", mine], "mine.csv: exists")
    refused(multitask_classifier, [*job, "--sts_dev_out", mine / "x.csv"], "mine.csv")
    assert mine.read_bytes() == b"precious"
    assert not (tmp_path / "run").exists()


CLASHES = [("new.csv", "./other/../new.csv"), ("a", "a/b"), ("a/b", "a"), (".",), ("run",)]


@pytest.mark.parametrize("files", [*CLASHES, ("run/predictions/para-dev-output.csv",)])
def test_output_files_do_not_clash_with_each_other_or_the_run(refused, job, tmp_path, files):
    for flag, file in zip(("--sst_dev_out", "--para_test_out"), files, strict=False):
        job += [flag, f"{tmp_path}/{file}"]
    refused(multitask_classifier, job, tmp_path)
    assert names(tmp_path) == ["data", "model"]


def test_files_are_read_and_written_where_the_user_says(run_script, job, tmp_path):
    """Test files need not exist with --no_test, and nothing is predicted for them."""
    out, train = tmp_path / "elsewhere" / "sst.csv", tmp_path / "data" / "ids-sst-dev.csv"
    for path in (tmp_path / "data").glob("*test*"):
        path.unlink()
    flags = ["--sst_dev_out", out, "--sst_train", train, "--no_test"]
    code, _, err = run_script(multitask_classifier, *job, *flags)
    assert code == 0, err
    assert len(out.read_text(encoding="utf-8").splitlines()) == 17
    config, result = (read_json(tmp_path / "run" / f"{n}.json") for n in ("config", "result"))
    assert config["rows"]["train"]["sst"] == 16
    assert config["files"]["train"]["sst"] == str(train)
    assert result["predictions"].keys() == {"sst_dev", "para_dev", "sts_dev"}
    assert result["predictions"]["sst_dev"] == str(out)
    assert names(tmp_path / "run/predictions") == ["para-dev-output.csv", "sts-dev-output.csv"]


def test_training_imports_no_compiler(tiny, data, tmp_path):
    """PyTorch's compiler takes as long to import as PyTorch; some calls would do so unasked."""
    flags = quick_run(tiny, data, tmp_path / "run", "--limit", 8, "--option", "finetune")
    code = f"import classifier, sys; classifier.main({flags})\n"
    code += "assert 'torch' in sys.modules and not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()
