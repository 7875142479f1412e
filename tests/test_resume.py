"""A run that is interrupted anywhere and resumed leaves what one never interrupted leaves, in bits.

Deaths are of three kinds: an exception out of nowhere at a chosen write, in this process; `kill -9`
at random moments, and signals, in processes of their own. Those are forked from one that has
imported everything and computed nothing, which saves seconds for each.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_train import files_of

import checkpoint
import classifier
import datasets
import multitask_classifier
import simcse
from bert import BertModel
from checkpoint import Run, read_state, whole_folder
from tokenizer import BertTokenizer
from train import Period, memory_for

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
SCRIPTS = {"classifier": classifier, "multitask_classifier": multitask_classifier, "simcse": simcse}


class Death(BaseException):
    """Not an Exception: nothing on the way may mistake it for an error that it knows."""


def flags(tiny, data, run_dir, *more) -> list[str]:
    """A quick run."""
    given = ["--model", tiny, "--data_dir", data, "--run_dir", run_dir, "--epochs", 2]
    return list(map(str, [*given, "--batch_size", 8, "--lr", "1e-3", "--save_every", 2, *more]))


# ------------------------------------------------------------------ deaths at chosen moments

JOBS = {
    "probe": ("multitask_classifier", "--option", "pretrain"),
    "finetune": ("multitask_classifier", "--option", "finetune", "--precision", "fp32"),
    "bf16": ("multitask_classifier", "--option", "finetune", "--precision", "bf16"),
    "accumulate": ("multitask_classifier", "--option", "finetune", "--accumulate", "2"),
    "proportional": ("multitask_classifier", "--option", "finetune", "--sampling", "proportional"),
    "annealed": ("multitask_classifier", "--option", "pretrain", "--sampling", "annealed"),
    "lpft": ("multitask_classifier", "--option", "lpft", "--pair_encoding", "joint"),
    "pcgrad": ("multitask_classifier", "--option", "finetune", "--surgery", "pcgrad"),
    "conflict": ("multitask_classifier", "--option", "finetune", "--measure_conflict", "3"),
    "patience": ("classifier", "--option", "finetune", "--eval_every", "2", "--patience", "1"),
    "classifier": ("classifier", "--task", "cfimdb", "--option", "pretrain", "--accumulate", "2"),
    "contrast": ("simcse", "--limit", "24", "--accumulate", "2"),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_death_at_any_write_costs_nothing(job, tiny, data, tmp_path, run_script, monkeypatch):
    """Every few lines of the log, at every file that is to be replaced and every folder."""
    name, *more = JOBS[job]
    if name == "simcse":
        data = SAMPLE
    script = SCRIPTS[name]
    code, _, err = run_script(script, *flags(tiny, data, tmp_path / "whole", *more))
    assert code == 0, err
    whole = files_of(tmp_path / "whole")

    left = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Death
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Run, "log", dying(Run.log))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    again = flags(tiny, data, tmp_path / "broken", *more, "--resume")
    for death in range(1, 200):
        left = 5 + 3 * death
        try:
            code, _, err = run_script(script, *again)
        except Death:
            continue
        assert code == 0, err
        break
    assert death > 3
    assert files_of(tmp_path / "broken") == whole
    assert len((tmp_path / "broken/resumed.jsonl").read_text().splitlines()) >= death - 1
    assert not list((tmp_path / "broken").rglob(".*"))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_folder_half_replaced_is_made_whole(tmp_path, monkeypatch, renames):
    """A process that dies before or between its two renames: the old folder is there again."""
    folder = tmp_path / "best"
    with whole_folder(folder) as draft:
        (draft / "file").write_text("old")
    real, done = os.replace, []

    def replace(source, target):
        if len(done) == renames:
            raise Death
        done.append(real(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # it died: no cleaning up
        with pytest.raises(Death), whole_folder(folder) as draft:
            (draft / "file").write_text("new")
    assert folder.exists() != bool(renames)
    checkpoint.restore_folder(folder)
    assert (folder / "file").read_text() == "old"


# ------------------------------------------------------------------ processes

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
# Permissions bind root too, once CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH have been given up.
BOUND = """
import ctypes
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~0b110
assert libc.capset(header, sets) == 0
"""


def start(forker, script: str, flags: list, patch: str = "") -> int:
    """A process of its own, as its number."""
    forker.start(1, script, flags, patch)
    return forker.pids[0]


def ended(forker) -> tuple[int, str]:
    """Its exit code, and what it said: errors last."""
    (code,), out, err = forker.wait()
    return code, out + err


KILLS = 20


def test_kill_9_at_random_moments(forker, tiny, data, tmp_path):
    """In loading, steps, evaluations, saving, predictions; what was killed is resumed."""
    more = ("--option", "finetune", "--eval_every", "4", "--epochs", "1")
    script = "multitask_classifier"
    started = time.perf_counter()
    start(forker, script, flags(tiny, data, tmp_path / "whole", *more))
    code, said = ended(forker)
    seconds = time.perf_counter() - started
    assert code == 0, said
    whole = files_of(tmp_path / "whole")

    rng = random.Random(1)
    killed = finished = 0
    while killed < KILLS or not finished:
        run_dir = tmp_path / f"run{finished}"
        pid = start(forker, script, flags(tiny, data, run_dir, *more, "--resume"))
        if killed < KILLS:
            time.sleep(rng.random() * seconds)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(pid, signal.SIGKILL)
        code, said = ended(forker)
        if code == -signal.SIGKILL:
            killed += 1
            continue
        seconds *= 0.8  # it was quicker: the first of all takes longest
        assert code == 0, said
        assert files_of(run_dir) == whole
        finished += 1


def wait_for(condition, what: str) -> None:
    """Until it holds."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(what)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_finishes_the_step_and_says_how_to_go_on(
    forker, tiny, data, tmp_path, number
):
    more = ("--option", "finetune", "--epochs", "30", "--save_every", "0")
    pid = start(forker, "classifier", flags(tiny, data, tmp_path / "run", *more))
    log = tmp_path / "run/log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 8, "no steps")
    os.kill(pid, number)
    code, said = ended(forker)
    last = said.strip().splitlines()[-1]
    assert code == 130, said
    assert "Traceback" not in said
    state = read_state(tmp_path / "run/last/state.safetensors")[1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert state["step"] == 1 + max(line["step"] for line in lines if line["kind"] == "train")
    assert f"stopped at step {state['step']}; to go on: " in last
    assert last.endswith("--resume") and str(tmp_path / "run") in last


def test_a_second_signal_stops_at_once(forker, tiny, data, tmp_path):
    """Even in a step that takes long; what had been saved stays."""
    more = ("--option", "finetune", "--batch_size", "40", "--accumulate", "1000000")
    pid = start(forker, "classifier", flags(tiny, data, tmp_path / "run", *more, "--epochs", "900"))
    wait_for(lambda: (tmp_path / "run/best").exists(), "no evaluation")
    for _ in range(50):  # the first is heard in a step, or in an evaluation and stops it
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    code, said = ended(forker)
    assert code == 130, said
    assert (tmp_path / "run/last/state.safetensors").exists()


def test_a_signal_while_the_finished_state_is_saved_is_heeded(
    tiny, data, tmp_path, run_script, monkeypatch
):
    """Training is over then, but predictions may take long; resumed, it goes on with those."""

    def save_state(self, tensors, facts):
        real(self, tensors, facts)
        if facts["finished"]:
            os.kill(os.getpid(), signal.SIGINT)

    real = Run.save_state
    given = flags(tiny, data, tmp_path / "run", "--option", "finetune")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", save_state)
        code, _, err = run_script(classifier, *given)
    assert code == 130 and "to go on: " in err.strip().splitlines()[-1]
    assert not (tmp_path / "run/result.json").exists()
    assert run_script(classifier, *given, "--resume")[0] == 0


# ------------------------------------------------------------------ what --resume refuses


@pytest.fixture
def stopped(tiny, data, tmp_path, run_script, monkeypatch):
    """The flags of a run that died in its second epoch."""
    given = flags(tiny, data, tmp_path / "run", "--option", "finetune")

    def log(self, kind, step, **figures):
        if step == 12:
            raise Death
        real(self, kind, step, **figures)

    real = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(Death):
            run_script(multitask_classifier, *given)
    return given


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_arguments_are_refused_by_name(stopped, tmp_path, run_script):
    before = contents(tmp_path / "run")
    code, _, err = run_script(
        multitask_classifier, *stopped, "--resume", "--seed", 4, "--pooling", "mean"
    )
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert "--pooling was pooler and is mean, --seed was 11711 and is 4" in line
    assert contents(tmp_path / "run") == before
    code, _, err = run_script(multitask_classifier, *stopped)
    assert code == 2 and "already in use" in err and "--resume" in err
    assert contents(tmp_path / "run") == before


def test_how_often_the_state_is_saved_may_change(stopped, run_script, monkeypatch):
    """The run died at step 12 of 18, of two epochs; every step is saved from there on."""
    saved = []

    def save_state(self, *given):
        saved.append(self.step)
        real(self, *given)

    real = Run.save_state
    monkeypatch.setattr(Run, "save_state", save_state)
    code, _, err = run_script(multitask_classifier, *stopped, "--resume", "--save_every", 1)
    assert code == 0, err
    assert len(saved) >= 6


def test_a_finished_run_is_left_alone(stopped, tmp_path, run_script):
    assert run_script(multitask_classifier, *stopped, "--resume")[0] == 0
    before = contents(tmp_path / "run")
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    assert code == 0
    assert "has finished (result.json); nothing is changed" in err and "error" not in err
    assert contents(tmp_path / "run") == before


def test_changed_data_is_refused(stopped, tmp_path, data, run_script, monkeypatch):
    real = checkpoint.digest
    monkeypatch.setattr(
        "datasets.digest", lambda path: "0" if path.name == "sts-dev.csv" else real(path)
    )
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    assert code == 2
    assert "sts-dev.csv has changed since the run began" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign", "another model"])
def test_a_damaged_state_is_refused_in_a_line(stopped, tmp_path, run_script, damage):
    """And nothing in it is run."""
    path = tmp_path / "run/last/state.safetensors"
    tensors, facts = read_state(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "pickle":
        torch.save({"model": Trap(tmp_path / "ran")}, path)
    elif damage == "foreign":
        checkpoint.write_tensors(path, tensors)
    else:
        tensors["model.bert.pooler.bias"] = torch.zeros(3)
        checkpoint.write_state(path, tensors, facts)
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert "state.safetensors" in line and "Traceback" not in err
    assert not (tmp_path / "ran").exists()


def test_any_bytes_as_a_state_are_refused(stopped, tmp_path, run_script):
    """Any at all, or the real ones with a few overwritten: in a line, and the folder stays."""
    path = tmp_path / "run/last/state.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(3)
    for trial in range(60):
        content = bytearray(whole)
        if trial < 10:
            content = rng.randbytes(rng.randrange(2000))
        while content == whole:
            place = rng.randrange(header if trial % 2 else len(whole))
            content[place : place + 4] = rng.randbytes(4)
        path.write_bytes(content)
        before = contents(tmp_path / "run")
        code, _, err = run_script(multitask_classifier, *stopped, "--resume")
        assert code == 2 and "Traceback" not in err
        assert f"{path}: " in err.strip().splitlines()[-1], err
        assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change",
    [
        {"random.0": torch.zeros(3)},
        {"random.0": torch.zeros(5056, dtype=torch.uint8)},
        {"random.0": None},
        {"optimizer.bert.0.exp_avg": torch.zeros(1)},
        {"optimizer.bert.0.exp_avg": None},
        {"optimizer.bert.0.exp_avg_sq": "double"},
        {"optimizer.bert.0.step": torch.tensor(-1)},
        {"optimizer.bert.0.step": torch.zeros(2)},
        {"optimizer.bert.x.step": torch.tensor(1)},
        {"optimizer.bert": torch.tensor(1)},
        {"step": "x"},
        {"step": None},
        {"best": {"score": 1}},
        {"best": [1]},
        {"log": "x"},
        {"log": 10**9},
        {"log": -1},
        {"seconds": None},
        {"stage": ...},
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_a_line(stopped, tmp_path, run_script, change):
    """Well-formed, but not of this run: the fast update trusts the shapes that it is given."""
    path = tmp_path / "run/last/state.safetensors"
    tensors, facts = read_state(path)
    for name, value in change.items():
        of = tensors if "." in name or isinstance(value, torch.Tensor) else facts
        if (value is None and of is tensors) or value is ...:
            of.pop(name)
        else:
            of[name] = of[name].double() if isinstance(value, str) and of is tensors else value
    checkpoint.write_state(path, tensors, facts)
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    assert code == 2 and "Traceback" not in err
    assert "state.safetensors" in err.strip().splitlines()[-1], err


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_to_resume_is_a_run_from_the_start(tiny, data, tmp_path, run_script):
    given = flags(tiny, data, tmp_path / "run", "--option", "pretrain", "--resume")
    assert run_script(classifier, *given)[0] == 0
    assert (tmp_path / "run/result.json").exists()


def test_without_run_dir_the_latest_run_is_resumed(tiny, data, tmp_path, monkeypatch, run_script):
    """Of that script and option, the newest that has not finished."""
    monkeypatch.chdir(tmp_path)
    given = flags(tiny, data, tmp_path / "unused", "--option", "pretrain")
    del given[given.index("--run_dir") : given.index("--run_dir") + 2]
    assert run_script(classifier, *given)[0] == 0
    (first,) = Path("runs").iterdir()
    first = first.rename("runs/classifier-pretrain-20200101-000000")
    config = json.loads((first / "config.json").read_text())
    config["arguments"]["run_dir"] = str(first)
    checkpoint.write_json(first / "config.json", config)
    (first / "result.json").unlink()
    code, _, err = run_script(classifier, *given, "--resume")
    assert code == 0, err
    assert (first / "result.json").exists()
    assert len(list(Path("runs").iterdir())) == 1


def test_two_processes_do_not_share_a_run(stopped, tmp_path, run_script):
    busy = Run(tmp_path / "run")
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    busy.close()
    assert code == 2
    assert "another process is at work there" in err


def test_what_was_read_before_is_not_tokenised_again(stopped, tmp_path, run_script, monkeypatch):
    def encode_batch(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(BertTokenizer, "encode_batch", encode_batch)
    code, _, err = run_script(multitask_classifier, *stopped, "--resume")
    assert code == 0, err
    assert not (tmp_path / "run/tokens").exists()


@pytest.mark.parametrize("how", ["rewritten", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tiny, data, tmp_path, run_script, monkeypatch, how
):
    """In the middle of its rows; in a new run, and in one that is to go on, whose state stays."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    path = folder / "sts-train.csv"
    given = flags(tiny, folder, tmp_path / "run", "--option", "pretrain")
    real = datasets.read_rows

    def read_rows(source, *rest):
        for number, row in enumerate(real(source, *rest)):
            if source == path and number == 3:
                content = path.read_bytes().replace(b"the", b"not")
                if how == "replaced":
                    path.rename(tmp_path / "old")
                path.write_bytes(content)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "read_rows", read_rows)
        code, _, err = run_script(multitask_classifier, *given)
    assert code == 2
    assert f"{path}: has changed while it was read; start again" in err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ disk and memory


def test_a_folder_that_becomes_read_only_ends_the_run_in_a_line(
    forker, tiny, data, run_script, tmp_path
):
    """Its last good state stays, and once the folder can be written to the run goes on from it."""
    run = tmp_path / "run"
    given = flags(tiny, data, run, "--option", "finetune", "--epochs", "500")
    start(forker, "classifier", given, BOUND)
    wait_for(lambda: (run / "best").exists(), "no evaluation")
    for folder in (run, run / "last"):
        folder.chmod(0o555)
    code, said = ended(forker)
    for folder in (run, run / "last"):
        folder.chmod(0o755)
    assert code == 2, said
    line = said.strip().splitlines()[-1]
    assert "error: " in line and str(run) in line and "ermission denied" in line, said
    state = run / "last/state.safetensors"
    before = read_state(state)[1]["step"]
    pid = start(forker, "classifier", [*given, "--resume"], BOUND)
    wait_for(lambda: f'"step": {before + 3},' in (run / "log.jsonl").read_text(), "nothing more")
    os.kill(pid, signal.SIGTERM)
    code, said = ended(forker)
    assert code == 130, said


def test_a_full_disk_ends_the_run_in_a_line_and_its_state_stays(
    forker, stopped, tmp_path, run_script, tiny, data
):
    """The limit on the size of a file stands for the disk; with room again the run goes on."""
    path = tmp_path / "run/last/state.safetensors"
    before = path.read_bytes()
    pid = start(
        forker,
        "multitask_classifier",
        [*stopped, "--resume"],
        LIMITED.format(len(before) // 2),
    )
    code, said = ended(forker)
    assert pid and code == 2, said
    line = said.strip().splitlines()[-1]
    assert "error: " in line and str(path) in line and "Traceback" not in said
    assert path.read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert run_script(multitask_classifier, *stopped, "--resume")[0] == 0
    whole = flags(tiny, data, tmp_path / "whole", "--option", "finetune")
    assert run_script(multitask_classifier, *whole)[0] == 0
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_a_log_that_cannot_grow_ends_the_run_in_a_line(forker, tiny, data, tmp_path):
    pid = start(forker, "classifier", flags(tiny, data, tmp_path / "run"), LIMITED.format(3000))
    code, said = ended(forker)
    assert pid and code == 2, said
    assert "Traceback" not in said and "File too large" in said.strip().splitlines()[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's
def test_a_folder_that_vanishes_ends_the_run_in_a_line(
    tiny, data, tmp_path, run_script, monkeypatch
):
    def log(self, kind, step, **figures):
        if step == 3:
            shutil.rmtree(self.path)
        real(self, kind, step, **figures)

    real = Run.log
    monkeypatch.setattr(Run, "log", log)
    code, _, err = run_script(classifier, *flags(tiny, data, tmp_path / "run"))
    assert code == 2
    assert "the run's folder has gone" in err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["train", "evaluate"])
@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_too_little_memory_is_told_with_the_batch(
    tiny, data, tmp_path, run_script, monkeypatch, where, kind
):
    """The CPU's error is PyTorch's own; a GPU's is of its class."""

    def forward(self, input_ids, *rest):
        if self.training == (where == "train"):
            if kind == "cpu":
                torch.empty(2**50)
            raise torch.OutOfMemoryError("CUDA out of memory.") if kind == "gpu" else MemoryError
        return real(self, input_ids, *rest)

    real = BertModel.forward
    monkeypatch.setattr(BertModel, "forward", forward)
    given = flags(tiny, data, tmp_path / "run", "--option", "finetune")
    code, _, err = run_script(classifier, *given)
    line = err.strip().splitlines()[-1]
    assert code == 1, err
    assert re.search(r"out of memory on cpu with \d sentences of \d+ tokens", line)
    assert "--batch_size" in line


def test_another_runtime_error_is_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_for(None):
        torch.ones(2, 3) @ torch.ones(2, 3)


# ------------------------------------------------------------------ periods


def test_periods_of_steps_and_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    steps, minutes, never = Period("5"), Period("2m"), Period("0")
    for each in (steps, minutes, never):
        each.start(7)
    assert [steps.over(11), steps.over(12)] == [False, True]
    now = 219.0
    assert not minutes.over(500)
    now = 220.0
    assert minutes.over(8)
    assert not never.over(10**6)


@pytest.mark.parametrize("text", ["", "m", "-1", "1.5m", "10s", "x"])
def test_a_bad_period_is_refused(text, tiny, data, tmp_path, run_script):
    code, _, err = run_script(
        classifier, *flags(tiny, data, tmp_path / "run"), f"--save_every={text}"
    )
    assert code == 2
    assert "--save_every" in err
