"""Train BERT with a linear head on one sentiment task: SST (5 classes) or CFIMDB (2 classes).

    python classifier.py --task sst --option finetune --use_gpu

The run folder gets what multitask_classifier.py's does.
"""

from argparse import Namespace
from collections.abc import Sequence

from options import Parser, add_file_flags, add_supervised_flags, complete_supervised, script

# What multitask_classifier.py has flags for, where there is one task.
ONE_TASK = {
    "sampling": "roundrobin",
    "pair_encoding": "separate",
    "leave_out": None,
    "surgery": "none",
    "measure_conflict": 0,
    "conflict_rows": None,
}


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["sst", "cfimdb"], default="sst")
    add_supervised_flags(parser)
    add_file_flags(parser, "", "the task's file")
    parser.set_defaults(**ONE_TASK)
    args = parser.parse_args(argv)
    complete_supervised(args, parser, "classifier")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    args = parse(argv)
    import distributed
    from supervised import Files, fit

    files = Files(args.train, args.dev, args.test, args.dev_out, args.test_out)
    with distributed.joined(args):
        fit(args, {args.task: files})


if __name__ == "__main__":
    script(main)
