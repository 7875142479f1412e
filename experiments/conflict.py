"""Gradient conflict between tasks: statistics and plots of what --measure_conflict logged.

A measurement holds, for each group of parameters (a layer's attention or feed-forward part, the
embeddings, the pooler) and "overall", the cosine, inner product and magnitude similarity of two
gradients. "a|b" compares batches of two tasks; "a|a", two batches of one task, is the noise floor.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from engine.checkpoint import read_text
from engine.errors import UserError, reading
from experiments.plots import new_figure, save_figure

Measurements = list[dict[str, Any]]  # one run's {"step", "parts"}
BOOTSTRAP_RESAMPLES = 2000
EXPLANATION = r"""a\|b compares the gradients of a batch of task a and one of task b, over all
parameters of BERT; a\|a, two batches of one task, is the noise floor. Minibatch noise pulls the
cosine of two tasks towards 0; the disattenuated cosine (Spearman 1904) corrects for it, and is
missing where a noise floor is not significantly positive or the inner products were not logged.
Intervals: Student's t over the measurements (for the disattenuated cosine a bootstrap), which
treats the measurements of one run as independent. Negative: the share of measurements with negative
cosine, overall and by group of parameters. Magnitude similarity (Yu et al. 2020): 1 for gradients
of equal norm, near 0 where one is much larger."""


def disattenuated_cosine(
    products: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[float, float, float] | None:
    """The cosine of two tasks' expected gradients, corrected for the noise of minibatches.

    Args:
        products: per measurement, the inner product <a, b> of gradients of the two tasks.
        first, second: the inner products <a, a'> and <b, b'> of two batches of one task.

    The noise of independent batches is independent, so the expectation of <a, b> is the inner
    product of the expected gradients, and sum <a, b> / sqrt(sum <a, a'> sum <b, b'>) estimates
    their cosine: Spearman's correction for attenuation (The proof and measurement of association
    between two things, 1904).

    Returns:
        The estimate and its 95% bootstrap interval; None if a noise floor is not significantly
        positive.
    """
    values = np.array([products, first, second])
    values = values[:, ~np.isnan(values).any(axis=0)]  # (3, N)
    count = values.shape[1]
    if count < 2:
        return None
    resamples = np.random.default_rng(0).integers(count, size=(BOOTSTRAP_RESAMPLES, count))
    rows = np.concatenate([np.arange(count)[None], resamples])  # row 0 is the sample itself
    ab, aa, bb = values[:, rows].sum(axis=-1)  # each (1 + R,)
    if min(np.quantile(aa[1:], 0.025), np.quantile(bb[1:], 0.025)) <= 0:
        return None
    cosines = ab / np.sqrt(np.where((aa > 0) & (bb > 0), aa * bb, np.nan))
    low, high = np.nanquantile(cosines[1:], [0.025, 0.975])
    return float(cosines[0]), float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95% interval of a mean by Student's t, ignoring NaN; None for fewer than two values."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None
    margin = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - margin), float(values.mean() + margin)


def summarize_conflict(runs: Sequence[Measurements]) -> dict[str, Any]:
    """Statistics of every pair over all measurements of several runs, as a JSON object."""
    groups = [group for group in runs[0][0]["parts"] if group != "overall"]
    pairs = {}
    for pair in runs[0][0]["parts"]["overall"]:
        cosine = values(runs, "overall", pair, "cosine")
        by_group = np.concatenate([values(runs, group, pair, "cosine") for group in groups])
        own = [f"{task}|{task}" for task in pair.split("|")]
        products = [values(runs, "overall", name, "product") for name in (pair, *own)]
        pairs[pair] = {
            "cosine": mean(cosine),
            "interval": mean_interval(cosine),
            "disattenuated": None if pair in own else disattenuated_cosine(*products),
            "negative_share": mean(np.where(np.isnan(cosine), np.nan, cosine < 0)),
            "negative_share_by_group": mean(np.where(np.isnan(by_group), np.nan, by_group < 0)),
            "magnitude_similarity": mean(values(runs, "overall", pair, "magnitude")),
        }
    return {"runs": len(runs), "measurements": sum(map(len, runs)), "pairs": pairs}


def values(runs: Sequence[Measurements], group: str, pair: str, key: str) -> np.ndarray:
    """One logged quantity of every measurement, NaN where there is none."""
    found = [point["parts"][group][pair].get(key) for run in runs for point in run]
    return np.array([math.nan if value is None else value for value in found])


def mean(values: np.ndarray) -> float | None:
    """The mean, ignoring NaN; None if there is nothing else."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def conflict_markdown(summary: dict[str, Any]) -> str:
    """A summary as a table in Markdown, with its explanation."""
    lines = [
        f"{summary['measurements']} measurements in {summary['runs']} runs. {EXPLANATION}",
        "",
        "| pair | mean cosine | 95% interval | disattenuated cosine | negative"
        " | negative, by group | magnitude similarity |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair, row in summary["pairs"].items():
        cosine, low, high = row["disattenuated"] or (None, None, None)
        cells = [
            pair.replace("|", r"\|"),
            show(row["cosine"], "+.3f"),
            " to ".join(show(bound, "+.3f") for bound in row["interval"] or [None]),
            show(cosine, "+.3f") + (f" ({low:+.3f} to {high:+.3f})" if cosine is not None else ""),
            show(row["negative_share"], ".0%"),
            show(row["negative_share_by_group"], ".0%"),
            show(row["magnitude_similarity"], ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    """A number in the given format, a dash for None."""
    return "-" if value is None else format(value, form)


def plot_conflict(runs: Sequence[Measurements], folder: Path, name: str) -> list[Path]:
    """Draw a heat map by group of parameters and curves over steps; returns the files."""
    paths = [folder / f"{name}-layers.png", folder / f"{name}-steps.png"]
    plot_heat_map(runs, paths[0])
    plot_steps(runs, paths[1])
    return paths


def plot_heat_map(runs: Sequence[Measurements], path: Path) -> None:
    """The mean cosine of each pair in each group of parameters."""
    groups = [group for group in runs[0][0]["parts"] if group != "overall"]
    pairs = list(runs[0][0]["parts"]["overall"])
    grid = np.array([[mean(values(runs, g, p, "cosine")) for p in pairs] for g in groups], float)
    figure, panels = new_figure(width=7.5, height=0.32 * len(groups) + 1.2)
    image = panels[0].imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    panels[0].set_xticks(range(len(pairs)), pairs)
    panels[0].set_yticks(range(len(groups)), groups)
    for (i, j), value in np.ndenumerate(grid):
        panels[0].text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7)
    panels[0].set_xlabel("gradients compared (a|a: two batches of one task, the noise floor)")
    figure.colorbar(image, label="mean cosine")
    save_figure(figure, path)


def plot_steps(runs: Sequence[Measurements], path: Path) -> None:
    """The cosine of each pair over training steps, averaged over runs."""
    figure, panels = new_figure(width=9, height=5)
    steps = [point["step"] for point in runs[0]]
    for pair in runs[0][0]["parts"]["overall"]:
        cosines = []
        for step in steps:
            points = [[point for point in run if point["step"] == step] for run in runs]
            cosines.append(mean(values(points, "overall", pair, "cosine")))
        style = "--" if len(set(pair.split("|"))) == 1 else "-"
        panels[0].plot(steps, np.array(cosines, float), style, marker="o", ms=3, label=pair)
    panels[0].axhline(0, color="black", linewidth=0.5)
    panels[0].set(xlabel="training step", ylabel="cosine over all parameters of BERT")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


def report_run(run: Path) -> None:
    """Print the table of one run, and draw its plots into its own folder."""
    log = run / "log.jsonl"
    with reading(log, "the log of a run"):
        entries = [json.loads(line) for line in read_text(log).splitlines()]
        measured = [entry for entry in entries if entry["kind"] == "conflict"]
    if not measured:
        raise UserError(f"{run}: no measurements; train with --measure_conflict N")
    print(conflict_markdown(summarize_conflict([measured])))
    print("\n" + "\n".join(map(str, plot_conflict([measured], run, "conflict"))))
