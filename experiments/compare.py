"""Compare any number of runs: their dev scores, and their differences from the first run."""

from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from engine.checkpoint import write_text
from engine.errors import UserError
from engine.stats import format_p
from experiments.render import markdown_table
from report.page import interval_text
from report.plots import error_bars, new_figure, save_figure
from saved_runs import SavedRun, Score, check_different, read_scores

NOTES = """Dev scores with 95% intervals over rows: Wilson's for accuracy, Fisher's z for Pearson's
r. Differences from the first run: 95% bootstrap interval over the same rows, and a paired test's p
with Holm's correction over all differences. None of them covers the variance between seeds."""


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


def score_rows(scores: Sequence[Sequence[Score]]) -> list[list[str]]:
    """The table as text, with a header."""
    header = ["task", "run", "rows", "score", "95% interval", "minus first", "95% interval"]
    rows = [[*header, "p (Holm)"]]
    for s in chain(*scores):
        cells = [f"{s.task.title}, {s.metric}", s.run, f"{s.rows:,}", f"{s.score:.3f}"]
        cells.append(interval_text(s.interval))
        difference = ["", "", ""]
        if c := s.comparison:
            difference = [f"{c.difference:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", format_p(c.p)]
        rows.append([cell.replace("|", r"\|") for cell in [*cells, *difference]])
    return rows


def plot_scores(scores: Sequence[Sequence[Score]], path: Path) -> None:
    """A panel for each task: a dot with its interval for each run, from the first run down."""
    runs = list(dict.fromkeys(score.run for score in chain(*scores)))
    options = {"width": 3.4, "height": 1.3 + 0.35 * len(runs), "sharey": True}
    figure, panels = new_figure(len(scores), **options)
    for panel, of_task in zip(panels, scores, strict=True):
        first, intervals = of_task[0], np.array([s.interval for s in of_task])
        line = panel.axvline(first.score, color="0.5", linestyle="--")
        values, rows = np.array([s.score for s in of_task]), [runs.index(s.run) for s in of_task]
        error_bars(panel, values, rows, intervals, across=True)
        panel.set(title=first.task.title, xlabel=f"dev {first.metric}, 95% interval")
    # Keep the end of a long path: it tells runs apart.
    names = [run if len(run) < 40 else f"...{run[-37:]}" for run in runs]
    names = [name.replace("$", r"\$") for name in names]  # $ would begin a formula
    panels[0].set_yticks(range(len(runs)), names)
    panels[0].set_ylim(len(runs) - 0.5, -0.5)  # the first run at the top
    figure.legend([line], ["the first run"], loc="outside lower right")
    save_figure(figure, path)
