"""The order in which training draws batches from the data sets of several tasks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import distributed

SAMPLINGS = ("roundrobin", "proportional", "annealed")


@dataclass
class TaskMixture:
    """The order in which training draws batches from one or several tasks.

    A step is a list of batches of one task: one batch, or `accumulate` of them; each process gets
    its slice of their rows. Each task is an endless stream of steps, pass after pass over its set,
    and an epoch takes the next few of each:

    - `roundrobin`: the tasks in turn, as in the paper. An epoch is one pass over the smallest set;
      in the next epoch, larger sets continue where they stopped.
    - `proportional`: an epoch is one pass over every set, in random order.
    - `annealed`: as many steps as `proportional`, shared in proportion to (set size)^a, where a
      falls from 1 in the first epoch to 0.2 in the last (Stickland & Murray 2019, section 4.2).

    With `all_tasks`, each step of `roundrobin` has batches of every task, for methods that compare
    the tasks' gradients.
    """

    datasets: Sequence[Any]  # such as `datasets.TokenizedDataset`
    batch_size: int
    seed: int
    epochs: int
    sampling: str = "roundrobin"
    accumulate: int = 1
    all_tasks: bool = False

    def __post_init__(self) -> None:
        # Steps in one pass over each set.
        batches = [dataset.num_batches(self.batch_size) for dataset in self.datasets]
        self.pass_steps = [math.ceil(count / self.accumulate) for count in batches]

    def task_steps(self, epoch: int) -> list[int]:
        """How many steps of each task the epoch (0, 1, ...) takes."""
        if self.sampling == "roundrobin":
            return [min(self.pass_steps)] * len(self.pass_steps)
        if self.sampling == "proportional":
            return self.pass_steps
        exponent = 1 - 0.8 * epoch / max(1, self.epochs - 1)
        weights = np.array([len(dataset) for dataset in self.datasets], dtype=float) ** exponent
        shares = weights / weights.sum() * sum(self.pass_steps)
        steps = np.diff(np.rint(shares.cumsum()), prepend=0).astype(int)  # rounded, the same sum
        return np.maximum(1, steps).tolist()  # no task is left out, however small

    def epoch_steps(self, epoch: int) -> int:
        """The number of steps in an epoch."""
        steps = self.task_steps(epoch)
        return steps[0] if self.all_tasks else sum(steps)

    def order(self, epoch: int) -> list[list[int]]:
        """Which sets each step of the epoch draws from."""
        steps = self.task_steps(epoch)
        sets = list(range(len(steps)))
        if self.sampling == "roundrobin":
            return [sets] * steps[0] if self.all_tasks else [[i] for i in sets] * steps[0]
        rng = np.random.default_rng([self.seed, epoch])
        return [[i] for i in rng.permutation(np.repeat(sets, steps)).tolist()]

    def steps(self, epoch: int, first: int = 0) -> Iterator[list[Any]]:
        """The epoch's steps from number `first` on; skipped ones cost nothing."""
        order = self.order(epoch)
        streams = []
        for i in range(len(self.datasets)):
            # The position in the set's stream: earlier epochs, and the skipped steps of this one.
            earlier = sum(self.task_steps(e)[i] for e in range(epoch))
            streams.append(self._stream(i, earlier + sum(step.count(i) for step in order[:first])))
        for step in order[first:]:
            yield [batch for i in step for batch in next(streams[i])]

    def _stream(self, i: int, start: int) -> Iterator[list[Any]]:
        """The steps of a set from number `start` on, pass after pass, without end."""
        dataset, (number, place) = self.datasets[i], divmod(start, self.pass_steps[i])
        while True:
            # Each pass has its own order.
            batches = dataset.training_batches(self.batch_size, self.seed, number)
            for j in range(place * self.accumulate, len(batches), self.accumulate):
                step = batches[j : j + self.accumulate]
                yield [dataset.batch(r[distributed.rank_slice(len(r))], r) for r in step]
            number, place = number + 1, 0

    def rows_used(self) -> list[np.ndarray]:
        """The row numbers of each set that the whole training will see."""
        used = []
        for i, dataset in enumerate(self.datasets):
            steps = sum(self.task_steps(epoch)[i] for epoch in range(self.epochs))
            rows = dataset.training_batches(self.batch_size, self.seed, 0)
            used.append(np.concatenate(rows[: steps * self.accumulate]))
        return used
