"""Measuring how much the gradients of several tasks conflict, part by part of the model."""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def inner_products(a: Gradient, b: Gradient) -> Tensor:
    """<a, b>, <a, a> and <b, b>, (3,)."""
    return torch.stack([inner_product(a, b), inner_product(a, a), inner_product(b, b)])


def similarity(product: float, aa: float, bb: float) -> dict[str, float | None]:
    """From `inner_products`: the cosine, <a, b> itself, and 2 |a| |b| / (|a|^2 + |b|^2).

    The last is "magnitude" (Yu et al. 2020, def. 2). None where a gradient is zero or not finite.
    """
    if not (min(aa, bb) > 0 and max(aa, bb) < math.inf):
        return {"cosine": None, "product": None, "magnitude": None}
    norms = math.sqrt(aa) * math.sqrt(bb)
    return {"cosine": product / norms, "product": product, "magnitude": 2 * norms / (aa + bb)}


def gradient_conflict(
    gradients: Mapping[str, tuple[Gradient, Callable[[], Gradient]]], names: Sequence[str]
) -> dict[str, Similarities]:
    """Compare the gradients of several tasks, for each part of the model and over all of it.

    gradients: task -> the gradient of a batch, and a function that computes that of a second batch
    of the task: how far the two agree is the noise floor. names: of the parameters.

    Returns part (`layer_group`, then "overall") -> "a|b", then "a|a" -> `similarity`.
    """
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        parts.setdefault(layer_group(name), []).append(i)
    parts["overall"] = list(range(len(names)))
    pairs = chain(
        ((f"{a}|{b}", gradients[a][0], gradients[b][0]) for a, b in combinations(gradients, 2)),
        ((f"{a}|{a}", first, second()) for a, (first, second) in gradients.items()),
    )
    products: dict[tuple[str, str], Tensor] = {}
    for pair, a, b in pairs:  # one second gradient at a time: each is as large as the model
        for part, indices in parts.items():
            products[part, pair] = inner_products([a[i] for i in indices], [b[i] for i in indices])
    similarities: dict[str, Similarities] = {part: {} for part in parts}
    numbers = torch.stack(list(products.values())).cpu().tolist()  # a GPU is waited for once
    for (part, pair), figures in zip(products, numbers, strict=True):
        similarities[part][pair] = similarity(*figures)
    return similarities


@dataclass
class GradientConflictLogger:
    """A backward function that also logs, every N steps, how much the tasks' gradients conflict.

    It measures at the step's own weights, on two batches per task drawn for it, without dropout,
    in fp32 and unclipped. Training continues as if nothing had been measured.
    """

    backward: Callable[[Sequence[Any], int], Tensor]  # (batches, step) -> loss; leaves gradients
    loss_fn: Callable[[Any], Tensor]  # batch -> the loss of each row, (B,)
    model: Any  # its `bert` is shared by the tasks; its `dtype` is that of matrix products
    datasets: Sequence[Any]  # the training set of each task
    run: RunDir  # gets the log entries
    args: Namespace  # `measure_conflict` (N), `conflict_rows`, `batch_size` and `seed`

    def __call__(self, batches: Sequence[Any], step: int) -> Tensor:
        """Measure if it is time to, then compute the step's gradients."""
        if step % self.args.measure_conflict == 0:
            samples = {dataset: self._draw(dataset, step) for dataset in self.datasets}
            parts = self._measure(samples)
            rows = {dataset.name: len(first) for dataset, (first, _) in samples.items()}
            self.run.log("conflict", step, rows=rows, parts=parts)
        return self.backward(batches, step)

    def cost(self, steps: int) -> str:
        """What measuring costs in a run of so many steps, in a sentence."""
        # Two batches per task, each forward and backward.
        rows = sum(len(rows) for dataset in self.datasets for rows in self._draw(dataset, 0))
        each = math.ceil(rows / self.args.batch_size)
        count = math.ceil(steps / self.args.measure_conflict)
        size = 4 * sum(p.numel() for p in self.model.bert.parameters()) / 2**20
        return (
            f"--measure_conflict: {count} measurements, each as long as about {each} training steps"
            f" in fp32, in a run of {steps} steps; gradients take up to"
            f" {size * (len(self.datasets) + 2):,.0f} MiB"
        )

    def _draw(self, dataset: Any, step: int) -> list[np.ndarray]:
        """The row numbers of two batches without common rows, a function of seed and step."""
        # A generator of its own: measuring must not change what training draws next.
        rng = np.random.default_rng([self.args.seed, step, *dataset.name.encode()])
        size = 2 * (self.args.conflict_rows or self.args.batch_size)
        return np.array_split(rng.permutation(len(dataset))[:size], 2)

    def _measure(self, samples: dict[Any, list[np.ndarray]]) -> dict[str, Similarities]:
        # Dropout and bf16 rounding would add noise that training averages out over many steps.
        dtype, self.model.dtype = self.model.dtype, torch.float32
        self.model.eval()
        gradients = {
            dataset.name: (self._gradient(dataset, first), partial(self._gradient, dataset, second))
            for dataset, (first, second) in samples.items()
        }
        parts = gradient_conflict(gradients, [n for n, _ in self.model.bert.named_parameters()])
        self.model.train()
        self.model.dtype = dtype
        return parts

    def _gradient(self, dataset: Any, rows: np.ndarray) -> Gradient:
        """The gradient of the mean loss of these rows, as many at a time as a step has."""
        parameters = list(self.model.bert.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        size = -(-self.args.batch_size // distributed.world_size())
        for start in range(0, len(rows), size):
            batch = dataset.batch(rows[start : start + size]).to(self.model.device)
            loss = self.loss_fn(batch).sum() / len(rows)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for sum_, grad in zip(total, grads, strict=True):
                if grad is not None:  # of an unused pooler
                    sum_ += grad
        return total
