"""Run the paper's tables and ours over several seeds, and report them.

python -m experiments run table1 --seeds 3 --model all-MiniLM-L6-v2 --data_dir DATA
python -m experiments report --data_dir DATA
python -m experiments conflict RUN
python -m experiments map RUN
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.cli import POSITIVE_INT, ArgumentParser, run_script
from experiments.conflict import report_run
from experiments.plots import plot_map
from experiments.report import report
from experiments.runner import run
from experiments.tables import TABLES

RESERVED_FLAGS = ("model", "data_dir", "seed", "run_dir", "resume")  # set by `run` itself


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; invalid arguments exit with code 2."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m experiments")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run|report|conflict|map", help="what to do"
    )

    def command(name: str, help: str) -> ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    def add_folders(add: Callable) -> None:
        add("--data_dir", type=Path, default=Path("data"), help="folder of the csv files")
        add("--out", type=Path, default=Path("results"), help="folder of records and tables")

    add = command("run", "run every cell of some tables that has no record yet").add_argument
    add("tables", nargs="+", metavar="TABLE", help=f"{', '.join(TABLES)}, or all")
    add("--model", default="bert-base-uncased", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--seeds", type=POSITIVE_INT, default=3, help="seeds per cell that trains the encoder")
    add("--probe_seeds", type=POSITIVE_INT, default=5, help="seeds per cell that freezes it")
    add("--flags", default="", help='flags for every script, as --flags="--epochs 1 --use_gpu"')
    add("--runs", type=Path, default=Path("runs/experiments"), help="folder of the run folders")
    add_folders(add)
    add = command("report", "write tables and plots from the records in --out").add_argument
    add("tables", nargs="*", metavar="TABLE", help="default: every table that is complete")
    add_folders(add)
    add = command("conflict", "plot the gradient conflict that a run logged").add_argument
    add("run", type=Path, help="folder of a run with --measure_conflict")
    add = command("map", "plot a run's dev sentence embeddings by PCA").add_argument
    add("run", type=Path, help="a run folder")
    add("--data_dir", type=Path, help="folder of the dev files (default: the run's own files)")
    add("--limit", type=POSITIVE_INT, help="use a fixed random subset of N rows per file")
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def check_args(args: argparse.Namespace, parser: ArgumentParser) -> None:
    """Check the tables and --flags, and expand "all"."""
    if "all" in getattr(args, "tables", []):
        args.tables = list(TABLES)
    for table in getattr(args, "tables", []):
        if table not in TABLES:
            parser.error(f"{table}: no such table; there are {', '.join(TABLES)}, and all")
    if args.command == "run":
        try:
            args.flags = shlex.split(args.flags)
        except ValueError as error:
            parser.error(f"--flags {args.flags}: {error}")
        for name in RESERVED_FLAGS:
            if any(word.split("=")[0] == f"--{name}" for word in args.flags):
                parser.error(f"--flags: --{name} is set by this command; leave it out")


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    if args.command == "run":
        run(args)
    elif args.command == "report":
        report(args)
    elif args.command == "conflict":
        report_run(args.run)
    else:
        plot_map(args.run, args.data_dir, args.limit)


if __name__ == "__main__":
    run_script(main)
