"""Fine-tune one BERT for sentiment, paraphrase and similarity at once, or probe a frozen one.

    python multitask_classifier.py --option finetune --use_gpu

Each mini-batch belongs to one task; its loss reaches that task's head and, when fine-tuning, BERT.
The run folder gets config.json, log.jsonl, best/ (a HuggingFace folder), predictions/ in the
leaderboard's format, and result.json.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from options import (
    COUNT,
    POSITIVE,
    Parser,
    add_file_flags,
    add_supervised_flags,
    complete_supervised,
    script,
)

TASK_FLAGS = {"sst": "SST sentiment", "para": "Quora question pairs", "sts": "STS similarity"}


def __getattr__(name: str) -> Any:
    """`from multitask_classifier import MultitaskBERT`, as in the course; --help stays quick."""
    if name == "MultitaskBERT":
        from tasks import MultitaskBERT

        return MultitaskBERT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = Parser(__doc__.splitlines()[0])
    add_supervised_flags(parser)
    add = parser.add_argument
    add("--tasks", default="sst,para,sts", help="names of rows in tasks.TASKS, by commas")
    add(
        "--sampling",
        choices=["roundrobin", "proportional", "annealed"],
        default="roundrobin",
        help="how an epoch mixes the tasks (datasets.Mixture)",
    )
    add("--pair_encoding", choices=["separate", "joint"], default="separate")
    for task in ("para", "sts"):
        add(
            f"--{task}_decoder",
            choices=["concat", "dot", "cosine"],
            help="with --pair_encoding separate (default: dot, the paper's)",
        )
    add("--leave_out", metavar="TASK", help="its head is trained, but its loss never reaches BERT")
    add(
        "--surgery",
        choices=["none", "sum", "pcgrad"],
        default="none",
        help="sum, pcgrad: a step has a batch of every task, and BERT gets the sum of their"
        " gradients, for pcgrad after conflicts are projected away (Yu et al. 2020)",
    )
    add(
        "--measure_conflict",
        type=COUNT,
        default=0,
        metavar="N",
        help="every N steps, log how the tasks' gradients lie to each other; 0: never. Two batches"
        " a task are encoded two to eight times each, layers together as memory allows",
    )
    add(
        "--conflict_rows",
        type=POSITIVE,
        metavar="ROWS",
        help="of a batch that --measure_conflict takes (default: --batch_size; at most half of the"
        " training set): the more, the less of its gradient is chance, and the longer it takes",
    )
    for task, what in TASK_FLAGS.items():
        add_file_flags(parser, f"{task}_", what)
    args = parser.parse_args(argv)
    complete_supervised(args, parser, "multitask")
    args.tasks = [name.strip() for name in args.tasks.split(",")]
    if len(set(args.tasks)) < len(args.tasks):
        parser.error(f"--tasks {','.join(args.tasks)}: name each task once")
    for task in TASK_FLAGS:
        for field in ("train", "dev", "test", "dev_out", "test_out", "decoder"):
            if task not in args.tasks and getattr(args, f"{task}_{field}", None) is not None:
                parser.error(f"--{task}_{field}: {task} is not in --tasks {','.join(args.tasks)}")
    if args.leave_out and args.leave_out not in args.tasks:
        parser.error(f"--leave_out {args.leave_out}: not in --tasks {','.join(args.tasks)}")
    if args.leave_out and len(args.tasks) < 2:
        parser.error(f"--leave_out {args.leave_out}: it is the only task; nothing would train BERT")
    for flag in ("leave_out", "surgery", "measure_conflict"):
        if args.option == "pretrain" and getattr(args, flag) not in (None, "none", 0):
            parser.error(f"--{flag} is for training BERT: give --option finetune or lpft")
    if args.conflict_rows and not args.measure_conflict:
        parser.error("--conflict_rows is for --measure_conflict N: give that too, or leave it out")
    if args.measure_conflict and len(args.tasks) < 2:
        parser.error("--measure_conflict needs two tasks or more")
    if args.surgery != "none" and len(args.tasks) < 2:
        parser.error(f"--surgery {args.surgery} needs two tasks or more")
    if args.surgery != "none" and args.sampling != "roundrobin":
        parser.error(f"--surgery {args.surgery} needs --sampling roundrobin: all tasks in a step")
    if args.pair_encoding == "joint" and (args.para_decoder or args.sts_decoder):
        parser.error("--pair_encoding joint has its own (linear) decoder; leave out --*_decoder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    args = parse(argv)
    import distributed
    from supervised import Files, fit

    files = {
        task: Files(
            **{
                field: getattr(args, f"{task}_{field}", None)
                for field in ("train", "dev", "test", "dev_out", "test_out")
            }
        )
        for task in args.tasks
    }
    with distributed.joined(args):
        fit(args, files, {"para": args.para_decoder, "sts": args.sts_decoder})


if __name__ == "__main__":
    script(main)
