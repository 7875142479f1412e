"""The paper's claims, judged: differences between cells, tested and compared with a margin."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.stats import SIGNIFICANCE, holm
from experiments.records import Record, Records, predictions
from experiments.runner import Job
from experiments.stats import (
    average_groups,
    crossed_effect,
    pigeonhole_interval,
    row_values,
    superiority,
)
from experiments.tables import CELLS, CLAIMS, MARGINS, Contrast
from prediction import majority_share, primary_metric
from tasks import TASKS

BOOTSTRAP_UNITS = 8  # with fewer runs a bootstrap over them is too narrow


def difference(
    records: Records,
    first: str,
    second: str,
    task: str,
    gold: np.ndarray,
    metric: str,
) -> np.ndarray:
    """First minus second, paired by seed: (units, N), a unit being a seed or a shared encoder.

    A cell with more seeds than the other lends those that both have; the untouched encoder is
    compared with every run.
    """
    runs, others = records[first], records[second]
    if second != "untouched":
        common = {run["seed"] for run in runs} & {run["seed"] for run in others}
        runs, others = ([r for r in cell if r["seed"] in common] for cell in (runs, others))
    # Runs that start from one SimCSE encoder share its luck, whichever of the cells they are in.
    cell = next((c for c in (first, second) if c in CELLS and CELLS[c].start_from), first)
    units = [Job(cell, run["seed"]).encoder or run["seed"] for run in runs]
    if len(set(units)) < 2:
        raise UserError(f"{first} and {second}: no two seeds in common, and an interval needs them")
    ours, theirs = (
        row_values(gold, np.stack([predictions(run, task) for run in cell]), metric)
        for cell in (runs, others)
    )
    return average_groups(ours - theirs, units)


def compare_cells(
    records: Records, first: str, second: str, task: str, gold: np.ndarray
) -> dict[str, Any]:
    """A difference with its interval, as tables show it: in accuracy or Pearson's r."""
    metric = "accuracy" if TASKS[task].labels.integer else "pearson"
    values = difference(records, first, second, task, gold, metric)
    effect = crossed_effect(values)
    low, high = effect.interval()
    scores = [[primary_metric(r["dev"][task]) for r in records[cell]] for cell in (first, second)]
    row = {"first": first, "second": second, "task": task, "units": len(values)}
    row |= {"difference": effect.estimate, "low": low, "high": high, "df": effect.df}
    row |= {"detectable": effect.detectable(), "superiority": superiority(*scores)}
    if len(values) >= BOOTSTRAP_UNITS:
        row["bootstrap"] = pigeonhole_interval(values)
    return row


def judge_claims(records: Records, gold: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """All contrasts of `CLAIMS`, with p-values corrected over the whole list, and answers."""
    rows = [
        {"claim": claim.text, **judge_contrast(records, contrast, gold[contrast.task])}
        for claim in CLAIMS
        for contrast in claim.contrasts
    ]
    # No difference, and one of the margin or more, cannot both be true: a contrast gives at most
    # one chance of error, and each list may have the whole level (Goeman et al. 2010).
    for key in ("p", "p_margin"):
        for row, p in zip(rows, holm([row[key] for row in rows]), strict=True):
            row[f"{key}_corrected"] = p
    for row in rows:
        row["answer"] = answer(row)
    return rows


def judge_contrast(records: Records, contrast: Contrast, gold: np.ndarray) -> dict[str, Any]:
    """A contrast's difference, and its tests on the scale of the margin, accuracy or Fisher's z.

    p: of no difference; p_margin: of a difference of the margin or more, either way, or, if the
    paper says that there is no gain, of such a gain.
    """
    cells = contrast.cell, contrast.reference, contrast.task, gold
    metric = "accuracy" if TASKS[contrast.task].labels.integer else "fisher_z"
    effect = crossed_effect(difference(records, *cells, metric))
    margin, no_gain = MARGINS[metric], contrast.expected == "not above 0"
    ours, theirs = (
        mean_score(records[c], contrast.task) for c in (contrast.cell, contrast.reference)
    )
    scale = 1 - theirs**2 if metric == "fisher_z" else 1  # dr is about (1 - r^2) dz
    return {
        **compare_cells(records, *cells),
        "expected": contrast.expected,
        "paper": contrast.paper,
        "at_majority": metric == "accuracy" and max(ours, theirs) < majority_share(gold) + margin,
        "p": effect.p_difference(),
        "margin": margin * scale,
        "p_margin": effect.p_below(margin) if no_gain else effect.p_equivalence(margin),
    }


def mean_score(runs: Sequence[Record], task: str) -> float:
    """The mean of the runs' primary metric on a task."""
    return float(np.mean([primary_metric(run["dev"][task]) for run in runs]))


def answer(row: Mapping[str, Any]) -> str:
    """What a contrast, with its corrected p-values, says of its claim."""
    different = row["p_corrected"] < SIGNIFICANCE
    within = row["p_margin_corrected"] < SIGNIFICANCE
    above = row["difference"] > 0
    if row["at_majority"]:  # neither has learnt anything that could differ
        return "inconclusive, both at the commonest class"
    if row["expected"] == "not above 0":
        return "holds" if within else "fails" if different and above else "inconclusive"
    if different:
        agrees = above == (row["expected"] == "above 0")
        return ("holds" if agrees else "fails") + (", within the margin" if within else "")
    return "no difference within the margin" if within else "inconclusive"
