"""Fine-tune one BERT for sentiment, paraphrase and similarity at once, or probe a frozen one.

    python multitask_classifier.py --option finetune --use_gpu

Each batch belongs to one task; its loss reaches that task's head and, when fine-tuning, BERT. The
run folder gets config.json, log.jsonl, best/ (a HuggingFace folder), predictions/ in the
leaderboard's format, and result.json.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prediction
from bert import BertModel, layer_group
from datasets import Batch, TaskDataset
from engine import cli, distributed
from engine.checkpoint import check_new_file, write_text
from engine.conflict import GradientConflictLogger
from engine.device import setup_device
from engine.errors import UserError
from engine.gradients import backward_by_task, pcgrad, sum_gradients, sum_losses
from engine.mixture import SAMPLINGS, TaskMixture
from engine.run_dir import RunDir
from engine.trainer import Trainer
from hub.export import model_card
from model import HEADS, PAIR_ENCODINGS, POOLINGS, MultitaskBERT
from optimizer import AdamW, lr_factor, parameter_groups
from prediction import Embed, EmbeddingCache, embed_batch
from saved_runs import run_facts
from tasks import TASKS, Task, find_tasks
from tokenizer import BertTokenizer

Datasets = dict[str, list[TaskDataset]]  # split -> a dataset per task
Backward = Callable[[Sequence[Batch], int], Tensor]  # (batches, step) -> loss, leaving gradients
Predict = Callable[[TaskDataset], Tensor]  # -> the logits (N, C) of the current weights

# The methods of --surgery: functions that combine the gradients of several tasks into one.
GRADIENT_COMBINERS = {"sum": sum_gradients, "pcgrad": pcgrad}
DEFAULT_LR = 5e-5  # of BERT
DEFAULT_HEAD_LR = 1e-2  # of the heads; LOG.md has the measurement
DEFAULT_EPOCHS = {"pretrain": 10, "finetune": 3, "lpft": 3}
# The first stage of --option lpft: train the heads on a frozen BERT until dev stops improving.
PROBE = {"epochs": 50, "patience": 3, "eval_every": 0, "schedule": "constant", "warmup": 0.0}
PROBE |= {"leave_out": None, "surgery": "none", "measure_conflict": 0}

# ---------------------------------------------------------------------------- command line


def add_supervised_flags(parser: ArgumentParser) -> None:
    """The flags of training on labels, for one task or several."""
    add = parser.add_argument_group("method").add_argument
    options = ["pretrain", "finetune", "lpft"]
    help_text = "pretrain: heads only (linear probing); finetune: BERT too; lpft: one, then both"
    add("--option", choices=options, default="pretrain", help=help_text)
    add("--epochs", type=cli.POSITIVE_INT, help="epochs (default: 10 for pretrain, else 3)")
    add("--lr", type=cli.POSITIVE, help="peak learning rate (default: pretrain 1e-2, else 5e-5)")
    head_help = "peak learning rate of the heads if BERT is trained too (default: 1e-2)"
    add("--head_lr", type=cli.POSITIVE, help=head_help)
    probe_help = "epochs of probing in lpft (default: until dev stops improving)"
    add("--probe_epochs", type=cli.POSITIVE_INT, metavar="EPOCHS", help=probe_help)
    rdrop_help = "weight of R-Drop, which makes two dropout passes agree (default: 0, off)"
    add("--rdrop", type=cli.NON_NEGATIVE, default=0.0, metavar="ALPHA", help=rdrop_help)
    add("--no_test", action="store_true", help="do not read or predict the test files")


def add_file_flags(add: Callable[..., Any], prefix: str, title: str) -> None:
    """A task's three input files and two output files, under the course's flag names."""
    splits = {"train": "training", "dev": "dev", "test": "test"}
    for split, word in splits.items():
        add(f"--{prefix}{split}", type=Path, help=f"{title} {word} file (default: in --data_dir)")
    for split in ("dev", "test"):
        help_text = f"{title} {split} predictions (default: predictions/ in the run folder)"
        add(f"--{prefix}{split}_out", type=Path, help=help_text)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = cli.ArgumentParser(__doc__, fromfile_prefix_chars="@")
    add_supervised_flags(parser)
    add = parser.add_argument_group("multitask training").add_argument
    add("--tasks", default="sst,para,sts", help=f"comma-separated, of {', '.join(TASKS)}")
    add("--sampling", choices=SAMPLINGS, default="roundrobin", help="how an epoch mixes the tasks")
    pair_help = "one embedding per sentence, or one for '[CLS] a [SEP] b [SEP]'"
    add("--pair_encoding", choices=PAIR_ENCODINGS, default="separate", help=pair_help)
    add("--leave_out", metavar="TASK", help="train this task's head only, not BERT")
    surgery_help = "sum, pcgrad: a batch of each task per step; pcgrad projects out conflicts"
    add("--surgery", choices=["none", *GRADIENT_COMBINERS], default="none", help=surgery_help)
    conflict_help = "log gradient conflict every N steps; prints the cost beforehand"
    add("--measure_conflict", type=cli.COUNT, default=0, metavar="N", help=conflict_help)
    rows_help = "rows per batch of --measure_conflict (default: --batch_size)"
    add("--conflict_rows", type=cli.POSITIVE_INT, metavar="ROWS", help=rows_help)
    cli.add_training_flags(parser, POOLINGS)
    for task in TASKS.values():
        add = parser.add_argument_group(f"{task.title} ({task.name})").add_argument
        add(f"--{task.name}_decoder", choices=HEADS, help=f"decoder head (default: {task.head})")
        if len(task.text_columns) == 2:  # a pair
            add(
                f"--{task.name}_encoding", choices=PAIR_ENCODINGS, help="(default: --pair_encoding)"
            )
        add_file_flags(add, f"{task.name}_", task.title)
    args = parser.parse_args(argv)
    complete_supervised_args(args, parser, "multitask")
    check_multitask_args(args, parser)
    return args


def complete_supervised_args(args: Namespace, parser: ArgumentParser, name: str) -> None:
    """Fill in defaults that depend on --option, and refuse contradictory flags."""
    cli.complete_training_args(args, parser, f"{name}-{args.option}")
    if args.option == "pretrain" and args.lr and args.head_lr:
        parser.error("--lr and --head_lr are the same with --option pretrain; give one of them")
    # classifier.py has --test, multitask_classifier.py --sst_test and its like.
    for flag in [flag for flag in vars(args) if flag.endswith(("test", "test_out"))]:
        if args.no_test and flag != "no_test" and getattr(args, flag) is not None:
            parser.error(f"--{flag} contradicts --no_test; give one of them")
    # Linear probing trains only heads, so there is one learning rate, under either name.
    if args.option == "pretrain":
        args.head_lr = args.head_lr or args.lr or DEFAULT_HEAD_LR
    else:
        args.lr = args.lr or DEFAULT_LR
        args.head_lr = args.head_lr or DEFAULT_HEAD_LR
    args.epochs = args.epochs or DEFAULT_EPOCHS[args.option]
    if args.probe_epochs and args.option != "lpft":
        parser.error("--probe_epochs is for --option lpft")
    if args.option == "lpft" and args.final_only and not args.probe_epochs:
        parser.error("--final_only with --option lpft needs --probe_epochs: dev must not decide")
    if args.rdrop and args.hidden_dropout_prob == 0:
        parser.error("--rdrop needs dropout: --hidden_dropout_prob above 0")


def check_multitask_args(args: Namespace, parser: ArgumentParser) -> None:
    """Split --tasks, and refuse flags that have no effect with them."""
    args.tasks = [name.strip() for name in args.tasks.split(",")]
    listed = ",".join(args.tasks)
    for task in set(args.tasks) - set(TASKS):
        parser.error(f"--tasks {task}: no such task; there are {', '.join(TASKS)}")
    if len(set(args.tasks)) < len(args.tasks):
        parser.error(f"--tasks {listed}: name each task once")
    # A file of a task that is not trained would never be read.
    for task in set(TASKS) - set(args.tasks):
        for flag in [flag for flag in vars(args) if flag.startswith(f"{task}_")]:
            if getattr(args, flag) is not None:
                parser.error(f"--{flag}: {task} is not in --tasks {listed}")
    if args.leave_out and args.leave_out not in args.tasks:
        parser.error(f"--leave_out {args.leave_out}: not in --tasks {listed}")
    if args.conflict_rows and not args.measure_conflict:
        parser.error("--conflict_rows needs --measure_conflict N")
    # These are about the gradients that BERT gets from several tasks.
    for flag in ("leave_out", "surgery", "measure_conflict"):
        if getattr(args, flag) in (None, "none", 0):
            continue
        if args.option == "pretrain":
            parser.error(f"--{flag} is for training BERT: give --option finetune or lpft")
        if len(args.tasks) < 2:
            parser.error(f"--{flag} needs two tasks or more")
    if args.surgery != "none" and args.sampling != "roundrobin":
        parser.error(f"--surgery {args.surgery} needs --sampling roundrobin: all tasks in a step")


# ---------------------------------------------------------------------------- files


def given_path(args: Namespace, task: str, name: str) -> Path | None:
    """The user's path for a task's file: --sst_dev here, --dev in classifier.py."""
    return getattr(args, f"{task}_{name}", None) or getattr(args, name, None)


def pair_encodings(args: Namespace) -> dict[str, str]:
    """Task -> how its pairs are encoded: by the task's own flag, or else by --pair_encoding."""
    flags = {task: getattr(args, f"{task}_encoding", None) for task in args.tasks}
    return {task: flag or args.pair_encoding for task, flag in flags.items()}


def load_datasets(args: Namespace, tasks: list[Task], tokenizer: BertTokenizer) -> Datasets:
    """Read and tokenise the train, dev and test file of each task."""
    splits = ("train", "dev") if args.no_test else ("train", "dev", "test")
    datasets: Datasets = {split: [] for split in splits}
    encodings = pair_encodings(args)
    for task in tasks:
        for split in splits:
            path = given_path(args, task.name, split) or args.data_dir / task.file(split)
            labelled = split != "test"  # test labels are not public
            dataset = TaskDataset(path, task, tokenizer, encodings[task.name], labelled, args.limit)
            datasets[split].append(dataset)
            print(dataset)
    short = [dataset for dataset in datasets["train"] if len(dataset) < 2]
    if short and args.measure_conflict:
        raise UserError(f"{short[0].path}: one row, but --measure_conflict needs two batches")
    return datasets


def output_paths(args: Namespace, resumed: bool) -> dict[tuple[str, str], Path]:
    """(task, split) -> its prediction file.

    UserError if a file that the user named exists (unless this run may have written it), is named
    twice, or cannot be written.
    """
    paths: dict[tuple[str, str], Path] = {}
    taken = [args.run_dir.resolve()]
    for task in args.tasks:
        for split in ("dev",) if args.no_test else ("dev", "test"):
            default = args.run_dir / "predictions" / f"{task}-{split}-output.csv"
            path = given_path(args, task, f"{split}_out")
            paths[task, split] = path or default
            if path is None:
                continue
            if not resumed:
                check_new_file(path)
            # Two outputs in one file, or one inside another, would overwrite each other.
            full = path.resolve()
            if any(full in (p, *p.parents) or p in full.parents for p in taken):
                raise UserError(f"{path}: clashes with --run_dir or another output; move it")
            taken.append(full)
    return paths


# ---------------------------------------------------------------------------- training methods


def row_losses(
    model: MultitaskBERT, embed: Embed, batch: Batch, detach: bool = False, rdrop: float = 0.0
) -> Tensor:
    """The loss of each row, (B,); with `detach` it reaches the head but not BERT.

    With `rdrop` (alpha), the loss of R-Drop (Liang et al. 2021, https://arxiv.org/abs/2106.14448):
    the mean loss of two passes with different dropout masks, plus alpha times their disagreement.
    """
    labels = TASKS[batch.task].labels

    def forward() -> tuple[Tensor, Tensor]:
        """One pass: logits (B, C) and losses (B,)."""
        # SOLUTION: embed(batch), model.decode, labels.loss; with detach no gradient may reach BERT
        with torch.set_grad_enabled(not detach):  # no graph, no gradient for BERT
            embeddings = embed(batch)
        logits = model.decode(batch.task, embeddings)
        return logits, labels.loss(logits, batch.labels)
        # END SOLUTION

    first, loss = forward()
    if not rdrop:
        return loss
    second, second_loss = forward()
    return (loss + second_loss) / 2 + rdrop * labels.disagreement(first, second)


def make_backward(args: Namespace, model: MultitaskBERT, embed: Embed) -> Backward:
    """How a step gets its gradients: from one task's loss, or combined from those of all tasks."""

    def backward_task(batches: Sequence[Batch]) -> Tensor:
        # A step trains BERT and the head of its own task; the other heads have no gradients.
        task = batches[0].task
        trained = [*model.bert.parameters(), *model.heads[task].parameters()]
        options = {"detach": task == args.leave_out, "rdrop": args.rdrop}
        loss_fn = partial(row_losses, model, embed, **options)
        return sum_losses(loss_fn, batches, [p for p in trained if p.requires_grad])

    if args.surgery == "none":
        return lambda batches, step: backward_task(batches)
    # Each task's gradient is computed separately; those of the shared weights are then combined.
    shared = list(model.bert.parameters())
    combine = GRADIENT_COMBINERS[args.surgery]
    return lambda batches, step: backward_by_task(backward_task, batches, shared, combine)


def evaluate_weights(predict: Predict, datasets: Sequence[TaskDataset]) -> dict[str, Any]:
    """`prediction.evaluate` of the current weights, for the trainer."""
    outputs = [(dataset, predict(dataset)) for dataset in datasets]
    # One process computes the metrics, so that all of them agree on which weights are the best.
    return distributed.broadcast_from_rank_zero(lambda: prediction.evaluate(outputs))


def make_optimizers(args: Namespace, model: MultitaskBERT, frozen: bool) -> dict[str, AdamW]:
    """One AdamW for BERT, unless it is frozen, and one for each head, as in the paper."""
    # BERT gets a small learning rate, new heads a large one.
    rates = {name: (head, args.head_lr) for name, head in model.heads.items()}
    rates = rates if frozen else {"bert": (model.bert, args.lr), **rates}
    return {
        name: AdamW(parameter_groups(module, args.weight_decay), lr=lr, fused=True)
        for name, (module, lr) in rates.items()
    }


def cache_embeddings(
    args: Namespace, model: MultitaskBERT, datasets: Datasets, mixture: TaskMixture
) -> EmbeddingCache:
    """The embeddings of a frozen BERT, which are the same in every epoch: each computed once."""
    cache = EmbeddingCache(model, args.batch_size)
    for dataset, rows in zip(datasets["train"], mixture.rows_used(), strict=True):
        cache.add(dataset, rows)
    for dataset in datasets["dev"]:
        cache.add(dataset)
    return cache


def train(
    args: Namespace,
    model: MultitaskBERT,
    datasets: Datasets,
    run: RunDir,
    frozen: bool,
    best_folder: str = "best",
) -> tuple[Trainer, Predict]:
    """Train the heads, and BERT unless frozen; the trainer has the best evaluation."""
    mixture = TaskMixture(
        datasets["train"],
        args.batch_size,
        args.seed,
        args.epochs,
        args.sampling,
        args.accumulate,
        all_tasks=args.surgery != "none",
    )
    embed: Embed = partial(embed_batch, model)
    if frozen:
        embed = cache_embeddings(args, model, datasets, mixture)
    model.freeze(frozen)
    optimizers = make_optimizers(args, model, frozen)
    backward = make_backward(args, model, embed)
    if args.measure_conflict:
        loss_fn = partial(row_losses, model, partial(embed_batch, model))
        backward = GradientConflictLogger(
            backward, loss_fn, model, layer_group, datasets["train"], run, args
        )
        print(backward.cost(sum(map(mixture.epoch_steps, range(args.epochs)))))
    predict = partial(prediction.predict, model, batch_size=args.batch_size, embed=embed)
    evaluate = partial(evaluate_weights, predict, datasets["dev"])
    factor = partial(lr_factor, args.schedule, args.warmup)
    trainer = Trainer(
        model, optimizers, factor, mixture, backward, evaluate, run, args, best_folder
    )
    trainer.fit()
    return trainer, predict


def load_best(model: MultitaskBERT, folder: Path) -> None:
    """Load the weights in a folder, which only rank 0 may see, into all processes."""

    def load() -> None:
        model.load_state_dict(MultitaskBERT.from_pretrained(folder).state_dict())

    distributed.broadcast_from_rank_zero(load)
    distributed.broadcast_parameters(model)


def train_by_option(
    args: Namespace, model: MultitaskBERT, datasets: Datasets, run: RunDir
) -> tuple[Trainer, Predict]:
    """Train in the one or two stages of --option, then load the best weights."""
    if args.option == "lpft":
        # A run resumed in the second stage has already finished the first.
        if run.state is None or run.state[1]["stage"] == "probe":
            run.stage = "probe"
            probe_args = Namespace(**{**vars(args), **PROBE})
            if args.probe_epochs:
                probe_args.epochs, probe_args.patience = args.probe_epochs, 0
            train(probe_args, model, datasets, run, frozen=True, best_folder="probe")
        # Starting from trained heads keeps the first large, random gradients away from BERT.
        load_best(model, run.path / "probe")
        run.stage = "finetune"
        args.head_lr = args.lr  # one rate for the whole model, as Kumar et al. fine-tune
        print("linear probing is done: fine-tuning from its best heads")
    trained = train(args, model, datasets, run, frozen=args.option == "pretrain")
    load_best(model, run.path / "best")
    return trained


# ---------------------------------------------------------------------------- results


def write_results(
    args: Namespace,
    datasets: Datasets,
    baselines: dict[str, tuple[str, float]],
    trainer: Trainer,
    predict: Predict,
) -> dict[str, Any]:
    """Write predictions of the best weights and result.json, print a table; returns the result."""
    best, outputs = trainer.state.best, output_paths(args, resumed=True)
    for (task, split), path in outputs.items():
        dataset = next(d for d in datasets[split] if d.name == task)
        logits = predict(dataset)
        if trainer.run.writes:
            write_text(path, prediction.format_predictions(dataset, logits))
    print(f"best weights: epoch {best['epoch']}, step {best['step']}; dev scores:")
    print(prediction.results_table(best["tasks"], baselines))
    return trainer.finish(
        model_card,
        dev=best["tasks"],
        overall=best["score"],
        baselines={task: {name: value} for task, (name, value) in baselines.items()},
        predictions={f"{task}_{split}": str(path) for (task, split), path in outputs.items()},
    )


# ---------------------------------------------------------------------------- main


def run_training(args: Namespace) -> dict[str, Any]:
    """Train as the command line says; returns the content of `result.json`."""
    with distributed.process_group(args):
        # 1. Check as much as possible before anything is written.
        tasks = find_tasks(args.tasks)
        recorded = RunDir.check(args)
        device, dtype = setup_device(args.seed, args.device, args.precision, recorded)
        output_paths(args, resumed=recorded is not None)
        # 2. Data and model.
        tokenizer = BertTokenizer.from_pretrained(args.model)
        datasets = load_datasets(args, tasks, tokenizer)
        bert = BertModel.from_pretrained(args.model, hidden_dropout_prob=args.hidden_dropout_prob)
        if args.rdrop and not bert.config.hidden_dropout_prob:
            raise UserError(f"--rdrop: {args.model} has no dropout; give --hidden_dropout_prob 0.1")
        decoders = {task.name: getattr(args, f"{task.name}_decoder", None) for task in tasks}
        encodings = pair_encodings(args)
        model = MultitaskBERT(bert, tasks, decoders, args.pooling, encodings, tokenizer)
        model.dtype = dtype
        distributed.broadcast_parameters(model.to(device))
        # 3. The run folder records everything needed to repeat the run.
        run = RunDir.start_or_resume(args, **run_facts(model, datasets))
        with closing(run):
            # 4. Train, then predict with the best weights.
            print(f"run folder: {run.path} ({device}, {str(dtype).removeprefix('torch.')})")
            dev = datasets["dev"]
            baselines = {d.name: prediction.baseline(model, d, args.batch_size) for d in dev}
            trained = train_by_option(args, model, datasets, run)
            return write_results(args, datasets, baselines, *trained)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    run_training(parse_args(argv))


if __name__ == "__main__":
    cli.run_script(main)
