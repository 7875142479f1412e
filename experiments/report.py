"""Records of finished runs -> tables.json, tables.md, a LaTeX file per table, and plots.

Every figure comes from the records and the gold labels; only the baseline for STS needs a model.
tables.json holds each figure that the other files show.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bert import BertModel
from datasets import TaskDataset, read_examples
from engine.checkpoint import read_json, write_json, write_text
from engine.errors import UserError, reading
from engine.stats import compare, holm
from experiments.conflict import plot_conflict, summarize_conflict
from experiments.plots import plot_bars, plot_curves
from experiments.render import FLOOR_MARGIN, latex, markdown
from experiments.tables import CELLS, TABLES, TASK_TITLES, Column, Table
from model import SentenceEncoder
from prediction import baseline, majority_share, primary_metric
from tasks import TASKS
from tokenizer import BertTokenizer

Records = dict[str, list[dict[str, Any]]]  # cell -> its runs, by seed
ROUNDING_TOLERANCE = 1e-3  # predictions are rounded in a record


def report(args: argparse.Namespace) -> None:
    """Write tables, plots and tables.json into --out, from the records in it."""
    records = load_records(args.out)
    tables = select_tables(args.tables, records)
    shown = {cell for name in tables for cell in TABLES[name].cells}
    records = {cell: runs for cell, runs in records.items() if cell in shown}
    results = json.dumps(summarize(tables, records, args.data_dir))
    # Rounded, figures are equal on every machine.
    results = json.loads(results, parse_float=lambda text: round(float(text), 6))
    write_json(args.out / "tables.json", results)
    # All of them are made from tables.json alone, so they cannot disagree.
    for name, table in results["tables"].items():
        write_text(args.out / f"{name}.tex", latex(table, results["baselines"]))
        plot_bars(table, results["baselines"], args.out / f"{name}.png")
    has_curves = plot_curves(records, args.out / "curves.png")
    for cell in results["conflict"]:
        plot_conflict([run["conflict"] for run in records[cell]], args.out, f"conflict-{cell}")
    write_text(args.out / "tables.md", markdown(results, has_curves))
    print(f"{args.out}: tables.json, tables.md, {', '.join(f'{n}.tex' for n in tables)}, and plots")


def load_records(out: Path) -> Records:
    """The records in `out` by cell, in the order of their seeds."""
    records: Records = {}
    for path in sorted((out / "records").glob("*.json")):
        record = read_json(path)
        with reading(path, "a record of a run"):
            cell, command, _ = record["cell"], record["command"], record["predictions"]
            # A cell of the same name may have been changed since.
            if CELLS[cell].flags not in command:
                raise UserError(
                    f"{path}: made by `{command}`, but its cell is now `{CELLS[cell].flags}`; run"
                    " it again"
                )
        records.setdefault(cell, []).append(record)
    if not records:
        raise UserError(f"{out / 'records'}: no records; first: python -m experiments run TABLE")
    return {cell: sorted(runs, key=lambda run: run["seed"]) for cell, runs in records.items()}


def select_tables(names: Sequence[str], records: Records) -> list[str]:
    """The named tables; without names, those whose columns all have records."""
    # A table with a column that was never run would look finished.
    tables = list(names) or [n for n, table in TABLES.items() if set(table.cells) <= set(records)]
    if not tables or not any(set(TABLES[name].cells) & set(records) for name in tables):
        raise UserError("no table has all of its columns recorded; name one to see what there is")
    return tables


def load_gold(records: Records, data_dir: Path) -> dict[str, np.ndarray]:
    """Task -> the labels of the dev rows that the records were evaluated on, (N,).

    UserError if the rows in `data_dir` do not reproduce the recorded scores.
    """
    gold: dict[str, np.ndarray] = {}
    for task in TASK_TITLES:
        for run in [run for runs in records.values() for run in runs if task in run["predictions"]]:
            predicted = np.array(run["predictions"][task])
            path, labels = data_dir / TASKS[task].file("dev"), TASKS[task].labels
            if task not in gold:
                examples, _, _ = read_examples(path, TASKS[task], limit=len(predicted))
                gold[task] = np.array([example.label for example in examples])
            what = f"{path}: wrong data: the record of {run['cell']}, seed {run['seed']},"
            if len(predicted) != len(gold[task]):
                raise UserError(f"{what} has {len(predicted)} rows of {task}")
            # The score again: other rows, or another order of them, would not give it.
            score = primary_metric(labels.metrics(predicted, gold[task]))
            recorded = primary_metric(run["dev"][task])
            if abs(score - recorded) > ROUNDING_TOLERANCE:
                raise UserError(f"{what} scored {recorded:.4f} on {task}, here {score:.4f}")
    return gold


def summarize(tables: Sequence[str], records: Records, data_dir: Path) -> dict[str, Any]:
    """Everything that tables.json holds."""
    gold = load_gold(records, data_dir)
    runs = [run for runs in records.values() for run in runs]
    rows = {
        split: {task: sorted({run["rows"][split].get(task, 0) for run in runs}) for task in gold}
        for split in ("train", "dev")
    }
    measured = {cell: [run["conflict"] for run in runs] for cell, runs in records.items()}
    return {
        "rows": rows,
        "baselines": baselines(runs, gold, data_dir),
        "tables": {name: summarize_table(TABLES[name], records, gold) for name in tables},
        "conflict": {
            cell: summarize_conflict(runs) for cell, runs in measured.items() if all(runs)
        },
    }


def summarize_table(
    table: Table, records: Records, gold: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """A table's columns and comparisons."""
    comparisons = [
        compare_cells(column.cell, other, task, records, gold[task])
        for column in table.columns
        for other in column.compare_with
        for task in gold
        if column.cell in records and other in records
    ]
    # One correction for all comparisons of a table.
    corrected = holm([row["p"] for row in comparisons])
    for row, p in zip(comparisons, corrected, strict=True):
        row["p_corrected"] = p
    columns = {c.cell: summarize_column(c, records.get(c.cell, [])) for c in table.columns}
    return {"title": table.title, "columns": columns, "comparisons": comparisons}


def summarize_column(column: Column, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A column's scores over seeds, and where they come from."""
    scores = {
        task: {
            **over_seeds([primary_metric(run["dev"][task]) for run in runs if task in run["dev"]]),
            "paper": paper,
        }
        for task, paper in zip(TASK_TITLES, column.paper, strict=True)
    }
    # The paper averages otherwise: its figure cannot stand beside the course's score.
    overall = [run["overall"] for run in runs if run.get("overall") is not None]
    scores["overall"] = {**over_seeds(overall), "paper": None}
    # "+": made with changes that were not committed.
    commits = [
        (run["commit"] or "unknown")[:7] + ("+" if run.get("uncommitted_changes") else "")
        for run in runs
    ]
    return {
        "heading": column.heading,
        "scores": scores,
        "seeds": [run["seed"] for run in runs],
        "precision": sorted({run["precision"] for run in runs}),
        "commits": list(dict.fromkeys(commits)),
        "command": runs[0]["command"] if runs else None,
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation; with one seed there is no deviation to show."""
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": len(values),
    }


def compare_cells(
    first: str, second: str, task: str, records: Records, gold: np.ndarray
) -> dict[str, Any]:
    """The difference between two cells on a task, the first minus the second."""
    predicted = [np.array([r["predictions"][task] for r in records[c]]) for c in (first, second)]
    ours, theirs = ([primary_metric(r["dev"][task]) for r in records[c]] for c in (first, second))
    # The test of an accuracy counts rows; that of a correlation resamples them.
    is_accuracy = TASKS[task].labels.integer
    floor = majority_share(gold) + FLOOR_MARGIN
    accuracies = [(rows == gold).mean() for rows in predicted]
    return {
        **{"first": first, "second": second, "task": task},
        **vars(compare(gold, *predicted, correlation=not is_accuracy)),
        "seeds": min(len(ours), len(theirs)),
        # The cruder question, whether the seeds of one are all above those of the other.
        "seeds_separate": min(ours) > max(theirs) or max(ours) < min(theirs),
        "both_at_majority": is_accuracy and bool(max(accuracies) < floor),
    }


def baselines(
    runs: Sequence[dict[str, Any]], gold: Mapping[str, np.ndarray], data_dir: Path
) -> dict[str, Any]:
    """Task -> a score without training: the majority class's, and for STS the untouched encoder's.

    The second is left out if the runs' model cannot be loaded.
    """
    found: dict[str, Any] = {}
    for task in [task for task in gold if TASKS[task].labels.integer]:
        found[task] = {"kind": "majority class", "score": majority_share(gold[task])}
    if "sts" not in gold:
        return found
    # Runs that start from another cell's encoder have that as their --model.
    words = [shlex.split(run["command"]) for run in runs if not CELLS[run["cell"]].start_from]
    for name in sorted({command[command.index("--model") + 1] for command in words}):
        try:
            tokenizer = BertTokenizer.from_pretrained(name)
            encoder = SentenceEncoder(BertModel.from_pretrained(name), tokenizer)
            sts = TASKS["sts"]
            path = data_dir / sts.file("dev")
            dataset = TaskDataset(path, sts, tokenizer, limit=len(gold["sts"]))
            kind, score = baseline(encoder, dataset, batch_size=64)
            found["sts"] = {"kind": kind, "score": score}
        except UserError as error:
            print(f"no baseline for STS: {error}")
    return found
