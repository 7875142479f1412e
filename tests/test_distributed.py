"""Several processes leave what one leaves: losses, weights, figures, predictions; and end together.

What they meet through is held by `forker.Forker`, as by torchrun's agent. One test starts torchrun.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_data
from forker import LIMIT
from safetensors.torch import load_file
from test_train import files_of, log_of, result_of

import classifier
import distributed
from checkpoint import read_json, read_state, write_json

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """The tiny model without dropout, which each process would draw differently."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny, folder)
    config = read_json(folder / "config.json")
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Files whose last batches of 8 have 1 row (para, sst) and 4 (sts)."""
    return write_data(tmp_path_factory.mktemp("rows"), {"train": 25, "dev": 11, "test": 5})


def flags(model, data, run_dir, *more) -> list:
    """A quick run."""
    given = ["--model", model, "--data_dir", data, "--run_dir", run_dir, "--epochs", 2]
    return [*given, "--batch_size", 8, "--lr", "1e-3", "--precision", "fp32", *more]


def near(found, expected, tolerance=1e-6):
    """The same values: losses to 1e-6; norms, correlations, cosines magnify rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            near(found[name], expected[name], 1e-6 if name in ("loss", "lr") else 1e-5)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)
    else:
        assert found == expected


def numbers(text: str) -> list:
    """The predictions of a prediction file."""
    return [float(line.split(" , ")[1]) for line in text.splitlines()[1:]]


def same_run(found: Path, expected: Path) -> None:
    """Losses, figures, weights, moments and predictions of two runs, to 1e-6."""
    for kind in ("train", "dev", "conflict"):
        pairs = zip(log_of(found, kind), log_of(expected, kind), strict=True)
        for mine, theirs in pairs:
            mine.pop("summary", None), theirs.pop("summary", None)
            near(mine, theirs)
    (mine, facts), (theirs, others) = (
        read_state(run / "last/state.safetensors") for run in (found, expected)
    )
    assert facts["step"] == others["step"] and facts["rows"] == others["rows"]
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        if not name.startswith("random."):
            torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for path in (expected / "best").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            theirs = load_file(found / "best" / path.name)[name]
            torch.testing.assert_close(theirs, tensor, atol=1e-6, rtol=1e-6)
    near(result_of(found)["dev"], result_of(expected)["dev"])
    paths = list((expected / "predictions").glob("*.csv"))
    for path in paths:
        text = (found / "predictions" / path.name).read_text()
        assert numbers(text) == pytest.approx(numbers(path.read_text()), abs=1e-5)


# ------------------------------------------------------------------ the same as one process

JOBS = {
    "probe": ("multitask_classifier", "--option", "pretrain", "--sampling", "annealed"),
    "finetune": ("multitask_classifier", "--option", "finetune", "--leave_out", "para"),
    "proportional": (
        *("multitask_classifier", "--option", "finetune", "--sampling", "proportional"),
        *("--accumulate", 2, "--measure_conflict", 99, "--pair_encoding", "joint"),
    ),
    "pcgrad": ("multitask_classifier", "--option", "finetune", "--surgery", "pcgrad"),
    "classifier": ("classifier", "--option", "finetune", "--eval_every", 2, "--patience", 3),
    # A last batch of 2. The temperature's inverse is what a cosine's rounding is multiplied by.
    "supervised": ("simcse", "--limit", 18, "--lr", "5e-5", "--temperature", 1),
    "unsupervised": (
        "simcse",
        "--limit",
        6,
        "--lr",
        "5e-5",
        "--mode",
        "unsupervised",
        "--accumulate",
        2,
        "--temperature",
        1,
    ),
}


SMALL_BUCKETS = "import distributed; distributed.BUCKET = 5000"


@pytest.mark.parametrize("job", JOBS)
def test_n_processes_leave_what_one_leaves(job, forker, model, rows, tmp_path):
    """The last batches have 1 or 2 rows, so that some process has none; heads sit steps out."""
    script, *more = JOBS[job]
    data = SAMPLE if script == "simcse" else rows
    for n in (1, 2, 3):
        forker.run(n, script, flags(model, data, tmp_path / str(n), *more), SMALL_BUCKETS)
        assert read_json(tmp_path / str(n) / "config.json")["processes"] == n
        assert result_of(tmp_path / str(n))["processes"] == n
    same_run(tmp_path / "2", tmp_path / "1")
    same_run(tmp_path / "3", tmp_path / "1")
    if job == "finetune":  # what three processes predict is what one does, to the bit
        for task, file in (("sts", "sts-dev.csv"), ("sst", "ids-sst-dev.csv")):
            words = ["--data", rows / file, "--task", task, "--out", tmp_path / task]
            forker.run(1, "evaluation", [tmp_path / "3", *words])
            expected = tmp_path / "3/predictions" / f"{task}-dev-output.csv"
            assert (tmp_path / task).read_bytes() == expected.read_bytes()
    if job == "probe":
        found, expected = (files_of(tmp_path / n).keys() for n in ("3", "1"))
        assert found == expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_row_is_one_process_s_and_no_two_draw_the_same(size, monkeypatch):
    monkeypatch.setattr(distributed, "_size", size)
    for count in range(8):
        shares = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "_rank", rank)
            shares.append(np.arange(count)[distributed.own(count)].tolist())
        assert shares == [part.tolist() for part in np.array_split(np.arange(count), size)]
    drawn = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_rank", rank)
        torch.manual_seed(5)
        distributed.own_stream(5)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == size
    assert drawn[0] == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()


# ------------------------------------------------------------------ resuming

AT = """
import os, checkpoint
kind = checkpoint.Follower if rank else checkpoint.Run
real = kind.log
def log(self, kind, step, **figures):
    real(self, kind, step, **figures)
    if rank == {rank} and step == {step} and kind == "train":
        os.kill(os.getpid(), {signal})
kind.log = log
"""


@pytest.mark.parametrize(("option", "rank"), [("pretrain", 1), ("finetune", 0)])
def test_a_process_is_killed_and_the_run_resumed_to_the_same_bits(
    option, rank, forker, tiny, rows, tmp_path
):
    """With dropout; the others end at once, and one of them says why."""
    job = flags(tiny, rows, tmp_path / "whole", "--option", option, "--save_every", 2)
    forker.run(2, "multitask_classifier", job)
    job = flags(tiny, rows, tmp_path / "broken", "--option", option, "--save_every", 2)
    kill = AT.format(rank=rank, step=9, signal=9)
    forker.start(2, "multitask_classifier", job, kill)
    codes, _, err = forker.wait()
    assert codes[rank] == -9 and codes[1 - rank] == 1
    assert "Traceback" not in err
    assert err.count("another process of this run has ended") == 1
    forker.run(2, "multitask_classifier", [*job, "--resume"])
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def test_ctrl_c_stops_all_and_another_number_goes_on(forker, model, rows, tmp_path):
    """A signal to any process; 2, then 1, then 3 processes leave what one leaves."""
    more = ("--option", "finetune", "--surgery", "pcgrad", "--save_every", 0)
    forker.run(1, "multitask_classifier", flags(model, rows, tmp_path / "whole", *more))
    job = [*flags(model, rows, tmp_path / "run", *more), "--resume"]
    for n, rank, step in ((2, 1, 0), (1, 0, 2)):
        forker.start(n, "multitask_classifier", job, AT.format(rank=rank, step=step, signal=2))
        codes, _, err = forker.wait()
        assert codes == [130] * n, err
        assert err.count("to go on: ") == 1 and "Traceback" not in err
        assert f"stopped at step {step + 1}" in err
        start = r"\S*torchrun --nproc_per_node=2 multi" if n == 2 else r"\S*python\S* multi"
        assert re.search(f"to go on: {start}", err), err
    forker.run(3, "multitask_classifier", job)
    same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------ errors


def test_what_is_wrong_is_said_once(forker, model, rows, tmp_path, run_script, monkeypatch):
    for more in (["--lr", "x"], ["--model", tmp_path / "none"], ["--run_dir", rows]):
        forker.start(2, "classifier", flags(model, rows, tmp_path / "run", *more))
        codes, _, err = forker.wait()
        assert codes == [2, 2], err
        assert err.count("error: ") == len(err.strip().splitlines()) == 1, err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run_script(classifier, *flags(model, rows, tmp_path / "run"))
    assert code == 2 and "MASTER_ADDR" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


OUT_OF_MEMORY = """
import bert
real = bert.BertModel.forward
def forward(self, *args):
    if rank == 1 and self.training:
        raise MemoryError
    return real(self, *args)
bert.BertModel.forward = forward
"""


def test_an_error_of_one_process_ends_all(forker, model, rows, tmp_path):
    job = flags(model, rows, tmp_path / "run", "--option", "finetune")
    forker.start(3, "classifier", job, OUT_OF_MEMORY)
    codes, _, err = forker.wait()
    assert codes == [1, 1, 1]
    assert err.count("out of memory on cpu") == 1 and "Traceback" not in err
    assert err.count("another process of this run has ended") == 1


def test_other_command_lines_are_refused(forker, model, rows, tmp_path):
    patch = "import sys; sys.argv += ['--seed', str(rank)]; import classifier"
    patch += "; real = classifier.parse; classifier.parse = lambda _: real(sys.argv[1:])"
    forker.start(2, "classifier", flags(model, rows, tmp_path / "run"), patch)
    codes, _, err = forker.wait()
    assert codes[1] == 2 and "another --seed than the first" in err and "Traceback" not in err


# ------------------------------------------------------------------ torchrun


def test_torchrun(model, rows, tmp_path):
    """The command of the README."""
    torchrun = Path(sys.executable).with_name("torchrun")
    words = flags(model, rows, tmp_path / "run", "--option", "finetune")
    done = subprocess.run(
        [torchrun, "--nproc_per_node=2", "classifier.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert result_of(tmp_path / "run")["processes"] == 2
