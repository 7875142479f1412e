"""Records of finished runs -> tables.json, tables.md, a LaTeX file per table, and plots.

Every figure comes from the records and the gold labels; tables.json holds each figure of tables.md
and of the LaTeX files.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.checkpoint import write_json, write_text
from engine.errors import UserError
from experiments.claims import compare_cells, judge_claims
from experiments.conflict import conflict_markdown, plot_conflict, summarize_conflict
from experiments.plots import plot_claims, plot_table
from experiments.records import (
    Record,
    Records,
    check_alike,
    claimed_cells,
    load_gold,
    load_records,
    select_seeds,
)
from experiments.render import latex, markdown
from experiments.tables import CELLS, PAPER, TABLES, TASK_TITLES, Column, Table
from prediction import majority_share, primary_metric
from tasks import TASKS


def report(args: argparse.Namespace) -> None:
    """Write tables, plots and tables.json into --out, from the records in it."""
    records = load_records(args.out)
    names = select_tables(args.tables, records, args.seeds)
    cells = [cell for name in names for cell in TABLES[name].cells]
    # A claim needs only its own two cells; their tables may be incomplete.
    cells += [] if args.tables else claimed_cells(records, args.seeds)
    cells = list(dict.fromkeys(cells))
    selected = {**select_seeds(records, cells, args.seeds), "untouched": records["untouched"]}
    gold = load_gold(selected, args.data_dir)
    results = json.dumps(summarize(names, cells, {**records, **selected}, gold, args.mixed))
    # Without digits that differ between machines.
    results = json.loads(results, parse_float=lambda text: round(float(text), 6))
    write_json(args.out / "tables.json", results)
    # The tables and their plots are made from tables.json alone, so they cannot disagree.
    for name, table in results["tables"].items():
        write_text(args.out / f"{name}.tex", latex(table, results["baselines"]))
        plot_table(table, results["baselines"], args.out / f"{name}.png")
    if results["claims"]:
        plot_claims(results["claims"], args.out / "claims.png")
    conflict = {}
    for cell, summary in results["conflict"].items():
        measured = [run["conflict"] for run in selected[cell]]
        images = plot_conflict(measured, args.out, f"conflict-{cell}")
        conflict[cell] = conflict_markdown(summary, images)
    write_text(args.out / "tables.md", markdown(results, conflict))
    print(f"{args.out}: tables.json, tables.md, {', '.join(f'{n}.tex' for n in names)}, and plots")


def select_tables(names: Sequence[str], records: Records, seeds: int | None) -> list[str]:
    """The named tables; without names, those whose columns all have records.

    UserError if there is none, or if no cell of them is planned with so many seeds.
    """
    # A table with a column that was never run would look finished.
    tables = list(names) or [n for n, table in TABLES.items() if set(table.cells) <= set(records)]
    if not tables:
        raise UserError("no table has all of its columns recorded; name one to see what is missing")
    most = max(CELLS[cell].seeds for name in tables for cell in TABLES[name].cells)
    if seeds and seeds > most:
        raise UserError(f"--seeds {seeds}: no cell of {', '.join(tables)} has more than {most}")
    return tables


def summarize(
    names: Sequence[str],
    cells: Sequence[str],
    records: Records,
    gold: Mapping[str, np.ndarray],
    mixed: bool,
) -> dict[str, Any]:
    """Everything that tables.json holds: some tables, and what some cells say about the claims."""
    runs = [run for cell in cells for run in records[cell]]
    rows = {
        split: {task: sorted({run["rows"][split].get(task, 0) for run in runs}) for task in gold}
        for split in ("train", "dev")
    }
    measured = {cell: [run["conflict"] for run in records[cell]] for cell in cells}
    claims = judge_claims({cell: records[cell] for cell in cells}, gold)
    judged = sorted({row[key] for row in claims for key in ("first", "second")})
    return {
        "rows": rows,
        "baselines": baselines(records["untouched"][0], gold),
        "tables": {name: summarize_table(TABLES[name], records, gold, mixed) for name in names},
        "claims": claims,
        "claim_origins": check_alike("claims", judged, records, mixed),
        "conflict": {
            cell: summarize_conflict(runs) for cell, runs in measured.items() if all(runs)
        },
    }


def baselines(untouched: Record, gold: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Task -> the scores of the majority class and of the untouched encoder, where it has them."""
    scores: dict[str, Any] = {task: {"majority": None, "untouched": None} for task in gold}
    for task in [task for task in gold if TASKS[task].labels.integer]:
        scores[task]["majority"] = majority_share(gold[task])
    for task in untouched["dev"]:
        scores[task]["untouched"] = primary_metric(untouched["dev"][task])
    return scores


def summarize_table(
    table: Table, records: Records, gold: Mapping[str, np.ndarray], mixed: bool
) -> dict[str, Any]:
    """A table's columns, and their differences from other columns and the untouched encoder."""
    origins = check_alike(table.title, table.cells, records, mixed)
    untouched = records["untouched"][0]["dev"]
    comparisons = [
        compare_cells(records, column.cell, other, task, gold[task])
        for column in table.columns
        for other in (*column.compare_with, "untouched")
        for task in (untouched if other == "untouched" else gold)
        if len(records[column.cell]) > 1  # a single run has no interval
    ]
    return {
        "title": table.title,
        "origins": origins,
        "columns": {c.cell: summarize_column(c, records[c.cell]) for c in table.columns},
        "comparisons": comparisons,
    }


def summarize_column(column: Column, runs: Sequence[Record]) -> dict[str, Any]:
    """A column's scores over seeds, and where they come from."""
    values = {task: [primary_metric(run["dev"][task]) for run in runs] for task in TASK_TITLES}
    values["overall"] = [run["overall"] for run in runs]
    # The paper averages otherwise: its figure cannot stand beside the course's score.
    papers = dict(zip(TASK_TITLES, PAPER.get(column.cell, ()), strict=False))
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
