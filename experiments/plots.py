"""Plots of tables, learning curves and sentence embeddings."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from datasets import read_examples
from engine.checkpoint import atomic_file
from engine.errors import UserError
from experiments.tables import TASK_TITLES
from model import MultitaskBERT
from saved_runs import SavedRun
from tasks import TASKS


def new_figure(columns: int = 1, width: float = 6, height: float = 4) -> tuple[Figure, list[Axes]]:
    """A figure, drawn without a display, and its panels side by side."""
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    # No figure is left half-written in a folder whose tables are new.
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_bars(table: Mapping[str, Any], baselines: Mapping[str, Any], path: Path) -> None:
    """One panel per task: a bar per column (mean, sd over seeds), the paper's score as a line."""
    figure, panels = new_figure(len(TASK_TITLES), width=4.5, height=4.6)
    columns = list(table["columns"].values())
    for panel, (task, title) in zip(panels, TASK_TITLES.items(), strict=True):
        for i, score in enumerate(column["scores"][task] for column in columns):
            if score["mean"] is not None:
                error = {"yerr": score["sd"], "capsize": 4} if score["sd"] is not None else {}
                panel.bar(i, score["mean"], color="tab:blue", alpha=0.8, label="ours", **error)
            if score["paper"] is not None:
                lines = {"color": "tab:orange", "linewidth": 2, "label": "paper"}
                panel.hlines(score["paper"], i - 0.4, i + 0.4, **lines)
        if task in baselines:
            kind, score = baselines[task]["kind"], baselines[task]["score"]
            panel.axhline(score, color="black", linestyle=":", linewidth=1, label=kind)
        headings = [column["heading"] for column in columns]
        panel.set_xticks(range(len(headings)), headings, rotation=40, ha="right")
        panel.set(title=title, ylabel=title.split()[1])
        panel.margins(y=0.28)  # room for the legend
        # One entry for all bars of a kind.
        handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        panel.legend(handles.values(), handles.keys(), fontsize="small", loc="upper left", ncols=3)
    save_figure(figure, path)


def plot_curves(records: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> bool:
    """The overall dev score over steps, averaged over seeds; False if no cell has a curve."""
    figure, panels = new_figure(width=9, height=5)
    for cell, runs in records.items():
        # LP-FT's probe is left out: its steps start from 0 again when fine-tuning begins.
        curves = [[point for point in run["curve"] if point["stage"] != "probe"] for run in runs]
        length = min(map(len, curves))  # early stopping may have ended some before others
        if length > 1:  # a cell that was evaluated once has no curve
            scores = [[point["score"] for point in curve[:length]] for curve in curves]
            steps = [point["step"] for point in curves[0][:length]]
            panels[0].plot(steps, np.mean(scores, axis=0), marker="o", label=cell)
    panels[0].set(xlabel="training step", ylabel="overall score, dev")
    if not panels[0].lines:
        return False
    panels[0].legend(fontsize="small")
    save_figure(figure, path)
    return True


def plot_map(args: Namespace) -> None:
    """Write map.png into a run: two principal components of its dev sentences, colored by task."""
    run = args.run
    saved, model = SavedRun(run), MultitaskBERT.from_pretrained(run)
    vectors: dict[str, np.ndarray] = {}
    for task in saved.files.get("dev", {}):  # not of its heads: a SimCSE run has none
        path = saved.data_file(TASKS[task], "dev", args.data_dir)
        examples, _, _ = read_examples(path, TASKS[task], limit=args.limit)
        vectors[task] = model.encode([text for example in examples for text in example.texts])
    if sum(map(len, vectors.values())) < 3:
        raise UserError(f"{run}: fewer than three dev sentences; a map needs more")
    # One projection for all tasks, or their clouds could not be compared.
    pca = PCA(2, random_state=0).fit(np.concatenate(list(vectors.values())))
    figure, (panel,) = new_figure(width=8, height=7)
    for task, embeddings in vectors.items():
        label = f"{task} ({len(embeddings):,} sentences)"
        panel.scatter(*pca.transform(embeddings).T, s=4, alpha=0.5, label=label)
    names = [
        f"principal component {i} ({share:.0%} of the variance)"
        for i, share in enumerate(pca.explained_variance_ratio_, start=1)
    ]
    panel.set(title=f"{run.name}: dev sentences", xlabel=names[0], ylabel=names[1])
    panel.legend(markerscale=3)
    save_figure(figure, run / "map.png")
    print(run / "map.png")
