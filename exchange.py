"""Models to and from other people's software: sentence-transformers, model cards, ONNX.

What a model folder holds for `transformers` comes from `bert.py` and `tokenizer.py`; this is what
the others want beside.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import (
    UserError,
    check_weight,
    read_json,
    read_weights,
    whole_file,
    write_json,
    write_tensors,
    write_text,
)

# ---------------------------------------------------------------------------- sentence-transformers

# Its modules, in order -> their folders. Their names and settings are written as its older versions
# did, which its newer ones read too.
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
TANH = "torch.nn.modules.activation.Tanh"


def write_modules(folder: Path, pooling: str, max_length: int, pooler: nn.Linear) -> None:
    """Write what makes `SentenceTransformer(folder).encode` the same as `MultitaskBERT.encode`.

    Args:
        folder: holds, or will hold, encoder and tokenizer.
        pooling: `pooler`, `cls` or `mean` (`bert.pool`).
        max_length: in tokens; longer sentences are truncated.
        pooler: BERT's own. With the pooling `pooler` it is written once more, as a module: there
            dense + tanh is no part of the encoder.
    """
    width = pooler.in_features
    names = list(MODULES) if pooling == "pooler" else list(MODULES)[:2]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": MODULES[name],
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    write_text(folder / "modules.json", json.dumps(modules, indent=2) + "\n")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length})
    write_json(
        folder / MODULES["Pooling"] / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling != "mean",
            "pooling_mode_mean_tokens": pooling == "mean",
        },
    )
    if pooling == "pooler":
        dense = folder / MODULES["Dense"]
        shape = {"in_features": width, "out_features": width, "bias": True}
        write_json(dense / "config.json", {**shape, "activation_function": TANH})
        tensors = {f"linear.{name}": tensor for name, tensor in pooler.state_dict().items()}
        write_tensors(dense / "model.safetensors", tensors)


def read_pooler(folder: Path, width: int) -> dict[str, Tensor]:
    """BERT's pooler as sentence-transformers trained it, by HuggingFace's names of its tensors.

    It trains the module that `write_modules` describes, and leaves the pooler among the encoder's
    weights as it was. The result is empty where a folder has no such module: dense + tanh on the
    first token, as wide as BERT (`width`).

    Raises:
        UserError: a damaged file.
    """
    paths = [folder / MODULES[name] / "config.json" for name in ("Pooling", "Dense")]
    if not all(path.is_file() for path in paths):
        return {}
    pooling, dense = map(read_json, paths)
    first_token = pooling.get("pooling_mode") == "cls" or pooling.get("pooling_mode_cls_token")
    wanted = {"in_features": width, "out_features": width, "activation_function": TANH}
    plain = dense.get("bias", True) and not dense.get("use_residual")
    if not (first_token and plain and all(dense.get(key) == wanted[key] for key in wanted)):
        return {}
    tensors, source = read_weights(folder / MODULES["Dense"])
    shapes = {"weight": (width, width), "bias": (width,)}
    for name, shape in shapes.items():
        tensor = tensors.get(f"linear.{name}")
        if tensor is None or tensor.shape != shape:
            raise UserError(f"{source}: linear.{name} of shape {shape} is missing: fetch it again")
        check_weight(f"linear.{name}", tensor, source)
    return {f"pooler.dense.{name}": tensors[f"linear.{name}"] for name in shapes}


# ---------------------------------------------------------------------------- model cards

# Figures that a card tells of, and the hub's names of them.
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
CARD = """---
{front}
---

# {name}

A BERT encoder that was trained from `{base}` by

    {command}

(commit {commit}, {precision}). Trained on {data}.

| dev | metric | |
|---|---|---|
{lines}

It loads in `transformers` and in `sentence-transformers`, whose `encode` gives its embeddings
({pooling} pooling):

```python
from sentence_transformers import SentenceTransformer

SentenceTransformer("THIS_FOLDER").encode(["A fine film.", "Dull."])
```

`MultitaskBERT.from_pretrained("THIS_FOLDER")` of the software that trained it has the heads too.
"""


def model_card(run: Path, result: dict[str, Any]) -> str:
    """The README.md of a run's best/: what it was made from and how, and its dev figures.

    Args:
        run: the run's folder, whose `config.json` is read.
        result: what `result.json` holds, or will.
    """
    from huggingface_hub import EvalResult, ModelCardData  # late: only who trains needs it

    config = read_json(run / "config.json")
    rows = config["rows"]["train"]
    train, dev = (
        {task: Path(path).name for task, path in config["files"][split].items()}
        for split in ("train", "dev")
    )
    figures = [
        (task, name, value)
        for task, of in result["dev"].items()
        for name, value in of.items()
        if name in METRICS
    ]
    front = ModelCardData(
        base_model=config["arguments"]["model"],
        datasets=list(train.values()),
        metrics=list(dict.fromkeys(METRICS[name] for _, name, _ in figures)),
        command=config["command"],
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["bert", "feature-extraction", "sentence-similarity"],
        model_name=run.resolve().name,
        eval_results=[
            EvalResult(
                task_type="text-classification"
                if "accuracy" in result["dev"][task]
                else "sentence-similarity",
                task_name=task,
                dataset_type=dev[task],
                dataset_name=dev[task],
                metric_type=METRICS[name],
                metric_value=value,
            )
            for task, name, value in figures
        ],
    )
    return CARD.format(
        front=front.to_yaml(),
        name=front.model_name,
        base=front.base_model,
        command=front.command,
        commit=(config["commit"] or "unknown")[:7],
        precision=config["precision"],
        data=", ".join(f"{file} ({rows[task]:,} rows)" for task, file in train.items()),
        pooling=read_json(run / "best" / "heads.json")["pooling"],
        lines="\n".join(f"| {dev[task]} | {name} | {value:.4f} |" for task, name, value in figures),
    )


# ---------------------------------------------------------------------------- ONNX


def write_onnx(path: Path, encoder: nn.Module, outputs: Sequence[str], longest: int) -> None:
    """Write an encoder for ONNX runtimes: for batches of any size, and sentences of any length.

    Args:
        path: the file, which will hold the weights too.
        encoder: its `forward` takes input_ids, attention_mask and token_type_ids, (B, T) int64.
        outputs: the names of what it returns, a tensor each.
        longest: the most tokens that a sentence may have.

    Raises:
        UserError: a package that PyTorch needs for it is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export onnx: the package {missing[0]} is missing: run ./setup.sh --dev")
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    # Any sizes but 0 and 1, which would be fixed; one tensor thrice would become one input.
    example = tuple(torch.zeros(2, 3, dtype=torch.int64) for _ in inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with whole_file(path) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(
            encoder,
            example,
            draft,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(sizes,) * len(inputs),
            external_data=False,
            verbose=False,
        )
