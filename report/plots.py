"""The figures of a report, and the one style of all plots."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.checkpoint import atomic_file
from report.analysis import Calibration, Curves, EmbeddingMap, Group, Predictions

STYLE = Path(__file__).with_name("style.mplstyle")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
# Edges, because the lightest colour is invisible on white.
POINTS = {"s": 14, "edgecolor": "0.35", "linewidth": 0.3}
CURVES = {"loss": "training loss, running mean", "dev": "dev score", "lr": "learning rate"}


def new_figure(
    columns: int = 1, width: float = 6, height: float = 4, rows: int = 1, **options: object
) -> tuple[Figure, list[Axes]]:
    """A figure, drawn without a display, and its panels, each `width` by `height` inches."""
    matplotlib.rc_file(STYLE)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the file's extension."""
    # Never leave a half-written figure beside new tables.
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def plot_curves(curves: Curves) -> Figure:
    """Losses, dev scores and learning rates over training steps."""
    figure, panels = new_figure(width=6.4, height=2.6, rows=len(curves), sharex=True)
    for panel, (name, lines) in zip(panels, curves.items(), strict=True):
        for i, (label, (steps, values)) in enumerate(sorted(lines.items())):
            marker = MARKERS[i % len(MARKERS)] if name == "dev" else None
            panel.plot(steps, values, marker=marker, label=label)
        panel.set_ylabel(CURVES[name])
        # Rates of BERT and of the heads differ by a factor of a hundred.
        if name == "lr" and any(np.any(values > 0) for _, values in lines.values()):
            panel.set_yscale("log")
        if lines:  # an unfinished run may have no dev scores yet
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel("training step")
    return figure


def plot_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix (C, C), rows gold, with the share of each row in its cells."""
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(1, totals)
    figure, (panel,) = new_figure(width=2.8 + 0.9 * len(names), height=1.6 + 0.7 * len(names))
    image = panel.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        color = "white" if share > 0.6 else "black"
        text = f"{share:.0%}\n{matrix[i, j]:,}"
        panel.text(j, i, text, color=color, ha="center", va="center", fontsize=9)
    panel.set_xticks(range(len(names)), [fill(name, 10) for name in names])
    rows = [f"{name}\n(n = {n:,})" for name, n in zip(names, totals[:, 0], strict=True)]
    panel.set_yticks(range(len(names)), rows)
    panel.set(xlabel="predicted class", ylabel="gold class")
    panel.grid(False)
    figure.colorbar(image, label="share of the gold class's rows")
    return figure


def plot_calibration(calibration: Calibration) -> Figure:
    """Accuracy by confidence with 95% intervals, above the number of rows."""
    options = {"sharex": True, "height_ratios": [2.4, 1]}
    figure, (panel, counts) = new_figure(width=5.6, height=2.6, rows=2, **options)
    x, y = calibration.confidence, calibration.accuracy
    panel.plot([0, 1], [0, 1], color="0.5", linestyle="--", label="perfect calibration")
    error_bars(panel, x, y, calibration.intervals, label="the model, 95% interval")
    panel.set(ylabel="accuracy (share of rows)", ylim=(-0.02, 1.02))
    panel.set_title(f"expected calibration error {calibration.expected_error:.3f}")
    figure.legend(loc="outside lower center", ncols=2)
    counts.bar(x, calibration.rows, width=0.04, color="0.5")
    counts.set(xlabel="confidence (probability of the predicted class)", ylabel="rows")
    counts.set_xlim(-0.02, 1.02)
    counts.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def error_bars(
    panel: Axes, x: np.ndarray, y: np.ndarray, intervals: np.ndarray, across: bool = False, **style
) -> None:
    """Points with their intervals' ends (N, 2), along y or, with `across`, along x."""
    value = x if across else y
    lengths = np.abs(np.asarray(intervals) - np.asarray(value)[:, None]).T
    options = {"fmt": "o", "color": "C0", **style}
    panel.errorbar(x, y, **{"xerr" if across else "yerr": lengths}, **options)


def plot_scores(predictions: Predictions) -> Figure:
    """Predicted scores against gold ones, with the distribution of each along its axis."""
    labels = predictions.task.labels
    options = {"width_ratios": [4, 1], "height_ratios": [1, 4], "sharex": "col", "sharey": "row"}
    figure, panels = new_figure(2, width=2.8, height=2.7, rows=2, **options)
    above, corner, main, beside = panels
    corner.remove()
    gold, predicted = predictions.gold, predictions.predicted
    main.plot([labels.low, labels.high], [labels.low, labels.high], color="0.5", linestyle="--")
    main.scatter(gold, predicted, s=14, color="C0", alpha=0.35, linewidth=0)
    main.set(xlabel=f"gold score ({labels.low:g} to {labels.high:g})", ylabel="predicted score")
    above.hist(gold, bins=25, range=(labels.low, labels.high), color="0.5")
    above.set_ylabel("rows")
    # Predictions are not clipped to the range of the labels.
    ends = min(labels.low, predicted.min()), max(labels.high, predicted.max())
    beside.hist(predicted, bins=25, range=ends, color="0.5", orientation="horizontal")
    beside.set_xlabel("rows")
    return figure


def plot_groups(groups: Sequence[Group], metric: str, overall: float) -> Figure:
    """Scores by group with 95% intervals, a panel for each property that rows are grouped by."""
    properties = list(dict.fromkeys(group.by for group in groups))
    figure, panels = new_figure(width=6, height=2.5, rows=len(properties), sharey=True)
    for panel, by in zip(panels, properties, strict=True):
        mine = [group for group in groups if group.by == by]
        names = [f"{group.label}\nn = {group.rows:,}" for group in mine]
        line = panel.axhline(overall, color="0.5", linestyle="--")
        intervals = np.array([group.interval for group in mine])
        error_bars(panel, range(len(mine)), [group.score for group in mine], intervals)
        panel.set_xticks(range(len(mine)), names)
        panel.set(xlabel=by, ylabel=metric, xlim=(-0.5, len(mine) - 0.5))
    figure.legend([line], [f"all rows: {overall:.3f}"], loc="outside upper right")
    return figure


def plot_embeddings(embedding_map: EmbeddingMap) -> Figure:
    """The maps before and after training side by side, coloured by class or by score."""
    task, gold, panels = embedding_map.task, embedding_map.gold, embedding_map.panels
    figure, axes = new_figure(len(panels), width=3.7, height=4.1)
    labels, shown = task.labels, None
    for axis, (title, (points, shares)) in zip(axes, panels.items(), strict=True):
        if labels.integer:
            for number, name in enumerate(task.classes):
                # From dark to light: the order of the classes is visible in grey.
                color = matplotlib.colormaps["cividis"](number / (len(task.classes) - 1))
                style = {**POINTS, "marker": MARKERS[number % len(MARKERS)], "color": color}
                axis.scatter(*points[gold == number].T, label=name, **style)
        else:
            limits = {"vmin": labels.low, "vmax": labels.high}
            shown = axis.scatter(*points.T, c=gold, **POINTS, **limits)
        names = [f"component {i} ({s:.0%} of the variance)" for i, s in enumerate(shares, 1)]
        axis.set(title=title, xlabel=names[0], ylabel=names[1])
    if labels.integer:
        entries = axes[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=3, markerscale=1.8)
    else:
        figure.colorbar(
            shown, ax=axes, label=f"gold {task.label_column}", location="bottom", aspect=40
        )
    return figure
