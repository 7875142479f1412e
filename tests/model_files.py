"""Model folders for tests to break, and the check that a refusal is one line."""

import json
import resource
import signal
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

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 12, "max_position_embeddings": 16}
TEXTS = ["the film is not great ! " * 9, "café [SEP] 中文 $A \u200b", ""]


def names(folder):
    """Every file and folder directly inside, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def within(seconds, mebibytes):
    """Fail a block that takes longer or reserves more memory."""

    def stop(*_):
        pytest.fail(f"not done within {seconds} s")  # no Exception, which may become a refusal

    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    size = pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, memory[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def refused(call, *parts, mebibytes=10_000):
    """The message of the UserError that `call` must raise: one line that contains every part."""
    with within(20, mebibytes), pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1100
    for part in parts:
        assert str(part) in message
    return message


def edit_json(path, *keys, **values):
    """Change values of the object at these keys inside a JSON file."""
    tree = place = json.loads(path.read_bytes())
    for key in keys:
        place = place[key]
    place.update(values)
    path.write_text(json.dumps(tree), encoding="utf-8")


def edit_tensors(path, **changed):
    """Replace, add or (None) drop tensors of a safetensors file."""
    tensors = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def save_as_pickle(folder, zipped=True):
    """Replace model.safetensors by a pickle, in today's format or that of before PyTorch 1.6."""
    tensors, path = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path


def save_small_model(tiny, folder):
    """A model with a head for each task, as `save_pretrained` writes it."""
    tokenizer = BertTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **SIZES))
    MultitaskBERT(bert, list(TASKS.values()), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def use_model(folder):
    """Load all that a model folder contains, and run it."""
    MultitaskBERT.from_pretrained(folder).encode(TEXTS)
