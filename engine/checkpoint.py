"""Reading and writing files: they appear whole or not at all, and loading executes nothing."""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import UserError, reading


def read_text(path: Path, kind: str = "a text file in UTF-8") -> str:
    """The contents of a UTF-8 text file, line endings as they are."""
    with reading(path, kind):
        return path.read_bytes().decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError if it is missing, damaged or something else."""
    with reading(path, "a JSON object"):
        value = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"found a {type(value).__name__}")
        return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file, or of a `.bin` file that torch.save wrote.

    With `weights_only`, torch.load calls only the few functions that rebuild tensors.
    """
    with reading(path, "a file of named tensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".safetensors":
            return load_file(path)
        # safetensors cannot hold code. A pickle can: it is a program that builds objects.
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:  # torch's own message suggests weights_only=False
            raise ValueError("holds more than tensors; nothing in it was executed") from None
        if not isinstance(tensors, dict) or not all(map(_is_named_tensor, tensors.items())):
            raise TypeError("holds something other than named tensors with all their numbers")
        return tensors


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return isinstance(name, str) and dense


def check_weight(name: str, tensor: Tensor, source: Path) -> None:
    """UserError unless a weight consists of finite floating-point numbers."""
    # With NaN weights, a model would train for hours and learn nothing.
    if not tensor.is_floating_point():
        raise UserError(f"{source}: {name} has dtype {tensor.dtype}, expected floating point")
    if not tensor.float().isfinite().all():
        raise UserError(f"{source}: {name} contains NaN or infinity: use an earlier checkpoint")


def check_new_file(path: Path) -> None:
    """UserError if an output file that the user named exists already or cannot be created."""
    # A run of hours must not fail at the end because a file cannot be written.
    with reading(path, "a new file"):
        if path.exists():
            raise UserError(f"{path}: exists and is not overwritten; name another file")
        parents = path.absolute().parents
        folder = next(parent for parent in parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(f"{path}: {folder} is not a folder that you can write to")


def _temporary(path: Path, suffix: str = "tmp") -> Path:
    """A file name beside `path`, unique to this process, within the limit of 255 bytes."""
    name = path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    return path.with_name(f".{name}.{os.getpid()}.{suffix}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename between file systems would be a copy.
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the contents must be on disk before the name is
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` only if the block succeeds.

    A process killed between the two renames leaves the old folder under another name;
    `restore_folder` puts it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _temporary(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():  # a folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Finish or undo the replacement of a process that was killed inside `atomic_folder`."""
    # If the new folder is in place, only the deletion of the old one was missing.
    for old in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, line endings as given."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors writes them, sorted by name."""
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, sorted by name: equal tensors give equal bytes."""
    with atomic_file(path) as temporary:
        try:
            save_file(_on_cpu(tensors), temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # such as a full disk
            raise UserError(f"{path}: cannot be written ({error})") from None
        umask = os.umask(0)
        os.umask(umask)
        with suppress(OSError):  # file systems without permissions, such as SMB
            os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files private to the owner


def write_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and a JSON object as one file, so that neither is ever newer than the other."""
    tensors = _on_cpu(tensors)  # once, for the checksum and the file
    # The facts travel in the header of the tensors' file.
    text = json.dumps(facts, allow_nan=False)
    write_tensors(path, tensors, {"facts": text, "checksum": checksum(tensors, text)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote; UserError if a single bit of it has changed."""
    tensors = read_tensors(path)
    with reading(path, "a saved training state"):
        with safe_open(path, "pt") as file:
            header = file.metadata()
        if checksum(tensors, header["facts"]) != header["checksum"]:
            raise ValueError("wrong checksum")
        return tensors, json.loads(header["facts"])


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """CRC-32 of all names, dtypes, shapes and bytes: detects damage, not tampering."""
    # Names and shapes too: the same bytes under other names would be another state.
    value = zlib.crc32(text.encode())
    for name, tensor in _on_cpu(tensors).items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"
