"""A run that is interrupted anywhere and resumed leaves the same bits as one that never was.

Here by an exception at a chosen write, in this process, and by `kill -9` at random moments.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import quick_run, run_contents

import classifier
import mlm
import multitask_classifier
import simcse
from engine.run_dir import RunDir

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
SCRIPTS = {"classifier": classifier, "simcse": simcse, "mlm": mlm}  # or else multitask_classifier
SAVING = ("--save_every", 2, "--keep_last")


class Death(BaseException):
    """Not an Exception: nothing may take it for an error that it knows."""


@pytest.fixture
def die_at(monkeypatch):
    """`die_at(n)`: the n-th write from now on fails, a line of the log or a file being replaced."""
    left = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Death
            return function(*args, **kwargs)

        return call

    def start(count):
        nonlocal left
        left = count

    monkeypatch.setattr(RunDir, "log", mortal(RunDir.log))
    monkeypatch.setattr(os, "replace", mortal(os.replace))
    return start


JOBS = {
    "probe": "--option pretrain --sampling annealed",
    "bf16": "--option finetune --precision bf16",
    "accumulate": "--option finetune --sampling proportional --accumulate 2 --rdrop 1",
    "lpft": "--option lpft --pair_encoding joint --sts_encoding separate --sts_decoder concat",
    "pcgrad": "--option finetune --surgery pcgrad --measure_conflict 3",
    "classifier": "--option finetune --eval_every 2 --patience 1",
    "simcse": "--limit 24 --accumulate 2",
    "mlm": "--tasks sst --accumulate 2 --whole_word",
}


@pytest.mark.parametrize("job", JOBS)
def test_a_death_at_any_write_costs_nothing(job, tiny, data, tmp_path, run_script, die_at):
    script = SCRIPTS.get(job, multitask_classifier)
    data = SAMPLE if script is simcse else data
    more = (*SAVING, *JOBS[job].split())
    code, _, err = run_script(script, *quick_run(tiny, data, tmp_path / "whole", *more))
    assert code == 0, err
    flags = quick_run(tiny, data, tmp_path / "broken", *more, "--resume")
    for deaths in range(200):
        die_at(8 + 3 * deaths)
        with suppress(Death):
            code, _, err = run_script(script, *flags)
            assert code == 0, err
            break
    assert deaths >= 3
    code, _, err = run_script(script, *flags)  # which leaves a finished run as it is
    assert code == 0 and "has finished" in err and "error" not in err
    assert run_contents(tmp_path / "broken") == run_contents(tmp_path / "whole")
    assert len((tmp_path / "broken/resumed.jsonl").read_text().splitlines()) >= deaths - 1
    assert not list((tmp_path / "broken").rglob(".*"))


def test_kill_9_at_20_random_moments(forker, tiny, data, tmp_path):
    """In loading, steps, evaluations, saving, predictions; every killed run is resumed."""
    more = (*SAVING, "--option", "finetune", "--eval_every", 4, "--epochs", 1)
    started = time.perf_counter()
    forker.run(1, "multitask_classifier", quick_run(tiny, data, tmp_path / "whole", *more))
    seconds = time.perf_counter() - started
    whole, rng = run_contents(tmp_path / "whole"), random.Random(1)
    kills = finished = 0
    while kills < 20 or not finished:
        run = tmp_path / f"run{finished}"
        forker.start(1, "multitask_classifier", quick_run(tiny, data, run, *more, "--resume"))
        if kills < 20:
            time.sleep(rng.random() * seconds)
            with suppress(ProcessLookupError):  # it has finished already
                os.kill(forker.pids[0], signal.SIGKILL)
        (code,), _, err = forker.wait()
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0 and "Traceback" not in err, err
        seconds *= 0.8  # too late: be quicker
        assert run_contents(run) == whole
        finished += 1


def test_a_signal_before_the_predictions_is_heeded(tiny, data, tmp_path, run_script, monkeypatch):
    """Training has finished then; resumed, the run goes on with the predictions."""
    save_state = RunDir.save_state

    def save_and_interrupt(self, tensors, facts):
        save_state(self, tensors, facts)
        if facts["finished"]:
            os.kill(os.getpid(), signal.SIGINT)

    flags = quick_run(tiny, data, tmp_path / "run", "--option", "finetune")
    monkeypatch.setattr(RunDir, "save_state", save_and_interrupt)
    code, _, err = run_script(classifier, *flags)
    assert code == 130 and "--resume" in err.strip().splitlines()[-1]
    assert not (tmp_path / "run/result.json").exists()
    code, out, _ = run_script(classifier, *flags, "--resume")
    assert code == 0 and "training had finished" in out


def test_the_latest_unfinished_run_is_resumed(train, tiny, data, tmp_path, monkeypatch, run_script):
    """Of that script and option, if --run_dir is not given."""
    monkeypatch.chdir(tmp_path)
    names = ["classifier-pretrain-20200101-0", "classifier-pretrain-20210101-0"]
    for name in names:
        train(classifier, Path("runs") / name, "--option", "pretrain")
    (Path("runs") / names[0] / "result.json").unlink()
    flags = quick_run(tiny, data, tmp_path, "--option", "pretrain", "--resume")
    del flags[flags.index("--run_dir") : flags.index("--run_dir") + 2]
    code, out, err = run_script(classifier, *flags)
    assert code == 0, err
    assert f"run folder: runs/{names[0]}" in out
    assert sorted(path.name for path in Path("runs").iterdir()) == names


LARGEST_FILE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def test_a_full_disk_is_named_and_the_state_stays(
    forker, train, tiny, data, tmp_path, run_script, die_at
):
    """A limit on the size of files stands for the disk; with room again the run goes on."""
    flags = quick_run(tiny, data, tmp_path / "run", *SAVING, "--option", "finetune", "--resume")
    die_at(20)
    with pytest.raises(Death):
        run_script(multitask_classifier, *flags)
    path = tmp_path / "run/last/state.safetensors"
    before = path.read_bytes()
    forker.start(1, "multitask_classifier", flags, LARGEST_FILE.format(len(before) // 2))
    (code,), _, err = forker.wait()
    line = err.strip().splitlines()[-1]
    assert code == 2 and "error: " in line and str(path) in line
    assert path.read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert run_script(multitask_classifier, *flags)[0] == 0
    train(multitask_classifier, tmp_path / "whole", *SAVING, "--option", "finetune")
    assert run_contents(tmp_path / "run") == run_contents(tmp_path / "whole")
