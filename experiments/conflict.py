"""Gradient conflict between tasks: statistics and plots of what --measure_conflict logged.

A measurement holds, for each group of parameters (a layer's attention or feed-forward part, the
embeddings, the pooler) and "overall", the cosine, inner product and magnitude similarity of two
gradients. "a|b" compares batches of two tasks; "a|a", two batches of one task, is the noise floor.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from engine.checkpoint import read_text
from engine.errors import UserError, reading
from report.plots import MARKERS, new_figure, save_figure

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

    The noise of independent batches is independent, so the expectation of <a, b> is the inner
    product of the expected gradients, and sum <a, b> / sqrt(sum <a, a'> sum <b, b'>) estimates
    their cosine: Spearman's correction for attenuation (The proof and measurement of association
    between two things, 1904).

    products, first, second: <a, b>, <a, a'> and <b, b'> of each measurement. Returns the estimate
    and its 95% bootstrap interval; None if a noise floor is not significantly positive.
    """
    values = np.array([products, first, second])
    values = values[:, ~np.isnan(values).any(axis=0)]  # (3, N)
    count = values.shape[1]
    if count < 2:
        return None
    resamples = np.random.default_rng(0).integers(count, size=(BOOTSTRAP_RESAMPLES, count))
    # All resamples at once: (1 + R, N) indices.
    rows = np.concatenate([np.arange(count)[None], resamples])  # row 0 is the sample itself
    ab, aa, bb = values[:, rows].sum(axis=-1)  # each (1 + R,)
    # Where two batches of one task do not agree, there is only noise, and nothing to correct.
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
    # Student's t, as there are few measurements.
    margin = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - margin), float(values.mean() + margin)


def summarize_conflict(runs: Sequence[Measurements]) -> dict[str, Any]:
    """Statistics of every pair over all measurements of several runs, as a JSON object."""
    groups = [group for group in runs[0][0]["parts"] if group != "overall"]
    pairs = {}
    for pair in runs[0][0]["parts"]["overall"]:
        cosine = values(runs, "overall", pair, "cosine")
        by_group = np.concatenate([values(runs, group, pair, "cosine") for group in groups])
        # Of two batches of the same task, for the noise floor and the correction.
        noise_floors = [f"{task}|{task}" for task in pair.split("|")]
        products = [values(runs, "overall", name, "product") for name in (pair, *noise_floors)]
        pairs[pair] = {
            "cosine": mean(cosine),
            "interval": mean_interval(cosine),
            "disattenuated": None if pair in noise_floors else disattenuated_cosine(*products),
            "negative_share": mean(np.where(np.isnan(cosine), np.nan, cosine < 0)),
            "negative_share_by_group": mean(np.where(np.isnan(by_group), np.nan, by_group < 0)),
            "magnitude_similarity": mean(values(runs, "overall", pair, "magnitude")),
        }
    return {"runs": len(runs), "measurements": sum(map(len, runs)), "pairs": pairs}


def values(runs: Sequence[Measurements], group: str, pair: str, key: str) -> np.ndarray:
    """One logged quantity of every measurement, NaN where there is none."""
    logged = [point["parts"][group][pair].get(key) for run in runs for point in run]
    return np.array(logged, dtype=float)  # None becomes NaN


def mean(values: np.ndarray) -> float | None:
    """The mean, ignoring NaN; None if there is nothing else."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def conflict_markdown(summary: dict[str, Any]) -> str:
    """A summary as a table in Markdown, with its explanation."""

    def show(*numbers: float | None, form: str = "+.3f") -> str:
        return "-" if None in numbers else " to ".join(format(n, form) for n in numbers)

    lines = [
        f"{summary['measurements']} measurements in {summary['runs']} runs. {EXPLANATION}",
        "",
        "| pair | mean cosine | 95% interval | disattenuated cosine | negative"
        " | negative, by group | magnitude similarity |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair, row in summary["pairs"].items():
        cosine, *interval = row["disattenuated"] or [None]
        cells = [
            pair.replace("|", r"\|"),
            show(row["cosine"]),
            show(*(row["interval"] or [None])),
            show(cosine) + (f" ({show(*interval)})" if interval else ""),
            show(row["negative_share"], form=".0%"),
            show(row["negative_share_by_group"], form=".0%"),
            show(row["magnitude_similarity"], form=".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_conflict(runs: Sequence[Measurements], folder: Path, name: str) -> list[Path]:
    """Draw a heat map by group of parameters and curves over steps; returns the files."""
    paths = [folder / f"{name}-layers.png", folder / f"{name}-steps.png"]
    groups = [group for group in runs[0][0]["parts"] if group != "overall"]
    pairs = list(runs[0][0]["parts"]["overall"])
    grid = np.array([[mean(values(runs, g, p, "cosine")) for p in pairs] for g in groups], float)
    figure, (panel,) = new_figure(width=7.5, height=0.32 * len(groups) + 1.2)
    # Diverging colors around 0: red where tasks pull against each other.
    image = panel.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    panel.set_xticks(range(len(pairs)), pairs)
    panel.set_yticks(range(len(groups)), groups)
    for (i, j), value in np.ndenumerate(grid):
        panel.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7)
    panel.grid(False)
    panel.set_xlabel("gradients compared (a|a: two batches of one task, the noise floor)")
    figure.colorbar(image, label="mean cosine")
    save_figure(figure, paths[0])

    figure, (panel,) = new_figure(width=9, height=5)
    steps = [point["step"] for point in runs[0]]
    for i, pair in enumerate(pairs):
        at = [[[point for point in run if point["step"] == step] for run in runs] for step in steps]
        cosines = [mean(values(points, "overall", pair, "cosine")) for points in at]
        marker = MARKERS[i % len(MARKERS)]
        style = "--" if len(set(pair.split("|"))) == 1 else "-"
        panel.plot(steps, np.array(cosines, float), style, marker=marker, label=pair)
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set(xlabel="training step", ylabel="cosine over all parameters of BERT")
    figure.legend(loc="outside right upper")
    save_figure(figure, paths[1])
    return paths


def report_run(args: Namespace) -> None:
    """Print the table of one run, and draw its plots into its own folder."""
    run, log = args.run, args.run / "log.jsonl"
    with reading(log, "the log of a run"):
        entries = [json.loads(line) for line in read_text(log).splitlines()]
        measured = [entry for entry in entries if entry["kind"] == "conflict"]
    if not measured:
        raise UserError(f"{run}: no measurements; train with --measure_conflict N")
    print(conflict_markdown(summarize_conflict([measured])))
    print("\n" + "\n".join(map(str, plot_conflict([measured], run, "conflict"))))
