"""The numbers in a report: calibration, groups of rows, worst rows, curves, maps.

Shapes: N dev rows, C classes, D hidden size.
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.decomposition import PCA
from torch import Tensor

from datasets import Example, TaskDataset
from engine.checkpoint import read_text
from engine.errors import UserError, reading
from engine.stats import score_interval
from prediction import primary_metric
from tasks import Task

WORST_ROWS = 25
BINS = 10  # of confidence, in the reliability diagram
# Also words that end in n't, as in "don't"; SST's files have "do n't".
NEGATIONS = {
    *("no", "not", "never", "none", "nobody", "nothing", "neither", "nor", "nowhere"),
    *("without", "cannot", "hardly", "barely"),
}

Series = tuple[np.ndarray, np.ndarray]  # steps and values
Curves = dict[str, dict[str, Series]]  # "loss", "dev" or "lr" -> label -> a curve


@dataclass(frozen=True)
class Predictions:
    """A task's dev rows, with the model's predictions."""

    task: Task
    examples: list[Example]
    gold: np.ndarray  # (N,)
    predicted: np.ndarray  # (N,)
    losses: np.ndarray  # (N,)
    probabilities: np.ndarray | None  # (N, C); None for scores

    @classmethod
    def from_logits(cls, dataset: TaskDataset, logits: Tensor) -> "Predictions":
        """From a labelled dataset and its logits (N, num_logits)."""
        task, labels = dataset.task, dataset.task.labels
        return cls(
            task,
            dataset.examples,
            dataset.labels.numpy(),
            labels.predict(logits).numpy(),
            labels.loss(logits, dataset.labels).numpy(),
            labels.probabilities(logits).numpy() if labels.integer else None,
        )

    @property
    def metrics(self) -> dict[str, Any]:
        """The task's metrics and the number of rows."""
        metrics = self.task.labels.metrics(self.predicted, self.gold)
        return {**metrics, "rows": len(self.gold)}


@dataclass(frozen=True)
class Calibration:
    """How often predictions of about the same confidence are right, by bin of confidence."""

    confidence: np.ndarray  # (bins,) means; empty bins are left out
    accuracy: np.ndarray  # (bins,)
    rows: np.ndarray  # (bins,)

    @property
    def intervals(self) -> np.ndarray:
        """The 95% confidence interval of each accuracy, (bins, 2)."""
        pairs = zip(self.accuracy, self.rows, strict=True)
        return np.array([score_interval(a, n, correlation=False) for a, n in pairs])

    @property
    def expected_error(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| over all rows.

        (Naeini et al. 2015; Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.)
        """
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.rows))


def calibrate(predictions: Predictions) -> Calibration:
    """Calibration of the predicted class's probability, in bins of equal width."""
    confidence = predictions.probabilities.max(axis=1).astype(np.float64)
    right = predictions.predicted == predictions.gold
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = np.bincount(bins, minlength=BINS)
    used = rows > 0
    means = [
        np.bincount(bins, weights=values, minlength=BINS)[used] / rows[used]
        for values in (confidence, right)
    ]
    return Calibration(*means, rows[used])


# ---------------------------------------------------------------------------- groups of rows


@dataclass(frozen=True)
class Group:
    """Rows that share a property, such as their length, and the model's score on them."""

    by: str  # the property: "number of words", "word overlap" or "negation"
    label: str
    rows: int
    score: float
    interval: tuple[float, float]  # 95%


def words(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation around them."""
    stripped = (word.strip(string.punctuation) for word in text.lower().split())
    return [word for word in stripped if word]


def word_overlap(texts: tuple[str, str]) -> float:
    """The Jaccard index of two sentences: words in both over words in either."""
    first, second = (set(words(text)) for text in texts)
    return len(first & second) / max(1, len(first | second))


def is_negated(text: str) -> bool:
    """Whether a text has a word of negation."""
    plain = words(text.replace("’", "'"))
    return any(word in NEGATIONS or word.endswith("n't") for word in plain)


def quartiles(values: np.ndarray, form: str) -> np.ndarray:
    """The name of each value's quarter, "smallest to largest", (N,); ties stay together."""
    quarter = np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values)
    names = np.empty(len(values), dtype=object)
    for number in np.unique(quarter):
        mine = quarter == number
        low, high = (format(end(values[mine]), form) for end in (np.min, np.max))
        names[mine] = low if low == high else f"{low} to {high}"
    return names


def group_scores(predictions: Predictions) -> list[Group]:
    """Scores by length and, where they apply, by word overlap and negation."""
    task = predictions.task
    texts = [example.texts for example in predictions.examples]
    lengths = np.array([sum(len(words(text)) for text in row) for row in texts])
    keys = {"number of words": (lengths, quartiles(lengths, "d"))}
    if len(task.text_columns) == 2:
        overlaps = np.array([word_overlap(row) for row in texts])
        keys["word overlap"] = (overlaps, quartiles(overlaps, ".2f"))
    elif task.class_names:
        negated = np.array([is_negated(row[0]) for row in texts])
        keys["negation"] = (negated, np.where(negated, "negated", "not negated"))
    groups = []
    for by, (values, names) in keys.items():
        for name in dict.fromkeys(names[np.argsort(values, kind="stable")]):
            mine = names == name
            metrics = task.labels.metrics(predictions.predicted[mine], predictions.gold[mine])
            score, rows = primary_metric(metrics), int(mine.sum())
            interval = score_interval(score, rows, correlation=not task.labels.integer)
            groups.append(Group(by, str(name), rows, score, interval))
    return groups


# ---------------------------------------------------------------------------- worst rows


def label_name(task: Task, value: float) -> str:
    """The name of a class, or a score."""
    return task.classes[int(value)] if task.labels.integer else f"{value:.2f}"


def worst_rows(predictions: Predictions) -> list[dict[str, str]]:
    """The rows with the largest losses, largest first, as text by column."""
    task, rows = predictions.task, []
    for i in np.argsort(-predictions.losses, kind="stable")[:WORST_ROWS]:
        texts = zip(("text", "second text"), predictions.examples[i].texts, strict=False)
        row = {"id": predictions.examples[i].id, **dict(texts)}
        row |= {"gold": label_name(task, predictions.gold[i])}
        row |= {"prediction": label_name(task, predictions.predicted[i])}
        if predictions.probabilities is not None:
            row["confidence"] = f"{predictions.probabilities[i].max():.3f}"
        rows.append({**row, "loss": f"{predictions.losses[i]:.3f}"})
    return rows


# ---------------------------------------------------------------------------- curves


def learning_curves(path: Path) -> Curves:
    """Running mean of each task's loss, dev scores and learning rates over a run's log.

    UserError if the log is missing, is damaged or has no step.
    """
    curves: dict[str, dict[str, list]] = {"loss": {}, "dev": {}, "lr": {}}
    with reading(path, "the log of a run"):
        entries = [json.loads(line) for line in read_text(path).splitlines()]
        offset, step, stage = 0, 0, None
        for entry in entries:
            if entry["kind"] not in ("train", "dev"):
                continue
            # The second stage of LP-FT counts steps from 0 again.
            if entry.get("stage") != stage:
                offset, stage = step, entry.get("stage")
            step = offset + entry["step"]
            for panel, values in _points(entry).items():
                for label, value in values.items():
                    curves[panel].setdefault(label, []).append((step, value))
    if not curves["loss"]:
        raise UserError(f"{path}: no training step")
    arrays: Curves = {
        panel: {label: tuple(np.array(points).T) for label, points in lines.items()}
        for panel, lines in curves.items()
    }
    for label, (steps, losses) in arrays["loss"].items():
        window = max(1, len(losses) // 20)
        smoothed = ndimage.uniform_filter1d(losses, window, mode="nearest")
        arrays["loss"][label] = steps, smoothed
    return arrays


def _points(entry: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The values that a line of the log adds to each panel: label -> value."""
    if entry["kind"] == "dev":
        if "tasks" not in entry:  # a run without heads
            return {"dev": {"score": entry["score"]}}
        scores = {f"{t} {next(iter(m))}": primary_metric(m) for t, m in entry["tasks"].items()}
        return {"dev": scores}
    # All heads have the same rate.
    rates = {"BERT" if name == "bert" else "heads": rate for name, rate in entry["lr"].items()}
    return {"loss": {entry["task"]: entry["loss"]}, "lr": rates}


# ---------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class EmbeddingMap:
    """A task's dev rows on the two principal components of their embeddings."""

    task: Task
    gold: np.ndarray  # (N,)
    # "before training", "after training" -> points (N, 2) and the shares of the variance (2,).
    panels: dict[str, tuple[np.ndarray, np.ndarray]]
    pairs: bool  # whether rows have two embeddings


def project(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, 1 or 2, D) -> points (N, 2) by PCA, and their shares of the variance (2,).

    A pair with two embeddings u and v is the point of |u - v|.
    UserError if there are fewer than three different embeddings.
    """
    rows = vectors[:, 0] if vectors.size(1) == 1 else (vectors[:, 0] - vectors[:, 1]).abs()
    if len(rows.unique(dim=0)) < 3:
        raise UserError("fewer than three different embeddings of dev rows; a map needs more")
    pca = PCA(2, svd_solver="full")
    return pca.fit_transform(rows.cpu().numpy()), pca.explained_variance_ratio_
