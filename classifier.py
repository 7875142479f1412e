"""Train BERT with a linear head on one sentiment task: SST (5 classes) or CFIMDB (2 classes).

    python classifier.py --task sst --option finetune --use_gpu

It is multitask_classifier.py with a single task, and writes the same run folder.
"""

from argparse import Namespace
from collections.abc import Sequence

import multitask_classifier as multitask
from engine import cli
from model import POOLINGS

# Flags of multitask_classifier.py that have no effect with a single task.
SINGLE_TASK = {
    "sampling": "roundrobin",
    "pair_encoding": "separate",
    "leave_out": None,
    "surgery": "none",
    "measure_conflict": 0,
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--task", choices=["sst", "cfimdb"], default="sst", help="task to train on")
    multitask.add_supervised_flags(parser)
    cli.add_training_flags(parser, POOLINGS)
    multitask.add_file_flags(parser.add_argument_group("files").add_argument, "", "the task's")
    parser.set_defaults(**SINGLE_TASK)
    args = parser.parse_args(argv)
    # From here on it is a multitask run of one task.
    args.tasks = [args.task]
    multitask.complete_supervised_args(args, parser, "classifier")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    multitask.run_training(parse_args(argv))


if __name__ == "__main__":
    cli.run_script(main)
