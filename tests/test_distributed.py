"""Several processes train the model that one trains: losses, weights, metrics, predictions.

They connect through a store that `forker.Forker` holds, as torchrun's agent would. One test starts
torchrun itself.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_run, read_log, run_contents, write_data
from forker import LIMIT
from model_files import edit_json
from safetensors.torch import load_file

import classifier
from engine import distributed
from engine.checkpoint import read_json, read_state

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """The tiny model without dropout, which would be different in each process."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("model") / "model")
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    edit_json(folder / "config.json", **rates)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Files whose last batches of 8 have 1 row (para, sst) and 4 (sts)."""
    return write_data(tmp_path_factory.mktemp("rows"), {"train": 25, "dev": 11, "test": 5})


def assert_close(value, expected, tolerance=1e-6):
    """The same values: losses to 1e-6; norms, correlations and cosines magnify rounding."""
    if isinstance(expected, dict):
        assert list(value) == list(expected)
        for name in expected:
            tolerance = 1e-6 if name in ("loss", "lr") else 1e-5
            assert_close(value[name], expected[name], tolerance)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, abs=tolerance, rel=tolerance)
    else:
        assert value == expected


def assert_same_run(run: Path, other: Path) -> None:
    """Losses, metrics, weights, moments and predictions of two runs are equal to 1e-6."""
    for kind in ("train", "dev", "conflict"):
        for entries in zip(read_log(run, kind), read_log(other, kind), strict=True):
            assert_close(*({**entry, "summary": ""} for entry in entries))
    states = [read_state(folder / "last/state.safetensors") for folder in (run, other)]
    (tensors, facts), (expected, other_facts) = states
    assert facts["step"] == other_facts["step"] and facts["rows"] == other_facts["rows"]
    for path in (other / "best").glob("*.safetensors"):
        tensors |= load_file(run / "best" / path.name)
        expected |= load_file(path)
    assert set(tensors) == set(expected)
    for name in expected:
        if not name.startswith("random."):
            torch.testing.assert_close(tensors[name], expected[name], atol=1e-6, rtol=1e-6)
    assert_close(*(read_json(folder / "result.json")["dev"] for folder in (run, other)))
    for path in (other / "predictions").glob("*.csv"):
        files = (run / "predictions" / path.name, path)
        columns = (np.loadtxt(file, delimiter=",", skiprows=1, usecols=1) for file in files)
        np.testing.assert_allclose(*columns, rtol=1e-5, atol=1e-5)


MULTITASK = "multitask_classifier --option "
JOBS = {
    "probe": MULTITASK + "pretrain --sampling annealed",
    "finetune": MULTITASK + "finetune --leave_out para",
    "joint": MULTITASK + "finetune --sampling proportional --accumulate 2 --measure_conflict 99"
    " --pair_encoding joint",
    "pcgrad": MULTITASK + "finetune --surgery pcgrad",
    # R-Drop needs dropout, which differs between processes unless it is too rare to happen.
    "classifier": "classifier --option finetune --eval_every 2 --patience 3 --accumulate 2"
    " --rdrop 2 --hidden_dropout_prob 1e-30",
    # The last batch has 2 rows. The loss divides cosines, and their rounding, by the temperature.
    "supervised": "simcse --limit 18 --lr 5e-5 --temperature 1",
    "mlm": "mlm --tasks sst,sts --accumulate 2",
    "unsupervised": "simcse --limit 6 --lr 5e-5 --temperature 1 --mode unsupervised --accumulate 2",
}


@pytest.mark.parametrize("job", JOBS)
def test_several_processes_leave_what_one_leaves(job, forker, model, rows, tmp_path):
    """The last batches have 1 or 2 rows, so that some process has none; heads sit steps out."""
    script, *more = JOBS[job].split()
    data = ROOT / "data/sample" if script == "simcse" else rows
    runs = {n: tmp_path / str(n) for n in ((1, 2, 3) if job == "finetune" else (1, 3))}
    for n, run in runs.items():
        forker.run(n, script, quick_run(model, data, run, "--keep_last", *more))
        for name in ("config", "result"):
            assert read_json(run / f"{name}.json")["processes"] == n
        assert_same_run(run, runs[1])
    assert run_contents(runs[3]).keys() == run_contents(runs[1]).keys()
    if job == "finetune":  # what three processes predict is what one predicts, to the bit
        for task, file in (("sts", "sts-dev.csv"), ("sst", "ids-sst-dev.csv")):
            words = ["--data", rows / file, "--task", task, "--out", tmp_path / task]
            forker.run(1, "evaluation", [runs[3], *words])
            expected = runs[3] / "predictions" / f"{task}-dev-output.csv"
            assert (tmp_path / task).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_belongs_to_one_process_and_no_two_draw_the_same_numbers(size, monkeypatch):
    monkeypatch.setattr(distributed, "_world_size", size)
    parts, drawn = [], []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_rank", rank)
        parts.append([np.arange(n)[distributed.rank_slice(n)].tolist() for n in range(8)])
        torch.manual_seed(5)
        distributed.seed_by_rank(5)
        drawn.append(torch.rand(1).item())
    for n, slices in enumerate(zip(*parts, strict=True)):
        assert list(slices) == [part.tolist() for part in np.array_split(np.arange(n), size)]
    assert len(set(drawn)) == size
    assert drawn[0] == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()


KILL_AT = """
import os
from engine.run_dir import RunDir
log = RunDir.log
def log_and_kill(self, kind, step, **figures):
    log(self, kind, step, **figures)
    if rank == {rank} and step == {step} and kind == "train":
        os.kill(os.getpid(), {signal})
RunDir.log = log_and_kill
"""


def fail(forker, processes: int, script: str, flags: list, patch: str = "") -> tuple[list, str]:
    """Run a script that must fail: each process's exit code, and standard error."""
    forker.start(processes, script, flags, patch)
    codes, _, err = forker.wait()
    assert "Traceback" not in err
    return codes, err


@pytest.mark.parametrize(("option", "rank"), [("pretrain", 1), ("finetune", 0)])
def test_a_killed_process_ends_all_until_they_resume(option, rank, forker, tiny, rows, tmp_path):
    """To the same bits, with dropout; one of the others says why it ends."""
    more = ("--option", option, "--save_every", 2, "--keep_last")
    forker.run(2, "multitask_classifier", quick_run(tiny, rows, tmp_path / "whole", *more))
    flags = quick_run(tiny, rows, tmp_path / "broken", *more)
    patch = KILL_AT.format(rank=rank, step=9, signal=9)
    codes, err = fail(forker, 2, "multitask_classifier", flags, patch)
    assert codes[rank] == -9 and codes[1 - rank] == 1
    assert err.count("another process of this run has ended") == 1
    forker.run(2, "multitask_classifier", [*flags, "--resume"])
    assert run_contents(tmp_path / "broken") == run_contents(tmp_path / "whole")


def test_a_signal_stops_all_processes_and_another_number_goes_on(forker, model, rows, tmp_path):
    """2, then 1, then 3 processes leave what one leaves."""
    more = ("--option", "finetune", "--surgery", "pcgrad", "--save_every", 0, "--keep_last")
    forker.run(1, "multitask_classifier", quick_run(model, rows, tmp_path / "whole", *more))
    flags = quick_run(model, rows, tmp_path / "run", *more, "--resume")
    for n, rank, step, number in ((2, 1, 0, 2), (1, 0, 2, 15)):  # SIGINT, SIGTERM
        patch = KILL_AT.format(rank=rank, step=step, signal=number)
        codes, err = fail(forker, n, "multitask_classifier", flags, patch)
        # The line of a step is written within the next one, which the signal lets finish.
        assert codes == [130] * n and err.count(f"stopped at step {step + 2}; ") == 1, err
    forker.run(3, "multitask_classifier", flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_error_of_all_is_printed_once(forker, model, rows, tmp_path, run_script, monkeypatch):
    for more in (["--lr", "x"], ["--model", tmp_path / "none"], ["--run_dir", rows]):
        codes, err = fail(forker, 2, "classifier", quick_run(model, rows, tmp_path / "run", *more))
        assert codes == [2, 2] and err.count("error: ") == len(err.strip().splitlines()) == 1, err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run_script(classifier, *quick_run(model, rows, tmp_path / "run"))
    assert code == 2 and "MASTER_ADDR" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


OUT_OF_MEMORY = """
import bert
forward = bert.BertModel.forward
def run_out(self, *args):
    if rank == 1 and self.training:
        raise MemoryError
    return forward(self, *args)
bert.BertModel.forward = run_out
"""
DIFFERENT_SEEDS = """
import sys
import classifier
parse_args = classifier.parse_args
classifier.parse_args = lambda _: parse_args([*sys.argv[1:], "--seed", str(rank)])
"""
DIFFERENT_DATA = """
import datasets
read_examples = datasets.read_examples
datasets.read_examples = lambda *given: (*read_examples(*given)[:2], str(rank))
"""


def test_an_error_of_one_process_ends_all(forker, model, rows, tmp_path):
    flags = quick_run(model, rows, tmp_path / "run", "--option", "finetune")
    codes, err = fail(forker, 3, "classifier", flags, OUT_OF_MEMORY)
    assert codes == [1, 1, 1] and err.count("out of memory on cpu") == 1
    assert err.count("another process of this run has ended") == 1


def test_different_command_lines_or_data_are_refused(forker, model, rows, tmp_path):
    for patch, expected in (
        (DIFFERENT_SEEDS, "another --seed than process 0"),
        (DIFFERENT_DATA, "different data files"),
    ):
        codes, err = fail(forker, 2, "classifier", quick_run(model, rows, tmp_path / "run"), patch)
        assert codes[1] == 2 and expected in err


def test_torchrun(model, rows, tmp_path):
    command = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=2", "classifier.py"]
    command += quick_run(model, rows, tmp_path / "run", "--option", "finetune")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert read_json(tmp_path / "run/result.json")["processes"] == 2
