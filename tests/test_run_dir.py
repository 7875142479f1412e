"""Run folders: what they record, what --resume refuses, locks, full disks, and what stays."""

import errno
import json
import os
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from engine import run_dir
from engine.checkpoint import read_json
from engine.errors import AlreadyFinished, UserError
from engine.run_dir import RunDir, provenance

DATA = {"train.csv": "abc", "dev.csv": "def"}


def arguments(path: Path, *, resume: bool = False, **changes) -> Namespace:
    defaults = {"lr": 1e-5, "model": "a model", "data_dir": Path("data"), "save_every": "10m"}
    defaults["keep_last"] = False
    return Namespace(run_dir=path, resume=resume, seed=3, **{**defaults, **changes})


def start(path: Path, **changes) -> RunDir:
    return RunDir.start_or_resume(arguments(path, **changes), data=DATA, model_checksum="weights")


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A run that saved its state after one line of the log and was killed after two."""
    run = start(tmp_path / "run")
    run.log("train", 0, loss=0.5)
    run.save_state({"weight": torch.ones(3)}, {"step": 1})
    run.log("train", 1, loss=0.25)
    run.close()
    return tmp_path / "run"


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the list of attempts to resume."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != "resumed.jsonl"}


def refused(
    path: Path,
    *,
    resume: bool = True,
    data: dict = DATA,
    model_checksum: str = "weights",
    **changes,
) -> str:
    """The line with which a run is refused, which leaves the folder as it is."""
    before = contents(path)
    args = arguments(path, resume=resume, **changes)
    with pytest.raises(UserError) as caught:  # both, as the scripts do
        RunDir.check(args)
        RunDir.start_or_resume(args, data=data, model_checksum=model_checksum)
    assert contents(path) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_records_what_it_takes_to_repeat_it(tmp_path, monkeypatch):
    """config.json first, a line in the log per call and at once, result.json last."""
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--lr", "1e-5", "--note", "two words"])
    folder = tmp_path / "runs" / "one"
    run = RunDir.start_or_resume(arguments(folder, note="día"), data=DATA, device="cpu")
    config = read_json(folder / "config.json")
    assert config["arguments"]["note"] == "día" and config["arguments"]["lr"] == 1e-5
    assert config["arguments"]["data_dir"] == str(Path("data").absolute())
    assert config["data"] == DATA and config["device"] == "cpu"
    assert shlex.split(config["command"])[1:] == sys.argv
    libraries = {"torch": torch.__version__, "cuda": torch.version.cuda}
    libraries["cudnn"] = torch.backends.cudnn.version()
    assert libraries.items() <= config["versions"].items()
    assert config["hardware"]["threads"] == torch.get_num_threads()
    assert config["python"] == sys.version.split()[0] and config["processes"] == 1
    assert {"commit", "uncommitted_changes", "started"} <= config.keys()
    run.log("train", 1, loss=0.5)
    run.stage = "probe"
    run.log("dev", 2, tasks={"sst": {"accuracy": 0.25}}, note="line\nbreak “é”")
    first, second, rest = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")
    dev = {"kind": "dev", "step": 2, "stage": "probe", "tasks": {"sst": {"accuracy": 0.25}}}
    assert json.loads(first) == {"kind": "train", "step": 1, "loss": 0.5}
    assert json.loads(second) == {**dev, "note": "line\nbreak “é”"} and rest == ""
    assert not (folder / "result.json").exists()
    run.finish({"accuracy": 0.25}, keep_last=False)
    assert read_json(folder / "result.json") == {"accuracy": 0.25}


def test_tensorboard_gets_every_tenth_training_step_and_all_evaluations(tmp_path, monkeypatch):
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(run_dir.util, "find_spec", lambda name: True)
    run = start(tmp_path / "run")
    for step in range(7, 23):
        run.log("train", step, task="sst", loss=0.5)
    run.log("dev", 23, score=0.25)
    board.SummaryWriter.assert_called_once_with(str(tmp_path / "run/tensorboard"), purge_step=7)
    given = [call.args for call in board.SummaryWriter().add_scalar.call_args_list]
    expected = [("train/sst/loss", 0.5, 10), ("train/sst/loss", 0.5, 20), ("dev/score", 0.25, 23)]
    assert given == expected
    assert (tmp_path / "run/log.jsonl").read_bytes().count(b"\n") == 17


@pytest.mark.parametrize("keep_last", [False, True])
def test_a_finished_run_keeps_its_training_state_only_on_request(interrupted, keep_last):
    run = start(interrupted, resume=True)
    (interrupted / "probe").mkdir()
    run.finish({}, keep_last)
    assert (interrupted / "last").exists() == keep_last
    assert not (interrupted / "probe").exists()
    with pytest.raises(AlreadyFinished, match="nothing is changed"):
        RunDir.check(arguments(interrupted, resume=True))


def test_a_folder_in_use_is_refused_and_not_touched(interrupted, tmp_path, capsys):
    assert "not empty" in refused(interrupted, resume=False)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".notes").write_text("mine", encoding="utf-8")
    assert "not empty" in refused(hidden, resume=False)
    assert "is a file" in refused(hidden / ".notes", resume=False)
    assert "--run_dir" in refused(hidden / ".notes" / "run", resume=False)
    with pytest.raises(UserError, match="File name too long"):
        RunDir.check(arguments(tmp_path / ("n" * 300)))
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty", resume=True).close()
    assert "nothing to resume" in capsys.readouterr().out
    assert not (tmp_path / "empty/resumed.jsonl").exists()


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    """The second has found the folder empty before the first writes to it."""
    path = tmp_path / "run"
    lock = run_dir.folder_lock

    def late(path):
        monkeypatch.setattr(run_dir, "folder_lock", lock)
        start(path, lr=1.0).close()
        return lock(path)

    assert RunDir.check(arguments(path, lr=2.0)) is None
    monkeypatch.setattr(run_dir, "folder_lock", late)
    with pytest.raises(UserError, match="not empty"):
        start(path, lr=2.0)
    assert read_json(path / "config.json")["arguments"]["lr"] == 1.0


def test_a_run_killed_while_it_started_leaves_a_folder_that_can_be_used(tmp_path):
    """All that it leaves is a draft of config.json."""
    (tmp_path / ".config.json.123.tmp").write_text("{", encoding="utf-8")
    start(tmp_path).close()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_another_process_uses_is_refused(interrupted):
    run = start(interrupted, resume=True)
    assert "in use by another process" in refused(interrupted)
    run.close()
    start(interrupted, resume=True).close()


def test_a_file_system_without_locks_only_gets_a_note(tmp_path, monkeypatch, capsys):
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(run_dir.fcntl, "flock", Mock(side_effect=error))
    start(tmp_path / "run").close()
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_resuming_returns_the_state_and_cuts_the_log_back_to_it(interrupted):
    run = start(interrupted, resume=True)
    tensors, facts = run.state
    assert torch.equal(tensors["weight"], torch.ones(3)) and facts["step"] == 1
    assert len((interrupted / "log.jsonl").read_text().splitlines()) == 1
    assert run.seconds() >= facts["seconds"]
    run.close()
    again = (interrupted / "resumed.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"command", "versions", "started"} <= json.loads(again[0]).keys()


def test_other_arguments_and_data_are_refused_by_name(interrupted):
    line = refused(interrupted, lr=2.0, data_dir=Path("/b"))
    assert f"--data_dir was {Path('data').absolute()} and is /b, --lr was 1e-05 and is 2.0" in line
    assert "another script" in (line := refused(interrupted, option="x")) and "--option" in line
    line = refused(interrupted, data={**DATA, "dev.csv": "other"})
    assert "dev.csv has changed since the run began" in line
    line = refused(interrupted, model_checksum="other weights")
    assert "--model a model has changed since the run began" in line
    # What only changes how a run is stored may change; a refused run has left no lock.
    start(interrupted, resume=True, save_every="5", keep_last=True).close()


def test_a_run_resumes_after_it_was_moved_and_from_another_directory(
    interrupted, tmp_path, monkeypatch
):
    """Also with the same model by another name."""
    interrupted.rename(tmp_path / "moved")
    data_dir = Path("data").absolute()
    monkeypatch.chdir(tmp_path)
    start(Path("moved"), resume=True, data_dir=data_dir, model="a copy").close()


def test_resuming_with_other_code_is_noted(interrupted, monkeypatch, capsys):
    recorded = read_json(interrupted / "config.json")
    for commit, changes, noted in (("x", False, True), (None, True, True), (None, False, False)):
        now = {"commit": commit or recorded["commit"], "uncommitted_changes": changes}
        monkeypatch.setattr(run_dir, "provenance", lambda now=now: now)
        config = {**recorded, "uncommitted_changes": False}
        (interrupted / "config.json").write_text(json.dumps(config), encoding="utf-8")
        start(interrupted, resume=True).close()
        assert ("the code may have changed" in capsys.readouterr().err) == noted


def test_the_commit_is_the_projects_own_whatever_the_environment(tmp_path, monkeypatch):
    commit = provenance()["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as a hook of another repository sets it
    monkeypatch.chdir(tmp_path)
    assert provenance()["commit"] == commit


def test_a_damaged_record_state_or_log_is_refused(interrupted):
    damages = {"config.json": [b"{", b"[]", b"{}", b'{"arguments": 3}'], "log.jsonl": [b""]}
    for name, damaged in {**damages, "last/state.safetensors": [b"", b"x" * 500]}.items():
        path = interrupted / name
        whole = path.read_bytes()
        for content in damaged:
            path.write_bytes(content)
            assert str(path) in refused(interrupted)
        path.write_bytes(whole)
    start(interrupted, resume=True).close()


def test_a_folder_that_vanishes_is_named(tmp_path):
    run = start(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="was deleted or emptied during training"):
        run.log("train", 1, loss=1.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_named(interrupted):
    run = start(interrupted, resume=True)
    with open("/dev/full", "ab", buffering=0) as full, pytest.raises(OSError) as caught:
        run._log = full
        run.log("train", 1, loss=1.0)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"
    run.close()
