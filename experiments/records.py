"""Read the records of finished runs, and check that they can be compared."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets import read_examples
from engine.checkpoint import read_json
from engine.errors import UserError, reading
from experiments.runner import expand_recipes, planned_seeds
from experiments.tables import CELLS, CLAIMS, TASK_TITLES
from tasks import TASKS

Record = dict[str, Any]
Records = dict[str, list[Record]]  # cell -> its runs, by seed


def load_records(out: Path) -> Records:
    """The records in `out` by cell, ordered by seed, and that of the untouched encoder.

    UserError if there are none, or if a cell has changed since its run.
    """
    records: Records = {}
    for path in sorted((out / "records").glob("*.json")):
        record = read_json(path)
        with reading(path, "a record of a run"):
            cell, command, _ = record["cell"], record["command"], record["predictions"]
        if cell not in CELLS:
            raise UserError(f"{path}: there is no cell {cell} any more; delete the record")
        flags = shlex.join(expand_recipes(shlex.split(CELLS[cell].flags)))
        if f" {flags} --model " not in command:
            raise UserError(
                f"{path}: made by `{command}`, but its cell is now `{flags}`; delete it"
            )
        records.setdefault(cell, []).append(record)
    if not records:
        raise UserError(f"{out / 'records'}: no records; first: python -m experiments run TABLE")
    path = out / "untouched.json"
    if not path.exists():
        raise UserError(f"{path}: no such file, the baseline of every table: run a table again")
    with reading(path, "the record of the untouched encoder"):
        untouched = read_json(path)
        _ = untouched["dev"]["para"], untouched["dev"]["sts"], untouched["predictions"]
    runs = {cell: sorted(runs, key=lambda run: run["seed"]) for cell, runs in records.items()}
    return {**runs, "untouched": [untouched]}


def select_seeds(records: Records, cells: Sequence[str], seeds: int | None) -> Records:
    """The planned runs of some cells; UserError if a cell lacks one."""
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


def claimed_cells(records: Records, seeds: int | None) -> list[str]:
    """The cells that the paper's claims are about and that have all of their planned runs."""
    claimed = {cell for claim in CLAIMS for *pair, _ in claim.contrasts for cell in pair}
    recorded = {cell: {run["seed"] for run in records.get(cell, [])} for cell in claimed}
    return sorted(c for c in claimed if recorded[c] >= set(planned_seeds(c, seeds)))


def encoders_of(cells: Sequence[str]) -> list[str]:
    """The cells whose encoders these cells start from."""
    return sorted({CELLS[cell].start_from for cell in cells} - {None})


def origin(run: Record) -> str:
    """What comparable scores must share: commit, precision and kind of machine."""
    commit = (run["commit"] or "unknown")[:7]
    changed = " with uncommitted changes" if run.get("uncommitted_changes") else ""
    hardware = run["hardware"]
    machine = hardware["gpu"] or f"{hardware['machine']} {hardware['cpu']}"
    return f"{commit}{changed}, {run['precision']}, {machine}"


def check_alike(title: str, cells: Sequence[str], records: Records, mixed: bool) -> list[str]:
    """The origins of all runs of some cells, and of the encoders that they start from.

    UserError if they differ (unless `mixed`), or if data or model differ.
    """
    runs = [run for cell in (*cells, *encoders_of(cells)) for run in records.get(cell, [])]
    (untouched,) = records["untouched"]
    examples = {origin(run): run for run in runs}  # one run of each
    if len(examples) > 1 and not mixed:
        (one, run), (two, other), *_ = examples.items()
        raise UserError(
            f"{title}: {run['cell']}, seed {run['seed']}, is of {one}, but {other['cell']}, seed"
            f" {other['seed']}, of {two}; run one of them again, or give --mixed"
        )
    data: dict[str, str] = {}
    for run in runs:
        for file, checksum in run["data"].items():
            if data.setdefault(file, checksum) != checksum:
                raise UserError(f"{title}: {run['cell']} was trained on another {file}")
        chained = CELLS[run["cell"]].start_from
        if not chained and run["model_checksum"] != untouched["model_checksum"]:
            raise UserError(f"{title}: {run['cell']} and untouched.json have different models")
    return list(examples)


def predictions(run: Record, task: str) -> np.ndarray:
    """The recorded dev predictions, (N,)."""
    return np.array(list(map(float, run["predictions"][task])))  # of classes: a string of digits


def load_gold(records: Records, data_dir: Path) -> dict[str, np.ndarray]:
    """Task -> the labels of the dev rows that the runs were evaluated on, (N,).

    UserError if a file in `data_dir` is not the one that the runs read, or has other rows.
    """
    gold, checksums = {}, {}
    for run in [run for runs in records.values() for run in runs]:
        for task in [task for task in TASK_TITLES if task in run["predictions"]]:
            count, path = len(run["predictions"][task]), data_dir / TASKS[task].file("dev")
            if task not in gold:
                examples, _, checksums[task] = read_examples(path, TASKS[task], limit=count)
                gold[task] = np.array([example.label for example in examples])
            if run["data"][path.name] != checksums[task] or count != len(gold[task]):
                raise UserError(f"{path}: not the file that {run['cell']} was evaluated on")
    return gold
