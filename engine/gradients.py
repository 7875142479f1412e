"""How a step gets its gradients: from one task's loss, or combined from those of several tasks.

A gradient is a list of tensors, one per parameter.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed

Gradient = Sequence[Tensor]


def sum_losses(
    loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], parameters: Sequence[nn.Parameter]
) -> float:
    """Gradients of the mean loss over all rows of a step's batches; returns that loss.

    Losses are summed and divided once by the number of rows, so accumulation and short batches
    weigh every row alike; only one batch's activations are held at a time.

    loss_fn: batch -> the loss of each of its rows, (B,). parameters: those with gradients to sum
    over the processes.
    """
    count = sum(len(batch.global_rows) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        # Backward at once, so that the activations of one batch at a time are in memory.
        if len(batch):  # a process may have no row of a short batch
            loss = loss_fn(batch).sum() / count
            loss.backward()
            total += loss.item()
    distributed.all_reduce_gradients(parameters)
    return distributed.all_reduce_sum(total).item()


def inner_product(a: Gradient, b: Gradient) -> float:
    """<a, b> over all parameters, in float64, as squares could leave float32's range."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x.device.type == "mps":  # has no float64
            x, y = x.cpu(), y.cpu()
        total += torch.dot(x.flatten().double(), y.flatten().double()).item()
    return total


def project(gradient: Gradient, others: Sequence[Gradient]) -> list[Tensor]:
    """Remove from `gradient` its conflict with each of `others`, one after the other.

    Yu et al. 2020 (https://arxiv.org/abs/2001.06782), algorithm 1: if <g, g_j> < 0, then
    g <- g - <g, g_j> / |g_j|^2 g_j, after which <g, g_j> = 0. A later projection may undo that.
    """
    result = [g.clone() for g in gradient]  # the others are projected against the original
    for other in others:
        # A negative inner product: a step along one gradient undoes a part of the other's.
        product = inner_product(result, other)
        if product < 0:
            factor = product / inner_product(other, other)
            for g, g_j in zip(result, other, strict=True):
                g.sub_(g_j, alpha=factor)
    return result


def sum_gradients(gradients: Sequence[Gradient]) -> list[Tensor]:
    """The sum of the tasks' gradients."""
    return [sum(parts) for parts in zip(*gradients, strict=True)]


def pcgrad(gradients: Sequence[Gradient]) -> list[Tensor]:
    """The sum of the tasks' gradients, each first projected against the others in random order."""
    count = len(gradients)
    orders = distributed.broadcast_from_rank_zero(  # the same in all processes
        lambda: [torch.randperm(count).tolist() for _ in range(count)]
    )
    projected = []
    for i, gradient in enumerate(gradients):
        projected.append(project(gradient, [gradients[j] for j in orders[i] if j != i]))
    return sum_gradients(projected)


def backward_by_task(
    backward: Callable[[Sequence[Any]], float],
    batches: Sequence[Any],
    shared: Sequence[nn.Parameter],
    combine: Callable[[Sequence[Gradient]], list[Tensor]],
) -> float:
    """Gradients of a step with batches of several tasks; returns the sum of the tasks' losses.

    backward: batches of one task -> the task's loss, leaving gradients. Those of the `shared`
    parameters are taken for each task separately, then combined (`pcgrad`, `sum_gradients`); any
    other parameter keeps its own task's.
    """
    loss = 0.0
    by_task: list[list[Tensor | None]] = []
    # The batches of a task stand together, several with --accumulate.
    for _, task_batches in groupby(batches, key=lambda batch: batch.task):
        loss += backward(list(task_batches))
        # Take this task's gradients away, so that the next task's do not add to them.
        by_task.append([p.grad for p in shared])
        for p in shared:
            p.grad = None
    # What no task reaches, such as an unused pooler, keeps no gradient.
    used = [i for i in range(len(shared)) if any(grads[i] is not None for grads in by_task)]
    whole = [
        [torch.zeros_like(shared[i]) if grads[i] is None else grads[i] for i in used]
        for grads in by_task
    ]
    for i, gradient in zip(used, combine(whole), strict=True):
        shared[i].grad = gradient
    return loss
