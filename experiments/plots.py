"""Plots of tables, learning curves and sentence embeddings."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from datasets import read_examples
from engine.errors import UserError
from experiments.tables import TASK_TITLES
from model import MultitaskBERT
from report.plots import MARKERS, new_figure, save_figure
from saved_runs import SavedRun
from tasks import TASKS


def plot_bars(table: Mapping[str, Any], baselines: Mapping[str, Any], path: Path) -> None:
    """One panel per task: a bar per column (mean, sd over seeds), the paper's score as a line."""
    figure, panels = new_figure(len(TASK_TITLES), width=4.5, height=4.6)
    columns = list(table["columns"].values())
    for panel, (task, title) in zip(panels, TASK_TITLES.items(), strict=True):
        for i, score in enumerate(column["scores"][task] for column in columns):
            if score["mean"] is not None:
                error = {"yerr": score["sd"], "capsize": 4} if score["sd"] is not None else {}
                panel.bar(i, score["mean"], color="C3", label="ours", **error)
            if score["paper"] is not None:
                lines = {"color": "black", "linewidth": 2.5, "label": "paper"}
                panel.hlines(score["paper"], i - 0.4, i + 0.4, **lines)
        if task in baselines:
            kind, score = baselines[task]["kind"], baselines[task]["score"]
            panel.axhline(score, color="black", linestyle=":", linewidth=1, label=kind)
        headings = [column["heading"] for column in columns]
        panel.set_xticks(range(len(headings)), headings, rotation=40, ha="right")
        panel.set(title=title, ylabel=title.split()[1])
        panel.grid(axis="x", visible=False)
    # One entry for everything of a kind.
    labels = [panel.get_legend_handles_labels() for panel in panels]
    handles = {name: h for hs, names in labels for h, name in zip(hs, names, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
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
            # Out of step with the colours, which repeat after as many curves.
            number = len(panels[0].lines)
            marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
            panels[0].plot(steps, np.mean(scores, axis=0), marker=marker, label=cell)
    panels[0].set(xlabel="training step", ylabel="overall score, dev")
    if not panels[0].lines:
        return False
    figure.legend(loc="outside right upper")
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
    for marker, (task, embeddings) in zip(cycle(MARKERS), vectors.items(), strict=False):
        label = f"{task} ({len(embeddings):,} sentences)"
        panel.scatter(*pca.transform(embeddings).T, s=6, alpha=0.5, marker=marker, label=label)
    names = [
        f"principal component {i} ({share:.0%} of the variance)"
        for i, share in enumerate(pca.explained_variance_ratio_, start=1)
    ]
    panel.set(title=f"{run.name}: dev sentences", xlabel=names[0], ylabel=names[1])
    figure.legend(loc="outside lower center", ncols=2, markerscale=3)
    save_figure(figure, run / "map.png")
    print(run / "map.png")
