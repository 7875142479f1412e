"""The job of `classifier.py` and `multitask_classifier.py`: files in, a trained model out."""

import os
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bert import BertModel
from checkpoint import Run, UserError
from datasets import Batch, Mixture, TaskData
from evaluation import (
    FrozenEmbeddings,
    embed,
    evaluate,
    overall,
    predict,
    report,
    summary,
    write_predictions,
)
from optimizer import AdamW, parameter_groups
from tasks import TASKS, MultitaskBERT, Task, find_tasks
from tokenizer import BertTokenizer
from train import peak_memory, prepare, summed, train


@dataclass
class Files:
    """Paths that a user gave for one task; None is the default."""

    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    dev_out: Path | None = None
    test_out: Path | None = None


def fit(
    args: Namespace, files: dict[str, Files], decoders: dict[str, str | None] | None = None
) -> dict[str, Any]:
    """Train on the tasks that `files` names, in a new run folder, and write all that a run leaves.

    Args:
        args: the command line (`options.add_training_flags`, and for several tasks `sampling` and
            `pair_encoding`).
        files: task name -> the paths given for it.
        decoders: task name -> decoder, where one is given.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: anything the user can mend; before training starts nothing has been written.
    """
    tasks = find_tasks(list(files))
    device, precision = prepare(args.seed, args.device, args.precision)
    outputs = output_paths(args.run_dir, files)
    Run.check(args.run_dir)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    sets = load_sets(args, tasks, files, tokenizer)
    model = build(args, tasks, decoders, tokenizer)
    model.precision = precision
    model.to(device)

    optimizers = {}
    if args.option == "finetune":
        optimizers["bert"] = AdamW(parameter_groups(model.bert, args.weight_decay), lr=args.lr)
    for task in tasks:
        groups = parameter_groups(model.heads[task.name], args.weight_decay)
        optimizers[task.name] = AdamW(groups, lr=args.head_lr)

    embedder = partial(embed, model) if "bert" in optimizers else FrozenEmbeddings(model)

    def loss_fn(batch: Batch) -> Tensor:
        """The loss of each row of a batch; it reaches the batch's own head alone, and BERT."""
        logits = model.decode(batch.task, embedder(batch))
        return TASKS[batch.task].loss(logits, batch.labels)

    sampling = getattr(args, "sampling", "roundrobin")
    mixture = Mixture(
        sets["train"], args.batch_size, args.seed, args.epochs, sampling, args.accumulate
    )
    run = Run.create(
        args.run_dir,
        vars(args),
        device=str(device),
        precision=str(precision).removeprefix("torch."),
        decoders=model.decoders,
        rows={split: {s.task.name: len(s) for s in of} for split, of in sets.items()},
    )
    print(f"run folder: {run.path}")
    started = time.perf_counter()
    best = train(
        model,
        summed(loss_fn),
        mixture,
        optimizers,
        lambda: evaluate(model, sets["dev"], args.batch_size, embedder),
        run,
        args,
    )
    seconds = time.perf_counter() - started

    model.load(run.path / "best")
    reports = {}
    for split in ("dev", "test"):
        for data in sets[split]:
            logits = predict(model, data, args.batch_size, embedder)
            write_predictions(outputs[data.task.name, split], data, logits)
            if split == "dev":
                reports[data.task.name] = report(data, logits)
    result = {
        "dev": reports,
        "overall": overall(reports),
        "best_epoch": best["epoch"] + 1,
        "best_step": best["step"],
        "training_seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(device),
        "predictions": {f"{task}_{split}": str(path) for (task, split), path in outputs.items()},
    }
    run.finish(result)
    print(f"dev, best epoch {best['epoch'] + 1}: {summary(reports)}")
    print(f"{run.path}: best/, predictions/, result.json; trained for {seconds:.0f} s")
    return result


def output_paths(run_dir: Path, files: dict[str, Files]) -> dict[tuple[str, str], Path]:
    """(task, split) -> its prediction file.

    Raises:
        UserError: a file that the user named exists, is named twice, or cannot be made.
    """
    paths: dict[tuple[str, str], Path] = {}
    for task, given in files.items():
        for split, named in (("dev", given.dev_out), ("test", given.test_out)):
            if named is not None and named.exists():
                raise UserError(f"{named}: exists, and is not overwritten; name another file")
            if named is not None:
                if named.resolve() in [path.resolve() for path in paths.values()]:
                    raise UserError(f"{named}: named for two outputs; give each its own file")
                folder = next(parent for parent in named.absolute().parents if parent.exists())
                if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                    raise UserError(f"{named}: {folder} is not a folder that can be written to")
            paths[task, split] = named or run_dir / "predictions" / f"{task}-{split}-output.csv"
    return paths


def load_sets(
    args: Namespace, tasks: list[Task], files: dict[str, Files], tokenizer: BertTokenizer
) -> dict[str, list[TaskData]]:
    """The train, dev and test set of each task, read and tokenised."""
    sets: dict[str, list[TaskData]] = {"train": [], "dev": [], "test": []}
    for task in tasks:
        for split, of in sets.items():
            name = task.files.format("test-student" if split == "test" else split)
            data = TaskData(
                getattr(files[task.name], split) or args.data_dir / name,
                task,
                tokenizer,
                getattr(args, "pair_encoding", "separate"),
                labelled=split != "test",
                limit=args.limit,
            )
            print(data)
            of.append(data)
    return sets


def build(
    args: Namespace,
    tasks: list[Task],
    decoders: dict[str, str | None] | None,
    tokenizer: BertTokenizer,
) -> MultitaskBERT:
    """The model that the command line describes, frozen for linear probing."""
    model = MultitaskBERT(
        BertModel.from_pretrained(args.model, hidden_dropout_prob=args.hidden_dropout_prob),
        tasks,
        decoders,
        args.pooling,
        getattr(args, "pair_encoding", "separate"),
        tokenizer,
    )
    if args.option == "pretrain":
        model.freeze()
    return model
