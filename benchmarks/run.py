"""Run the benchmarks, all or some, and rewrite docs/benchmarks.md from their records.

    python benchmarks/run.py --data_dir DATA
    python benchmarks/run.py train encode --data_dir DATA --turns 2

A benchmark's record is benchmarks/results/NAME.json; the tables in docs/benchmarks.md are made from
these files, so running one benchmark refreshes its table alone. If one fails, the others still run.
Stop other work on the machine first: it would affect the measurements.
"""

import re
import shlex
import sys
import tempfile
import traceback
from argparse import SUPPRESS, Namespace
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
from hub.models import resolve_model

NAMES = ["train", "encode", "probe", "optimizer", "tokenization", "startup", "simcse", "scale"]
RESULTS = harness.ROOT / "benchmarks" / "results"
DOCS = harness.ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- benchmarks/run.py writes what follows -->"
END = "<!-- end of what benchmarks/run.py writes -->"
QUICK = {"rows": 32, "turns": 1, "passes": 1}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked; settings that it does not name are absent."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    add("--only", nargs="+", metavar="TEXT", help="only contestants whose names contain a TEXT")
    add("--quick", action="store_true", help="a trial with tiny sizes; writes no record")
    add("--results", type=Path, help="write the records there, and leave the docs alone")
    add("--report", action="store_true", help="run nothing, only rewrite docs/benchmarks.md")
    # Benchmarks have their own defaults, and some lack a setting.
    add = parser.add_argument_group("settings", argument_default=SUPPRESS).add_argument
    add("--model", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--data_dir", type=Path, help="folder of the csv files (default: data/sample)")
    add("--rows", type=POSITIVE_INT, help="rows of each file, or sentences")
    add("--batch_size", type=POSITIVE_INT, help="rows per batch")
    add("--turns", type=POSITIVE_INT, help="measurements of each contestant (default: 3)")
    add("--passes", type=POSITIVE_INT, help="timed passes per measurement; the median counts")
    add("--device", choices=["cpu", "cuda"], help="where to run (default: cpu)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in NAMES:
            parser.error(f"{name}: no such benchmark; there are {', '.join(NAMES)}")
    args.names = args.names or NAMES
    known = {name for benchmark in args.names for name in settings(load(benchmark), args)}
    for name in set(vars(args)) - known - {"names", "only", "quick", "results", "report"}:
        parser.error(f"--{name} has no effect on {', '.join(args.names)}")
    if "data_dir" in args and not args.data_dir.is_dir():
        parser.error(f"--data_dir {args.data_dir}: no such folder")
    return args


def load(name: str) -> Any:
    """The module of a benchmark."""
    return import_module(f"benchmarks.{name}")


def settings(benchmark: Any, args: Namespace) -> dict[str, Any]:
    """A benchmark's settings: its defaults, those of --quick, and those of the command line."""
    defaults = {"quick": False, "turns": 3, "passes": 1, **benchmark.SETTINGS}
    chosen = {**defaults, **(QUICK if args.quick else {}), **vars(args)}
    return {name: chosen[name] for name in defaults}


def run(name: str, args: Namespace) -> dict[str, Any]:
    """Measure the contestants of a benchmark (--only: some) in turns; returns the record."""
    benchmark = load(name)
    used = settings(benchmark, args)
    # An empty TEXT is in every name.
    contestants = [n for n in benchmark.CONTESTANTS if any(x in n for x in args.only or [""])]
    if not contestants:
        raise UserError(f"--only: {name} has {', '.join(benchmark.CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        job = Namespace(**{"device": "cpu", **used}, scratch=scratch)
        if "model" in used:
            job.model = str(resolve_model(used["model"]))
        runs, outputs, skipped = harness.measure_in_turns(benchmark.__name__, contestants, job)
    claims = [c for c in benchmark.CLAIMS if {c.ours, c.peer or c.ours} <= set(runs)]
    if "data_dir" in used:  # a record does not show where the data is
        used["data_dir"] = "DATA" if "data_dir" in args else str(used["data_dir"])
    words = ["python", "benchmarks/run.py", name]
    given = [flag for flag in used if flag in args and flag != "quick"]
    words += [word for flag in given for word in (f"--{flag}", str(used[flag]))]
    words += ["--only", *args.only] if args.only else []
    words += ["--quick"] if args.quick else []
    return {
        "benchmark": name,
        "units": dict.fromkeys(benchmark.CONTESTANTS, benchmark.UNIT),
        **harness.machine(),
        "command": shlex.join(words),
        "quick": args.quick,
        "settings": used,
        "device": job.device,
        "contestants": {contestant: harness.summarize(turns) for contestant, turns in runs.items()},
        "skipped": skipped,
        "checked": benchmark.check(outputs) if hasattr(benchmark, "check") else {},
        "claims": [harness.judge(claim, runs) for claim in claims],
    }


# ---------------------------------------------------------------------------- docs/benchmarks.md


def report(results: Path) -> str:
    """A section per record: what is compared (the module's docstring), the table, its origin."""
    sections = []
    for name in NAMES:
        if (path := results / f"{name}.json").exists():
            record = read_json(path)
            sections += [f"## {name}", load(name).__doc__.strip()]
            sections += [harness.claim_table(record), harness.origin(record)]
    return "\n\n".join(sections)


def rewrite(docs: Path, text: str) -> None:
    """Put `text` between the two markers; nothing else changes."""
    parts = re.split(f"({BEGIN}|{END})", read_text(docs))
    if parts[1::2] != [BEGIN, END]:
        raise UserError(f"{docs}: needs the lines {BEGIN} and {END}, once each, in this order")
    write_text(docs, f"{parts[0]}{BEGIN}\n\n{text}\n\n{END}{parts[-1]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks and rewrite the docs; exit with code 1 if a benchmark failed."""
    args = parse_args(argv)
    failed = False
    for name in [] if args.report else args.names:
        print(f"== {name}", flush=True)
        try:
            record = run(name, args)
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else traceback.format_exc()
            print(f"run.py: error: {message}", file=sys.stderr)
            failed = True  # the others still run
            continue
        print(harness.claim_table(record), flush=True)
        if args.results or not args.quick:
            write_json((args.results or RESULTS) / f"{name}.json", record)
    if args.report or not (args.results or args.quick):
        rewrite(DOCS, report(RESULTS))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
