"""Compare any number of runs: their dev scores, and their differences from the first run."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoint import write_text
from engine.errors import UserError
from engine.stats import Comparison, compare, format_p, holm, score_interval
from experiments.render import markdown_table
from prediction import primary_metric
from report.page import interval_text
from report.plots import error_bars, new_figure, save_figure
from saved_runs import SavedRun, check_different, read_dev_predictions
from tasks import TASKS, Task

NOTES = """Dev scores with 95% intervals over rows: Wilson's for accuracy, Fisher's z for Pearson's
r. Differences from the first run: 95% bootstrap interval over the same rows, and a paired test's p
with Holm's correction over all differences. None of them covers the variance between seeds."""


@dataclass(frozen=True)
class Score:
    """A run's dev score on a task, and its difference from the first run (None for that run)."""

    task: Task
    run: str
    metric: str
    rows: int
    score: float
    interval: tuple[float, float]
    comparison: Comparison | None


def compare_runs(args: Namespace) -> None:
    """Print a table of all runs, and write it to --out as compare.md, with a plot."""
    check_new_folder(args.out)
    runs = [SavedRun(folder) for folder in args.runs]
    check_different(runs)
    scores = read_scores(runs, args.data_dir)
    table = "\n".join(markdown_table(score_rows(scores)))
    print(table.strip())
    plot_scores(scores, args.out / "compare.png")
    text = f"# Comparison\n\nWritten by `python -m experiments compare`.\n\n{NOTES}\n{table}\n"
    write_text(args.out / "compare.md", f"{text}\n![scores with intervals](compare.png)\n")
    print(f"{args.out}: compare.md, compare.png")


def check_new_folder(out: Path) -> None:
    """UserError if the folder of --out is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; name a new one")


def read_scores(runs: Sequence[SavedRun], data_dir: Path | None) -> list[Score]:
    """The scores on each task that the first run shares with another, from prediction files."""
    scores = []
    for task in TASKS.values():
        having = [run for run in runs if task.name in run.files.get("dev", {})]
        if len(having) < 2 or having[0] is not runs[0]:
            continue
        gold, predictions = read_dev_predictions(having, task, data_dir)
        correlation = not task.labels.integer
        for run, predicted in zip(having, predictions, strict=True):
            metrics = task.labels.metrics(predicted, gold)
            metric, score = next(iter(metrics)), primary_metric(metrics)
            interval, comparison = score_interval(score, len(gold), correlation), None
            if run is not runs[0]:
                comparison = compare(gold, predicted, predictions[0], correlation)
            row = (task, str(run.folder), metric, len(gold), score, interval, comparison)
            scores.append(Score(*row))
    for run in runs[1:]:
        if str(run.folder) not in {score.run for score in scores}:
            raise UserError(f"{run.folder}: has no task in common with {runs[0].folder}")
    return scores


def score_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The table as text, with a header."""
    corrected = iter(holm([score.comparison.p for score in scores if score.comparison]))
    header = ["task", "run", "rows", "score", "95% interval", "minus first", "95% interval"]
    rows = [[*header, "p (Holm)"]]
    for s in scores:
        cells = [f"{s.task.title}, {s.metric}", s.run, f"{s.rows:,}", f"{s.score:.3f}"]
        cells.append(interval_text(s.interval))
        difference = ["", "", ""]
        if s.comparison:
            low, high = s.comparison.low, s.comparison.high
            difference = [f"{s.comparison.difference:+.3f}", f"{low:+.3f} to {high:+.3f}"]
            difference.append(format_p(next(corrected)))
        rows.append([cell.replace("|", r"\|") for cell in [*cells, *difference]])
    return rows


def plot_scores(scores: Sequence[Score], path: Path) -> None:
    """A panel for each task: a dot with its interval for each run, from the first run down."""
    tasks = {score.task.name: score for score in scores}
    runs = list(dict.fromkeys(score.run for score in scores))
    options = {"width": 3.4, "height": 1.3 + 0.35 * len(runs), "sharey": True}
    figure, panels = new_figure(len(tasks), **options)
    for panel, (name, one) in zip(panels, tasks.items(), strict=True):
        mine = [score for score in scores if score.task.name == name]
        rows, intervals = [runs.index(s.run) for s in mine], np.array([s.interval for s in mine])
        line = panel.axvline(mine[0].score, color="0.5", linestyle="--")
        error_bars(panel, np.array([s.score for s in mine]), rows, intervals, across=True)
        panel.set(title=one.task.title, xlabel=f"dev {one.metric}, 95% interval")
    # Keep the end of a long path: it tells runs apart.
    names = [run if len(run) < 40 else f"...{run[-37:]}" for run in runs]
    names = [name.replace("$", r"\$") for name in names]  # $ would begin a formula
    panels[0].set_yticks(range(len(runs)), names)
    panels[0].set_ylim(len(runs) - 0.5, -0.5)  # the first run at the top
    figure.legend([line], ["the first run"], loc="outside lower right")
    save_figure(figure, path)
