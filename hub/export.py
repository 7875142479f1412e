"""Files for other software: sentence-transformers modules, model cards, ONNX."""

import logging
import re
import warnings
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.errors import UserError
from hub.models import BUNDLED, module_paths, read_weights

# Its modules in order -> their folders, in the format of older versions: newer ones read both.
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
TANH = "torch.nn.modules.activation.Tanh"


def write_modules(folder: Path, pooling: str, max_length: int, pooler: nn.Linear) -> None:
    """Write files that make `SentenceTransformer(folder).encode` equal `SentenceEncoder.encode`.

    With pooling `pooler`, BERT's dense layer `pooler` becomes a separate module, because
    sentence-transformers does not count it as part of the encoder.
    """
    # modules.json lists the modules in order; each has a folder with its configuration.
    width, names = pooler.in_features, list(MODULES)[: 3 if pooling == "pooler" else 2]
    prefix = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "path": MODULES[name], "type": prefix + name}
        for i, name in enumerate(names)
    ]
    checkpoint.write_json(folder / "modules.json", modules)
    checkpoint.write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length})
    modes = {"cls_token": pooling != "mean", "mean_tokens": pooling == "mean"}
    config = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    checkpoint.write_json(
        folder / "1_Pooling/config.json", {"word_embedding_dimension": width, **config}
    )
    # Pooler, as a dense layer with tanh on the embedding of [CLS].
    if pooling == "pooler":
        shape = {"in_features": width, "out_features": width, "bias": True}
        checkpoint.write_json(
            folder / "2_Dense/config.json", {**shape, "activation_function": TANH}
        )
        tensors = {f"linear.{name}": tensor for name, tensor in pooler.state_dict().items()}
        checkpoint.write_tensors(folder / "2_Dense/model.safetensors", tensors)


def read_pooler(folder: Path, width: int) -> dict[str, Tensor]:
    """BERT's pooler as sentence-transformers trained it, under HuggingFace's names.

    sentence-transformers trains the dense module that `write_modules` writes, not the pooler in the
    encoder's weights. Empty if modules.json lists no such module: dense + tanh of hidden size
    `width` on the first token.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    # Other folders may be left over from a model that was saved here before.
    modules = module_paths(path)
    if list(modules.values())[:3] != list(MODULES):
        return {}
    paths = [folder / name for name in modules]
    # Another dense module, such as a projection to fewer features, is not BERT's pooler.
    pooling, dense = (checkpoint.read_json(path / "config.json") for path in paths[1:3])
    first_token = pooling.get("pooling_mode") == "cls" or pooling.get("pooling_mode_cls_token")
    wanted = {"in_features": width, "out_features": width, "activation_function": TANH}
    plain = dense.get("bias", True) and not dense.get("use_residual")
    if not (first_token and plain and wanted.items() <= dense.items()):
        return {}
    tensors, source = read_weights(paths[2])
    pooler = {}
    for name, shape in {"weight": (width, width), "bias": (width,)}.items():
        tensor = tensors.get(f"linear.{name}")
        if tensor is None or tensor.shape != shape:
            raise UserError(f"{source}: linear.{name} of shape {shape} is missing: fetch it again")
        checkpoint.check_weight(f"linear.{name}", tensor, source)
        pooler[f"pooler.dense.{name}"] = tensor
    return pooler


# The metrics of result.json that are single numbers.
CARD_METRICS = ("accuracy", "macro_f1", "pearson", "spearman")
CARD = """---
{base_model}library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [bert, feature-extraction, sentence-similarity]
---

# {name}

A BERT encoder trained from `{base}` by

    {command}

(commit {commit}, {precision}) on {data}.

| dev set | metric | value |
|---|---|---|
{lines}

It loads in `transformers` and in `sentence-transformers`, whose `encode` returns its embeddings
({pooling} pooling):

```python
from sentence_transformers import SentenceTransformer

SentenceTransformer("THIS_FOLDER").encode(["A fine film.", "Dull."])
```

`MultitaskBERT.from_pretrained("THIS_FOLDER")` of the software that trained it loads the heads too.
"""


def model_card(run: Path, result: dict[str, Any]) -> str:
    """The README.md of a run's best/: base model, command, data and dev metrics."""
    config = checkpoint.read_json(run / "config.json")
    # File names without folders: a published card should not show a user's paths.
    rows, files = config["rows"]["train"], config["files"]
    data = [f"{Path(path).name} ({rows[task]:,} rows)" for task, path in files["train"].items()]
    # A row of the table for each metric that is a single number.
    lines = [
        f"| {Path(files['dev'][task]).name} | {name} | {metrics[name]:.4f} |"
        for task, metrics in result["dev"].items()
        for name in CARD_METRICS
        if name in metrics
    ]
    base = config["arguments"]["model"]
    # The hub refuses a base_model that is not a hub id, such as the folder of another run.
    hub_id = f"sentence-transformers/{base}" if base in BUNDLED else base
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) and not Path(base).exists()
    return CARD.format(
        base=base if is_hub_id else Path(base).name,
        base_model=f"base_model: {hub_id}\n" if is_hub_id else "",
        name=run.resolve().name,
        command=config["command"],
        commit=(config["commit"] or "unknown")[:7],
        precision=config["precision"],
        data=", ".join(data),
        lines="\n".join(lines),
        pooling=checkpoint.read_json(run / "best" / "heads.json")["pooling"],
    )


def write_onnx(path: Path, encoder: nn.Module, outputs: Sequence[str], max_length: int) -> None:
    """Export an encoder to ONNX, for batches of any size and sentences of any length.

    encoder: its `forward` takes input_ids, attention_mask and token_type_ids, (B, T) int64.
    outputs: a name for each tensor that it returns. max_length: the model's limit in tokens.
    """
    # Development packages: most users never export.
    missing = [name for name in ("onnx", "onnxscript") if util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export onnx: the package {missing[0]} is missing: run ./setup.sh --dev")
    # The input names of transformers' exports, which other software expects.
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=max_length)}
    # Sizes other than 0 and 1, which the exporter would treat as constants; three tensors, because
    # it would merge one that is passed three times.
    example = tuple(torch.zeros(2, 3, dtype=torch.int64) for _ in inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Silence the exporter's notes: it raises an exception if something goes wrong.
    with checkpoint.atomic_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            example,
            temporary,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(sizes,) * len(inputs),
            external_data=False,
            verbose=False,
        )
