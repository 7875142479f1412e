"""The folder of one training run: its record, its log, and the state to resume from.

config.json is written first: arguments, data checksums, versions, hardware. Then log.jsonl grows, a
line per step and per evaluation; best/ holds the best model, last/ the whole training state;
result.json, written last, marks a run that finished.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import distributed
from engine.checkpoint import read_json, read_state, restore_folder, write_json, write_state
from engine.errors import AlreadyFinished, UserError, reading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DRAFT = ".config.json.*.tmp"
PACKAGES = ("numpy", "tokenizers", "scipy", "scikit-learn", "safetensors")
# Arguments that change how a run is stored, not what it computes: a resumed run may change them.
STORAGE_ARGUMENTS = ("save_every", "keep_last", "run_dir")
TENSORBOARD_STEPS = 10  # TensorBoard gets every tenth training step


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Lock a folder, if the file system can; UserError if another process has locked it."""
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: in use by another process") from None
        except OSError as error:
            print(f"note: {path} cannot be locked ({error.strerror})", file=sys.stderr)
        yield
    finally:
        os.close(handle)


@dataclass
class RunDir:
    """A run folder; of several processes only rank 0 writes to it."""

    path: Path
    stage: str | None = None  # added to log lines and states, in runs of several stages
    # Tensors and facts of an interrupted run, for the trainer to take over.
    state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    # Writes a deferred log line: of a step whose loss is still being copied from a GPU.
    pending: Callable[[], None] | None = None
    _start_time: float = field(default_factory=time.perf_counter)
    _log: Any = None
    _tensorboard: Any = None
    _open_files: ExitStack = field(default_factory=ExitStack)  # and the lock

    @staticmethod
    def check(args: Namespace) -> dict[str, Any] | None:
        """The `config.json` of the run that --resume continues; None if a new run starts."""
        return distributed.broadcast_from_rank_zero(lambda: _check(args))

    @classmethod
    def start_or_resume(cls, args: Namespace, **facts: Any) -> "RunDir":
        """Start a run in the new folder `args.run_dir`, or continue the run there.

        facts: further entries of `config.json`; "data" maps each data file to its checksum.
        """
        # Each process reads the files itself, perhaps from its own disk.
        if distributed.broadcast_from_rank_zero(lambda: facts["data"]) != facts["data"]:
            raise UserError("the processes read different data files: copy those of process 0")
        run = cls(args.run_dir)
        try:
            resumed = distributed.broadcast_from_rank_zero(lambda: run._open(args, facts))
            run._load_state()
        except UserError:
            run.close()
            raise
        # The training time of a state tells whether all processes have read the same one.
        seconds = run.state[1]["seconds"] if run.state else None
        if distributed.broadcast_from_rank_zero(lambda: seconds) != seconds:
            raise UserError(
                f"--resume: {run.path} differs between processes: put it on a shared disk"
            )
        if run.writes and resumed:
            with open(run.path / "resumed.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(now := provenance()) + "\n")
            before = read_json(run.path / "config.json")
            changed = now["uncommitted_changes"] or before["uncommitted_changes"]
            if changed or now["commit"] != before["commit"]:
                print("note: the code may have changed since this run began", file=sys.stderr)
        distributed.barrier()  # others may still read the state that rank 0 replaces
        distributed.seed_by_rank(args.seed)
        return run

    def _open(self, args: Namespace, facts: dict[str, Any]) -> bool:
        """Lock the folder, then write config.json or check it against the run to resume.

        Returns whether there is a run to resume.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._open_files.enter_context(folder_lock(self.path))
            recorded = _check(args)  # again: another process may have been faster
            if recorded is None:
                # Not an error: one command line with --resume can be started again and again.
                if args.resume:
                    print(f"{self.path}: nothing to resume there; starting a new run")
                config = {"arguments": plain_arguments(args), **facts, **provenance()}
                write_json(self.path / "config.json", config)
            else:
                _check_inputs(args, recorded, facts)
                # The process may have been killed while replacing one of these.
                for name in ("best", "probe"):
                    restore_folder(self.path / name)
            for draft in self.path.rglob(".*.tmp"):  # of a process that was killed
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            log = open(self.path / "log.jsonl", "ab", buffering=0)  # noqa: SIM115
            self._log = self._open_files.enter_context(log)
            return recorded is not None
        except OSError as error:
            raise UserError(f"--run_dir {self.path}: not writable ({error.strerror})") from None

    def _load_state(self) -> None:
        """Read the last saved state, and truncate the log to where it was saved."""
        path = self.path / "last/state.safetensors"
        length = 0
        if path.exists():
            self.state = read_state(path)
            length = self.state[1]["log"]
            self._start_time -= self.state[1]["seconds"]
        if self._log is not None:
            if length > os.fstat(self._log.fileno()).st_size:
                raise UserError(f"{self._log.name}: has lost lines since {path} was saved")
            # Later lines belong to steps that will be repeated. The file position must follow: the
            # next state records it.
            self._log.seek(self._log.truncate(length))

    @property
    def writes(self) -> bool:
        """Whether this process writes to the folder."""
        return self._log is not None

    def seconds(self) -> float:
        """How long the run has taken, without the time between interruption and resumption."""
        return time.perf_counter() - self._start_time

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append a line to log.jsonl and, if tensorboard is installed, to its event files.

        TensorBoard gets every tenth training step only: an event can take longer than a step on a
        GPU.
        """
        self.flush()
        if not self.writes:
            return
        # Writing to a deleted file succeeds, so the run would train on for nothing.
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path}: the run folder was deleted or emptied during training")
        stage = {"stage": self.stage} if self.stage else {}
        entry = {"kind": kind, "step": step, **stage, **values}
        # Unbuffered, so that a process that is killed loses no line.
        try:
            self._log.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        except OSError as error:
            error.filename = self._log.name
            raise
        if self._tensorboard is None and util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Hide events of an interrupted run from this step on.
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
            self._open_files.callback(self._tensorboard.close)
        shown = kind != "train" or step % TENSORBOARD_STEPS == 0
        if self._tensorboard is not None and shown:
            tag = "/".join(filter(None, [self.stage, kind, values.get("task")]))
            for name, value in _numbers(tag, values):
                self._tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the deferred log line, if there is one."""
        write, self.pending = self.pending, None
        if write is not None:
            write()

    def save_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the state in last/ with this one."""
        if not self.writes:
            return
        os.fsync(self._log.fileno())  # the state records the length of the log
        progress = {"stage": self.stage, "log": self._log.tell(), "seconds": self.seconds()}
        write_state(self.path / "last/state.safetensors", tensors, {**facts, **progress})

    def finish(self, result: dict[str, Any], keep_last: bool) -> None:
        """Write result.json, which marks a finished run, and delete last/ unless it is kept."""
        if self.writes:
            write_json(self.path / "result.json", result)
            # The training state is no longer needed, and three times as large as the model.
            for name in ["probe"] if keep_last else ["probe", "last"]:
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Close the log and release the lock."""
        with suppress(OSError):  # a full disk was already reported by `log`
            self._open_files.close()


def _check(args: Namespace) -> dict[str, Any] | None:
    """`RunDir.check` for one process."""
    path, config = args.run_dir, args.run_dir / "config.json"
    try:
        # A process killed while starting the run may have left a draft of config.json.
        if not path.exists() or (path.is_dir() and all(f.match(DRAFT) for f in path.iterdir())):
            return None
    except OSError as error:
        raise UserError(f"--run_dir {path}: cannot be used ({error.strerror})") from None
    if not path.is_dir():
        raise UserError(f"--run_dir {path}: is a file; name a new folder")
    if not args.resume:
        raise UserError(
            f"--run_dir {path}: not empty; name a new folder, or --resume the run there"
        )
    recorded, given = read_json(config), plain_arguments(args)
    with reading(config, "the record of a run"):
        before = dict(recorded["arguments"])
    if "model_checksum" in recorded and "model" in before:  # compared by weights, not by name
        before["model"] = given["model"]
    # Any difference, even in the set of flags, would make it another run.
    unknown = sorted(set(before) ^ set(given))
    if unknown:
        raise UserError(
            f"--resume: {path} was made by another script or another version of it, which differ in"
            f" --{unknown[0]}; start a new --run_dir"
        )
    changed = [n for n in sorted(given) if before[n] != given[n] and n not in STORAGE_ARGUMENTS]
    if changed:
        listed = ", ".join(f"--{name} was {before[name]} and is {given[name]}" for name in changed)
        raise UserError(f"--resume: {path} was made with other arguments: {listed}")
    if (path / "result.json").exists():
        raise AlreadyFinished(f"{path}: has finished (result.json); nothing is changed")
    return recorded


def _check_inputs(args: Namespace, recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    """UserError unless data files and model are those that the run started with."""
    before = {os.path.abspath(name): checksum for name, checksum in recorded["data"].items()}
    for name, checksum in facts["data"].items():
        if before.get(os.path.abspath(name)) != checksum:
            raise UserError(f"--resume: {name} has changed since the run began")
    # Frozen weights are not in the saved state: they would come from the changed model.
    checksum = facts.get("model_checksum")
    if recorded.get("model_checksum", checksum) != checksum:
        raise UserError(f"--resume: --model {args.model} has changed since the run began")


def plain_arguments(args: Namespace) -> dict[str, Any]:
    """The command line as JSON values, without --resume.

    Paths are absolute, so a record does not depend on the working directory.
    """
    plain = {k: os.path.abspath(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {name: value for name, value in plain.items() if name != "resume"}


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in nested dicts, named by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{tag}/{key}", inner)
    elif isinstance(value, int | float):
        yield tag, value


def provenance() -> dict[str, Any]:
    """What is needed to repeat a run: command, commit, versions, hardware."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": {
            **{name: metadata.version(name) for name in PACKAGES},
            "torch": str(torch.__version__),  # with its build, such as +cpu
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "processes": distributed.world_size(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git(*arguments: str) -> str | None:
    """git's output for the project's own checkout; None outside of one."""
    # Not the working directory, which may belong to another project.
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        # GIT_DIR and the like, set by a hook for example, would mean another repository.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(root), *arguments]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, env=env, **options).stdout.strip()
    return None
