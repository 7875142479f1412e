"""Model folders for tests to break, and the check that a refusal is one line."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bert import BertConfig, BertModel
from engine.errors import UserError
from model import MultitaskBERT
from tasks import TASKS
from tokenizer import BertTokenizer


def names(folder: Path) -> list[str]:
    """Every file and folder directly inside, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


class TooSlow(BaseException):
    """No Exception, which the code under test may turn into a refusal."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail a block that takes longer: opening a pipe, for example, would wait forever."""

    def stop(*_: object) -> None:
        raise TooSlow(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def within_memory(mebibytes: int) -> Iterator[None]:
    """Let a block reserve only so much more memory than the process has."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(call: Callable[[], object], *parts: object) -> str:
    """The message of the UserError that `call` must raise: one line that contains every part."""
    with within(20), pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1100
    for part in parts:
        assert str(part) in message
    return message


def edit_json(path: Path, *keys: str, **values: object) -> None:
    """Change values of the object at these keys inside a JSON file."""
    tree = json.loads(path.read_bytes())
    place = tree
    for key in keys:
        place = place[key]
    place.update(values)
    path.write_text(json.dumps(tree), encoding="utf-8")


def edit_tensors(path: Path, **changed: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a safetensors file."""
    tensors = load_file(path)
    for name, tensor in changed.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def save_as_pickle(folder: Path, zipped: bool = True) -> Path:
    """Replace model.safetensors by a pickle, in today's format or that of before PyTorch 1.6."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path


def save_as_shards(folder: Path, kind: str = "model.safetensors") -> Path:
    """Replace model.safetensors by two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"shard-{i % 2}{Path(kind).suffix}" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        (save_file if kind.endswith(".safetensors") else torch.save)(part, folder / file)
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


def save_small_model(tiny: Path, folder: Path) -> Path:
    """A model with a head for each task, as `save_pretrained` writes it."""
    tokenizer = BertTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    model = MultitaskBERT(BertModel(config), list(TASKS.values()), tokenizer=tokenizer)
    model.save_pretrained(folder)
    return folder


TEXTS = ["the film is not great ! " * 9, "café [SEP] 中文 $A \u200b", ""]


def use_model(folder: Path) -> None:
    """Load all that a model folder contains, and run it."""
    MultitaskBERT.from_pretrained(folder).encode(TEXTS)
