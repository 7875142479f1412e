"""The job of `evaluation.py`: what can be asked of a saved run."""

import json
import os
import sys
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert import pool
from checkpoint import UserError, check_new_file, read_json, whole_file
from contrastive import figures
from datasets import Sentences, TaskData, read
from exchange import write_onnx
from scoring import (
    LEVEL,
    Comparison,
    Embed,
    FrozenEmbeddings,
    compare,
    embed,
    evaluate,
    headline,
    holm,
    p_value,
    predict,
    read_predictions,
    report,
    write_predictions,
)
from tasks import TASKS, MultitaskBERT, Task, find_tasks
from train import prepare

LEADERBOARD = ("sst", "para", "sts")  # the tasks that it wants, with dev and test
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # as recorded -> as a flag


def answer(args: Namespace) -> None:
    """Do what the command line of `evaluation.py` asks. Answers go to standard output.

    Raises:
        UserError: anything the user can mend; nothing has been written then.
    """
    record = read_record(args.run)
    if args.action == "evaluate":
        evaluate_again(record, args.data_dir, args.device)
    elif args.action == "data":
        predict_file(record, args.data, args.task, args.out, args.device)
    elif args.action == "text":
        predict_texts(record, args.text, args.device)
    elif args.action == "submit":
        submit(record, args.submit, args.data_dir)
    elif args.action == "compare":
        compare_runs(record, read_record(args.compare), args.data_dir)
    else:
        export(record, args.out)


# ---------------------------------------------------------------------------- what was recorded


@dataclass(frozen=True)
class Record:
    """What a run's `config.json` says, as far as it is asked for here.

    Attributes:
        folder: the run folder.
        arguments: of its command line.
        files: split -> task -> the file that was read.
        precision, device: as the flags spell them, with `auto` decided.
        threads: of PyTorch, on the CPU.
    """

    folder: Path
    arguments: dict[str, Any]
    files: dict[str, dict[str, str]]
    precision: str
    device: str
    threads: int

    def file(self, task: Task, split: str, data_dir: Path | None) -> Path:
        """A task's file: the one that the run read, or the one in another folder of data."""
        if data_dir is not None:
            return data_dir / task.files.format("test-student" if split == "test" else split)
        if task.name not in self.files.get(split, {}):
            path = self.folder / "config.json"
            raise UserError(f"{path}: names no {split} file of {task.name}; give --data_dir")
        return Path(self.files[split][task.name])

    def predictions(self, task: Task, split: str) -> Path:
        """Where the run left its predictions."""
        flags = (f"{task.name}_{split}_out", f"{split}_out")
        named = next((self.arguments[f] for f in flags if self.arguments.get(f)), None)
        return Path(str(named or self.folder / "predictions" / f"{task.name}-{split}-output.csv"))


def read_record(folder: Path) -> Record:
    """The record of a run; UserError where there is none, or it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no run folder; expected one with config.json and best/")
    config = read_json(path)
    if "model_type" in config:
        raise UserError(f"{folder}: a model, not a run; name a run folder")
    try:
        arguments = config["arguments"]
        threads = config["hardware"]["threads"]
        limit = 1 if arguments["limit"] is None else arguments["limit"]
        counts = [arguments["batch_size"], limit, threads]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"one of {counts} is no count")
        if config["device"] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"no device {config['device']!r}")
        precision = PRECISIONS[config["precision"]]
        files = {
            split: {task: str(file) for task, file in of.items()}
            for split, of in config.get("files", {}).items()
        }
        return Record(folder, arguments, files, precision, config["device"], threads)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no record of a run ({reason}); name a run folder") from None


def load(record: Record, device: str | None) -> MultitaskBERT:
    """The run's best model, in the run's precision, on the run's device or another."""
    model = MultitaskBERT.from_pretrained(record.folder)
    place, model.precision = prepare(0, device or record.device, record.precision)
    # To the bit as in the run: the order in which PyTorch adds depends on its number of threads,
    # and on whether weights want a gradient.
    torch.set_num_threads(min(record.threads, os.cpu_count() or 1))
    model.freeze(record.arguments.get("option") == "pretrain")
    return model.to(place)


def note(*lines: object) -> None:
    """Say what is no answer."""
    print(*lines, sep="\n", file=sys.stderr)


# ---------------------------------------------------------------------------- figures


def evaluate_again(record: Record, data_dir: Path | None, device: str | None) -> None:
    """Print the dev figures of the run's best model, in the form of `result.json`."""
    model = load(record, device)
    tasks = find_tasks(list(model.heads)) or [TASKS["sts"]]  # a contrastive run has no heads
    sets = [
        TaskData(
            record.file(task, "dev", data_dir),
            task,
            model.tokenizer,
            model.pair_encoding,
            limit=record.arguments["limit"],
        )
        for task in tasks
    ]
    note(*sets)
    batch_size = record.arguments["batch_size"]
    if model.heads:
        embedder: Embed = partial(embed, model)
        if record.arguments.get("features") and record.arguments["option"] == "pretrain":
            embedder = FrozenEmbeddings(model, Path(str(record.arguments["features"])))
        logits = [predict(model, data, batch_size, embedder) for data in sets]
        found = evaluate(sets, logits)
        result = {"dev": found["tasks"], "overall": found["score"]}
    else:
        found = figures(model, sets[0], batch_size)
        numbers = {key: found[key] for key in found if key not in ("score", "summary")}
        result = {"dev": {"sts": numbers}}
    print(json.dumps(result, indent=2))
    note(found["summary"])
    known = record.folder / "result.json"
    if data_dir is None and known.exists():
        same = read_json(known).get("dev") == result["dev"]
        note(f"{known}: {'the same figures, to the bit' if same else 'OTHER FIGURES'}")


def compare_runs(first: Record, second: Record, data_dir: Path | None) -> None:
    """Print how the dev figures of two runs differ, and whether by more than noise."""
    both = [name for name in TASKS if all(name in r.files.get("dev", {}) for r in (first, second))]
    if not both:
        raise UserError(f"{first.folder}, {second.folder}: have no task in common")
    found: list[tuple[str, Comparison]] = []
    for task in find_tasks(both):
        path = first.file(task, "dev", data_dir)
        examples, others = (
            read(path, task, limit=r.arguments["limit"])[0] for r in (first, second)
        )
        if examples != others:
            one, other = (f"{r.folder} had --limit {r.arguments['limit']}" for r in (first, second))
            raise UserError(f"{one}, {other}: they predicted other rows of {path}")
        gold = np.array([example.label for example in examples])
        predicted = [
            read_predictions(record.predictions(task, "dev"), task, examples, path)
            for record in (first, second)
        ]
        reports = [task.report(of, gold) for of in predicted]
        one, other = map(headline, reports)
        what = f"{task.name} {next(iter(reports[0]))}, {len(gold):,} rows: {one:.4f} - {other:.4f}"
        one, other = predicted
        found.append((what, compare(gold, one[None], other[None], correlation=not task.whole)))
    for (what, difference), p in zip(found, holm([of.p for _, of in found]), strict=True):
        print(
            f"{what} = {difference.difference:+.4f}, 95% interval {difference.low:+.4f} to"
            f" {difference.high:+.4f}, p {p_value(p)}:"
            f" {'more' if p < LEVEL else 'no more'} than noise"
        )
    note(
        f"intervals: bootstrap over rows; p: paired test, times the number of tasks (Holm), noise"
        f" from {LEVEL}; what another seed would change is in neither"
    )


# ---------------------------------------------------------------------------- predictions


def find_task(model: MultitaskBERT, name: str) -> Task:
    """The task of that name; UserError where the run has no head for it."""
    if name not in model.heads:
        trained = ", ".join(model.heads) or "none: it is contrastive"
        raise UserError(f"--task {name}: the run has no head for it; there are {trained}")
    return TASKS[name]


def predict_file(record: Record, path: Path, name: str, out: Path, device: str | None) -> None:
    """Write predictions of a file as the leaderboard has them; print figures if it has labels."""
    check_new_file(out)
    model = load(record, device)
    task = find_task(model, name)
    data = TaskData(path, task, model.tokenizer, model.pair_encoding, labelled=None)
    note(data)
    logits = predict(model, data, record.arguments["batch_size"], partial(embed, model))
    write_predictions(out, data, logits)
    if data.labels is not None:
        print(json.dumps({name: report(data, logits)}, indent=2))
    note(out)


def predict_texts(record: Record, texts: Sequence[str], device: str | None) -> None:
    """Print what each task for so many sentences says of them, with its probabilities."""
    model = load(record, device)
    tasks = [task for task in find_tasks(list(model.heads)) if len(task.texts) == len(texts)]
    if not tasks:
        raise UserError(
            f"{record.folder}: no task for {len(texts)} --text; it has"
            f" {', '.join(model.heads) or 'none at all, as a contrastive run'}"
        )
    for task in tasks:
        joint = len(texts) > model.embeddings_per_row(task)
        columns = [[text] for text in texts]
        rows = Sentences(task.name, Path("--text"), columns, model.tokenizer, joint)
        if rows.truncated:
            note(rows)
        with torch.no_grad():
            batch = rows.batch(np.arange(1)).to(model.device)
            logits = model.decode(task.name, embed(model, batch)).cpu()
        shown = f"{task.name}: {task.decode(logits).item()}"
        if task.probabilities:
            chances = task.probabilities(logits)[0].tolist()
            shown += " (" + ", ".join(f"{i}: {p:.4f}" for i, p in enumerate(chances)) + ")"
        print(shown)


def submit(record: Record, out: Path, data_dir: Path | None) -> None:
    """Pack the run's prediction files for the leaderboard, if they are as it wants them."""
    check_new_file(out)
    files: dict[str, Path] = {}
    notes: list[str] = []
    for task in find_tasks(LEADERBOARD):
        for split in ("dev", "test"):
            path = record.predictions(task, split)
            source = record.file(task, split, data_dir)
            examples, _ = read(source, task, labelled=split == "dev")
            limit = record.arguments["limit"]
            if limit is not None and limit < len(examples):
                raise UserError(
                    f"{record.folder}: had --limit {limit}, but {source} has {len(examples)} rows,"
                    " and the leaderboard wants all: make a run without"
                )
            read_predictions(path, task, examples, source)
            files[f"predictions/{task.name}-{split}-output.csv"] = path
            notes.append(f"{path}: {len(examples):,} predictions, in the order of {source}")
    with whole_file(out) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name)  # without the time: equal files make equal archives
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    note(*notes)
    print(out)


# ---------------------------------------------------------------------------- other software


class Encoder(nn.Module):
    """A run's encoder with its pooling, for export."""

    OUTPUTS = ("last_hidden_state", "pooler_output", "sentence_embedding")

    def __init__(self, model: MultitaskBERT):
        super().__init__()
        self.bert = model.bert
        self.pooling = model.pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """input_ids and the others, (B, T) -> the tensors of `OUTPUTS`, the last two (B, D)."""
        output = self.bert(input_ids, attention_mask, token_type_ids)
        embedding = pool(output, attention_mask, self.pooling)
        return output["last_hidden_state"], output["pooler_output"], embedding


def export(record: Record, out: Path | None) -> None:
    """Write the run's encoder as ONNX."""
    path = out or record.folder / "best" / "onnx" / "model.onnx"
    check_new_file(path)
    model = MultitaskBERT.from_pretrained(record.folder)
    limit = model.bert.config.max_position_embeddings
    write_onnx(path, Encoder(model).eval(), Encoder.OUTPUTS, limit)
    print(path)
