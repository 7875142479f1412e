"""Records of finished runs -> tables.json, tables.md, a LaTeX file per table, and plots.

Every figure comes from the records and the gold labels, and tables.json holds each figure that the
other files show.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.checkpoint import write_json, write_text
from engine.errors import UserError
from experiments.claims import compare_cells, judge_claims
from experiments.conflict import plot_conflict, summarize_conflict
from experiments.plots import plot_claims, plot_table
from experiments.records import (
    Record,
    Records,
    check_alike,
    load_gold,
    load_records,
    load_untouched,
    select_seeds,
)
from experiments.render import latex, markdown
from experiments.tables import CLAIMS, TABLES, TASK_TITLES, Column, Table
from prediction import majority_share, primary_metric


def report(args: argparse.Namespace) -> None:
    """Write tables, plots and tables.json into --out, from the records in it."""
    records, untouched = load_records(args.out), load_untouched(args.out)
    names = select_tables(args.tables, records)
    cells = list(dict.fromkeys(cell for name in names for cell in TABLES[name].cells))
    records = select_seeds(records, cells, args.seeds)
    gold = load_gold(
        [untouched, *(run for runs in records.values() for run in runs)], args.data_dir
    )
    results = json.dumps(summarize(names, records, untouched, gold, args.mixed))
    # Rounded, figures are equal on every machine.
    results = json.loads(results, parse_float=lambda text: round(float(text), 6))
    write_json(args.out / "tables.json", results)
    # All of them are made from tables.json alone, so they cannot disagree.
    for name, table in results["tables"].items():
        write_text(args.out / f"{name}.tex", latex(table, results["baselines"]))
        plot_table(table, results["baselines"], args.out / f"{name}.png")
    if results["claims"]:
        plot_claims(results["claims"], args.out / "claims.png")
    for cell in results["conflict"]:
        plot_conflict([run["conflict"] for run in records[cell]], args.out, f"conflict-{cell}")
    write_text(args.out / "tables.md", markdown(results))
    print(f"{args.out}: tables.json, tables.md, {', '.join(f'{n}.tex' for n in names)}, and plots")


def select_tables(names: Sequence[str], records: Records) -> list[str]:
    """The named tables; without names, those whose columns all have records."""
    # A table with a column that was never run would look finished.
    tables = list(names) or [n for n, table in TABLES.items() if set(table.cells) <= set(records)]
    if not tables:
        raise UserError("no table has all of its columns recorded; name one to see what is missing")
    return tables


def summarize(
    names: Sequence[str],
    records: Records,
    untouched: Record,
    gold: Mapping[str, np.ndarray],
    mixed: bool,
) -> dict[str, Any]:
    """Everything that tables.json holds."""
    runs = [run for runs in records.values() for run in runs]
    rows = {
        split: {task: sorted({run["rows"][split].get(task, 0) for run in runs}) for task in gold}
        for split in ("train", "dev")
    }
    measured = {cell: [run["conflict"] for run in runs] for cell, runs in records.items()}
    judged = {cell for claim in CLAIMS for c in claim.contrasts for cell in (c.cell, c.reference)}
    return {
        "rows": rows,
        "baselines": baselines(untouched, gold),
        "tables": {
            name: summarize_table(TABLES[name], records, untouched, gold, mixed) for name in names
        },
        # All or none: their p-values are corrected over the whole list.
        "claims": judge_claims(records, gold) if judged <= set(records) else [],
        "conflict": {
            cell: summarize_conflict(runs) for cell, runs in measured.items() if all(runs)
        },
    }


def baselines(untouched: Record, gold: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Task -> the scores of the commonest class and of the untouched encoder, where it has them."""
    scores: dict[str, Any] = {task: {"majority": None, "untouched": None} for task in gold}
    for task in set(gold) - {"sts"}:
        scores[task]["majority"] = majority_share(gold[task])
    for task in untouched["dev"]:
        scores[task]["untouched"] = primary_metric(untouched["dev"][task])
    return scores


def summarize_table(
    table: Table,
    records: Records,
    untouched: Record,
    gold: Mapping[str, np.ndarray],
    mixed: bool,
) -> dict[str, Any]:
    """A table's columns, and their differences from other columns and the untouched encoder."""
    shown = {cell: records[cell] for cell in table.cells}
    origins = check_alike(table.title, shown, mixed)
    with_untouched = {**shown, "untouched": [untouched]}
    comparisons = [
        compare_cells(with_untouched, column.cell, other, task, gold[task])
        for column in table.columns
        for other in (*column.compare_with, "untouched")
        for task in (untouched["dev"] if other == "untouched" else gold)
        if len(shown[column.cell]) > 1
    ]
    columns = {c.cell: summarize_column(c, shown[c.cell]) for c in table.columns}
    return {
        "title": table.title,
        "origins": origins,
        "columns": columns,
        "comparisons": comparisons,
    }


def summarize_column(column: Column, runs: Sequence[Record]) -> dict[str, Any]:
    """A column's scores over seeds, and where they come from."""
    values = {task: [primary_metric(run["dev"][task]) for run in runs] for task in TASK_TITLES}
    values["overall"] = [run["overall"] for run in runs]
    # The paper averages otherwise: its figure cannot stand beside the course's score.
    papers = dict(zip(TASK_TITLES, column.paper, strict=True))
    return {
        "heading": column.heading,
        "scores": {
            task: {**over_seeds(scores), "values": scores, "paper": papers.get(task)}
            for task, scores in values.items()
        },
        "seeds": [run["seed"] for run in runs],
        "head_steps": runs[0]["head_steps"],
        "losses": {task: [run["losses"][task] for run in runs] for task in runs[0]["losses"]},
        "command": runs[0]["command"],
    }


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation; with one seed there is no deviation to show."""
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
