"""Measuring how much the gradients of several tasks conflict, part by part of the model."""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import distributed
from engine.gradients import Gradient, inner_product
from engine.run_dir import RunDir

Similarities = dict[str, dict[str, float | None]]  # "task|task" -> cosine, product, magnitude


def layer_group(name: str) -> str:
    """Which part of BERT a parameter of `bert.BertModel` belongs to, by its name."""
    layer = re.match(r"bert_layers\.(\d+)\.(self_attention|attention)?", name)
    if layer:
        return f"layer {layer[1]} {'attention' if layer[2] else 'feed-forward'}"
    return "pooler" if name.startswith("pooler") else "embeddings"


def gradient_conflict(
    gradients: Mapping[str, tuple[Gradient, Callable[[], Gradient]]], names: Sequence[str]
) -> dict[str, Similarities]:
    """Compare the gradients of several tasks, for each part of the model and over all of it.

    Args:
        gradients: task -> the gradient of a batch, and a function that computes that of a second
            batch of the task: how far the two agree is the noise floor.
        names: of the parameters, in the order of the gradients.

    Returns:
        part (`layer_group`, and "overall") -> "a|b" -> "cosine", "product" (the inner product) and
        "magnitude", the similarity 2 |a| |b| / (|a|^2 + |b|^2) of Yu et al. 2020, definition 2.
        None where a gradient is zero or not finite.
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(layer_group(name), []).append(i)

    def products(a: Gradient, b: Gradient) -> np.ndarray:
        """Inner products by group, and their sum."""
        parts = [inner_product([a[i] for i in of], [b[i] for i in of]) for of in groups.values()]
        return np.array([*parts, sum(parts)])

    # A gradient is as large as the model: hold the first of each task, and one second at a time.
    tasks = list(gradients)
    found = {}  # pair -> (<a, b>, <a, a>, <b, b>), by group
    squares = {task: products(gradients[task][0], gradients[task][0]) for task in tasks}
    for i, a in enumerate(tasks):
        for b in tasks[i + 1 :]:
            inner = products(gradients[a][0], gradients[b][0])
            found[f"{a}|{b}"] = inner, squares[a], squares[b]
    for task in tasks:
        second = gradients[task][1]()
        inner = products(gradients[task][0], second)
        found[f"{task}|{task}"] = inner, squares[task], products(second, second)
    return {
        group: {pair: _similarity(*(of[g] for of in three)) for pair, three in found.items()}
        for g, group in enumerate([*groups, "overall"])
    }


def _similarity(product: float, square_a: float, square_b: float) -> dict[str, float | None]:
    if not (min(square_a, square_b) > 0 and max(square_a, square_b) < math.inf):
        return {"cosine": None, "product": None, "magnitude": None}
    lengths = math.sqrt(square_a) * math.sqrt(square_b)
    return {
        "cosine": float(product / lengths),
        "product": float(product),
        "magnitude": float(2 * lengths / (square_a + square_b)),
    }


def negative_share(parts: Mapping[str, Similarities]) -> dict[str, float]:
    """Pair -> the share of the model's parts in which its cosine is negative."""
    names = [part for part in parts if part != "overall"]
    return {
        pair: sum((parts[part][pair]["cosine"] or 0) < 0 for part in names) / len(names)
        for pair in parts["overall"]
    }


class GradientConflictLogger:
    """A backward function that also logs, every N steps, how much the tasks' gradients conflict.

    It measures at the step's own weights, on two batches per task drawn for it, without dropout,
    in fp32 and unclipped. Training continues as if nothing had been measured.

    Args:
        backward: (batches, step) -> loss, leaving gradients; called after measuring.
        loss_fn: batch -> the loss of each row, (B,).
        model: its `bert` is shared by the tasks, its `dtype` is that of matrix products.
        datasets: the training set of each task.
        run: gets the log entries.
        args: `measure_conflict` (N), `conflict_rows`, `batch_size` and `seed`.
    """

    def __init__(
        self,
        backward: Callable[[Sequence[Any], int], float],
        loss_fn: Callable[[Any], Tensor],
        model: Any,
        datasets: Sequence[Any],
        run: RunDir,
        args: Namespace,
    ):
        self.backward = backward
        self.loss_fn = loss_fn
        self.model = model
        self.datasets = {dataset.name: dataset for dataset in datasets}
        self.run = run
        self.args = args

    def __call__(self, batches: Sequence[Any], step: int) -> float:
        """Measure if it is time to, then compute the step's gradients."""
        if step % self.args.measure_conflict == 0:
            drawn = {name: self._draw(name, step) for name in self.datasets}
            parts = self._measure(drawn)
            rows = {name: len(first) for name, (first, _) in drawn.items()}
            negative = negative_share(parts)
            self.run.log("conflict", step, rows=rows, parts=parts, negative=negative)
        return self.backward(batches, step)

    def cost(self, steps: int) -> str:
        """What measuring costs in a run of so many steps, in a sentence."""
        rows = sum(len(rows) for name in self.datasets for rows in self._draw(name, 0))
        each = math.ceil(rows / self.args.batch_size)
        count = math.ceil(steps / self.args.measure_conflict)
        size = 4 * sum(p.numel() for p in self.model.bert.parameters()) / 2**20
        return (
            f"--measure_conflict: {count} measurements, each as long as about {each} training steps"
            f" in fp32, in a run of {steps} steps; {size * (len(self.datasets) + 1):,.0f} MiB"
        )

    def _draw(self, name: str, step: int) -> list[np.ndarray]:
        """The row numbers of two batches without common rows, a function of seed and step."""
        # A generator of its own: measuring must not change what training draws next.
        rng = np.random.default_rng([self.args.seed, step, *name.encode()])
        size = 2 * (self.args.conflict_rows or self.args.batch_size)
        return np.array_split(rng.permutation(len(self.datasets[name]))[:size], 2)

    def _measure(self, drawn: dict[str, list[np.ndarray]]) -> dict[str, Similarities]:
        # Dropout and bf16 rounding would add noise that training averages out over many steps.
        dtype, self.model.dtype = self.model.dtype, torch.float32
        self.model.eval()
        gradients = {
            name: (self._gradient(name, first), lambda n=name, rows=second: self._gradient(n, rows))
            for name, (first, second) in drawn.items()
        }
        names = [name for name, _ in self.model.bert.named_parameters()]
        found = gradient_conflict(gradients, names)
        self.model.train()
        self.model.dtype = dtype
        return found

    def _gradient(self, name: str, rows: np.ndarray) -> Gradient:
        """The gradient of the mean loss of these rows, as many at a time as a step has."""
        parameters: list[nn.Parameter] = list(self.model.bert.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        size = -(-self.args.batch_size // distributed.world_size())
        for start in range(0, len(rows), size):
            batch = self.datasets[name].batch(rows[start : start + size]).to(self.model.device)
            loss = self.loss_fn(batch).sum() / len(rows)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for sum_of, part in zip(total, found, strict=True):
                if part is not None:
                    sum_of.add_(part)
        return total
