"""Collect the contents of a run's report; parts that cannot be made are listed as missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bert import BertModel
from datasets import TaskDataset, sample_rows
from engine.checkpoint import read_json
from engine.errors import UserError
from model import MultitaskBERT, SentenceEncoder
from prediction import baseline, embed_dataset
from report.analysis import Curves, EmbeddingMap, Predictions, learning_curves, project
from saved_runs import SavedRun, model_checksum
from tasks import TASKS, Task
from tokenizer import BertTokenizer

MAP_ROWS = 1000  # per task: more points would hide each other


@dataclass
class Report:
    """What is known about a run. A part that could not be made gets a line in `missing`."""

    run: SavedRun
    missing: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # result.json
    curves: Curves = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)  # by task, like the next two
    untouched: dict[str, float] = field(default_factory=dict)  # scores before training
    maps: dict[str, EmbeddingMap] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the report that may fail without the others."""
        try:
            yield
        except UserError as error:
            self.missing.append(f"{name}: {error}")

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Dev metrics by task: those of the predictions, or else those that the run recorded."""
        computed = {name: p.metrics for name, p in self.predictions.items()}
        return {**self.result.get("dev", {}), **computed}


def collect(run: SavedRun, data_dir: Path | None, device: str | None) -> Report:
    """Read a run's files, predict its dev rows, and embed some before and after training."""
    report = Report(run)
    with report.part("time, memory and recorded scores"):
        report.result = read_json(run.folder / "result.json")
    with report.part("learning curves"):
        report.curves = learning_curves(run.folder / "log.jsonl")
    with report.part("predictions and maps of all tasks"):
        model = run.load_model(device)
        untouched = None
        with report.part("untouched encoder"):
            untouched = load_untouched(run, model)
        if not model.heads:
            report.missing.append("predictions: the run has no heads")
        # A SimCSE run has no heads, but STS pairs to evaluate its embeddings on.
        for name in model.heads or [name for name in run.files.get("dev", {}) if name in TASKS]:
            with report.part(TASKS[name].title):
                add_task(report, model, untouched, TASKS[name], data_dir)
    return report


def load_untouched(run: SavedRun, model: MultitaskBERT) -> SentenceEncoder:
    """The encoder before training, set up like `model`; UserError if it is gone."""
    name = str(run.arguments.get("model"))
    bert, tokenizer = BertModel.from_pretrained(name), BertTokenizer.from_pretrained(name)
    if model_checksum(bert, tokenizer) != run.config.get("model_checksum"):
        raise UserError(f"{name} is not the model that the run began with")
    encoder = SentenceEncoder(bert, tokenizer, model.pooling).eval()
    encoder.dtype = model.dtype
    return encoder.to(model.device)


def add_task(
    report: Report,
    model: MultitaskBERT,
    untouched: SentenceEncoder | None,
    task: Task,
    data_dir: Path | None,
) -> None:
    """Add a task's predictions, if it has a head, its map and the score before training."""
    run = report.run
    if task.name in model.heads:
        outputs = run.predict(model, ["dev"], data_dir, [task.name])
        dataset, logits = outputs[task.name, "dev"]
        report.predictions[task.name] = Predictions.from_logits(dataset, logits)
    else:
        dataset = run.dataset(model, task, "dev", data_dir)
    if run.checksums().get((task.name, "dev"), dataset.checksum) != dataset.checksum:
        report.missing.append(f"{task.title}: {dataset.path} is not the file that the run read")
    if untouched is not None and not task.labels.integer:
        report.untouched[task.name] = baseline(untouched, dataset, run.batch_size)[1]
    report.maps[task.name] = make_map(dataset, model, untouched, run.batch_size)


def make_map(
    dataset: TaskDataset,
    model: MultitaskBERT,
    untouched: SentenceEncoder | None,
    batch_size: int,
) -> EmbeddingMap:
    """The map of a fixed subset of dev rows, before and after training."""
    rows = np.array(sample_rows(range(len(dataset)), MAP_ROWS))
    encoders = {"before training": untouched, "after training": model}
    panels = {
        title: project(embed_dataset(encoder, dataset, batch_size, rows)[rows])
        for title, encoder in encoders.items()
        if encoder is not None
    }
    pairs = dataset.embeddings_per_row == 2
    return EmbeddingMap(dataset.task, dataset.labels.numpy()[rows], panels, pairs)
