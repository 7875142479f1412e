"""Run the paper's tables and ours over several seeds, and report them.

python -m experiments run table1 --model all-MiniLM-L6-v2 --data_dir DATA
python -m experiments report --data_dir DATA
python -m experiments sweep --flags=@recipes/best.txt --model all-MiniLM-L6-v2 --data_dir DATA
python -m experiments compare RUN RUN RUN --out FOLDER
python -m experiments conflict RUN RUN RUN --out FOLDER
python -m experiments transfer RUN RUN RUN --data_dir DATA
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.cli import POSITIVE, POSITIVE_INT, ArgumentParser, number, run_script
from experiments.compare import compare_runs
from experiments.conflict import report_runs
from experiments.report import report
from experiments.runner import run
from experiments.sweep import sweep
from experiments.tables import TABLES
from experiments.transfer import transfer

# Set by the command itself.
RESERVED_FLAGS = {
    run: ("model", "data_dir", "seed", "run_dir", "resume"),
    sweep: ("model", "data_dir", "limit", "lr", "head_lr", "run_dir", "resume", "no_test"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `action` is the function of the subcommand."""
    parser = ArgumentParser(__doc__, prog="python -m experiments")
    names = "run|report|sweep|compare|conflict|transfer"
    commands = parser.add_subparsers(required=True, metavar=names, help="what to do")

    def command(name: str, action: Callable, help: str) -> Callable[..., Any]:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(action=action)
        return sub.add_argument

    add = command("run", run, "run every cell of some tables that has no record yet")
    add("tables", nargs="+", metavar="TABLE", help=f"{', '.join(TABLES)}, or all")
    add_folders(add)
    add_run_flags(add, "experiments")
    add("--seeds", type=POSITIVE_INT, help="at most N seeds per cell (default: as planned, 3 to 8)")
    add = command("report", report, "write tables and plots from the records in --out")
    add("tables", nargs="*", metavar="TABLE", help="default: all that are complete")
    add_folders(add)
    add("--seeds", type=POSITIVE_INT, help="use N seeds per cell (default: as planned)")
    add("--mixed", action="store_true", help="allow different commits, precisions and machines")
    add = command("sweep", sweep, "search learning rates: a grid with successive halving")
    add_folders(add, "sweep")
    add_run_flags(add, "sweep")
    add_grid_flags(commands.choices["sweep"].add_argument_group("grid").add_argument)
    add = command("compare", compare_runs, "compare runs with the first of them: table and plot")
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the reference")
    add("--data_dir", type=Path, help="folder of the dev files (default: the first run's own)")
    add("--out", type=Path, default=Path("comparison"), help="new folder for table and plot")
    add = command("conflict", report_runs, "tables and plots of the gradient conflict in some runs")
    help_text = "folders of runs with --measure_conflict that differ in --seed only"
    add("runs", nargs="+", type=Path, metavar="RUN", help=help_text)
    add("--out", type=Path, help="new folder (default: that of a single run, or conflict/)")
    add = command("transfer", transfer, "scores out of domain, with and without heads")
    add_folders(add, "transfer")
    add_transfer_flags(add)
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args


def add_folders(add: Callable[..., Any], out: str = "") -> None:
    """Where the data is, and where results go."""
    add("--data_dir", type=Path, default=Path("data"), help="folder of the csv files")
    add("--out", type=Path, default=Path("results", out), help="folder of records, tables, plots")


def add_run_flags(add: Callable[..., Any], runs: str) -> None:
    """The flags of subcommands that start training runs."""
    add("--model", default="bert-base-uncased", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--flags", default="", help='flags for every script, as --flags="--limit 99 --use_gpu"')
    add("--runs", type=Path, default=Path("runs", runs), help="folder of the run folders")
    add("--jobs", type=POSITIVE_INT, default=1, help="parallel runs, sharing the cores")


def add_grid_flags(add: Callable[..., Any]) -> None:
    """The rates that the sweep tries, and the number of rows."""
    rates = {"nargs": "+", "type": POSITIVE, "metavar": "RATE"}
    add("--lr", **rates, default=[3e-5, 5e-5, 1e-4], help="rates of BERT")
    add("--head_lr", **rates, default=[1e-3, 3e-3, 1e-2], help="rates of the heads")
    add("--rows", type=POSITIVE_INT, default=30000, help="--limit in the last rung")
    add("--rungs", type=POSITIVE_INT, default=3, help="each rung keeps half of the pairs")


def add_transfer_flags(add: Callable[..., Any]) -> None:
    """Which runs are measured, on how many rows, and which methods Kumar's test compares."""
    runs_help = "run folders named METHOD-seedN (default: only report on the records in --out)"
    add("runs", nargs="*", type=Path, metavar="RUN", help=runs_help)
    add("--limit", type=number(int, 100), help="use a fixed random subset of N rows per file")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="device (default: each run's)")
    for method in ("probe", "lpft"):
        add(f"--{method}", default=method, metavar="METHOD", help="a method in Kumar's comparison")
    # With commas: after a flag that takes several words, the run folders would be read as methods.
    names = {"type": lambda text: text.split(","), "default": "finetune,finetune-long"}
    add("--finetune", **names, metavar="METHODS", help="the same, comma-separated")


def check_args(args: argparse.Namespace, parser: ArgumentParser) -> None:
    """Check the tables and --flags, and expand "all"."""
    if "all" in getattr(args, "tables", []):
        args.tables = list(TABLES)
    for table in getattr(args, "tables", []):
        if table not in TABLES:
            parser.error(f"{table}: no such table; there are {', '.join(TABLES)}, and all")
    for flag in ("limit", "device"):
        if args.action is transfer and not args.runs and getattr(args, flag):
            parser.error(f"--{flag} has no effect without run folders to measure")
    # `run` sets some flags itself; --flags must not override them.
    if "flags" in args:
        try:
            args.flags = shlex.split(args.flags)
        except ValueError as error:
            parser.error(f"--flags {args.flags}: {error}")
        for name in RESERVED_FLAGS[args.action]:
            if any(word.split("=")[0] == f"--{name}" for word in args.flags):
                parser.error(f"--flags: --{name} is set by this command; leave it out")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    args = parse_args(argv)
    try:
        args.action(args)
    except KeyboardInterrupt:  # a run's message names --resume, which is no flag here
        raise KeyboardInterrupt("interrupted; the same command continues") from None


if __name__ == "__main__":
    run_script(main)
