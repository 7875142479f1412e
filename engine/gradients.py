"""How a step gets its gradients: from one task's loss, or combined from those of several tasks.

A gradient is a list of tensors, one per parameter.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.device import to_float64

Gradient = Sequence[Tensor]


def sum_losses(
    loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Gradients of the mean loss over all rows of a step's batches; returns that loss.

    Losses are summed and divided once by the number of rows, so all rows have equal weight, also
    with accumulation and short batches.

    loss_fn: batch -> the loss of each of its rows, (B,). parameters: those with gradients to sum
    over the processes.
    """
    count = sum(len(batch.global_rows) for batch in batches)
    total = to_float64(parameters[0].new_zeros(()))  # stays on the device: no synchronization
    for batch in batches:
        # Backward at once, so that memory holds the activations of only one batch at a time.
        if len(batch):  # a process may have no row of a short batch
            loss = loss_fn(batch).sum() / count
            loss.backward()
            total += to_float64(loss.detach())
    distributed.all_reduce_gradients(parameters)
    return distributed.all_reduce_sum(total)


def inner_product(a: Gradient, b: Gradient) -> Tensor:
    """<a, b> over all parameters, in float64: squares could exceed float32's range."""
    if a[0].device.type != "cpu":  # one long vector each saves a GPU many kernel launches
        a, b = ([torch.cat([x.flatten() for x in gradient])] for gradient in (a, b))
    total = to_float64(a[0].new_zeros(()))
    for x, y in zip(a, b, strict=True):
        total += torch.dot(to_float64(x.flatten()), to_float64(y.flatten()))
    return total


def project(gradient: Gradient, others: Sequence[Gradient]) -> list[Tensor]:
    """Remove from `gradient` its conflict with each of `others`, one after the other.

    Yu et al. 2020 (https://arxiv.org/abs/2001.06782), algorithm 1: if <g, g_j> < 0, then
    g <- g - <g, g_j> / |g_j|^2 g_j, after which <g, g_j> = 0. A later projection may undo that.
    """
    result = [g.clone() for g in gradient]  # the others are projected against the original
    for other in others:
        # A negative inner product: a step along one gradient undoes part of the other's.
        product = inner_product(result, other)
        if product.device.type == "cpu" and product >= 0:  # on a GPU, comparing would synchronize
            continue
        square = inner_product(other, other).clamp(min=torch.finfo(torch.float64).tiny)
        factor = (product.clamp(max=0) / square).to(other[0])  # 0 where they do not conflict
        for g, g_j in zip(result, other, strict=True):
            g.addcmul_(g_j, factor, value=-1)
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
    backward: Callable[[Sequence[Any]], Tensor],
    batches: Sequence[Any],
    shared: Sequence[nn.Parameter],
    combine: Callable[[Sequence[Gradient]], list[Tensor]],
) -> Tensor:
    """Gradients of a step with batches of several tasks; returns the sum of the tasks' losses.

    backward: batches of one task -> the task's loss, leaving gradients. Gradients of the `shared`
    parameters are computed for each task separately, then combined (`pcgrad`, `sum_gradients`);
    any other parameter keeps the gradient of its own task.
    """
    losses = []
    by_task: list[list[Tensor | None]] = []
    # A task's batches are consecutive: several with --accumulate.
    for _, task_batches in groupby(batches, key=lambda batch: batch.task):
        losses.append(backward(list(task_batches)))
        # Take this task's gradients away, so that the next task's do not add to them.
        by_task.append([p.grad for p in shared])
        for p in shared:
            p.grad = None
    # Parameters that no task uses, such as an unused pooler, keep no gradient.
    used = [i for i in range(len(shared)) if any(grads[i] is not None for grads in by_task)]
    whole = [
        [torch.zeros_like(shared[i]) if grads[i] is None else grads[i] for i in used]
        for grads in by_task
    ]
    for i, gradient in zip(used, combine(whole), strict=True):
        shared[i].grad = gradient
    return sum(losses)
