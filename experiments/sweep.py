"""Search the learning rates of BERT and heads: a grid with successive halving.

Every pair of rates is first tried on a few rows; the better half advances to twice as many, and so
on (Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943). After an interruption,
repeat the command: finished trials are skipped, and the one that was running is resumed.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import read_json, write_json, write_text
from engine.errors import TrainingDiverged, UserError
from engine.run_dir import folder_lock
from engine.trainer import progress_bar
from experiments.render import markdown_table
from experiments.runner import (
    check_command,
    check_data_dir,
    expand_recipes,
    format_command,
    last_line,
    read_run,
    side_by_side,
    start_process,
    threads_per_job,
)
from prediction import primary_metric
from report.plots import DASHES, MARKERS, new_figure, save_figure
from tasks import TASKS

Record = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A run with these learning rates on a random subset of `limit` rows of each file.

    This includes the dev files, so scores are comparable only within a rung.
    """

    lr: float
    head_lr: float
    limit: int

    def __str__(self) -> str:
        return f"lr{self.lr:g}-head{self.head_lr:g}-limit{self.limit}"


def sweep(args: argparse.Namespace) -> None:
    """Run the rungs of the sweep, then write sweep.md and sweep.png into --out."""
    check_data_dir(args)
    for folder in (args.out / "records", args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    if args.rows < 2 ** (args.rungs - 1):
        raise UserError(f"--rows {args.rows}: too few to halve {args.rungs - 1} times")
    rates = list(dict.fromkeys(itertools.product(args.lr, args.head_lr)))
    records: list[Record] = []
    with folder_lock(args.runs):
        for rung in range(args.rungs):
            limit = args.rows // 2 ** (args.rungs - 1 - rung)
            rung_records = run_trials([Trial(*pair, limit) for pair in rates], args)
            if max(map(score, rung_records)) == -np.inf:
                raise UserError("training diverged at all rates: give smaller --lr and --head_lr")
            records += rung_records
            rates = better_half(rung_records)
    write_text(args.out / "sweep.md", markdown(records, args))
    plot_sweep(records, args.out / "sweep.png")
    lr, head_lr = rates[0]
    print(f"best: --lr {lr:g} --head_lr {head_lr:g}; {args.out}: sweep.md, sweep.png")


def score(record: Record) -> float:
    """The overall dev score; minus infinity for a run that diverged."""
    return -np.inf if record["overall"] is None else record["overall"]


def better_half(records: Sequence[Record]) -> list[tuple[float, float]]:
    """The rates of the better half of the trials, rounded up, best first."""
    ranked = sorted(records, key=score, reverse=True)
    return [(record["lr"], record["head_lr"]) for record in ranked[: (len(ranked) + 1) // 2]]


def run_trials(trials: Sequence[Trial], args: argparse.Namespace) -> list[Record]:
    """The trials' records, new or from before; --jobs trials run in parallel."""
    records: list[Record] = []
    with progress_bar(len(trials), "trials") as bar:
        for record in side_by_side(partial(run_trial, args), trials, args.jobs):
            records.append(record)
            bar.set_postfix_str(f"best overall {max(map(score, records)):.3f}")
            bar.update()
    return records


def run_trial(args: argparse.Namespace, trial: Trial) -> Record:
    """A trial's record, from --out or from a run in --runs."""
    path = args.out / "records" / f"{trial}.json"
    flags = ["--lr", f"{trial.lr:g}", "--head_lr", f"{trial.head_lr:g}"]
    flags += ["--limit", str(trial.limit)]
    script = [*base_command(args), "--no_test", *flags]

    def with_paths(runs: Path, data_dir: Path) -> list[str]:
        return [*script, "--data_dir", str(data_dir), "--run_dir", str(runs / str(trial))]

    recorded = format_command(with_paths(Path("runs/sweep"), Path("DATA")))
    check_command(path, recorded)
    if path.exists():
        return read_json(path)
    log = args.runs / f"{trial}.log"
    command = [*with_paths(args.runs, args.data_dir), "--resume"]
    code = start_process(command, log, threads_per_job(args.jobs))
    if code not in (0, TrainingDiverged.exit_code):
        raise UserError(f"{trial}: exit code {code}: {last_line(log)} (see {log})")
    if code:  # divergence at these rates is a result, too
        result = {"overall": None, "error": last_line(log)}
    else:
        result = read_run(args.runs / str(trial))
    record = {**asdict(trial), "command": recorded, **result}
    write_json(path, record)
    return record


def base_command(args: argparse.Namespace) -> list[str]:
    """The script and the flags of all trials; it trains BERT unless they say otherwise."""
    flags = expand_recipes(args.flags)
    option = [] if "--option" in flags else ["--option", "finetune"]
    return ["multitask_classifier.py", *option, *flags, "--model", args.model]


def markdown(records: Sequence[Record], args: argparse.Namespace) -> str:
    """sweep.md: the trials by rows and score, and a command with the best rates."""
    ranked = sorted(records, key=lambda r: (r["limit"], score(r)), reverse=True)
    tasks = list(ranked[0]["dev"])  # the best one did not diverge
    rows = [["rows per file", "lr", "head lr", *(TASKS[t].title for t in tasks), "overall"]]
    for record in ranked:
        cells = ["diverged"] * (len(tasks) + 1)
        if record["overall"] is not None:
            scores = [*(primary_metric(record["dev"][t]) for t in tasks), record["overall"]]
            cells = [f"{value:.3f}" for value in scores]
        rates = [f"{record[key]:g}" for key in ("lr", "head_lr")]
        rows.append([f"{record['limit']:,}", *rates, *cells])
    lines = ["# Learning rates", "", "Written by `python -m experiments sweep`; scores on dev."]
    best = [word for key in ("lr", "head_lr") for word in (f"--{key}", f"{ranked[0][key]:g}")]
    command = format_command([*base_command(args), *best, "--data_dir", "DATA"])
    lines += ["The best rates, for all rows:", "", f"    {command}", *markdown_table(rows)]
    return "\n".join([*lines, "", "![overall score](sweep.png)", ""])


def plot_sweep(records: Sequence[Record], path: Path) -> None:
    """The first rung as a grid of scores, and the score of each pair of rates by rung."""
    figure, (grid, lines) = new_figure(2, width=5.5, height=4.2)
    lrs, head_lrs = (sorted({record[key] for record in records}) for key in ("lr", "head_lr"))
    first = min(record["limit"] for record in records)
    scores = np.full((len(head_lrs), len(lrs)), np.nan)
    for record in records:
        if record["limit"] == first:
            row, column = head_lrs.index(record["head_lr"]), lrs.index(record["lr"])
            scores[row, column] = record["overall"]  # None becomes NaN, which stays white
            text = "diverged" if record["overall"] is None else f"{record['overall']:.3f}"
            grid.text(column, row, text, ha="center", va="center")
    grid.imshow(scores, cmap="Greys", origin="lower", aspect="auto", alpha=0.5)
    grid.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    grid.set_yticks(range(len(head_lrs)), [f"{lr:g}" for lr in head_lrs])
    grid.grid(False)
    grid.set(title=f"overall, {first:,} rows per file", xlabel="lr of BERT", ylabel="lr of heads")
    for i, lr in enumerate(lrs):
        for j, head_lr in enumerate(head_lrs):
            mine = [r for r in records if (r["lr"], r["head_lr"]) == (lr, head_lr)]
            points = [(r["limit"], r["overall"]) for r in mine if r["overall"] is not None]
            # Dashes tell lr and markers head_lr, also without colour.
            style = {"linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[j % len(MARKERS)]}
            style |= {"color": f"C{i}", "fillstyle": "none", "label": f"{lr:g}, {head_lr:g}"}
            lines.plot(*zip(*points, strict=True), **style)
    lines.set_xscale("log", base=2)
    ticks = sorted({record["limit"] for record in records})
    lines.set_xticks(ticks, [f"{rows:,}" for rows in ticks])
    lines.set(xlabel="rows per file (--limit)", ylabel="overall score, dev")
    lines.legend(title="lr, head lr", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
