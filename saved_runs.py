"""Saved runs: load one, compare several, average their predictions or their weights."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert import BertModel
from datasets import TaskDataset, TokenizedDataset, read_examples
from engine.checkpoint import checksum, read_json, write_text
from engine.device import setup_device
from engine.errors import UserError, reading
from engine.run_dir import RunDir
from engine.stats import Comparison, compare, holm, score_interval
from hub.export import model_card
from model import MultitaskBERT, SentenceEncoder
from prediction import evaluate, format_predictions, predict, read_predictions
from tasks import TASKS, Task, find_tasks
from tokenizer import BertTokenizer

# (task, split) -> a data set and its logits (N, C).
Outputs = dict[tuple[str, str], tuple[TaskDataset, Tensor]]


def note(*lines: object) -> None:
    """Print messages, as opposed to results, to standard error."""
    print(*lines, sep="\n", file=sys.stderr)


def model_checksum(bert: BertModel, tokenizer: BertTokenizer) -> str:
    """A checksum of weights, vocabulary and token limit, which identifies a model in records."""
    return checksum(bert.state_dict(), f"{tokenizer.backend.to_str()} {tokenizer.max_length}")


def run_facts(
    model: SentenceEncoder, datasets: dict[str, Sequence[TokenizedDataset]]
) -> dict[str, Any]:
    """What `config.json` records of a run's data (split -> a dataset per task) and model."""
    return {
        "data": {str(d.path.absolute()): d.checksum for tasks in datasets.values() for d in tasks},
        "model_checksum": model_checksum(model.bert, model.tokenizer),
        "device": model.device.type,  # "cuda", not "cuda:0": --resume gives it to setup_device
        "precision": str(model.dtype).removeprefix("torch."),
        "decoders": model.decoders,
        "rows": {split: {d.name: len(d) for d in tasks} for split, tasks in datasets.items()},
        "files": {
            split: {d.name: str(d.path.absolute()) for d in tasks}
            for split, tasks in datasets.items()
        },
    }


class SavedRun:
    """A run folder, finished or not, as its `config.json` describes it."""

    def __init__(self, folder: Path):
        # Other folders may have a config.json too. A run has a log from the start, and best/ later.
        path = folder / "config.json"
        beside = (folder / "log.jsonl", folder / "best")
        if not path.is_file() or not any(file.exists() for file in beside):
            raise UserError(
                f"{folder}: not a run folder; expected one with config.json and log.jsonl"
            )
        self.folder = folder
        self.config = read_json(path)
        with reading(path, "the record of a run"):
            self.arguments: dict[str, Any] = self.config["arguments"]
            self.batch_size = int(self.arguments["batch_size"])
            self.limit: int | None = self.arguments["limit"]
            self.files: dict[str, dict[str, str]] = self.config.get("files", {})
            _ = self.config["precision"], self.config["device"], self.config["hardware"]["threads"]

    def load_model(
        self, device: str | None = None, kind: type[SentenceEncoder] = MultitaskBERT
    ) -> Any:
        """The best model, with the run's precision and threads, on the run's device or another."""
        model = kind.from_pretrained(self.folder)
        # With the run's number of threads, sums are in the same order and the metrics are
        # bit-identical, even if the run had several processes.
        recorded = {**self.config, "device": device or self.config["device"], "processes": 1}
        chosen, model.dtype = setup_device(0, "auto", "auto", recorded)
        return model.to(chosen)

    def checksums(self) -> dict[tuple[str, str], str]:
        """(task, split) -> the checksum of the file that the run read."""
        return {
            (task, split): self.config["data"][path]
            for split, files in self.files.items()
            for task, path in files.items()
        }

    def data_file(self, task: Task, split: str, data_dir: Path | None) -> Path:
        """The file that the run read, or the one in another data folder."""
        if data_dir is not None:
            return data_dir / task.file(split)
        if task.name not in self.files.get(split, {}):
            path = self.folder / "config.json"
            raise UserError(f"{path}: names no {split} file of {task.name}; give --data_dir")
        path = Path(self.files[split][task.name])
        if not path.exists():
            raise UserError(f"{path}: no such file; if the run's data has moved, give --data_dir")
        return path

    def prediction_file(self, task: Task, split: str) -> Path:
        """Where the run wrote its predictions."""
        # --sst_dev_out of multitask_classifier.py, --dev_out of classifier.py.
        flags = (f"{task.name}_{split}_out", f"{split}_out")
        default = self.folder / "predictions" / f"{task.name}-{split}-output.csv"
        given = next((self.arguments[f] for f in flags if self.arguments.get(f)), default)
        return Path(given)

    def dataset(
        self, model: MultitaskBERT, task: Task, split: str, data_dir: Path | None
    ) -> TaskDataset:
        """The run's rows of a file, or of the file of that name in another data folder."""
        path, labelled = self.data_file(task, split, data_dir), split != "test"
        pairs = model.encoding(task)
        return TaskDataset(path, task, model.tokenizer, pairs, labelled, self.limit)

    def predict(
        self,
        model: MultitaskBERT,
        splits: Sequence[str],
        data_dir: Path | None,
        tasks: Sequence[str] | None = None,
    ) -> Outputs:
        """The model's logits on some splits of some tasks, by default all that have a head."""
        # Read all files before predicting, which takes long.
        tasks = find_tasks(list(model.heads) if tasks is None else tasks)
        datasets = {
            (task.name, split): self.dataset(model, task, split, data_dir)
            for split in splits
            for task in tasks
        }
        note(*datasets.values())
        return {
            key: (dataset, predict(model, dataset, self.batch_size))
            for key, dataset in datasets.items()
        }


def evaluate_dev(outputs: Outputs) -> dict[str, Any]:
    """`prediction.evaluate` of the dev sets in `outputs`."""
    return evaluate(output for (_, split), output in outputs.items() if split == "dev")


# ---------------------------------------------------------------------------- several runs


@dataclass
class Score:
    """A run's dev score on a task, and its difference from the reference's (None for that run)."""

    task: Task
    run: str
    metric: str
    rows: int
    score: float
    interval: tuple[float, float]
    comparison: Comparison | None = None


def read_scores(runs: Sequence[SavedRun], data_dir: Path | None) -> list[list[Score]]:
    """By task, the score of the first run, which is the reference, and of the others with the task.

    All come from prediction files. P-values have Holm's correction over all differences. UserError
    if a run shares no task with the reference or has predicted other rows.
    """
    scores = []
    for task in TASKS.values():
        having = [run for run in runs if task.name in run.files.get("dev", {})]
        if len(having) > 1 and having[0] is runs[0]:
            scores.append(score_task(having, task, data_dir))
    others = [score for of_task in scores for score in of_task[1:]]
    for run in runs[1:]:
        if str(run.folder) not in {score.run for score in others}:
            raise UserError(f"{run.folder}, {runs[0].folder}: have no task in common")
    for score, p in zip(others, holm([score.comparison.p for score in others]), strict=True):
        score.comparison = replace(score.comparison, p=p)
    return scores


def score_task(runs: Sequence[SavedRun], task: Task, data_dir: Path | None) -> list[Score]:
    """`read_scores` for a task that all runs have, without Holm's correction."""
    first = runs[0]
    path = first.data_file(task, "dev", data_dir)
    rows = {run.limit: read_examples(path, task, limit=run.limit)[0] for run in runs}
    examples = rows[first.limit]
    for run in runs:
        if rows[run.limit] != examples:
            limits = " and ".join(f"{r.folder} had --limit {r.limit}" for r in (run, first))
            raise UserError(f"{limits}: they predicted different rows of {path}")
    files = [run.prediction_file(task, "dev") for run in runs]
    predictions = [read_predictions(file, task, examples, path) for file in files]
    gold = np.array([example.label for example in examples])
    correlation, scores = not task.labels.integer, []
    for run, predicted in zip(runs, predictions, strict=True):
        metric, value = next(iter(task.labels.metrics(predicted, gold).items()))
        interval = score_interval(value, len(gold), correlation)
        scores.append(Score(task, str(run.folder), metric, len(gold), value, interval))
        if run is not first:
            scores[-1].comparison = compare(gold, predicted, predictions[0], correlation)
    return scores


def check_different(runs: Sequence[SavedRun]) -> None:
    """UserError unless there are at least two runs, each named once."""
    if len({run.folder.resolve() for run in runs}) < max(len(runs), 2):
        raise UserError(f"{runs[0].folder}: name at least two runs, each once")


def check_ensemble(runs: Sequence[SavedRun]) -> None:
    """UserError unless these are different runs of the same tasks, files and rows."""
    first = runs[0]
    check_different(runs)
    for run in runs:
        if not run.config.get("decoders"):
            raise UserError(f"{run.folder}: has no heads; an ensemble averages their outputs")
        pair = f"{run.folder} and {first.folder}"
        mine, theirs = (", ".join(sorted(r.config["decoders"])) for r in (run, first))
        if mine != theirs:
            raise UserError(f"{pair}: an ensemble needs the same tasks, not {mine} and {theirs}")
        # The rows must be the same, too: --limit draws the same ones in every run.
        if run.limit != first.limit:
            limits = (f"--limit {r.limit}" if r.limit else "all rows" for r in (run, first))
            raise UserError(f"{pair}: an ensemble needs the same rows, not {' and '.join(limits)}")
        before = first.checksums()
        for (task, split), value in run.checksums().items():
            if before.get((task, split), value) != value:
                raise UserError(
                    f"{pair}: an ensemble needs the same data, but they read different {split}"
                    f" files of {task}"
                )


def predict_ensemble(
    runs: Sequence[SavedRun], splits: Sequence[str], data_dir: Path | None, device: str | None
) -> Outputs:
    """The runs' logits, averaged (scores are logits); prints the dev scores of each run."""
    members = [run.predict(run.load_model(device), splits, data_dir) for run in runs]
    for run, outputs in zip(runs, members, strict=True):
        note(f"{run.folder}: {evaluate_dev(outputs)['summary']}")
    return {
        key: (dataset, torch.stack([outputs[key][1] for outputs in members]).mean(dim=0))
        for key, (dataset, _) in members[0].items()
    }


def check_average(runs: Sequence[SavedRun], folder: Path) -> None:
    """UserError if `folder` exists, or unless all runs started from the same weights of BERT.

    The mean of unrelated weights is not a useful model. Heads and pooling must be the same, too.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists and is not overwritten; name a new folder")

    def needed(run: SavedRun) -> dict[str, Any]:
        return {
            "weights to start from (--model)": run.config.get("model_checksum"),
            "heads": run.config["decoders"],
            "--pooling": run.arguments["pooling"],
        }

    for run in runs:
        for name, value in needed(run).items():
            if value is None or value != needed(runs[0])[name]:
                pair = f"{run.folder} and {runs[0].folder}"
                raise UserError(f"{pair}: --average needs the same {name}")


def average_weights(runs: Sequence[SavedRun], device: str | None) -> MultitaskBERT:
    """A model whose weights are the means of the runs' best ones, a "model soup".

    (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482.)
    """
    model = runs[0].load_model(device)
    members = [MultitaskBERT.from_pretrained(run.folder) for run in runs]
    for mean, *weights in zip(model.parameters(), *(m.parameters() for m in members), strict=True):
        mean.data.copy_(torch.stack([weight.data for weight in weights]).mean(dim=0))
    return model


def save_average(runs: Sequence[SavedRun], folder: Path, device: str | None) -> dict[str, Any]:
    """Write the mean of the runs' weights as a new run; returns its dev evaluation."""
    first, model = runs[0], average_weights(runs, device)
    outputs = first.predict(model, [split for split in first.files if split != "train"], None)
    evaluation = evaluate_dev(outputs)
    # Predictions go into the new folder, not to the files named for the first run.
    own_files = ("dev_out", "test_out")
    arguments = {k: None if k.endswith(own_files) else v for k, v in first.arguments.items()}
    args = Namespace(**{**arguments, "run_dir": folder, "resume": False})
    kept = ("data", "model_checksum", "precision", "decoders", "rows", "files")
    facts = {key: first.config[key] for key in kept if key in first.config}
    facts |= {"device": model.device.type, "average_of": [str(run.folder) for run in runs]}
    with closing(RunDir.start_or_resume(args, **facts)) as run:
        model.save_pretrained(folder / "best")
        mean = SavedRun(folder)
        for (_, split), (dataset, logits) in outputs.items():
            path = mean.prediction_file(dataset.task, split)
            write_text(path, format_predictions(dataset, logits))
        result = {"dev": evaluation["tasks"], "overall": evaluation["score"]}
        write_text(folder / "best" / "README.md", model_card(folder, result))
        run.finish(result, keep_last=False)
    return evaluation
