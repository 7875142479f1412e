"""Gradients of several tasks for one encoder: whether they conflict, and PCGrad, which mends it.

A gradient is a list of tensors, one a parameter. Nothing here knows what a task or a model is.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import compress, groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

Gradient = Sequence[Tensor]

# ---------------------------------------------------------------------------- PCGrad


def dot(a: Gradient, b: Gradient) -> float:
    """The inner product over all parameters, in float64: squares must not leave float32's range."""
    pairs = zip(a, b, strict=True)
    return sum(torch.dot(x.flatten().double(), y.flatten().double()).item() for x, y in pairs)


def project(gradient: Gradient, others: Sequence[Gradient]) -> list[Tensor]:
    """Take from `gradient` what points against each of `others`, one after the other.

    Yu et al. 2020 (https://arxiv.org/abs/2001.06782), algorithm 1: where g . g_j < 0,
    g <- g - (g . g_j / |g_j|^2) g_j, so that g . g_j is then 0. Later projections may undo it.
    """
    result = [g.clone() for g in gradient]
    for other in others:
        product = dot(result, other)
        if product < 0:
            share = product / dot(other, other)
            for mine, theirs in zip(result, other, strict=True):
                mine.sub_(theirs, alpha=share)
    return result


def total(gradients: Sequence[Gradient]) -> list[Tensor]:
    """The plain sum of the tasks' gradients."""
    return [sum(parts) for parts in zip(*gradients, strict=True)]


def pcgrad(gradients: Sequence[Gradient]) -> list[Tensor]:
    """The sum of the tasks' gradients, each first projected against the others in random order."""
    projected = []
    for i, own in enumerate(gradients):
        order = [j for j in torch.randperm(len(gradients)).tolist() if j != i]
        projected.append(project(own, [gradients[j] for j in order]))
    return total(projected)


class Surgery:
    """A step's gradients where it has batches of several tasks.

    Each task's gradients are made by themselves. Those of the shared parameters are put together by
    `combine`; any other parameter keeps its own task's.

    Args:
        gradients: batches of one task -> gradients left in the parameters, and the task's loss.
        shared: the parameters that all tasks train.
        combine: such as `pcgrad`.
    """

    def __init__(
        self,
        gradients: Callable[[Sequence[Any]], float],
        shared: Sequence[nn.Parameter],
        combine: Callable[[Sequence[Gradient]], list[Tensor]],
    ):
        self.gradients = gradients
        self.shared = list(shared)
        self.combine = combine

    def __call__(self, batches: Sequence[Any]) -> float:
        """Leave gradients in the parameters; the sum of the tasks' losses."""
        loss = 0.0
        found: list[list[Tensor | None]] = []
        for _, own in groupby(batches, key=lambda batch: batch.task):
            loss += self.gradients(list(own))
            found.append([p.grad for p in self.shared])
            for parameter in self.shared:
                parameter.grad = None
        # A task may reach no shared parameter, and no task some of them (the pooler, unused).
        found = [grads for grads in found if any(g is not None for g in grads)]
        reached = [any(g is not None for g in column) for column in zip(*found, strict=True)]
        shared = list(compress(self.shared, reached))
        whole = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(shared, kept, strict=True)]
            for kept in ([*compress(grads, reached)] for grads in found)
        ]
        for parameter, gradient in zip(shared, self.combine(whole) if whole else [], strict=True):
            parameter.grad = gradient
        return loss


# ---------------------------------------------------------------------------- conflict


def layer_group(name: str) -> str:
    """Which part of BERT a parameter of `bert.BertModel` belongs to, by its name."""
    found = re.match(r"layers\.(\d+)\.(attention)?", name)
    if found:
        return f"layer {found[1]} {'attention' if found[2] else 'feed-forward'}"
    return "pooler" if name.startswith("pooler.") else "embeddings"


def conflict(
    losses: Mapping[str, Sequence[Sequence[Callable[[], Tensor]]]],
    named_parameters: Sequence[tuple[str, nn.Parameter]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """How the gradients of tasks lie to each other, part by part of the model and over all of it.

    Args:
        losses: task -> two batches, each as functions that compute the parts which its loss is the
            sum of; the first batch is compared with the other tasks' first ones, and with the
            task's own second one: the noise floor.
        named_parameters: the shared ones.

    Returns:
        part (`layer_group`, and "overall") -> "a|b" -> "cosine", "product", the inner one, and
        "magnitude", the similarity 2 |a| |b| / (|a|^2 + |b|^2) (Yu et al. 2020, definition 2); None
        where a gradient is 0, or not finite.

    Batches are encoded several times, each time for as many parts as have, together, no more
    parameters than the largest has: no more gradients are held at a time than that part's, and
    those of two losses while a batch's are added up.
    """

    def gradient(batch: Sequence[Callable[[], Tensor]], of: Sequence[nn.Parameter]) -> Gradient:
        options = {"allow_unused": True, "materialize_grads": True}
        parts = (torch.autograd.grad(loss(), of, **options) for loss in batch)
        return reduce(lambda done, part: total([done, part]), parts)

    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        groups.setdefault(layer_group(name), []).append(parameter)
    tasks = list(losses)
    pairs = [((a, 0), (b, 0)) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    pairs += [((a, 0), (a, 1)) for a in tasks]
    keys = sorted({key for pair in pairs for key in pair})
    wanted = [*pairs, *((key, key) for key in keys)]
    products: dict[str, dict] = {}
    for together in bundles({name: sum(p.numel() for p in of) for name, of in groups.items()}):
        parameters = [p for name in together for p in groups[name]]
        found = {key: iter(gradient(losses[key[0]][key[1]], parameters)) for key in keys}
        for name in together:
            own = {key: [*islice(of, len(groups[name]))] for key, of in found.items()}
            products[name] = {(a, b): dot(own[a], own[b]) for a, b in wanted}
    products["overall"] = {pair: sum(p[pair] for p in products.values()) for pair in wanted}
    return {
        group: {f"{a[0]}|{b[0]}": _similarity(of, a, b) for a, b in pairs}
        for group, of in products.items()
    }


def bundles(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in their order, in lists whose sizes add up to no more than the largest's."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            found.append([])
            room = max(sizes.values())
        found[-1].append(name)
        room -= size
    return found


def negative(parts: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, float]:
    """Pair -> the share of the model's parts in which its cosine (`conflict`) is negative."""
    names = [part for part in parts if part != "overall"]
    return {
        pair: sum((parts[part][pair]["cosine"] or 0) < 0 for part in names) / len(names)
        for pair in parts["overall"]
    }


def _similarity(products: dict, a: tuple, b: tuple) -> dict[str, float | None]:
    squares = products[a, a], products[b, b]
    if not (min(squares) > 0 and max(squares) < math.inf):
        return {"cosine": None, "product": None, "magnitude": None}
    lengths = math.sqrt(squares[0]) * math.sqrt(squares[1])
    return {
        "cosine": products[a, b] / lengths,
        "product": products[a, b],
        "magnitude": 2 * lengths / sum(squares),
    }
