"""Measuring how much the gradients of several tasks conflict, part by part of the model."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import distributed
from engine.device import to_float64
from engine.gradients import Gradient, inner_product
from engine.run_dir import RunDir

PREDICTED_FALL = 3e-4  # of a task's own loss, by a step for it: see GradientConflictLogger


def inner_products(a: Gradient, b: Gradient, parts: Sequence[str]) -> dict[str, Tensor]:
    """Part of the model, and then "overall" -> <a, b>, <a, a> and <b, b>, (3,).

    parts: the part to which each parameter belongs.
    """
    products = {}
    for part in dict.fromkeys(parts):
        u, v = ([g for g, own in zip(x, parts, strict=True) if own == part] for x in (a, b))
        pairs = ((u, v), (u, u), (v, v))
        products[part] = torch.stack([inner_product(x, y) for x, y in pairs])
    return {**products, "overall": sum(products.values())}


def similarity(product: float, aa: float, bb: float) -> dict[str, float | None]:
    """The cosine of two gradients and <a, b>, from their `inner_products`.

    None if a gradient is zero or not finite.
    """
    if not (min(aa, bb) > 0 and max(aa, bb) < math.inf):
        return {"cosine": None, "product": None}
    return {"cosine": product / (math.sqrt(aa) * math.sqrt(bb)), "product": product}


def log_entry(
    products: Mapping[tuple[str, str], dict[str, Tensor]], changes: Mapping[tuple[str, str], Tensor]
) -> dict[str, Any]:
    """The log entry of a measurement; all numbers are copied from the GPU at once.

    products: (a, b) -> `inner_products` of two gradients. changes: (a, b) -> the loss of b, and its
    change by a step for a, as predicted and as measured, (3,).

    Returns "parts": part of the model -> "a|b" -> `similarity`; "changes": "a>b" -> these values.
    """
    tensors = [tensor for parts in products.values() for tensor in parts.values()]
    numbers = iter(torch.stack([*tensors, *changes.values()]).cpu().tolist())
    similarities: dict[str, Any] = {}
    for pair, parts in products.items():
        for part in parts:
            similarities.setdefault(part, {})["|".join(pair)] = similarity(*next(numbers))
    logged = {}
    for pair, values in zip(changes, numbers, strict=True):
        finite = (x if math.isfinite(x) else None for x in values)  # JSON has no other numbers
        logged[">".join(pair)] = dict(zip(("loss", "predicted", "measured"), finite, strict=True))
    return {"parts": similarities, "changes": logged}


@contextmanager
def moved(parameters: Sequence[Tensor], gradient: Gradient, eta: Tensor) -> Iterator[None]:
    """A block without gradients in which the parameters are theta - eta * gradient.

    Afterwards they are restored bit for bit.
    """
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        try:
            for p, g in zip(parameters, gradient, strict=True):
                p.sub_(eta * g)
            yield
        finally:
            for p, theta in zip(parameters, before, strict=True):
                p.copy_(theta)  # adding the step back would leave rounding errors


@dataclass
class GradientConflictLogger:
    """A backward function that also logs, every N steps, how much the tasks' gradients conflict.

    It measures at the step's weights, on two batches per task drawn for this, without dropout, in
    fp32 and without clipping. Training continues as if nothing had been measured.

    For each pair it also measures how a gradient-descent step for task a, on BERT alone, changes
    the loss of task b. To first order, the loss of a itself falls by `PREDICTED_FALL`. Tried with
    all-MiniLM-L6-v2 and 64 rows: at 3e-4, 34 of 36 measured changes were within 5% of the first
    order; at 1e-2 only 14, because of curvature; at 1e-5 only 30, because of rounding.
    """

    backward: Callable[[Sequence[Any], int], Tensor]  # (batches, step) -> loss; leaves gradients
    loss_fn: Callable[[Any], Tensor]  # batch -> the loss of each row, (B,)
    model: Any  # its `bert` is shared by the tasks; its `dtype` is that of matrix products
    part_of: Callable[[str], str]  # name of a parameter of `bert` -> its part of the model
    datasets: Sequence[Any]  # the training set of each task
    run: RunDir  # gets the log entries
    args: Namespace  # `measure_conflict` (N), `conflict_rows`, `batch_size` and `seed`

    def __call__(self, batches: Sequence[Any], step: int) -> Tensor:
        """Measure if the step is due, then compute the step's gradients."""
        if step % self.args.measure_conflict == 0:
            samples = {dataset: self._draw(dataset, step) for dataset in self.datasets}
            entry = self._measure(samples)
            rows = {dataset.name: len(first) for dataset, (first, _) in samples.items()}
            self.run.log("conflict", step, rows=rows, **entry)
        return self.backward(batches, step)

    def cost(self, steps: int) -> str:
        """The cost of measuring in a run of this many steps, in one sentence."""
        # Two batches per task, forward and backward; then, after the step for each task, a batch of
        # every task, forward only, which takes a third of the time.
        tasks = len(self.datasets)
        sizes = [list(map(len, self._draw(dataset, 0))) for dataset in self.datasets]
        rows = sum(first + second + tasks * first / 3 for first, second in sizes)
        each = math.ceil(rows / self.args.batch_size)
        count = math.ceil(steps / self.args.measure_conflict)
        size = 4 * sum(p.numel() for p in self.model.bert.parameters()) / 2**20
        return (
            f"--measure_conflict: {count} measurements of up to {max(map(max, sizes))} rows per"
            f" batch, each taking about {each} training steps in fp32, in a run of {steps}"
            f" steps; gradients take about {size * (tasks + 3):,.0f} MiB"
        )

    def _draw(self, dataset: Any, step: int) -> list[np.ndarray]:
        """Row numbers of two disjoint batches, a function of seed and step."""
        # A generator of its own: measuring must not change what training draws next.
        rng = np.random.default_rng([self.args.seed, step, *dataset.name.encode()])
        size = 2 * (self.args.conflict_rows or self.args.batch_size)
        halves = np.array_split(rng.permutation(len(dataset))[:size], 2)
        # Rows of similar length together need less padding.
        return [rows[np.argsort(dataset.lengths[rows], kind="stable")] for rows in halves]

    def _measure(self, samples: dict[Any, list[np.ndarray]]) -> dict[str, Any]:
        # Dropout and bf16 rounding would add noise that training averages out over many steps.
        dtype, self.model.dtype = self.model.dtype, torch.float32
        self.model.eval()
        names, parameters = zip(*self.model.bert.named_parameters(), strict=True)
        parts = list(map(self.part_of, names))
        gradients, losses = {}, {}
        for a, (first, _) in samples.items():
            gradients[a], losses[a] = self._gradient(a, first)
        products = {
            (a.name, b.name): inner_products(gradients[a], gradients[b], parts)
            for a, b in combinations(samples, 2)
        }
        changes = {}
        for a, (_, second) in samples.items():
            gradient, loss = self._gradient(a, second)
            products[a.name, a.name] = inner_products(gradients[a], gradient, parts)
            del gradient  # one at a time: each is as large as the model
            eta = PREDICTED_FALL * losses[a] / products[a.name, a.name]["overall"][1]
            with moved(parameters, gradients[a], eta):
                for b, (first, _) in samples.items():
                    rows, before = (second, loss) if a is b else (first, losses[b])
                    pair = (a.name, b.name)
                    inner = products[pair if pair in products else pair[::-1]]["overall"][0]
                    after = self._loss(b, rows)
                    changes[pair] = torch.stack([before, -eta * inner, after - before])
        self.model.train()
        self.model.dtype = dtype
        return log_entry(products, changes)

    def _batches(self, dataset: Any, rows: np.ndarray) -> Iterator[Any]:
        """These rows, in batches of the training batch size."""
        size = -(-self.args.batch_size // distributed.world_size())
        for start in range(0, len(rows), size):
            yield dataset.batch(rows[start : start + size]).to(self.model.device)

    def _loss(self, dataset: Any, rows: np.ndarray) -> Tensor:
        """The mean loss of these rows, in float64 and on the device."""
        batches = self._batches(dataset, rows)
        return sum(to_float64(self.loss_fn(batch)).sum() for batch in batches) / len(rows)

    def _gradient(self, dataset: Any, rows: np.ndarray) -> tuple[Gradient, Tensor]:
        """The gradient of the mean loss of these rows, and that loss as `_loss` computes it."""
        parameters = list(self.model.bert.parameters())
        gradient, total = [torch.zeros_like(p) for p in parameters], 0
        for batch in self._batches(dataset, rows):
            losses = self.loss_fn(batch)
            total += to_float64(losses.detach()).sum()
            grads = torch.autograd.grad(losses.sum() / len(rows), parameters, allow_unused=True)
            for sum_, grad in zip(gradient, grads, strict=True):
                if grad is not None:  # of an unused pooler
                    sum_ += grad
        return gradient, total / len(rows)
