"""Gradient conflict between tasks: statistics and plots of the log of --measure_conflict.

A measurement has, for each group of parameters (a layer's attention or feed-forward part, the
embeddings, the pooler) and "overall", the cosine and inner product of two gradients: "a|b" of
batches of two tasks; "a|a" of two batches of one task, the noise floor. "a>b" is the change of the
loss of b along a small step for a. The unit of all statistics is a run, one per seed.
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.checkpoint import read_text, write_json, write_text
from engine.conflict import PREDICTED_FALL
from engine.errors import UserError, reading
from engine.run_dir import STORAGE_ARGUMENTS
from experiments.compare import check_new_folder
from experiments.render import markdown_table
from experiments.stats import Estimate, mean_interval
from report.plots import MARKERS, new_figure, save_figure
from saved_runs import SavedRun

Measurement = dict[str, Any]  # {"step", "parts", "changes"}
KINDS = ("two tasks", "one task")
EXPLANATION = rf"""a\|b compares the gradients of a batch of task a and one of task b, over all
parameters of BERT; a\|a, two batches of one task, is the noise floor. Minibatch noise pulls the
cosine of two tasks towards 0. The disattenuated cosine (Spearman 1904) corrects for that. It may
fall outside -1 to 1 by chance, and is missing unless both noise floors are positive for every seed.
a>b is the change of the loss of b, in millionths of that loss, by a gradient-descent step for a
that should lower the loss of a, on the same rows, by {PREDICTED_FALL:.2%}; a>a is measured on other
rows of a. Predicted: minus the step size times the inner product of both gradients. Measured: with
BERT moved and the heads fixed. Slope: of measured on predicted changes, through 0; 1 if first-order
terms explain them. In brackets: 95% intervals by Student's t over seeds, not corrected for the
number of intervals; one seed has none. With --option lpft, steps count from the start of
fine-tuning: at step 0 BERT is untouched and the heads are trained. With finetune, the heads are
random at step 0, and so are the gradients."""


def disattenuated_cosine(product: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cosine of two tasks' expected gradients, corrected for the noise of minibatches.

    The noise of independent batches is independent, so the expectation of <a, b> is the inner
    product of the expected gradients, and <a, b> / sqrt(<a, a'> <b, b'>) estimates their cosine:
    Spearman's correction for attenuation (The proof and measurement of association between two
    things, 1904).

    product, first, second: <a, b>, <a, a'> and <b, b'> of each seed, (S,). Returns (S,), NaN where
    a noise floor is not positive: then there is only noise, and nothing to correct.
    """
    return product / np.sqrt(np.where((first > 0) & (second > 0), first * second, np.nan))


def split_phases(runs: Sequence[Sequence[Measurement]]) -> dict[str, list[Measurement]]:
    """Title -> the measurement of each run, for each step that all runs measured."""
    phases: dict[str, list[Measurement]] = {}
    for point in chain(*runs):
        stage = f"{point['stage']}, " if point.get("stage") else ""  # of --option lpft
        phases.setdefault(f"{stage}step {point['step']}", []).append(point)
    return {title: phase for title, phase in phases.items() if len(phase) == len(runs)}


def shown(phases: Mapping[str, Any]) -> dict[str, Any]:
    """The start, the middle and the end."""
    titles = list(phases)
    places = sorted({0, len(titles) // 2, len(titles) - 1})
    return {titles[i]: phases[titles[i]] for i in places}


def logged(phase: Sequence[Measurement], *keys: str) -> np.ndarray:
    """The number under these keys in each measurement, (S,); NaN where it is None."""
    return np.array([reduce(dict.get, keys, point) for point in phase], dtype=float)


def changes_of(phase: Sequence[Measurement]) -> dict[str, np.ndarray]:
    """ "a>b" -> predicted and measured changes in millionths of the loss, (2, S)."""
    found = {}
    for arrow in phase[0].get("changes", {}):
        keys = ("predicted", "measured", "loss")
        *both, loss = (logged(phase, "changes", arrow, key) for key in keys)
        found[arrow] = 1e6 * np.array(both) / loss
    return found


def kind(name: str) -> str:
    """Which tasks "a|b", "a|b, disattenuated", "a|a", "a>b" or "a>a" compares."""
    pair, *rest = name.split(", ")
    first, second = re.split("[|>]", pair)
    return ", ".join([KINDS[first == second], *rest])


def summarize_conflict(runs: Sequence[Sequence[Measurement]]) -> dict[str, Any]:
    """Estimates for each phase, as a JSON object; runs: their measurements, one run per seed."""
    phases = {
        title: {
            "step": phase[0]["step"],
            "groups": {group: summarize_group(phase, group) for group in phase[0]["parts"]},
            "changes": summarize_changes(changes_of(phase)),
        }
        for title, phase in split_phases(runs).items()
    }
    return {"seeds": len(runs), "rows": runs[0][0].get("rows"), "phases": phases}


def summarize_group(phase: Sequence[Measurement], group: str) -> dict[str, Estimate]:
    """The cosines of "a|b" and "a|a", and "a|b, disattenuated", in a group of parameters."""
    rows = {}
    for pair in phase[0]["parts"][group]:
        rows[pair] = mean_interval(logged(phase, "parts", group, pair, "cosine"))
        if kind(pair) == "two tasks":
            names = (pair, *(f"{task}|{task}" for task in pair.split("|")))
            products = (logged(phase, "parts", group, name, "product") for name in names)
            rows[f"{pair}, disattenuated"] = mean_interval(disattenuated_cosine(*products))
    return rows


def summarize_changes(changes: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Predicted and measured changes, and how well they agree; empty if none were logged."""
    summary = {}
    for arrow, both in changes.items():
        for name, figures in zip(("predicted", "measured"), both, strict=True):
            summary[f"{arrow}, {name}"] = mean_interval(figures)
    for one in KINDS if changes else ():
        both = [figures for arrow, figures in changes.items() if kind(arrow) == one]
        predicted, measured = np.stack(both, axis=1)  # each (pairs, S)
        same = (1 + np.sign(predicted * measured)) / 2
        slope = (predicted * measured).sum(axis=0) / (predicted**2).sum(axis=0)
        summary[f"{one}, share with the predicted sign"] = mean_interval(same.mean(axis=0))
        summary[f"{one}, slope"] = mean_interval(slope)
    return summary


def conflict_markdown(summary: dict[str, Any], images: Sequence[Path]) -> str:
    """A summary as tables in Markdown, with its explanation and its plots."""

    def show(estimate: Estimate) -> str:
        form = "+.3f" if abs(estimate[0] or 0) < 2 else "+.1f"
        mean, low, high = ("" if x is None else format(x, form) for x in estimate)
        return (mean or "-") + (f" ({low} to {high})" if low else "")

    rows = ", ".join(f"{task} {count}" for task, count in (summary["rows"] or {}).items())
    lines = [f"Seeds: {summary['seeds']}. Rows per batch: {rows or 'not recorded'}.", EXPLANATION]
    phases = shown(summary["phases"])
    gradients = [phase["groups"]["overall"] for phase in phases.values()]
    changes = [phase["changes"] for phase in phases.values()]
    for title, found in (("cosine", gradients), ("change of the loss", changes)):
        table = [[name.replace("|", r"\|"), *(show(f[name]) for f in found)] for name in found[0]]
        lines += markdown_table([[title, *phases], *table]) if table else []
    return "\n".join(lines + [f"\n![{path.stem}]({path.name})" for path in images])


def plot_layers(summary: dict[str, Any]) -> Figure:
    """Heat maps of groups and pairs: a column for each phase, a scale for each row."""
    phases = {title: phase["groups"] for title, phase in shown(summary["phases"]).items()}
    rows = [row for groups in phases.values() for row in groups.values()]
    known = [name for name in rows[0] if any(row[name][0] is not None for row in rows)] or rows[0]
    kinds, groups = list(dict.fromkeys(map(kind, known))), list(next(iter(phases.values())))
    width = 3 if len(phases) > 1 else 5
    size = {"width": width, "height": 0.24 * len(groups) + 0.7, "sharey": True}
    figure, panels = new_figure(len(phases), rows=len(kinds), **size)
    for i, one in enumerate(kinds):
        names = [name for name in known if kind(name) == one]
        grids = np.array([[row[name] for name in names] for row in rows], dtype=float)
        grids = grids.reshape(len(phases), len(groups), len(names), 3)
        limit = min(1, np.nanmax(np.abs(grids[..., 0])))  # estimates may be outside -1 to 1
        columns = panels[i * len(phases) : (i + 1) * len(phases)]
        for panel, title, grid in zip(columns, phases, grids, strict=True):
            colors = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}  # red: conflict
            image = panel.imshow(grid[..., 0], aspect="auto", **colors)
            for (j, k), mean in np.ndenumerate(grid[..., 0]):
                style = {"ha": "center", "va": "center", "fontsize": 7}
                style["color"] = "white" if abs(mean) > 0.6 * limit else "black"
                style["fontweight"] = "bold" if grid[j, k, 1] * grid[j, k, 2] > 0 else "normal"
                panel.text(k, j, "-" if np.isnan(mean) else f"{mean:+.3f}", **style)
            pairs = [name.split(",")[0] for name in names]
            panel.set_xticks(range(len(names)), pairs, fontsize="small")
            panel.set_yticks(range(len(groups)), groups)
            panel.set_title(title)
            panel.grid(False)
        label = f"cosine, {one.replace('one task', 'noise floor')} (bold: interval without 0)"
        figure.colorbar(image, ax=columns, label=label, aspect=30)
    return figure


def plot_changes(phases: Mapping[str, Sequence[Measurement]]) -> Figure:
    """Measured against predicted changes, a dot for each seed and pair, marked by phase."""
    figure, panels = new_figure(2, width=4.2, height=3.8)
    for one, panel in zip(KINDS, panels, strict=True):
        for marker, (title, phase) in zip(MARKERS, phases.items(), strict=False):
            changes = [both for arrow, both in changes_of(phase).items() if kind(arrow) == one]
            panel.plot(*np.concatenate(changes, axis=1), marker, alpha=0.7, label=title)
        panel.axline((0, 0), slope=1, color="0.5", linestyle="--", zorder=0, label="equal")
        panel.set(title=one, xlabel="predicted change (millionths of the loss)")
    panels[0].set_ylabel("measured change (millionths of the loss)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def plot_steps(summary: dict[str, Any]) -> Figure:
    """The cosines over all parameters of BERT at each step, averaged over seeds."""
    figure, panels = new_figure(width=8, height=2.6, rows=2, sharex=True)
    phases = list(summary["phases"].values())
    for one, panel in zip(KINDS, panels, strict=True):
        pairs = [pair for pair in phases[0]["groups"]["overall"] if kind(pair) == one]
        for marker, pair in zip(cycle(MARKERS), pairs, strict=False):
            points = [(phase["step"], phase["groups"]["overall"][pair][0]) for phase in phases]
            panel.plot(*np.array(points, dtype=float).T, marker=marker, label=pair)
        panel.axhline(0, color="black", linewidth=0.5)
        label = f"mean cosine, {one.replace('one task', 'noise floor')}"
        panel.set(xlabel="training step", ylabel=label)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_conflict(runs: Sequence[Sequence[Measurement]], folder: Path, name: str) -> list[Path]:
    """Draw heat maps, changes if there are any, and curves of many steps; returns the files."""
    phases, summary = split_phases(runs), summarize_conflict(runs)
    figures = {"layers": plot_layers(summary)}
    if all(map(changes_of, phases.values())):
        figures["changes"] = plot_changes(shown(phases))
    if len(phases) > len(shown(phases)):
        figures["steps"] = plot_steps(summary)
    for title, figure in figures.items():
        save_figure(figure, folder / f"{name}-{title}.png")
    return [folder / f"{name}-{title}.png" for title in figures]


def read_runs(folders: Sequence[Path]) -> list[list[Measurement]]:
    """The measurements of each run; UserError unless the runs differ only in --seed."""
    measured: dict[int, list[Measurement]] = {}  # by seed
    runs = [SavedRun(folder) for folder in folders]
    for run in runs:
        for name in sorted(set(run.arguments) - {"seed", *STORAGE_ARGUMENTS}):
            if run.arguments[name] != runs[0].arguments.get(name):
                raise UserError(f"{run.folder}: has another --{name} than {runs[0].folder}")
        if (seed := run.arguments["seed"]) in measured:
            raise UserError(f"{run.folder}: its --seed {seed} is that of another run here")
        with reading(run.folder / "log.jsonl", "the log of a run"):
            log = map(json.loads, read_text(run.folder / "log.jsonl").splitlines())
            measured[seed] = [entry for entry in log if entry["kind"] == "conflict"]
        if not measured[seed]:
            raise UserError(f"{run.folder}: no measurements; train with --measure_conflict N")
    return list(measured.values())


def report_runs(args: Namespace) -> None:
    """Print the tables of some runs, and write them and plots to a folder."""
    runs, out = read_runs(args.runs), args.out
    if len(runs) > 1 or out:
        check_new_folder(out := out or Path("conflict"))
    out = out or args.runs[0]
    summary = summarize_conflict(runs)
    text = conflict_markdown(summary, plot_conflict(runs, out, "conflict"))
    write_json(out / "conflict.json", summary)
    write_text(out / "conflict.md", f"# Gradient conflict\n\n{text}\n")
    print(f"{text}\n\n{out}: conflict.json, conflict.md, and plots")
