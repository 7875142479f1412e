"""The order in which training draws batches from several tasks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import TaskDataset
from engine.mixture import SAMPLINGS, TaskMixture
from tasks import TASKS
from tokenizer import BertTokenizer

SEEDS = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def sets(tiny, data):
    """SST and Quora with 40 training rows, STS with 20."""
    tokenizer = BertTokenizer.from_pretrained(tiny)
    tasks = [TASKS[name] for name in ("sst", "para", "sts")]
    return [TaskDataset(data / task.file("train"), task, tokenizer) for task in tasks]


def seen(mixture, *epochs):
    """(task, row) of every row of the epochs' steps, in order."""
    batches = [batch for epoch in epochs for step in mixture.steps(epoch) for batch in step]
    return [(batch.task, int(row)) for batch in batches for row in batch.rows]


def test_round_robin_takes_turns_for_one_pass_over_the_smallest(sets):
    order = [step[0].task for step in TaskMixture(sets, 8, 1, epochs=4).steps(0)]
    assert order == ["sst", "para", "sts"] * 3  # ceil(20 / 8) steps of STS


def test_proportional_sees_every_row_of_every_task_once_an_epoch(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=2, sampling="proportional")
    for epoch in (0, 1):
        rows = seen(mixture, epoch)
        assert len(rows) == len(set(rows)) == 100
    orders = [[step[0].task for step in mixture.steps(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_annealed_moves_from_proportional_towards_equal(sets):
    mixture = TaskMixture(sets, 1, 1, epochs=5, sampling="annealed")
    steps = np.array([mixture.task_steps(epoch) for epoch in range(5)])
    assert steps[0].tolist() == [40, 40, 20]
    assert (steps.sum(axis=1) == 100).all() and (np.diff(steps[:, 2]) >= 0).all()
    weights = np.array([40.0, 40.0, 20.0]) ** 0.2  # Stickland & Murray's last exponent
    np.testing.assert_allclose(steps[-1], weights / weights.sum() * 100, atol=1)


def test_a_step_has_a_batch_of_every_task_for_gradient_surgery(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=2, accumulate=2, all_tasks=True)
    for step in mixture.steps(1):
        assert sorted({batch.task for batch in step}) == ["para", "sst", "sts"]
    assert mixture.epoch_steps(1) == len(list(mixture.steps(1))) == 2
    alone = TaskMixture(sets, 8, 1, epochs=2, accumulate=2)
    assert sorted(seen(mixture, 0, 1)) == sorted(seen(alone, 0, 1))


@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(1, 4), st.sampled_from(SAMPLINGS), SEEDS, st.floats(0, 1))
def test_every_stream_is_pass_after_pass(sets, batch, accumulate, sampling, seed, skip):
    """Through all epochs. And a resumed epoch is the rest of an uninterrupted one."""
    mixture = TaskMixture(sets, batch, seed, 3, sampling, accumulate)
    epochs = [list(mixture.steps(epoch)) for epoch in range(3)]
    assert [len(steps) for steps in epochs] == [mixture.epoch_steps(epoch) for epoch in range(3)]
    steps = [step for epoch in epochs for step in epoch]
    for dataset, used in zip(sets, mixture.rows_used(), strict=True):
        stream = [r for s in steps if s[0].dataset is dataset for b in s for r in b.rows]
        for start in range(0, len(stream), len(dataset)):
            chunk = stream[start : start + len(dataset)]
            assert len(set(chunk)) == len(chunk)
        assert sorted(set(stream)) == sorted(used)
    assert all(len({b.task for b in step}) == 1 and len(step) <= accumulate for step in steps)
    first = int(skip * len(epochs[2]))
    rest = [[batch.rows.tolist() for batch in step] for step in mixture.steps(2, first)]
    assert rest == [[batch.rows.tolist() for batch in step] for step in epochs[2][first:]]
