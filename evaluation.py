"""Predictions, metrics, leaderboard files, and the command for everything about a saved run.

    python evaluation.py runs/NAME                                      # dev metrics again
    python evaluation.py runs/NAME --data FILE.csv --task sst --out PREDICTIONS.csv
    python evaluation.py runs/NAME --text "A fine film."                # --text twice for a pair
    python evaluation.py runs/NAME --submit FILE.zip
    python evaluation.py runs/NAME --compare runs/OTHER
    python evaluation.py runs/NAME --export onnx                        # after ./setup.sh --dev
    python evaluation.py runs/NAME --export course                      # pytorch_model.bin

Batch size, precision, pooling, pair encoding and dev files are those that the run recorded.
"""

import json
import math
import re
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert import hub_name
from datasets import Batch, Example, TaskDataset, TokenizedDataset, read_examples
from engine import distributed
from engine.checkpoint import (
    atomic_file,
    check_new_file,
    checksum,
    read_json,
    read_text,
    write_text,
)
from engine.cli import ArgumentParser, run_script
from engine.device import catch_out_of_memory, setup_device
from engine.errors import TrainingDiverged, UserError, reading
from engine.export import write_onnx
from engine.metrics import similarity_metrics
from engine.stats import SIGNIFICANCE, compare, format_p, holm
from engine.trainer import progress_bar
from masked_lm import MaskedLM
from model import MultitaskBERT, SentenceEncoder, pool
from tasks import TASKS, Task, find_tasks

# Batch -> its embeddings, all first sentences first: `embed_batch`, or a look-up in linear probing.
Embed = Callable[[Batch], Tensor]
LEADERBOARD = ("sst", "para", "sts")  # the tasks that a submission contains

# ---------------------------------------------------------------------------- predictions


def embed_batch(model: SentenceEncoder, batch: Batch, pooling: str | None = None) -> Tensor:
    """The embeddings of a batch, (embeddings_per_row * B, D)."""
    return model.embed(batch.input_ids, batch.attention_mask, batch.token_type_ids, pooling)


def compute_rows(
    model: SentenceEncoder,
    dataset: TokenizedDataset,
    batch_size: int,
    function: Callable[[Batch], Tensor],  # batch -> an output for each of its rows, (B, ...)
    size: tuple[int, ...],  # of a row's output
    rows: np.ndarray | None = None,  # only these; the others' outputs are 0
    title: str = "predict",
) -> Tensor:
    """The outputs of every row, (N, ...) on the model's device, in file order."""
    outputs = torch.zeros(len(dataset), *size, device=model.device)
    total = len(dataset) if rows is None else len(rows)
    title = f"{title} {dataset.path.name}"
    with model.evaluating(), progress_bar(total, title, leave=False) as bar:
        # Batches hold rows of similar length, so they do not follow the order of the file.
        for batch in dataset.eval_batches(batch_size, rows):
            with catch_out_of_memory(batch):
                outputs[torch.from_numpy(batch.rows)] = function(batch.to(model.device))
            bar.update(min(len(batch) * distributed.world_size(), total - bar.n))
    # Each process has filled in the rows of its own batches; the sum has all of them.
    distributed.all_reduce_sum(outputs)
    bad = ~outputs.flatten(1).isfinite().all(dim=1)
    if bad.any():
        row = dataset.describe_rows(bad.nonzero().flatten()[:1].cpu().numpy())
        raise TrainingDiverged(
            f"{dataset.path}: the outputs for {int(bad.sum())} rows are not finite ({row}, ...):"
            " try a smaller --lr or --precision fp32"
        )
    return outputs


def embed_dataset(
    model: SentenceEncoder,
    dataset: TokenizedDataset,
    batch_size: int,
    rows: np.ndarray | None = None,
    pooling: str | None = None,  # instead of the model's own
) -> Tensor:
    """Embeddings (N, embeddings_per_row, D) of all rows, or of `rows` and zeros elsewhere."""
    size = (dataset.embeddings_per_row, model.bert.config.hidden_size)

    def embed(batch: Batch) -> Tensor:
        # All first sentences, then all second ones -> (B, embeddings_per_row, D).
        return embed_batch(model, batch, pooling).unflatten(0, (size[0], -1)).transpose(0, 1)

    return compute_rows(model, dataset, batch_size, embed, size, rows, title="embed")


@dataclass
class EmbeddingCache:
    """Embeddings of a frozen encoder, each row's computed once: in linear probing they are fixed.

    Rows are encoded in evaluation batches before training, so that they do not depend on when
    training is interrupted and resumed.
    """

    model: SentenceEncoder
    batch_size: int
    vectors: dict[TokenizedDataset, Tensor] = field(default_factory=dict)

    def add(self, dataset: TokenizedDataset, rows: np.ndarray | None = None) -> None:
        """Encode a dataset, or only these rows of it."""
        self.vectors[dataset] = embed_dataset(self.model, dataset, self.batch_size, rows)

    def __call__(self, batch: Batch) -> Tensor:
        """The embeddings of a batch, as `embed_batch`."""
        # (B, embeddings_per_row, D) -> all first sentences, then all second ones.
        vectors = self.vectors[batch.dataset][torch.from_numpy(batch.rows)]
        return vectors.transpose(0, 1).flatten(0, 1)


def predict(model: MultitaskBERT, dataset: TaskDataset, batch_size: int, embed: Embed) -> Tensor:
    """The logits of every row, (N, C) float32 on the CPU, in file order."""
    size = (dataset.task.labels.num_logits,)

    def logits(batch: Batch) -> Tensor:
        return model.decode(batch.task, embed(batch))

    return compute_rows(model, dataset, batch_size, logits, size).cpu()


# ---------------------------------------------------------------------------- metrics


def task_metrics(dataset: TaskDataset, logits: Tensor) -> dict[str, Any]:
    """The task's metrics (the primary one first), mean loss and number of rows."""
    # Over all rows at once: a mean of batch means would weigh the last, short batch too much.
    labels = dataset.task.labels
    metrics = labels.metrics(labels.predict(logits).numpy(), dataset.labels.numpy())
    loss = labels.loss(logits, dataset.labels).double().mean().item()
    if not math.isfinite(loss):
        raise TrainingDiverged(f"{dataset.path}: the mean loss is {loss}; try a smaller --lr")
    return {**metrics, "loss": loss, "rows": len(dataset)}


def primary_metric(metrics: dict[str, Any]) -> float:
    """The first of a task's metrics: accuracy, or Pearson's r."""
    return next(iter(metrics.values()))


def overall_score(metrics: dict[str, dict[str, Any]]) -> float:
    """The course's overall score: the mean over tasks of accuracy, or of (Pearson + 1) / 2."""
    # Pearson's r is from -1 to 1, accuracy from 0 to 1: the first is brought to the same range.
    scores = [TASKS[name].labels.course_score(primary_metric(m)) for name, m in metrics.items()]
    return sum(scores) / len(scores)


def constant_note(metrics: dict[str, Any]) -> str:
    """A note beside the score if all predictions are one class, as when nothing was learnt."""
    # Rows are gold classes, columns predicted ones; a constant prediction fills one column.
    matrix = np.array(metrics.get("confusion", np.eye(2)))  # scores have no such matrix
    if np.count_nonzero(matrix.sum(axis=0)) > 1:
        return ""
    majority = matrix.sum(axis=1).argmax() == matrix.sum(axis=0).argmax()
    return " (majority class)" if majority else " (one class only)"


def summarize(metrics: dict[str, dict[str, Any]]) -> str:
    """One line for people: each task's primary metric, and the overall score."""
    parts = [
        f"{name} {next(iter(scores))} {primary_metric(scores):.3f}{constant_note(scores)}"
        for name, scores in metrics.items()
    ]
    return ", ".join([*parts, f"overall {overall_score(metrics):.3f}"])


def evaluate(datasets: Sequence[TaskDataset], logits: Sequence[Tensor]) -> dict[str, Any]:
    """Metrics by task ("tasks"), the overall score ("score"), and both in a line ("summary")."""
    metrics = {
        d.name: task_metrics(d, outputs) for d, outputs in zip(datasets, logits, strict=True)
    }
    return {"score": overall_score(metrics), "summary": summarize(metrics), "tasks": metrics}


def majority_share(gold: np.ndarray) -> float:
    """The accuracy of always predicting the most frequent class."""
    return float(np.unique(gold, return_counts=True)[1].max() / len(gold))


def baseline(model: SentenceEncoder, dataset: TaskDataset, batch_size: int) -> tuple[str, float]:
    """The name and the value of what a dev score has to beat, computed before training.

    For classes the share of the most frequent one; for scores of pairs Pearson's r of the cosine of
    mean-pooled embeddings, the best that the untouched encoder does without a head.
    """
    gold = dataset.labels.numpy()
    if dataset.task.labels.integer:
        return "majority class", majority_share(gold)
    # The pairs again, encoded separately whatever the model's pair encoding is.
    texts = list(zip(*(example.texts for example in dataset.examples), strict=True))
    pairs = TokenizedDataset(dataset.name, dataset.path, texts, model.tokenizer)
    vectors = embed_dataset(model, pairs, batch_size, pooling="mean").cpu()
    cosines = torch.cosine_similarity(vectors[:, 0], vectors[:, -1], dim=-1)
    return "untouched encoder", primary_metric(dataset.task.labels.metrics(cosines.numpy(), gold))


# ---------------------------------------------------------------------------- leaderboard files


def write_predictions(path: Path, dataset: TaskDataset, logits: Tensor) -> None:
    """Write a leaderboard file: its header, then `{id} , {prediction} ` per row, in file order.

    Sentiment is an integer, paraphrase the rounded probability, similarity the raw score.
    """
    predictions = dataset.task.labels.predict(logits).tolist()
    # Byte for byte the course's format, with its odd spaces and spelling: a grader may compare it.
    lines = [f"id \t {dataset.task.header} \n"]
    for example, prediction in zip(dataset.examples, predictions, strict=True):
        lines.append(f"{example.id} , {prediction} \n")
    write_text(path, "".join(lines))


def read_predictions(
    path: Path, task: Task, examples: Sequence[Example], source: Path
) -> np.ndarray:
    """The predictions (N,) in a leaderboard file, for exactly these rows of `source`, in order.

    UserError if the header, the number of rows, an id, the order or a prediction is wrong.
    """
    # Predictions in another order would silently be scored against the wrong rows.
    header, *rows = read_text(path, "a prediction file; a finished run has them").split("\n")
    if header != f"id \t {task.header} ":
        raise UserError(f"{path}, line 1: the header is {header[:60]!r}, not that of {task.name}")
    if len(rows) != len(examples) + 1 or rows[-1]:  # every line ends with a newline
        raise UserError(
            f"{path}: {len(rows) - 1} rows, but {source} has {len(examples)}: predict all of it"
        )
    labels, predictions = task.labels, np.empty(len(examples))
    for i, (example, row) in enumerate(zip(examples, rows[:-1], strict=True)):
        name, _, text = row.rpartition(" , ")
        where = f"{path}, line {i + 2}"
        if name != example.id:
            raise UserError(f"{where}: {row[:60]!r}, where {source} has the id {example.id!r}")
        valid = False
        with suppress(ValueError):
            value = float(text) if labels.dtype == torch.float32 else int(text)
            whole = value in range(int(labels.low), int(labels.high) + 1)
            valid = whole if labels.integer else math.isfinite(value)
        if not valid or text != f"{value} ":  # as `write_predictions` formats it
            raise UserError(f"{where}: {text[:40]!r} is not a prediction in its format")
        predictions[i] = value
    return predictions


# ---------------------------------------------------------------------------- saved runs


def run_facts(
    model: SentenceEncoder, datasets: dict[str, Sequence[TokenizedDataset]]
) -> dict[str, Any]:
    """What `config.json` records of a run's data (split -> a dataset per task) and model."""
    return {
        "data": {str(d.path.absolute()): d.checksum for tasks in datasets.values() for d in tasks},
        "model_checksum": checksum(model.bert.state_dict(), str(model.tokenizer)),
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
    """A run folder as its `config.json` describes it, once it has a best/."""

    def __init__(self, folder: Path):
        # Both files exist as soon as a run has started; other folders may have a config.json too.
        path = folder / "config.json"
        if not path.is_file() or not (folder / "log.jsonl").is_file():
            raise UserError(f"{folder}: not a run folder; expected one with config.json and best/")
        self.folder = folder
        self.config = read_json(path)
        with reading(path, "the record of a run"):
            self.arguments: dict[str, Any] = self.config["arguments"]
            self.batch_size = int(self.arguments["batch_size"])
            self.limit: int | None = self.arguments["limit"]
            self.files: dict[str, dict[str, str]] = self.config.get("files", {})
            _ = self.config["precision"], self.config["device"], self.config["hardware"]["threads"]

    def load_model(self, device: str | None = None) -> MultitaskBERT:
        """The best model, with the run's precision and threads, on the run's device or another."""
        model = MultitaskBERT.from_pretrained(self.folder)
        # With as many threads as the run had, sums are in the same order, and the metrics are the
        # run's bit for bit; also if it had several processes.
        recorded = {**self.config, "device": device or self.config["device"], "processes": 1}
        chosen, model.dtype = setup_device(0, "auto", "auto", recorded)
        return model.to(chosen)

    def data_file(self, task: Task, split: str, data_dir: Path | None) -> Path:
        """The file that the run read, or the one in another data folder."""
        if data_dir is not None:
            return data_dir / task.file(split)
        if task.name not in self.files.get(split, {}):
            path = self.folder / "config.json"
            raise UserError(f"{path}: names no {split} file of {task.name}; give --data_dir")
        return Path(self.files[split][task.name])

    def prediction_file(self, task: Task, split: str) -> Path:
        """Where the run wrote its predictions."""
        # --sst_dev_out of multitask_classifier.py, --dev_out of classifier.py.
        flags = (f"{task.name}_{split}_out", f"{split}_out")
        default = self.folder / "predictions" / f"{task.name}-{split}-output.csv"
        given = next((self.arguments[f] for f in flags if self.arguments.get(f)), default)
        if not Path(given).is_absolute() and given != default:  # an older record
            raise UserError(
                f"{self.folder / 'config.json'}: does not say in which folder {given} is: make that"
                " path absolute there"
            )
        return Path(given)


def note(*lines: object) -> None:
    """Print what is not the answer itself to standard error."""
    print(*lines, sep="\n", file=sys.stderr)


def format_json(value: dict[str, Any]) -> str:
    """Indented JSON with each innermost list, such as a row of a confusion matrix, on one line."""
    text = json.dumps(value, indent=2)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)


def evaluate_run(run: SavedRun, args: Namespace) -> None:
    """Print the dev metrics of the run's best model, in the form of `result.json`."""
    model = run.load_model(args.device)
    datasets = []
    # A SimCSE run has no heads: it is judged by the cosines of STS pairs, as during training.
    for task in find_tasks(list(model.heads)) or [TASKS["sts"]]:
        path = run.data_file(task, "dev", args.data_dir)
        pairs = model.encoding(task)
        datasets.append(TaskDataset(path, task, model.tokenizer, pairs, limit=run.limit))
    note(*datasets)
    if model.heads:
        embed = partial(embed_batch, model)
        logits = [predict(model, dataset, run.batch_size, embed) for dataset in datasets]
        evaluation = evaluate(datasets, logits)
        result = {"dev": evaluation["tasks"], "overall": evaluation["score"]}
        note(evaluation["summary"])
    else:
        vectors = embed_dataset(model, datasets[0], run.batch_size).cpu()
        result = {"dev": {"sts": similarity_metrics(vectors, datasets[0].labels)}}
    print(format_json(result))
    # On the same files the figures must be those that the run recorded.
    recorded = run.folder / "result.json"
    if not recorded.exists():
        note(f"{run.folder}: has not finished; these are its best weights so far")
    elif args.data_dir is None:
        same = read_json(recorded).get("dev") == result["dev"]
        note(f"{recorded}: {'the same metrics, bit for bit' if same else 'DIFFERENT metrics'}")


def compare_runs(first: SavedRun, args: Namespace) -> None:
    """Print the differences between two runs' dev metrics, and whether they are significant."""
    runs = (first, SavedRun(args.compare))
    common = [name for name in TASKS if all(name in run.files.get("dev", {}) for run in runs)]
    # Runs of different tasks are compared on what they share.
    if not common:
        raise UserError(f"{first.folder}, {args.compare}: have no task in common")
    titles, results = [], []
    for task in find_tasks(common):
        # Both runs' predictions of the same rows: the test is paired.
        path = first.data_file(task, "dev", args.data_dir)
        examples, others = (read_examples(path, task, limit=run.limit)[0] for run in runs)
        if examples != others:
            limits = " and ".join(f"{run.folder} had --limit {run.limit}" for run in runs)
            raise UserError(f"{limits}: they predicted different rows of {path}")
        gold = np.array([example.label for example in examples])
        files = [run.prediction_file(task, "dev") for run in runs]
        a, b = (read_predictions(file, task, examples, path) for file in files)
        metrics = [task.labels.metrics(predicted, gold) for predicted in (a, b)]
        values = " - ".join(f"{primary_metric(scores):.4f}" for scores in metrics)
        titles.append(f"{task.name} {next(iter(metrics[0]))}, {len(gold):,} rows: {values}")
        correlation = not task.labels.integer
        results.append(compare(gold, a[None], b[None], correlation))  # one seed each
    for title, result, p in zip(titles, results, holm([r.p for r in results]), strict=True):
        print(
            f"{title} = {result.difference:+.4f}, 95% interval {result.low:+.4f} to"
            f" {result.high:+.4f}, p {format_p(p)}:"
            f" {'significant' if p < SIGNIFICANCE else 'not significant'}"
        )
    note(
        f"differences: {first.folder} minus {args.compare}",
        "intervals: bootstrap over rows; p: paired test with Holm's correction, significant below"
        f" {SIGNIFICANCE}; the variance between seeds is in neither",
    )


def predict_file(run: SavedRun, args: Namespace) -> None:
    """Write the predictions for a csv file; print metrics if it has labels."""
    check_new_file(args.out)  # now, and not after minutes of predicting
    model = run.load_model(args.device)
    if args.task not in model.heads:
        trained = ", ".join(model.heads) or "none: SimCSE pre-training has no heads"
        raise UserError(f"--task {args.task}: the run has no head for it; it has {trained}")
    task = TASKS[args.task]
    # The file may have labels or not.
    dataset = TaskDataset(args.data, task, model.tokenizer, model.encoding(task), labelled=None)
    note(dataset)
    logits = predict(model, dataset, run.batch_size, partial(embed_batch, model))
    write_predictions(args.out, dataset, logits)
    if dataset.labels is not None:
        print(format_json({task.name: task_metrics(dataset, logits)}))
    note(args.out)


def predict_texts(run: SavedRun, args: Namespace) -> None:
    """Print each matching task's prediction for a sentence or a pair, with probabilities."""
    texts = args.text
    if "mlm_probability" in run.arguments and len(texts) == 1:
        masked = MaskedLM.from_pretrained(run.folder)
        for number, choices in enumerate(masked.fill(texts[0]), start=1):
            listed = ", ".join(f"{token} {p:.4f}" for token, p in choices)
            print(f"{masked.tokenizer.mask_token} {number}: {listed}")
        return
    model = run.load_model(args.device)
    tasks = [task for task in find_tasks(list(model.heads)) if len(task.text_columns) == len(texts)]
    if not tasks:
        raise UserError(
            f"{run.folder}: no task takes {len(texts)} --text; it has"
            f" {', '.join(model.heads) or 'no heads at all'}"
        )
    for task in tasks:
        # A data set of one row: the same path as a file takes.
        joint = len(texts) > model.embeddings_per_row(task)
        columns = [[text] for text in texts]
        dataset = TokenizedDataset(task.name, Path("--text"), columns, model.tokenizer, joint)
        if dataset.truncated:  # tell, as the end of the text was not read
            note(dataset)
        with model.evaluating():
            batch = dataset.batch(np.arange(1)).to(model.device)
            logits = model.decode(task.name, embed_batch(model, batch)).cpu()
        prediction = task.labels.predict(logits).item()
        if task.class_names:
            probabilities = task.labels.probabilities(logits)[0].tolist()
            names = zip(task.class_names, probabilities, strict=True)
            listed = ", ".join(f"{name} {p:.4f}" for name, p in names)
            print(f"{task.name}: {task.class_names[int(prediction)]} ({listed})")
        else:
            print(f"{task.name}: {prediction:.4f}")


def submit(run: SavedRun, args: Namespace) -> None:
    """Check the run's prediction files and pack them for the leaderboard."""
    out = args.submit
    check_new_file(out)
    files: dict[str, Path] = {}
    for task in find_tasks(LEADERBOARD):
        for split in ("dev", "test"):
            path = run.prediction_file(task, split)
            source = run.data_file(task, split, args.data_dir)
            examples, _, _ = read_examples(source, task, labelled=split == "dev")
            # A run on a subset of the rows has predicted that subset.
            if run.limit is not None and run.limit < len(examples):
                raise UserError(
                    f"{run.folder}: had --limit {run.limit}, but {source} has {len(examples)} rows,"
                    " and the leaderboard wants all: train without --limit"
                )
            read_predictions(path, task, examples, source)  # checks every line
            files[f"predictions/{task.name}-{split}-output.csv"] = path
            note(f"{path}: {len(examples):,} predictions, in the order of {source}")
    with atomic_file(out) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name)  # without a date: equal files give equal archives
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    print(out)


class ExportedEncoder(nn.Module):
    """A run's encoder with its pooling, as ONNX gets it."""

    OUTPUTS = ("last_hidden_state", "pooler_output", "sentence_embedding")

    def __init__(self, model: SentenceEncoder):
        super().__init__()
        self.bert = model.bert
        self.pooling = model.pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Three tensors (B, T) -> those of `OUTPUTS`: (B, T, D), (B, D), (B, D)."""
        output = self.bert(input_ids, attention_mask, token_type_ids)
        embedding = pool(output, attention_mask, self.pooling)
        return output["last_hidden_state"], output["pooler_output"], embedding


def export(run: SavedRun, args: Namespace) -> None:
    """Write the run's encoder as ONNX, or as the file that the course's own `BertModel` loads."""
    # Where the hub and the course look for it.
    name = {"onnx": "onnx/model.onnx", "course": "pytorch_model.bin"}[args.export]
    path = args.out or run.folder / "best" / name
    check_new_file(path)
    model = MultitaskBERT.from_pretrained(run.folder)
    if args.export == "onnx":
        limit = model.bert.config.max_position_embeddings
        write_onnx(path, ExportedEncoder(model).eval(), ExportedEncoder.OUTPUTS, limit)
    else:
        # The course's loader wants HuggingFace's names, each with this prefix.
        tensors = {f"bert.{hub_name(n)}": p.detach() for n, p in model.bert.named_parameters()}
        with atomic_file(path) as draft:
            torch.save(tensors, draft)
    print(path)


# ---------------------------------------------------------------------------- command line

# Without an action, the run is evaluated again.
ACTIONS = {
    "evaluate": evaluate_run,
    "data": predict_file,
    "text": predict_texts,
    "submit": submit,
    "compare": compare_runs,
    "export": export,
}
# For each other flag, the actions in which it has an effect.
ACTIONS_OF_FLAG = {
    "task": {"data"},
    "out": {"data", "export"},
    "data_dir": {"evaluate", "submit", "compare"},
    "device": {"evaluate", "data", "text"},
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked; `action` is a key of `ACTIONS`."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--data", type=Path, metavar="FILE", help="predict a csv file in the course's format")
    add("--text", action="append", help="predict a sentence, or a pair: --text A --text B")
    add("--submit", type=Path, metavar="ZIP", help="check the predictions, and pack them")
    add("--compare", type=Path, metavar="OTHER", help="compare dev metrics with another run's")
    export_help = (
        "write the encoder as ONNX (after ./setup.sh --dev), or for the course's BertModel"
    )
    add("--export", choices=["onnx", "course"], help=export_help)
    add = parser.add_argument
    add("--task", help="the task whose columns the file of --data has")
    add("--out", type=Path, help="a new file, for --data (predictions) or --export (the model)")
    add("--data_dir", type=Path, help="folder of the csv files (default: the files the run read)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="(default: the run's)")
    args = parser.parse_args(argv)
    given = [action for action in ACTIONS if getattr(args, action, None) is not None]
    args.action = given[0] if given else "evaluate"
    # A flag that would have no effect is refused, not ignored.
    for flag, actions in ACTIONS_OF_FLAG.items():
        if getattr(args, flag) is not None and args.action not in actions:
            parser.error(f"--{flag} has no effect {f'with --{given[0]}' if given else 'by itself'}")
    if args.data and not (args.task and args.out):
        parser.error("--data FILE needs --task NAME and --out FILE")
    if args.text and len(args.text) > 2:
        parser.error("--text: give one sentence, or the two of a pair")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Answer what the command line asks."""
    args = parse_args(argv)
    ACTIONS[args.action](SavedRun(args.run), args)


if __name__ == "__main__":
    run_script(main)
