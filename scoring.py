"""Predictions of a model, the figures they earn, and the leaderboard's files.

Every figure is computed from all rows at once; none is a mean of batch means. Everything is done in
evaluation mode, without gradients, and in file order.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bert
import distributed
import tasks
from checkpoint import UserError, read_tensors, write_tensors, write_text
from datasets import Batch, Example, Sentences, TaskData
from tasks import TASKS, MultitaskBERT, Task
from train import Diverged, memory_for, progress

Embed = Callable[[Batch], Tensor]


class FrozenEmbeddings:
    """Embeddings of a frozen encoder, each row's computed once and then looked up.

    A frozen encoder runs without dropout, so the same row has the same embeddings in every epoch,
    and in every run: `save` leaves them in `folder`, for others with this encoder and this data.
    (To rounding: a row's padding, and with it the last bit, depends on its batch.)

    Of several processes each embeds the rows of its share, and `save` gives them to all.

    Args:
        model: holds the encoder.
        folder: where embeddings are kept.
        sources: the sets whose embeddings are to be saved, in the same order in all processes.
    """

    def __init__(self, model: MultitaskBERT, folder: Path, sources: Sequence[Sentences] = ()):
        self.model = model
        self.folder = folder
        self.sources = sources
        self.known: dict[int, Known] = {}  # by the set's identity
        # All that decides what the encoder makes of tokens; it has no dropout.
        config = replace(model.bert.config, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        settings = (config, model.pooling, model.precision, torch.__version__)
        self.encoder = hashlib.sha256(repr(settings).encode())
        for module in (bert, tasks):
            self.encoder.update(Path(module.__file__).read_bytes())
        for name, tensor in model.bert.state_dict().items():
            self.encoder.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())

    def __call__(self, batch: Batch) -> Tensor:
        """Embeddings as `MultitaskBERT.embed` gives them, (width * B, D)."""
        source = batch.source
        known = self.find(source)
        new = batch.rows[~known.done[batch.rows]]
        if len(new):
            with torch.no_grad():
                fresh = embed(self.model, source.batch(new).to(self.model.device))
            known.vectors[new] = fresh.unflatten(0, (source.width, len(new))).transpose(0, 1)
            known.done[new] = True
        return known.vectors[batch.rows].transpose(0, 1).flatten(0, 1)

    def find(self, source: Sentences) -> "Known":
        """What is known of a set; at first, what is in the folder."""
        if id(source) not in self.known:
            self.known[id(source)] = self.load(source)
        return self.known[id(source)]

    def load(self, source: Sentences) -> "Known":
        """Room for a set's vectors, with what is in the folder filled in."""
        size = (len(source), source.width, self.model.bert.config.hidden_size)
        vectors = torch.empty(size, device=self.model.device)
        known = Known(self.name(source), vectors, np.zeros(len(source), dtype=bool))
        for part in sorted(self.folder.glob(f"{known.name}-*.safetensors")):
            try:
                found = read_tensors(part)
                rows = found["rows"].numpy()
                vectors[rows] = found["vectors"].to(vectors.device)
            except (UserError, KeyError, IndexError, RuntimeError):
                raise UserError(f"{part}: damaged; delete it, it will be made again") from None
            known.done[rows] = True
        known.saved = known.done.copy()
        return known

    def name(self, source: Sentences) -> str:
        """A name for all that decides a set's embeddings: encoder, pooling, precision, tokens."""
        digest = self.encoder.copy()
        digest.update(repr((source.width, source.pad_token_id, source.first_lengths)).encode())
        for ids in source.ids:
            digest.update(np.array([len(row) for row in ids]).tobytes())
            digest.update(np.concatenate(ids).tobytes())
        return digest.hexdigest()[:32]

    def save(self) -> None:
        """Add to the folder what it does not have."""
        if distributed.size() > 1:
            used = distributed.agree(*(id(source) in self.known for source in self.sources))
            for source in compress(self.sources, used):
                self.find(source).exchange()
        for known in self.known.values():
            rows = np.flatnonzero(known.done & ~known.saved)
            if len(rows) and distributed.rank() == 0:
                part = self.folder / f"{known.name}-{known.saved.sum():09d}.safetensors"
                new = {"rows": torch.from_numpy(rows), "vectors": known.vectors[rows]}
                write_tensors(part, new)
            known.saved = known.done.copy()


EXCHANGED = 8192  # rows at a time; bounds the memory for it


@dataclass
class Known:
    """A set's embeddings (N, width, D), which of them are there, and which are on disk."""

    name: str
    vectors: Tensor
    done: np.ndarray
    saved: np.ndarray | None = None

    def exchange(self) -> None:
        """Give all processes the rows that any has made; where several have, the first one's."""
        has = torch.zeros(len(self.done), distributed.size(), dtype=torch.uint8)
        has[:, distributed.rank()] = torch.from_numpy(self.done.astype(int) + self.saved)
        has = distributed.total(has).numpy()
        rows = np.flatnonzero(has.any(axis=1) & (has < 2).any(axis=1))
        for start in range(0, len(rows), EXCHANGED):
            some = rows[start : start + EXCHANGED]
            mine = has[some].argmax(axis=1) == distributed.rank()
            part = self.vectors.new_zeros(len(some), *self.vectors.shape[1:])
            part[mine] = self.vectors[some[mine]]
            self.vectors[some] = distributed.total(part)
        self.done[rows] = True


def embed(model: MultitaskBERT, batch: Batch) -> Tensor:
    """The embeddings of a batch's sentences, (width * B, D)."""
    return model.embed(batch.input_ids, batch.attention_mask, batch.token_type_ids)


@torch.no_grad()
def embeddings(model: MultitaskBERT, data: TaskData, batch_size: int) -> Tensor:
    """The embeddings of every row, (N, width, D) float32 on the CPU, in file order."""
    model.eval()
    vectors = torch.zeros(len(data), data.width, model.bert.config.hidden_size)
    for batch in data.in_order(batch_size):
        with memory_for(batch):
            found = embed(model, batch.to(model.device)).cpu()
        vectors[torch.from_numpy(batch.rows)] = found.unflatten(0, (data.width, -1)).transpose(0, 1)
    check_finite(distributed.total(vectors), data)
    return vectors


def check_finite(outputs: Tensor, data: TaskData) -> None:
    """Diverged where a row's outputs (N, ...) are not finite, naming the row."""
    bad = ~outputs.flatten(1).isfinite().all(dim=1)
    if bad.any():
        rows = data.names(bad.nonzero().flatten()[:1].numpy())
        raise Diverged(
            f"{data.path}: the outputs for {int(bad.sum())} rows are not finite ({rows}, ...):"
            " try a smaller --lr or --precision fp32"
        )


@torch.no_grad()
def predict(model: MultitaskBERT, data: TaskData, batch_size: int, embedder: Embed) -> Tensor:
    """The logits of every row, (N, C) float32 on the CPU, in file order."""
    model.eval()
    logits = torch.zeros(len(data), data.task.outputs)
    with progress(len(data), f"predict {data.path.name}", inner=True) as bar:
        for batch in data.in_order(batch_size):
            batch = batch.to(model.device)
            with memory_for(batch):
                found = model.decode(batch.task, embedder(batch)).cpu()
            logits[torch.from_numpy(batch.rows)] = found
            bar.update(min(len(batch) * distributed.size(), len(data) - bar.n))
    check_finite(distributed.total(logits), data)
    return logits


def report(data: TaskData, logits: Tensor) -> dict[str, Any]:
    """The task's figures (headline first), the mean loss, and the number of rows."""
    task = data.task
    predicted = task.decode(logits).numpy()
    figures = task.report(predicted, data.labels.numpy())
    loss = task.loss(logits, data.labels).double().sum().item() / len(data)
    if not math.isfinite(loss):
        raise Diverged(f"{data.path}: the mean loss is {loss}; try a smaller --lr or --head_lr")
    return {**figures, "loss": loss, "rows": len(data)}


def headline(figures: dict[str, Any]) -> float:
    """The first figure of a report: accuracy or Pearson's r."""
    return next(iter(figures.values()))


def overall(reports: dict[str, dict[str, Any]]) -> float:
    """The course's overall score: the mean over tasks of accuracy, or of (Pearson + 1) / 2."""
    scores = [TASKS[name].course_score(headline(figures)) for name, figures in reports.items()]
    return sum(scores) / len(scores)


def summary(reports: dict[str, dict[str, Any]]) -> str:
    """One line for people: each task's headline, and the overall score."""
    parts = []
    for name, figures in reports.items():
        key, value = next(iter(figures.items()))
        parts.append(f"{name} {key} {value:.3f}")
    return ", ".join([*parts, f"overall {overall(reports):.3f}"])


def evaluate(sets: Sequence[TaskData], logits: Sequence[Tensor]) -> dict[str, Any]:
    """Figures of each set by task, with the overall score as "score" and a line as "summary"."""
    pairs = zip(sets, logits, strict=True)
    reports = {data.task.name: report(data, of) for data, of in pairs}
    return {"score": overall(reports), "summary": summary(reports), "tasks": reports}


# ---------------------------------------------------------------------------- comparing models


@dataclass(frozen=True)
class Comparison:
    """The difference of two models' headline figures (the first minus the second), on one task.

    `low` and `high` bound its 95% interval; `p` is the chance of one as large where both are equal.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(
    gold: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    correlation: bool,
    resamples: int = 9999,
) -> Comparison:
    """Compare two models, each trained with one or several seeds, on the same rows.

    Args:
        gold: labels, (N,).
        first, second: predictions in the labels' units, (seeds, N).
        correlation: whether the figure is Pearson's r, else accuracy; averaged over seeds.
        resamples: of the bootstrap and of the permutation test.

    The interval is a percentile bootstrap over rows. The test is, for accuracy, a permutation test
    over rows (each row's two shares of right answers change sides at random; for one seed,
    McNemar's); for a correlation, the bootstrap itself. What seeds do beside is not in either.
    """
    rng = np.random.default_rng(0)
    if correlation:
        # A resample of r costs far more than one of a mean.
        resamples = min(resamples, 1999)

        def difference(gold: np.ndarray, *predicted: np.ndarray, axis: int = -1) -> np.ndarray:
            r = [_pearson(gold, row, axis) for row in predicted]
            return np.mean(r[: len(first)], axis=0) - np.mean(r[len(first) :], axis=0)

        samples = (gold, *first, *second)
    else:

        def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
            return a.mean(axis=axis) - b.mean(axis=axis)

        samples = tuple((model == gold).mean(axis=0) for model in (first, second))
    found = float(difference(*samples))
    options = {"n_resamples": resamples, "batch": 64, "rng": rng, "vectorized": True}
    if np.array_equal(first, second):
        return Comparison(0.0, 0.0, 0.0, 1.0)
    from scipy import stats  # half a second, of those only who compare

    boot = stats.bootstrap(
        samples, difference, paired=True, method="percentile", confidence_level=0.95, **options
    )
    if correlation:
        below = (1 + np.sum(boot.bootstrap_distribution <= 0)) / (1 + resamples)
        above = (1 + np.sum(boot.bootstrap_distribution >= 0)) / (1 + resamples)
        p = min(1.0, 2 * min(below, above))
    else:
        test = stats.permutation_test(samples, difference, permutation_type="samples", **options)
        p = test.pvalue
    low, high = boot.confidence_interval
    return Comparison(found, float(low), float(high), float(p))


def _pearson(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's r along an axis of many resamples at once; 0 where one is constant."""
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    scale = np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))
    return np.divide((x * y).sum(axis=axis), scale, out=np.zeros_like(scale), where=scale > 0)


LEVEL = 0.05  # of a p-value that counts as a difference


def p_value(p: float) -> str:
    """A p-value for people."""
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): each times how many are not smaller."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def write_predictions(path: Path, data: TaskData, logits: Tensor) -> None:
    """Write a leaderboard file: its header, then `{id} , {prediction} ` a line, in file order.

    Sentiment is an integer, paraphrase the rounded probability, similarity the raw value.
    """
    predictions = data.task.decode(logits).tolist()
    lines = [f"id \t {data.task.header} \n"]
    for example, prediction in zip(data.examples, predictions, strict=True):
        lines.append(f"{example.id} , {prediction} \n")
    write_text(path, "".join(lines))


def read_predictions(
    path: Path, task: Task, examples: Sequence[Example], source: Path
) -> np.ndarray:
    """The predictions of a leaderboard file, (N,) float64, if it is one for these rows.

    Args:
        path: what `write_predictions` wrote.
        task: the rows' task.
        examples: the rows, in order.
        source: the file that they are from.

    Raises:
        UserError: another header, number of rows, id or order, or a prediction in another format.
    """
    try:
        header, *rows = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: no predictions ({error.strerror}); a run with heads leaves them as it ends"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); predict anew") from None
    if header != f"id \t {task.header} ":
        raise UserError(f"{path}, line 1: the header is {header[:60]!r}, not that of {task.name}")
    if len(rows) != len(examples) + 1 or rows[-1]:  # every line has an end
        raise UserError(
            f"{path}: {len(rows) - 1} rows, but {source} has {len(examples)}: predict all of it"
        )
    predictions = np.empty(len(examples))
    for i, (example, row) in enumerate(zip(examples, rows[:-1], strict=True)):
        start, where = f"{example.id} , ", f"{path}, line {i + 2}"
        if not row.startswith(start):
            raise UserError(f"{where}: {row[:60]!r}, where {source} has the id {example.id!r}")
        predictions[i] = _prediction(row.removeprefix(start), task, where)
    return predictions


def _prediction(text: str, task: Task, where: str) -> float:
    """The number in a leaderboard line, if it is written as `write_predictions` does."""
    try:
        value = int(text) if task.dtype == torch.int64 else float(text)
    except ValueError:
        value = math.nan
    classes = range(int(task.low), int(task.high) + 1)
    valid = value in classes if task.whole else math.isfinite(value)
    if not valid or text != f"{value} ":
        raise UserError(
            f"{where}: {text[:40]!r} is no prediction of {task.name} as they are written"
        )
    return value
