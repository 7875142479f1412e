"""Reading the records of finished runs, and whether they may stand in one table."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets import read_examples
from engine.checkpoint import read_json
from engine.errors import UserError, reading
from experiments.runner import expand_recipes, planned_seeds
from experiments.tables import CELLS, TASK_TITLES
from prediction import primary_metric
from tasks import TASKS

Record = dict[str, Any]
Records = dict[str, list[Record]]  # cell -> its runs, by seed
ROUNDING_TOLERANCE = 1e-3  # predictions are rounded in a record


def load_records(out: Path) -> Records:
    """The records in `out` by cell, in the order of their seeds."""
    records: Records = {}
    for path in sorted((out / "records").glob("*.json")):
        record = read_json(path)
        with reading(path, "a record of a run"):
            cell, command, _ = record["cell"], record["command"], record["predictions"]
            # A cell of the same name may have been changed since.
            flags = shlex.join(expand_recipes(shlex.split(CELLS[cell].flags)))
            if flags not in command:
                raise UserError(
                    f"{path}: made by `{command}`, but its cell is now `{flags}`; run it again"
                )
        records.setdefault(cell, []).append(record)
    if not records:
        raise UserError(f"{out / 'records'}: no records; first: python -m experiments run TABLE")
    return {cell: sorted(runs, key=lambda run: run["seed"]) for cell, runs in records.items()}


def load_untouched(out: Path) -> Record:
    """What the encoder scores without training; UserError if it was not measured."""
    path = out / "untouched.json"
    if not path.exists():
        raise UserError(f"{path}: no such file, the baseline of every table: run a table again")
    record = read_json(path)
    with reading(path, "the record of the untouched encoder"):
        _ = record["dev"]["para"], record["dev"]["sts"], record["predictions"]
    return record


def select_seeds(records: Records, cells: Sequence[str], seeds: int | None) -> Records:
    """The planned runs of some cells; UserError if a cell has not all of them."""
    selected: Records = {}
    for cell in cells:
        planned = planned_seeds(cell, seeds)
        runs = [run for run in records.get(cell, []) if run["seed"] in planned]
        if len(runs) < len(planned):
            have = ", ".join(str(run["seed"]) for run in runs) or "none"
            raise UserError(
                f"{cell}: planned with {len(planned)} seeds, but recorded: {have}; run it again, or"
                " give --seeds N to use fewer"
            )
        selected[cell] = runs
    return selected


def origin(run: Record) -> str:
    """What has to be the same for scores to be comparable: commit, precision, kind of machine."""
    # "+": made with changes that were not committed.
    commit = (run["commit"] or "unknown")[:7] + ("+" if run.get("uncommitted_changes") else "")
    hardware = run["hardware"]
    machine = hardware["gpu"] or f"{hardware['machine']} {hardware['cpu']}"
    return f"{commit}, {run['precision']}, {machine}"


def check_alike(title: str, records: Records, mixed: bool) -> list[str]:
    """The origins of all runs of a table; UserError if they differ, unless `mixed`."""
    runs = [run for runs in records.values() for run in runs]
    origins = list(dict.fromkeys(origin(run) for run in runs))
    if len(origins) > 1 and not mixed:
        raise UserError(
            f"{title}: runs of unlike commits, precisions or machines ({origins[0]}; {origins[1]});"
            " run them again, or give --mixed"
        )
    return origins


def predictions(run: Record, task: str) -> np.ndarray:
    """The recorded dev predictions, (N,)."""
    return np.array(list(map(float, run["predictions"][task])))  # of classes: a string of digits


def load_gold(runs: Sequence[Record], data_dir: Path) -> dict[str, np.ndarray]:
    """Task -> the labels of the dev rows that the runs were evaluated on, (N,).

    UserError if the rows in `data_dir` do not reproduce the recorded scores.
    """
    gold: dict[str, np.ndarray] = {}
    for task in TASK_TITLES:
        for run in [run for run in runs if task in run["predictions"]]:
            predicted = predictions(run, task)
            path, labels = data_dir / TASKS[task].file("dev"), TASKS[task].labels
            if task not in gold:
                examples, _, _ = read_examples(path, TASKS[task], limit=len(predicted))
                gold[task] = np.array([example.label for example in examples])
            name = f"{run['cell']}, seed {run['seed']}," if "cell" in run else "untouched.json"
            what = f"{path}: wrong data: the record of {name}"
            if len(predicted) != len(gold[task]):
                raise UserError(f"{what} has {len(predicted)} rows of {task}")
            # The score again: other rows, or another order of them, would not give it.
            score = primary_metric(labels.metrics(predicted, gold[task]))
            recorded = primary_metric(run["dev"][task])
            if abs(score - recorded) > ROUNDING_TOLERANCE:
                raise UserError(f"{what} scored {recorded:.4f} on {task}, here {score:.4f}")
    return gold
