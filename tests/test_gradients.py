"""Gradients of one and of several tasks: accumulation, and PCGrad by hand and by property."""

from functools import partial
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_multitask
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gradients import backward_by_task, pcgrad, project, sum_gradients, sum_losses
from multitask_classifier import row_losses
from prediction import embed_batch


def make_gradients(*rows) -> list[list[torch.Tensor]]:
    """Each row as a gradient of two parameters: the first number, and the others."""
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return [[row[:1], row[1:].reshape(1, -1)] for row in tensors]


def flat(gradient) -> list[float]:
    return torch.cat([g.flatten() for g in gradient]).tolist()


class Batch(SimpleNamespace):
    """Row numbers of this process, and of all processes."""

    def __len__(self):
        return len(self.rows)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum))
def test_accumulated_batches_give_the_gradient_of_the_big_batch(sizes):
    """Parts weigh by their rows; a batch without rows, as a process may have, adds nothing."""
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    mean = ((x @ w - 1) ** 2).mean()
    (expected,) = torch.autograd.grad(mean, w)
    parts = np.split(np.arange(len(x)), np.cumsum(sizes)[:-1])
    batches = [Batch(rows=rows, global_rows=rows) for rows in parts]
    loss = sum_losses(lambda batch: (x[batch.rows] @ w - 1) ** 2, batches, [w])
    assert loss == pytest.approx(mean.item())
    torch.testing.assert_close(w.grad, expected)


def test_projection_by_hand():
    """(1, 0, 0) against (-1, 1, 0): their inner product is -1, and |g_j|^2 is 2."""
    first, second = make_gradients([1, 0, 0], [-1, 1, 0])
    assert flat(project(first, [second])) == [0.5, 0.5, 0]
    assert flat(project(second, [first])) == [0, 1, 0]
    assert flat(pcgrad([first, second])) == [0.5, 1.5, 0]
    assert flat(first) == [1, 0, 0]  # the inputs are not changed
    for size in (1e-23, 1e23):  # whose squares leave float32
        gradients = [torch.tensor([1.0, 0.0])], [torch.tensor([-size, 0.0])]
        torch.testing.assert_close(pcgrad(gradients)[0], torch.zeros(2))
    for rows in ([[1, 0, 0], [0, 2, 0]], [[1, 1, 0], [1, 0, 3]], [[1, 0, 0], [0, 0, 0]]):
        gradients = make_gradients(*rows)  # orthogonal, agreeing, zero: only summed
        assert flat(pcgrad(gradients)) == flat(sum_gradients(gradients)) == np.sum(rows, 0).tolist()


def test_the_order_of_projections_is_random():
    """Three tasks, each against the next: every result is that of one of the possible orders."""
    gradients = make_gradients([1, 0, 0], [-1, 1, 0], [0.2, -1, 0.3])
    results = set()
    for seed in range(40):
        torch.manual_seed(seed)
        results.add(tuple(np.round(flat(pcgrad(gradients)), 9)))
    options = []
    for i, gradient in enumerate(gradients):
        orders = permutations(gradients[:i] + gradients[i + 1 :])
        options.append([project(gradient, order) for order in orders])
    possible = {tuple(np.round(flat(sum_gradients(parts)), 9)) for parts in product(*options)}
    assert len(results) > 1 and results <= possible


numbers = st.floats(-3, 3).map(lambda x: round(x, 3))


@settings(max_examples=100)
@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=2, max_size=5))
def test_no_conflict_is_left_with_the_gradient_last_projected_against(rows):
    gradient, *others = make_gradients(*rows)
    for i, row in enumerate(rows[1:]):
        before, after = (np.array(flat(project(gradient, others[:n]))) for n in (i, i + 1))
        assert after @ row >= -1e-9
        assert after @ after <= before @ before + 1e-9
        if before @ row > 1e-9:
            assert after.tolist() == before.tolist()


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@pytest.mark.parametrize("left_out", [None, "sst"])
def test_bert_gets_the_combined_gradient_and_each_head_its_own(tiny, data, pooling, left_out):
    """Against autograd task by task. Mean pooling does not reach the pooler."""
    model, datasets = load_multitask(tiny, data, pooling=pooling)
    embed, shared = partial(embed_batch, model), list(model.bert.parameters())
    batches = [d.batch(np.arange(k, k + 3)) for d in datasets for k in (0, 3)]
    expected, losses = [], {}
    for name in model.heads:
        parts = [row_losses(model, embed, batch) for batch in batches if batch.task == name]
        losses[name] = torch.cat(parts).mean()
        if name != left_out:
            grads = torch.autograd.grad(losses[name], shared, allow_unused=True, retain_graph=True)
            expected.append([grad for grad in grads if grad is not None])

    def backward(batches):
        loss_fn = partial(row_losses, model, embed, detach=batches[0].task == left_out)
        return sum_losses(loss_fn, batches, list(model.parameters()))

    loss = backward_by_task(backward, batches, shared, sum_gradients)
    assert loss == pytest.approx(sum(losses.values()).item())
    assert (model.bert.pooler_dense.weight.grad is None) == (pooling == "mean")
    combined = [p.grad for p in shared if p.grad is not None]
    for grad, parts in zip(combined, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(grad, sum(parts), atol=1e-5, rtol=1e-4)
    for name, head in model.heads.items():
        grads = torch.autograd.grad(losses[name], list(head.parameters()))
        for parameter, grad in zip(head.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
