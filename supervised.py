"""The job of `classifier.py` and `multitask_classifier.py`: files in, a trained model out."""

import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed
from bert import BertModel
from checkpoint import Run, UserError, check_new_file, writable, write_text
from datasets import Batch, Mixture, TaskData
from exchange import model_card
from gradients import Surgery, conflict, negative, pcgrad, total
from optimizer import AdamW, parameter_groups
from scoring import (
    Embed,
    FrozenEmbeddings,
    embed,
    evaluate,
    overall,
    predict,
    report,
    summary,
    write_predictions,
)
from tasks import TASKS, MultitaskBERT, Task, find_tasks
from tokenizer import BertTokenizer
from train import begin, peak_memory, prepare, summed, train

# The first stage of lpft: a frozen encoder's heads, trained until dev improves no more.
PROBE = {
    "epochs": 50,
    "patience": 3,
    "eval_every": 0,
    "schedule": "constant",
    "warmup": 0.0,
    "leave_out": None,
    "surgery": "none",
    "measure_conflict": 0,
    "conflict_rows": None,
}


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
        args: the command line of `multitask_classifier.py`, or one with all that it holds.
        files: task name -> the paths given for it.
        decoders: task name -> decoder, where one is given.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: anything the user can mend; before training starts nothing has been written.
    """
    tasks = find_tasks(list(files))
    recorded = distributed.first(lambda: Run.check(args.run_dir, vars(args), args.resume))
    device, precision = prepare(args.seed, args.device, args.precision, recorded)
    outputs = output_paths(args.run_dir, files, args.no_test, recorded is not None)
    if args.features and not writable(args.features):
        raise UserError(f"--features {args.features}: not a folder that can be written to")
    if args.features and args.run_dir.resolve() in args.features.resolve().parents:
        raise UserError(f"--features {args.features}: is in --run_dir; name a place outside of it")
    tokenizer = BertTokenizer.from_pretrained(args.model)
    sets = load_sets(args, tasks, files, tokenizer)
    if args.measure_conflict:
        for data in sets["train"]:
            if len(data) < 2:
                raise UserError(f"{data.path}: one row; --measure_conflict needs two batches")
    model = MultitaskBERT(
        BertModel.from_pretrained(args.model, hidden_dropout_prob=args.hidden_dropout_prob),
        tasks,
        decoders,
        args.pooling,
        args.pair_encoding,
        tokenizer,
    )
    model.precision = precision
    distributed.spread(model.to(device))
    run = begin(
        args,
        data={str(data.path): data.digest for of in sets.values() for data in of},
        device=str(device),
        precision=str(precision).removeprefix("torch."),
        decoders=model.decoders,
        rows={split: {s.name: len(s) for s in of} for split, of in sets.items()},
        files={split: {s.name: str(s.path.absolute()) for s in of} for split, of in sets.items()},
    )
    with closing(run):
        for data in (data for of in sets.values() for data in of):
            if run.writes:
                data.save_tokens()
        return carry_out(args, model, sets, outputs, run)


def carry_out(
    args: Namespace,
    model: MultitaskBERT,
    sets: dict[str, list[TaskData]],
    outputs: dict[tuple[str, str], Path],
    run: Run,
) -> dict[str, Any]:
    """All that a run does once its folder is there: train, predict with the best, report."""
    print(f"run folder: {run.path}")
    if args.option == "lpft":
        if run.state is None or run.state[1]["stage"] == "probe":
            run.facts["stage"] = "probe"
            probe = Namespace(**{**vars(args), **PROBE})
            learn(model, sets, run, probe, frozen=True, keep="probe")
        load(model, run.path / "probe")
        run.facts["stage"] = "finetune"
        args.head_lr = args.lr  # all of the model at one rate, as Kumar et al. fine-tune
        print("the probe has converged: fine-tuning from its heads")
    best, judge = learn(model, sets, run, args, frozen=args.option == "pretrain")
    seconds = run.seconds()

    load(model, run.path / "best")
    reports = {}
    for split in [split for split in sets if split != "train"]:
        for data in sets[split]:
            logits = judge.logits(data, best["step"])
            if run.writes:
                write_predictions(outputs[data.task.name, split], data, logits)
            if split == "dev":
                reports[data.task.name] = report(data, logits)
    result = {
        "dev": reports,
        "overall": overall(reports),
        "best_epoch": best["epoch"] + 1,
        "best_step": best["step"],
        "training_seconds": round(seconds, 1),
        "saving_seconds": round(run.saving, 2),  # of them, for the states to resume from
        "peak_memory_bytes": peak_memory(model.device),  # of the first process
        "processes": distributed.size(),
        "predictions": {f"{task}_{split}": str(path) for (task, split), path in outputs.items()},
    }
    if run.writes:
        write_text(run.path / "best" / "README.md", model_card(run.path, result))
    run.finish(result)
    if args.features and isinstance(judge.embedder, FrozenEmbeddings):
        judge.embedder.save()
    for name in ("features", "tokens") if run.writes else ():  # nothing is left to go on with
        shutil.rmtree(run.path / name, ignore_errors=True)
    print(f"dev, best epoch {best['epoch'] + 1}: {summary(reports)}")
    print(f"{run.path}: best/, predictions/, result.json; trained for {seconds:.0f} s")
    return result


def load(model: MultitaskBERT, folder: Path) -> None:
    """Take over the weights in a folder, which the first process alone has to see yet."""
    distributed.first(lambda: model.load(folder))
    distributed.spread(model)


def learn(
    model: MultitaskBERT,
    sets: dict[str, list[TaskData]],
    run: Run,
    args: Namespace,
    frozen: bool,
    keep: str = "best",
) -> tuple[dict[str, Any], "Judge"]:
    """Train the heads, and BERT unless it is frozen. The best state is then in `keep` of the run.

    Returns the best evaluation, and what made it.
    """
    model.freeze(frozen)
    optimizers = {}
    if not frozen:
        optimizers["bert"] = AdamW(parameter_groups(model.bert, args.weight_decay), lr=args.lr)
    for name, head in model.heads.items():
        optimizers[name] = AdamW(parameter_groups(head, args.weight_decay), lr=args.head_lr)
    kept = args.features or run.path / "features"
    everything = [data for of in sets.values() for data in of]
    embedder = FrozenEmbeddings(model, kept, everything) if frozen else partial(embed, model)

    def losses(batch: Batch, stop: bool = False) -> Tensor:
        """The loss of each row; it reaches the batch's own head and, unless stopped there, BERT."""
        with torch.set_grad_enabled(not stop):
            vectors = embedder(batch)
        return TASKS[batch.task].loss(model.decode(batch.task, vectors), batch.labels)

    gradients = summed(lambda batch: losses(batch, stop=batch.task == args.leave_out))
    gradients = distributed.reduced(gradients, [p for p in model.parameters() if p.requires_grad])
    if args.surgery != "none":
        combine = {"pcgrad": distributed.same_draws()(pcgrad), "sum": total}[args.surgery]
        gradients = Surgery(gradients, list(model.bert.parameters()), combine)
    if args.measure_conflict:
        gradients = Measured(gradients, losses, model, sets["train"], run, args)
    mixture = Mixture(
        sets["train"],
        args.batch_size,
        args.seed,
        args.epochs,
        args.sampling,
        args.accumulate,
        together=args.surgery != "none",
    )
    judge = Judge(model, sets["dev"], args.batch_size, embedder, run)
    saved = embedder.save if frozen else lambda: None
    best = train(model, gradients, mixture, optimizers, judge, run, args, keep, saved)
    return best, judge


class Judge:
    """Evaluates the model on dev, for `train.train`; what the best one predicted is not lost."""

    def __init__(
        self, model: MultitaskBERT, dev: list[TaskData], batch_size: int, embedder: Embed, run: Run
    ):
        self.model = model
        self.dev = dev
        self.batch_size = batch_size
        self.embedder = embedder
        self.run = run
        self.best: tuple[float, int, list[Tensor]] = (-math.inf, -1, [])  # score, step, logits

    def __call__(self) -> dict[str, Any]:
        """The model's figures now (`scoring.evaluate`)."""
        found = [self.predict(data) for data in self.dev]
        figures = distributed.first(lambda: evaluate(self.dev, found))
        if figures["score"] > self.best[0]:
            self.best = figures["score"], self.run.step, found
        return figures

    def predict(self, data: TaskData) -> Tensor:
        """The logits (N, C) of the model as it is."""
        return predict(self.model, data, self.batch_size, self.embedder)

    def logits(self, data: TaskData, step: int) -> Tensor:
        """The same of the model as it was after `step` steps, which has been loaded again."""
        if step == self.best[1] and data in self.dev:
            return self.best[2][self.dev.index(data)]
        return self.predict(data)


class Measured:
    """A step's gradients as before; every so many steps the log gets how the tasks' conflict.

    It is measured at the step's own weights, on two batches of each task that are drawn for it (a
    pure function of seed and step), without dropout, in fp32 and unclipped. Training goes on as if
    nothing had been measured. A batch has `args.conflict_rows` rows, by default `args.batch_size`,
    or half of those that there are; a process encodes as many at a time as in a step.
    """

    def __init__(
        self,
        gradients: Callable[[Sequence[Batch]], float],
        losses: Callable[[Batch], Tensor],
        model: MultitaskBERT,
        sets: Sequence[TaskData],
        run: Run,
        args: Namespace,
    ):
        self.gradients = gradients
        self.losses = losses
        self.model = model
        self.sets = sets
        self.run = run
        self.args = args

    def __call__(self, batches: Sequence[Batch]) -> float:
        """Measure where it is time to; then make the gradients."""
        if self.run.step % self.args.measure_conflict == 0:
            parts = self.measure()
            rows = {data.name: len(self.draw(data)[0]) for data in self.sets}  # of a batch
            self.run.log(
                "conflict", self.run.step, rows=rows, parts=parts, negative=negative(parts)
            )
        return self.gradients(batches)

    def measure(self) -> dict[str, Any]:
        """What `gradients.conflict` finds."""
        precision, self.model.precision = self.model.precision, torch.float32
        self.model.eval()

        found = conflict(
            {data.name: [self.parts(data, rows) for rows in self.draw(data)] for data in self.sets},
            list(self.model.bert.named_parameters()),
        )
        self.model.train()
        self.model.precision = precision
        return found

    def draw(self, data: TaskData) -> list[np.ndarray]:
        """The row numbers of two batches of a task, none in both."""
        rng = np.random.default_rng([self.args.seed, self.run.step, *data.name.encode()])
        rows = rng.permutation(len(data))[: 2 * (self.args.conflict_rows or self.args.batch_size)]
        return np.array_split(rows, 2)

    def parts(self, data: TaskData, rows: np.ndarray) -> list[Callable[[], Tensor]]:
        """The mean loss of these rows as a sum, each part over no more than a process takes."""

        def part(few: np.ndarray) -> Tensor:
            return self.losses(data.batch(few).to(self.model.device)).sum() / len(rows)

        size = -(-self.args.batch_size // distributed.size())
        return [partial(part, rows[i : i + size]) for i in range(0, len(rows), size)]


def output_paths(
    run_dir: Path, files: dict[str, Files], no_test: bool, resumed: bool = False
) -> dict[tuple[str, str], Path]:
    """(task, split) -> its prediction file; a run that goes on may have written it before.

    Raises:
        UserError: a file that the user named exists, is named twice, or cannot be made.
    """
    paths: dict[tuple[str, str], Path] = {}
    taken = {run_dir.resolve(): "--run_dir"}
    for task, given in files.items():
        for split, named in (("dev", given.dev_out), ("test", given.test_out)):
            if split == "test" and no_test:
                continue
            paths[task, split] = named or run_dir / "predictions" / f"{task}-{split}-output.csv"
            if named is None:
                continue
            if not resumed:
                check_new_file(named)
            path = named.resolve()
            for other, what in taken.items():
                if path == other or other in path.parents or path in other.parents:
                    raise UserError(f"{named}: clashes with {what}; give each output its own place")
            taken[path] = f"another output, {named}"
    return paths


def load_sets(
    args: Namespace, tasks: list[Task], files: dict[str, Files], tokenizer: BertTokenizer
) -> dict[str, list[TaskData]]:
    """The train, dev and test set of each task, read and tokenised."""
    splits = ("train", "dev") if args.no_test else ("train", "dev", "test")
    sets: dict[str, list[TaskData]] = {split: [] for split in splits}
    for task in tasks:
        for split, of in sets.items():
            name = task.files.format("test-student" if split == "test" else split)
            data = TaskData(
                getattr(files[task.name], split) or args.data_dir / name,
                task,
                tokenizer,
                args.pair_encoding,
                labelled=split != "test",
                limit=args.limit,
                tokens=args.run_dir / "tokens",
            )
            print(data)
            of.append(data)
    return sets
