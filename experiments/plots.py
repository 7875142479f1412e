"""Plots of tables and of the paper's claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.tables import TASK_TITLES
from report.plots import DASHES, new_figure, save_figure


def plot_table(table: Mapping[str, Any], baselines: Mapping[str, Any], path: Path) -> None:
    """A panel per task: a dot for each run, joined by seed; below, the training loss."""
    columns = list(table["columns"].values())
    width = max(3.2, 1.2 + 0.55 * len(columns))
    figure, panels = new_figure(len(TASK_TITLES), width=width, height=3.4, rows=2)
    scores, losses = panels[: len(TASK_TITLES)], panels[len(TASK_TITLES) :]
    for panel, (task, title) in zip(scores, TASK_TITLES.items(), strict=True):
        plot_scores(panel, columns, task, baselines[task])
        panel.set(title=title, ylabel="dev")
    for panel, task in zip(losses, TASK_TITLES, strict=True):
        plot_losses(panel, columns, task)
    for row, place in ((scores, "outside right upper"), (losses, "outside right lower")):
        add_legend(figure, row, loc=place)
    save_figure(figure, path)


def add_legend(figure: Figure, panels: Sequence[Axes], **options: Any) -> None:
    """A legend with one entry for each label, even if several panels have it."""
    entries = [panel.get_legend_handles_labels() for panel in panels]
    handles = {name: h for hs, names in entries for h, name in zip(hs, names, strict=True)}
    figure.legend(handles.values(), handles.keys(), **options)


def plot_scores(
    panel: Axes, columns: Sequence[Mapping[str, Any]], task: str, known: Mapping[str, float | None]
) -> None:
    """Each column's runs on a task, their mean, the paper's score, and the baselines as lines."""
    # A line joins runs with the same seed, which are compared with each other.
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for i, column in enumerate(columns):
        score = column["scores"][task]
        for seed, value in zip(column["seeds"], score["values"], strict=True):
            by_seed.setdefault(seed, []).append((i, value))
        panel.hlines(score["mean"], i - 0.3, i + 0.3, color="black", linewidth=2, label="mean")
        if score["paper"] is not None:
            panel.plot(i, score["paper"], "D", color="black", fillstyle="none", label="paper")
    for points in by_seed.values():
        panel.plot(*zip(*points, strict=True), "o-", color="0.6", ms=3, lw=0.6, label="a seed")
    for kind, style in (("untouched", "--"), ("majority", ":")):
        if known[kind] is not None:
            name = {"untouched": "untouched encoder", "majority": "majority class"}[kind]
            panel.axhline(known[kind], color="black", linestyle=style, linewidth=1, label=name)
    headings = [column["heading"] for column in columns]
    panel.set_xticks(range(len(headings)), headings, rotation=40, ha="right")
    panel.grid(axis="x", visible=False)


def plot_losses(panel: Axes, columns: Sequence[Mapping[str, Any]], task: str) -> None:
    """The training loss of a task over each column's runs: the mean, and their range as a band."""
    for i, column in enumerate(columns):
        if task in column["losses"]:
            runs = np.array(column["losses"][task])  # (seeds, points)
            x = (np.arange(runs.shape[1]) + 0.5) / runs.shape[1]
            style = {"color": f"C{i}", "linestyle": DASHES[i % len(DASHES)]}
            panel.plot(x, runs.mean(axis=0), **style, label=column["heading"])
            panel.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=f"C{i}", alpha=0.2)
    panel.set(xlabel="share of training", ylabel="training loss")


def plot_claims(claims: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A forest plot: each difference with its interval and margin, and the paper's figure."""
    figure, (panel,) = new_figure(width=10, height=1.5 + 0.36 * len(claims))
    rows = np.arange(len(claims))
    for y, row in zip(rows, claims, strict=True):
        low, high = row["low"], row["high"]
        limits = {"xmin": -row["margin"], "xmax": row["margin"], "color": "0.88", "linewidth": 11}
        panel.hlines(y, **limits, label="margin", zorder=0)
        panel.hlines(y, low, high, color="black")
        # Filled: an answer was found.
        found = not row["answer"].startswith("inconclusive")
        name = "ours" if found else "ours, inconclusive"
        fill = {"fillstyle": "full" if found else "none", "label": name}
        panel.plot(row["difference"], y, "o", color="black", **fill)
        panel.plot(row["paper"], y, "D", color="C0", fillstyle="none", label="paper")
        panel.annotate(row["answer"], (1.01, y), xycoords=("axes fraction", "data"), va="center")
    panel.axvline(0, color="black", linewidth=0.6)
    # Effects of a hundredth and of half a unit on one axis.
    panel.set_xscale("symlog", linthresh=0.05, linscale=2)
    ticks = [-0.5, -0.05, -0.02, 0, 0.02, 0.05, 0.5]
    panel.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    names = [f"{row['first']} - {row['second']}, {row['task']}" for row in claims]
    panel.set_yticks(rows, names)
    panel.set_ylim(len(claims) - 0.5, -0.5)
    for y in rows[1:]:  # a line between claims
        if claims[y]["claim"] != claims[y - 1]["claim"]:
            panel.axhline(y - 0.5, color="0.7", linewidth=0.8)
    panel.set_xlabel("difference on dev, with its 95% interval (beyond 0.05: logarithmic)")
    add_legend(figure, [panel], loc="outside lower center", ncols=4)
    save_figure(figure, path)
