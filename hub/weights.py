"""Load a checkpoint's weights into a BERT, whatever prefixes and old names it uses."""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import check_weight
from engine.errors import UserError

# The encoder's parts; any other top-level name in a checkpoint is a head.
ENCODER_PARTS = ("embeddings", "encoder", "pooler")
# Heads that are skipped without a note: for pre-training, classification, question answering.
KNOWN_HEADS = ("cls", "classifier", "qa_outputs")
IGNORED = re.compile(rf"({'|'.join(KNOWN_HEADS)})\..*|embeddings\.position_ids")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile


def plain_name(stored: str) -> str:
    """A stored name without wrappers, and with PyTorch's names of LayerNorm's weights."""
    # The published bert-base-uncased still has TensorFlow's: gamma and beta.
    name = WRAPPERS.sub("", stored).replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def encoder_names(tensors: dict[str, Tensor], source: Path) -> dict[str, str]:
    """The encoder's tensors in a checkpoint: stored name -> HuggingFace's name in a plain model."""
    names = {stored: plain_name(stored) for stored in tensors}
    if any(name.startswith("bert.") for name in names.values()):
        # A model with heads: tensors outside `bert.` and the encoder belong to the heads.
        heads = {name.split(".")[0] for name in names.values()} - {"bert", *ENCODER_PARTS}
        names = {stored: n for stored, n in names.items() if n.split(".")[0] not in heads}
        names = {stored: name.removeprefix("bert.") for stored, name in names.items()}
        if heads := sorted(heads - {*KNOWN_HEADS}):
            print(f"note: {source}: not loaded, as of a head: {', '.join(heads)}", file=sys.stderr)
    return {stored: name for stored, name in names.items() if not IGNORED.fullmatch(name)}


@torch.no_grad()
def load_weights(
    expected: dict[str, Tensor],
    tensors: dict[str, Tensor],
    source: Path,
    pooler: dict[str, Tensor],
) -> None:
    """Copy the tensors of a checkpoint into those `expected` by name, strictly both ways.

    expected: a model's parameters under HuggingFace's names. A `bert.` prefix, TensorFlow's `gamma`
    and `beta`, and heads are accepted. `pooler` overrides the checkpoint's own; if neither has one,
    the pooler keeps its random weights. UserError names a tensor that is missing, unexpected,
    duplicate or misshapen.
    """
    # Nothing is skipped silently: a partly loaded checkpoint would train to a bad score.
    weights: dict[str, Tensor] = {}
    for stored, name in encoder_names(tensors, source).items():
        tensor = tensors[stored]
        if name not in expected:
            raise UserError(f"{source}: {stored} is not a weight of the model in config.json")
        if name in weights:
            raise UserError(f"{source}: {stored} appears twice, under two names")
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source}: {stored} has shape {tuple(tensor.shape)}, but config.json makes it"
                f" {tuple(expected[name].shape)}"
            )
        check_weight(stored, tensor, source)
        weights[name] = tensor
    missing = [name for name in expected if name not in weights]
    if missing and missing != [name for name in expected if name.startswith("pooler.")]:
        raise UserError(f"{source}: {missing[0]} is missing")
    if missing and not pooler:
        print(f"note: {source} has no pooler; its weights are drawn at random", file=sys.stderr)
    for name, tensor in (weights | pooler).items():
        expected[name].copy_(tensor)
