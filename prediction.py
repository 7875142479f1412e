"""Predictions of a model, their metrics, and the leaderboard's files."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import Batch, Example, TaskDataset, TokenizedDataset
from engine import distributed
from engine.checkpoint import read_text
from engine.device import catch_out_of_memory
from engine.errors import TrainingDiverged, UserError
from engine.trainer import progress_bar
from model import MultitaskBERT, SentenceEncoder
from tasks import TASKS, Task

# Batch -> its embeddings, all first sentences first: `embed_batch`, or a look-up in linear probing.
Embed = Callable[[Batch], Tensor]

# ---------------------------------------------------------------------------- predictions


def embed_batch(model: SentenceEncoder, batch: Batch, pooling: str | None = None) -> Tensor:
    """The embeddings of a batch, (embeddings_per_row * B, D)."""
    return model.embed(batch.input_ids, batch.attention_mask, batch.token_type_ids, pooling)


def row_indices(batch: Batch, device: torch.device) -> Tensor:
    """The row numbers of a batch as an index of a tensor on this device, (B,)."""
    # PyTorch would copy a CPU index to the GPU too, but synchronously.
    return torch.from_numpy(batch.rows).to(device, non_blocking=True)


def compute_rows(
    model: SentenceEncoder,
    dataset: TokenizedDataset,
    batch_size: int,
    function: Callable[[Batch], Tensor],  # batch -> an output for each of its rows, (B, ...)
    size: tuple[int, ...],  # of a row's output
    rows: np.ndarray | None = None,  # only these; the others' outputs are 0
    title: str = "predict",
) -> Tensor:
    """The outputs of every row, (N, ...) on the model's device, in file order."""
    outputs = torch.zeros(len(dataset), *size, device=model.device)
    total = len(dataset) if rows is None else len(rows)
    title = f"{title} {dataset.path.name}"
    # Small batches leave a GPU idle. Without gradients, eight times as many rows need less memory
    # than training does.
    batch_size *= 1 if model.device.type == "cpu" else 8
    with model.evaluating(), progress_bar(total, title, leave=False) as bar:
        # Batches hold rows of similar length, so they do not follow the order of the file.
        for batch in dataset.eval_batches(batch_size, rows):
            with catch_out_of_memory(batch, model.device):
                outputs[row_indices(batch, model.device)] = function(batch.to(model.device))
            bar.update(min(len(batch) * distributed.world_size(), total - bar.n))
    # Each process has filled in the rows of its own batches; the sum has all of them.
    distributed.all_reduce_sum(outputs)
    bad = ~outputs.flatten(1).isfinite().all(dim=1)
    if bad.any():
        row = dataset.describe_rows(bad.nonzero().flatten()[:1].cpu().numpy())
        raise TrainingDiverged(
            f"{dataset.path}: the outputs for {int(bad.sum())} rows are not finite ({row}, ...):"
            " try a smaller --lr or --precision fp32; before any training, check the model"
        )
    return outputs


def embed_dataset(
    model: SentenceEncoder,
    dataset: TokenizedDataset,
    batch_size: int,
    rows: np.ndarray | None = None,
    pooling: str | None = None,  # instead of the model's own
) -> Tensor:
    """Embeddings (N, embeddings_per_row, D) of all rows, or of `rows` and zeros elsewhere."""
    size = (dataset.embeddings_per_row, model.bert.config.hidden_size)

    def embed(batch: Batch) -> Tensor:
        # All first sentences, then all second ones -> (B, embeddings_per_row, D).
        return embed_batch(model, batch, pooling).unflatten(0, (size[0], -1)).transpose(0, 1)

    return compute_rows(model, dataset, batch_size, embed, size, rows, title="embed")


@dataclass
class EmbeddingCache:
    """Embeddings of a frozen encoder, computed once per row: linear probing does not change them.

    Rows are encoded in evaluation batches before training, so that they do not depend on when
    training is interrupted and resumed.
    """

    model: SentenceEncoder
    batch_size: int
    vectors: dict[TokenizedDataset, Tensor] = field(default_factory=dict)

    def add(self, dataset: TokenizedDataset, rows: np.ndarray | None = None) -> None:
        """Encode a dataset, or only these rows of it."""
        self.vectors[dataset] = embed_dataset(self.model, dataset, self.batch_size, rows)

    def __call__(self, batch: Batch) -> Tensor:
        """The embeddings of a batch, as `embed_batch`."""
        if batch.dataset not in self.vectors:  # a test set, which is predicted only once
            return embed_batch(self.model, batch)
        # (B, embeddings_per_row, D) -> all first sentences, then all second ones.
        vectors = self.vectors[batch.dataset][row_indices(batch, self.model.device)]
        return vectors.transpose(0, 1).flatten(0, 1)


def predict(
    model: MultitaskBERT, dataset: TaskDataset, batch_size: int, embed: Embed | None = None
) -> Tensor:
    """The logits of every row, (N, C) float32 on the CPU, in file order."""
    embed = embed or partial(embed_batch, model)
    size = (dataset.task.labels.num_logits,)

    def logits(batch: Batch) -> Tensor:
        return model.decode(batch.task, embed(batch))

    return compute_rows(model, dataset, batch_size, logits, size).cpu()


# ---------------------------------------------------------------------------- metrics


def task_metrics(dataset: TaskDataset, logits: Tensor) -> dict[str, Any]:
    """The task's metrics (the primary one first), mean loss and number of rows."""
    # Over all rows at once: a mean of batch means would give a short last batch too much weight.
    labels = dataset.task.labels
    metrics = labels.metrics(labels.predict(logits).numpy(), dataset.labels.numpy())
    loss = labels.loss(logits, dataset.labels).double().mean().item()
    if not math.isfinite(loss):
        raise TrainingDiverged(f"{dataset.path}: the mean loss is {loss}; try a smaller --lr")
    return {**metrics, "loss": loss, "rows": len(dataset)}


def primary_metric(metrics: dict[str, Any]) -> float:
    """The first of a task's metrics: accuracy, or Pearson's r."""
    return next(iter(metrics.values()))


def overall_score(metrics: dict[str, dict[str, Any]]) -> float:
    """The course's overall score: the mean over tasks of accuracy, or of (Pearson + 1) / 2."""
    # Pearson's r is from -1 to 1, accuracy from 0 to 1: map r to the range of accuracy.
    scores = [TASKS[name].labels.course_score(primary_metric(m)) for name, m in metrics.items()]
    return sum(scores) / len(scores)


def constant_note(metrics: dict[str, Any]) -> str:
    """A note beside the score if all predictions are one class, as when nothing was learnt."""
    # Rows are gold classes, columns predicted ones; a constant prediction fills one column.
    matrix = np.array(metrics.get("confusion", np.eye(2)))  # scores have no such matrix
    if np.count_nonzero(matrix.sum(axis=0)) > 1:
        return ""
    majority = matrix.sum(axis=1).argmax() == matrix.sum(axis=0).argmax()
    return " (majority class)" if majority else " (one class only)"


def summarize(metrics: dict[str, dict[str, Any]]) -> str:
    """A one-line summary: each task's primary metric, and the overall score."""
    parts = [
        f"{name} {next(iter(scores))} {primary_metric(scores):.3f}{constant_note(scores)}"
        for name, scores in metrics.items()
    ]
    return ", ".join([*parts, f"overall {overall_score(metrics):.3f}"])


def results_table(
    metrics: dict[str, dict[str, Any]], baselines: dict[str, tuple[str, float]]
) -> str:
    """Task, metric, score, baseline and number of rows, aligned."""
    lines = [("task", "metric", "score", "baseline", "rows")]
    for task, scores in metrics.items():
        name, value = baselines[task]
        score = f"{primary_metric(scores):.3f}{constant_note(scores)}"
        rows = f"{scores['rows']:,}"
        lines.append((task, next(iter(scores)), score, f"{value:.3f} ({name})", rows))
    lines.append(("overall", "", f"{overall_score(metrics):.3f}", "", ""))
    # Pad each column to its longest entry.
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def evaluate(outputs: Iterable[tuple[TaskDataset, Tensor]]) -> dict[str, Any]:
    """Metrics by task ("tasks"), the overall score ("score"), and both in a line ("summary").

    outputs: data sets with their logits (N, C).
    """
    metrics = {dataset.name: task_metrics(dataset, logits) for dataset, logits in outputs}
    return {"score": overall_score(metrics), "summary": summarize(metrics), "tasks": metrics}


def majority_share(gold: np.ndarray) -> float:
    """The accuracy of always predicting the most frequent class."""
    return float(np.unique(gold, return_counts=True)[1].max() / len(gold))


def baseline(model: SentenceEncoder, dataset: TaskDataset, batch_size: int) -> tuple[str, float]:
    """The name and value of the baseline that a dev score has to beat, computed before training.

    For classes, the share of the most frequent one. For similarity, Pearson's r of the cosine of
    mean-pooled embeddings, the best that the untouched encoder does without a head.
    """
    gold = dataset.labels.numpy()
    if dataset.task.labels.integer:
        return "majority class", majority_share(gold)
    cosines = mean_cosines(model, dataset, batch_size)
    return "untouched encoder", primary_metric(dataset.task.labels.metrics(cosines, gold))


def mean_cosines(model: SentenceEncoder, dataset: TaskDataset, batch_size: int) -> np.ndarray:
    """For each pair, the cosine of its sentences' mean-pooled embeddings, (N,)."""
    # The pairs again, encoded separately whatever the model's pair encoding is.
    texts = list(zip(*(example.texts for example in dataset.examples), strict=True))
    pairs = TokenizedDataset(dataset.name, dataset.path, texts, model.tokenizer)
    vectors = embed_dataset(model, pairs, batch_size, pooling="mean").cpu()
    return torch.cosine_similarity(vectors[:, 0], vectors[:, -1], dim=-1).numpy()


# ---------------------------------------------------------------------------- leaderboard files


def format_predictions(dataset: TaskDataset, logits: Tensor) -> str:
    """A leaderboard file: its header, then `{id} , {prediction} ` per row, in file order.

    Sentiment is an integer, paraphrase the rounded probability, similarity the raw score.
    """
    predictions = dataset.task.labels.predict(logits).tolist()
    # Byte for byte the course's format, with its odd spaces and spelling: a grader may compare it.
    lines = [f"id \t {dataset.task.header} \n"]
    for example, prediction in zip(dataset.examples, predictions, strict=True):
        lines.append(f"{example.id} , {prediction} \n")
    return "".join(lines)


def read_predictions(
    path: Path, task: Task, examples: Sequence[Example], source: Path
) -> np.ndarray:
    """The predictions (N,) in a leaderboard file, for exactly these rows of `source`, in order.

    UserError if the header, the number of rows, an id, the order or a prediction is wrong.
    """
    # Predictions in another order would silently be scored against the wrong rows.
    header, *rows = read_text(path, "a prediction file; a finished run has them").split("\n")
    if header != f"id \t {task.header} ":
        raise UserError(f"{path}, line 1: the header is {header[:60]!r}, not that of {task.name}")
    if len(rows) != len(examples) + 1 or rows[-1]:  # every line ends with a newline
        raise UserError(
            f"{path}: {len(rows) - 1} rows, but {source} has {len(examples)}: predict all of it"
        )
    labels, predictions = task.labels, np.empty(len(examples))
    for i, (example, row) in enumerate(zip(examples, rows[:-1], strict=True)):
        name, _, text = row.rpartition(" , ")
        where = f"{path}, line {i + 2}"
        if name != example.id:
            raise UserError(f"{where}: {row[:60]!r}, where {source} has the id {example.id!r}")
        try:
            value = float(text) if labels.dtype == torch.float32 else int(text)
        except ValueError:
            value = math.nan
        valid = value in range(labels.num_classes) if labels.integer else math.isfinite(value)
        if not valid or text != f"{value} ":  # as `format_predictions` does
            raise UserError(f"{where}: {text[:40]!r} is not a prediction in its format")
        predictions[i] = value
    return predictions
