"""Run the benchmarks, all or some, and rewrite docs/benchmarks.md from their records.

    python benchmarks/run.py --data_dir DATA
    python benchmarks/run.py train encode --data_dir DATA --turns 2

A benchmark's record is benchmarks/results/NAME.json; the tables in docs/benchmarks.md are made from
these files, so running one benchmark refreshes its table alone. If one fails, the others still run.
Close other work on the machine first: it would be measured too.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder has an optimizer.py and a simcse.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import harness
from engine.checkpoint import read_json, read_text, write_json, write_text
from engine.cli import POSITIVE_INT, ArgumentParser, run_script
from engine.errors import UserError

NAMES = ["train", "encode", "probe", "optimizer", "tokenization", "startup", "simcse", "scale"]
RESULTS = harness.ROOT / "benchmarks" / "results"
DOCS = harness.ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- benchmarks/run.py writes what follows -->"
END = "<!-- end of what benchmarks/run.py writes -->"
# The settings that benchmarks may have.
FLAGS: dict[str, dict[str, Any]] = {
    "model": {"help": "a folder, a hub id, or all-MiniLM-L6-v2"},
    "data_dir": {"type": Path, "help": "folder of the csv files (default: data/sample)"},
    "rows": {"type": POSITIVE_INT, "help": "rows of each file, or sentences"},
    "batch_size": {"type": POSITIVE_INT, "help": "rows per batch"},
    "turns": {"type": POSITIVE_INT, "help": "how often each contestant is measured (default: 3)"},
    "passes": {"type": POSITIVE_INT, "help": "timed passes per measurement; the median counts"},
    "device": {"choices": ["cpu", "cuda"], "help": "where to run (default: cpu)"},
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked; `args.given` has the settings that it names."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    for name, options in FLAGS.items():
        add(f"--{name}", **options)
    add("--only", nargs="+", metavar="TEXT", help="only contestants whose names contain a TEXT")
    add("--quick", action="store_true", help="tiny sizes, to try it; writes no record")
    add("--results", type=Path, help="write the records there, and leave the docs alone")
    add("--report", action="store_true", help="run nothing, only rewrite docs/benchmarks.md")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in NAMES:
            parser.error(f"{name}: no such benchmark; there are {', '.join(NAMES)}")
    args.names = args.names or NAMES
    args.given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    for name in args.given:
        if not any(name in settings(load(benchmark), args) for benchmark in args.names):
            parser.error(f"--{name} has no effect on {', '.join(args.names)}")
    if args.data_dir is not None and not args.data_dir.is_dir():
        parser.error(f"--data_dir {args.data_dir}: no such folder")
    return args


def load(name: str) -> Any:
    """The module of a benchmark."""
    return import_module(f"benchmarks.{name}")


def settings(benchmark: Any, args: Namespace) -> dict[str, Any]:
    """A benchmark's settings: its defaults, those of --quick, and those of the command line."""
    own = {"quick": False, "turns": 3, "passes": 1, **benchmark.SETTINGS}
    chosen = {**own, **(harness.QUICK if args.quick else {}), **args.given}
    return {setting: chosen[setting] for setting in own}


def run(name: str, args: Namespace) -> dict[str, Any]:
    """Run a benchmark; its record."""
    benchmark = load(name)
    used = settings(benchmark, args)
    results = harness.run_benchmark(benchmark, used, args.only)
    shown = {flag: str(value) for flag, value in used.items()}
    if "data_dir" in used and harness.ROOT not in used["data_dir"].resolve().parents:
        shown["data_dir"] = "DATA"  # a folder of this machine
    words = ["python", "benchmarks/run.py", name]
    words += [word for f in args.given if f in used for word in (f"--{f}", shown[f])]
    words += ["--only", *args.only] if args.only else []
    words += ["--quick"] if args.quick else []
    return {
        "benchmark": name,
        "units": dict.fromkeys(benchmark.CONTESTANTS, benchmark.UNIT),
        **harness.machine(),
        "command": shlex.join(words),
        "quick": args.quick,
        "settings": {**used, **({"data_dir": shown["data_dir"]} if "data_dir" in used else {})},
        "device": used.get("device", "cpu"),
        **results,
    }


# ---------------------------------------------------------------------------- docs/benchmarks.md


def report(results: Path) -> str:
    """A section per record: what is compared (the module's docstring), the table, its origin."""
    sections = []
    for name in NAMES:
        if (path := results / f"{name}.json").exists():
            record = read_json(path)
            parts = [load(name).__doc__.strip(), harness.claim_table(record)]
            sections.append("\n\n".join([f"## {name}", *parts, harness.origin(record)]))
    return "\n\n".join(sections)


def rewrite(docs: Path, text: str) -> None:
    """Put `text` between the two markers; every other character stays as it is.

    Raises:
        UserError: the file does not have each marker once, in this order.
    """
    content = read_text(docs)
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        raise UserError(f"{docs}: needs the lines {BEGIN} and {END}, once each, in this order")
    write_text(docs, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks and rewrite the docs; exit with code 1 if a benchmark failed."""
    args = parse_args(argv)
    failed = False
    for name in [] if args.report else args.names:
        print(f"== {name}", flush=True)
        try:
            record = run(name, args)
        except UserError as error:
            print(f"run.py: error: {error}", file=sys.stderr)
            failed = True
            continue
        print(harness.claim_table(record), flush=True)
        if args.results or not args.quick:
            write_json((args.results or RESULTS) / f"{name}.json", record)
    if args.report or not (args.results or args.quick):
        rewrite(DOCS, report(RESULTS))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
