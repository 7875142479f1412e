"""Rank submissions by the course's overall score, with intervals: a private leaderboard.

    python course/leaderboard.py SUBMISSION... --data_dir GOLD
    python course/leaderboard.py submissions/*.zip --data_dir GOLD --csv ranking.csv

A submission is a zip file that `evaluation.py --submit` made, or a folder of prediction files. GOLD
has the test files of the course with their label columns (or, with --split dev, the dev files).
"""

import csv
import io
import math
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from datasets import Example, read_examples
from engine.checkpoint import check_new_file, write_text
from engine.cli import ArgumentParser, print_error, run_script
from engine.errors import UserError, reading
from engine.stats import compare, score_interval
from evaluation import LEADERBOARD
from prediction import primary_metric, read_predictions
from tasks import TASKS, Task

Interval = tuple[float, float, float]  # a value and the ends of its 95% confidence interval


class Gold(NamedTuple):
    """The rows of one task."""

    task: Task
    path: Path
    examples: list[Example]
    labels: np.ndarray  # (N,)


@dataclass
class Submission:
    """One student's predictions and their scores."""

    name: str
    predictions: dict[str, np.ndarray]  # task -> (N,)
    scores: dict[str, Interval]  # of each task, and "overall"
    tied: bool = False  # not significantly worse than the submission above it


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """The interval of the mean of values with independent errors, such as those of the tasks.

    The distances from a value to the ends of its interval add in squares (Zou & Donner 2008).
    """
    value = sum(value for value, _, _ in parts) / len(parts)
    below = math.hypot(*(value - low for value, low, _ in parts)) / len(parts)
    above = math.hypot(*(high - value for value, _, high in parts)) / len(parts)
    return value, value - below, value + above


def read_gold(data_dir: Path, split: str) -> list[Gold]:
    """The labelled rows of every task."""
    gold = []
    for task in (TASKS[name] for name in LEADERBOARD):
        path = data_dir / task.file(split)
        examples, unlabelled, _ = read_examples(path, task)
        if unlabelled and split == "test":  # the course's own dev file has such rows
            raise UserError(f"{path}: {unlabelled} rows have no label; every test row needs one")
        gold.append(Gold(task, path, examples, np.array([e.label for e in examples])))
    return gold


def prediction_file(submission: Path, name: str) -> Path | zipfile.Path:
    """The file of that name in any folder of the submission; UserError unless there is one."""
    found: list[Path | zipfile.Path]
    if submission.is_dir():
        found = [*submission.rglob(name)]
    else:
        with reading(submission, "a zip file or a folder of predictions"):
            archive = zipfile.ZipFile(submission)
        names = [entry for entry in archive.namelist() if PurePath(entry).name == name]
        found = [zipfile.Path(archive, entry) for entry in names]
    if len(found) != 1:
        raise UserError(f"{submission}: has {len(found) or 'no'} {name}, expected one")
    return found[0]


def score(path: Path, gold: Sequence[Gold], split: str) -> Submission:
    """Read and score a submission; UserError names the first thing that does not fit."""
    predictions, scores = {}, {}
    for g in gold:
        name, labels = g.task.name, g.task.labels
        file = prediction_file(path, f"{name}-{split}-output.csv")
        predictions[name] = read_predictions(file, g.task, g.examples, g.path)
        value = primary_metric(labels.metrics(predictions[name], g.labels))
        interval = score_interval(value, len(g.labels), correlation=not labels.integer)
        scores[name] = (value, *interval)
    parts = [tuple(map(TASKS[name].labels.course_score, part)) for name, part in scores.items()]
    return Submission(str(path), predictions, {"overall": mean_interval(parts), **scores})


def is_tied(better: Submission, worse: Submission, gold: Sequence[Gold]) -> bool:
    """Whether the difference of the overall scores may be chance: its interval includes 0."""
    parts = []
    for g in gold:
        name, labels = g.task.name, g.task.labels
        pair = (s.predictions[name] for s in (better, worse))
        c = compare(g.labels, *pair, correlation=not labels.integer)
        # Pearson's r counts as (r + 1) / 2: half of a difference.
        zero = labels.course_score(0.0)
        parts.append(tuple(labels.course_score(d) - zero for d in (c.difference, c.low, c.high)))
    _, low, _ = mean_interval(parts)
    return low <= 0


def table(submissions: Sequence[Submission]) -> str:
    """Aligned columns; "=" after a rank: tied with the submission above."""
    names = ("overall", *LEADERBOARD)
    lines = [["rank", "submission", *(f"{name} [95% interval]" for name in names)]]
    for i, s in enumerate(submissions, start=1):
        cells = [
            f"{value:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
            for value, low, high in s.scores.values()
        ]
        lines.append([f"{i}{'=' if s.tied else ''}", s.name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def as_csv(submissions: Sequence[Submission]) -> str:
    """The same with full precision."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    columns = [name + end for name in ("overall", *LEADERBOARD) for end in ("", "_low", "_high")]
    writer.writerow(["rank", "tied_with_above", "submission", *columns])
    for i, s in enumerate(submissions, start=1):
        writer.writerow([i, int(s.tied), s.name, *chain(*s.scores.values())])
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Rank the readable submissions, and report the others."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("submissions", nargs="+", type=Path, help="zip files, or folders of prediction files")
    add("--data_dir", type=Path, required=True, help="folder of the csv files with labels")
    add("--split", choices=["test", "dev"], default="test", help="which files to score")
    add("--csv", type=Path, metavar="FILE", help="also write the table to this new file")
    args = parser.parse_args(argv)
    if args.csv:
        check_new_file(args.csv)
    gold = read_gold(args.data_dir, args.split)
    ranked = []
    for path in args.submissions:
        try:
            ranked.append(score(path, gold, args.split))
        except UserError as error:
            print_error(f"not ranked: {error}")
    ranked.sort(key=lambda submission: -submission.scores["overall"][0])
    for better, worse in pairwise(ranked):
        worse.tied = is_tied(better, worse, gold)
    print(table(ranked))
    if args.csv:
        write_text(args.csv, as_csv(ranked))
    if left_out := len(args.submissions) - len(ranked):
        raise UserError(f"{left_out} of {len(args.submissions)} submissions were not ranked")


if __name__ == "__main__":
    run_script(main)
