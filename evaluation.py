"""Predictions of a model, the figures they earn, and the leaderboard's files.

Every figure is computed from all rows at once; none is a mean of batch means. Everything is done in
evaluation mode, without gradients, and in file order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint import write_text
from datasets import Batch, TaskData
from tasks import TASKS, MultitaskBERT
from train import Diverged, progress

Embed = Callable[[Batch], Tensor]


class FrozenEmbeddings:
    """Embeddings of a frozen encoder, each row's computed once and then looked up.

    A frozen encoder runs without dropout, so the same row has the same embeddings in every epoch.
    """

    def __init__(self, model: MultitaskBERT):
        self.model = model
        self.known: dict[int, tuple[Tensor, np.ndarray]] = {}  # a set -> its vectors, which are in

    def __call__(self, batch: Batch) -> Tensor:
        """Embeddings as `MultitaskBERT.embed` gives them, (width * B, D)."""
        source = batch.source
        if id(source) not in self.known:
            size = (len(source), source.width, self.model.bert.config.hidden_size)
            vectors = torch.empty(size, device=self.model.device)
            self.known[id(source)] = vectors, np.zeros(len(source), dtype=bool)
        vectors, done = self.known[id(source)]
        rows = torch.from_numpy(batch.rows).to(self.model.device)
        if not done[batch.rows].all():
            with torch.no_grad():
                fresh = embed(self.model, batch)
            vectors[rows] = fresh.unflatten(0, (source.width, len(batch))).transpose(0, 1)
            done[batch.rows] = True
        return vectors[rows].transpose(0, 1).flatten(0, 1)


def embed(model: MultitaskBERT, batch: Batch) -> Tensor:
    """The embeddings of a batch's sentences, (width * B, D)."""
    return model.embed(batch.input_ids, batch.attention_mask, batch.token_type_ids)


@torch.no_grad()
def embeddings(model: MultitaskBERT, data: TaskData, batch_size: int) -> Tensor:
    """The embeddings of every row, (N, width, D) float32 on the CPU, in file order."""
    model.eval()
    vectors = torch.empty(len(data), data.width, model.bert.config.hidden_size)
    for batch in data.in_order(batch_size):
        found = embed(model, batch.to(model.device)).cpu()
        vectors[torch.from_numpy(batch.rows)] = found.unflatten(0, (data.width, -1)).transpose(0, 1)
    check_finite(vectors, data)
    return vectors


def check_finite(outputs: Tensor, data: TaskData) -> None:
    """Diverged where a row's outputs (N, ...) are not finite, naming the row."""
    bad = ~outputs.flatten(1).isfinite().all(dim=1)
    if bad.any():
        rows = data.names(bad.nonzero().flatten()[:1].numpy())
        raise Diverged(
            f"{data.path}: the outputs for {int(bad.sum())} rows are not finite ({rows}, ...):"
            " try a smaller --lr or --precision fp32"
        )


@torch.no_grad()
def predict(model: MultitaskBERT, data: TaskData, batch_size: int, embedder: Embed) -> Tensor:
    """The logits of every row, (N, C) float32 on the CPU, in file order."""
    model.eval()
    logits = torch.empty(len(data), data.task.outputs)
    with progress(len(data), f"predict {data.path.name}") as bar:
        for batch in data.in_order(batch_size):
            batch = batch.to(model.device)
            logits[torch.from_numpy(batch.rows)] = model.decode(batch.task, embedder(batch)).cpu()
            bar.update(len(batch))
    check_finite(logits, data)
    return logits


def report(data: TaskData, logits: Tensor) -> dict[str, Any]:
    """The task's figures (headline first), the mean loss, and the number of rows."""
    task = data.task
    predicted = task.decode(logits).numpy()
    figures = task.report(predicted, data.labels.numpy())
    loss = task.loss(logits, data.labels).double().sum().item() / len(data)
    return {**figures, "loss": loss, "rows": len(data)}


def headline(figures: dict[str, Any]) -> float:
    """The first figure of a report: accuracy or Pearson's r."""
    return next(iter(figures.values()))


def overall(reports: dict[str, dict[str, Any]]) -> float:
    """The course's overall score: the mean over tasks of accuracy, or of (Pearson + 1) / 2."""
    scores = [TASKS[name].course_score(headline(figures)) for name, figures in reports.items()]
    return sum(scores) / len(scores)


def summary(reports: dict[str, dict[str, Any]]) -> str:
    """One line for people: each task's headline, and the overall score."""
    parts = []
    for name, figures in reports.items():
        key, value = next(iter(figures.items()))
        parts.append(f"{name} {key} {value:.3f}")
    return ", ".join([*parts, f"overall {overall(reports):.3f}"])


def evaluate(
    model: MultitaskBERT,
    sets: list[TaskData],
    batch_size: int,
    embedder: Embed,
) -> dict[str, Any]:
    """Figures of each set by task, with the overall score as "score" and a line as "summary"."""
    reports = {
        data.task.name: report(data, predict(model, data, batch_size, embedder)) for data in sets
    }
    return {"score": overall(reports), "summary": summary(reports), "tasks": reports}


def write_predictions(path: Path, data: TaskData, logits: Tensor) -> None:
    """Write a leaderboard file: its header, then `{id} , {prediction} ` a line, in file order.

    Sentiment is an integer, paraphrase the rounded probability, similarity the raw value.
    """
    predictions = data.task.decode(logits).tolist()
    lines = [f"id \t {data.task.header} \n"]
    for example, prediction in zip(data.examples, predictions, strict=True):
        lines.append(f"{example.id} , {prediction} \n")
    write_text(path, "".join(lines))
