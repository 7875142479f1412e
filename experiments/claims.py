"""The paper's claims, judged: differences between cells, tested and compared with a margin."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.stats import SIGNIFICANCE, holm
from experiments.records import Record, Records, predictions
from experiments.stats import (
    average_groups,
    crossed_effect,
    pigeonhole_interval,
    row_values,
    superiority,
)
from experiments.tables import CELLS, CLAIMS, MARGINS, Claim, paper_difference
from prediction import majority_share, primary_metric
from tasks import TASKS

BOOTSTRAP_UNITS = 8  # with fewer runs a bootstrap over them is too narrow


def pair_runs(records: Records, first: str, second: str) -> tuple[list[Record], list[Record]]:
    """The runs of two cells with the seeds that both have; the untouched encoder has no seed."""
    runs, others = records[first], records[second]
    if second == "untouched":
        return runs, others
    common = {run["seed"] for run in runs} & {run["seed"] for run in others}
    if len(common) < 2:
        raise UserError(f"{first} and {second}: an interval needs two seeds that both have")
    return tuple([run for run in cell if run["seed"] in common] for cell in (runs, others))


def paired_differences(
    cells: tuple[list[Record], list[Record]], task: str, gold: np.ndarray, metric: str
) -> np.ndarray:
    """The first cell's values minus the second's, row by row, in independent units: (U, N).

    A unit is a seed; or a SimCSE encoder, averaged over the runs that start from it.
    """
    first, second = (
        row_values(gold, np.stack([predictions(run, task) for run in runs]), metric)
        for runs in cells
    )
    # Runs that start from the same encoder are not independent, in whichever cell they are.
    started = {name for name, cell in CELLS.items() if cell.start_from}
    chained = [runs for runs in cells if runs[0]["cell"] in started]
    units = [run["model_checksum"] for run in chained[0]] if chained else range(len(cells[0]))
    return average_groups(first - second, list(units))


def compare_cells(
    records: Records, first: str, second: str, task: str, gold: np.ndarray
) -> dict[str, Any]:
    """A difference with its interval, as tables show it: in accuracy or Pearson's r."""
    cells = pair_runs(records, first, second)
    metric = "accuracy" if TASKS[task].labels.integer else "pearson"
    values = paired_differences(cells, task, gold, metric)
    effect = crossed_effect(values)
    low, high = effect.interval()
    return {
        **{"first": first, "second": second, "task": task, "n": len(values)},
        **{"difference": effect.estimate, "low": low, "high": high, "df": effect.df},
        "detectable": effect.detectable(),
        "superiority": superiority(*([primary_metric(r["dev"][task]) for r in c] for c in cells)),
    }


def judge_claims(records: Records, gold: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The differences of `CLAIMS` whose cells have two runs or more, with p-values and answers."""
    contrasts = [(claim, names) for claim in CLAIMS for names in claim.contrasts]
    rows = [
        {"claim": claim.text, **judge_difference(records, claim, names, gold[names[-1]])}
        for claim, names in contrasts
        if all(len(records.get(cell, [])) > 1 for cell in names[:2])
    ]
    keys = [(row, key) for row in rows for key in ("p", "p_margin")]
    # Corrected over the tests of all claims, so that later runs cannot make a p-value larger.
    pending = [1.0] * (2 * len(contrasts) - len(keys))
    corrected = holm([*(row[key] for row, key in keys), *pending])
    for (row, key), p in zip(keys, corrected, strict=False):
        row[f"{key}_corrected"] = p
    for row in rows:
        row["answer"] = answer(row)
    return rows


def judge_difference(
    records: Records, claim: Claim, names: tuple[str, str, str], gold: np.ndarray
) -> dict[str, Any]:
    """One of a claim's differences, and its tests on the margin's scale, accuracy or Fisher's z.

    p: of the null hypothesis of no difference; p_margin: of a difference of at least the margin in
    size or, if the paper denies a gain, of a gain of at least the margin.
    """
    first, second, task = names
    cells = pair_runs(records, first, second)
    steps = [runs[0]["head_steps"][task] for runs in cells]
    if steps[0] != steps[1]:
        raise UserError(
            f"{first} and {second}: unlike numbers of steps of the {task} head ({steps[0]} and"
            f" {steps[1]}), which a claim may not compare; leave --epochs out of --flags"
        )
    metric = "accuracy" if TASKS[task].labels.integer else "fisher_z"
    values = paired_differences(cells, task, gold, metric)
    effect, margin = crossed_effect(values), MARGINS[metric]
    means = [np.mean([primary_metric(run["dev"][task]) for run in runs]) for runs in cells]
    # Neither has learnt anything that could differ.
    at_majority = metric == "accuracy" and max(means) < majority_share(gold) + margin
    scale = 1 - means[1] ** 2 if metric == "fisher_z" else 1  # dr is about (1 - r^2) dz
    row = {
        **compare_cells(records, first, second, task, gold),
        **{"paper": paper_difference(*names), "no_gain": claim.no_gain, "margin": margin * scale},
        **{"at_majority": bool(at_majority), "above": effect.estimate > 0},
        "p": effect.p_difference(),
        "p_margin": effect.p_below(margin) if claim.no_gain else effect.p_equivalence(margin),
    }
    if len(values) >= BOOTSTRAP_UNITS:
        shown = "accuracy" if metric == "accuracy" else "pearson"
        row["bootstrap"] = pigeonhole_interval(paired_differences(cells, task, gold, shown))
    return row


def answer(row: Mapping[str, Any]) -> str:
    """The verdict on a claim from one of its differences, by its corrected p-values."""
    within = row["p_margin_corrected"] < SIGNIFICANCE
    if row["n"] < 3:
        return "inconclusive, too few runs"
    if row["at_majority"]:
        return "inconclusive, neither above the majority class"
    if row["p_corrected"] < SIGNIFICANCE:
        agrees = not row["above"] if row["no_gain"] else row["above"] == (row["paper"] > 0)
        return ("holds" if agrees else "fails") + (", within the margin" if within else "")
    if within:
        return "holds" if row["no_gain"] else "no difference within the margin"
    return "inconclusive"
