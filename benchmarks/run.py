"""Run all benchmarks, or some, and rewrite the README's performance table from what they found.

    python benchmarks/run.py --data_dir DATA
    python benchmarks/run.py --data_dir DATA --only train --only encode

What a benchmark found is kept in `benchmarks/results/NAME.json`, with machine, versions, commit,
command and date. The table is made of those files, so running one again refreshes its part alone;
of the README nothing changes but the lines between the two markers. Benchmarks after one that fails
are still run. Close other work on the machine first: it would be measured too.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from subprocess import run as call
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import ROOT, claim_table
from options import Parser, script

# Name -> the file, and which of the flags below it has.
BENCHMARKS: dict[str, tuple[str, set[str]]] = {
    "train": ("train.py", {"model", "data_dir", "device"}),
    "encode": ("encode.py", {"model", "data_dir", "device"}),
    "probe": ("probe.py", {"model", "data_dir"}),
    "optimizer": ("optimizer.py", set()),
    "tokenize": ("tokenization.py", {"model", "data_dir"}),
    "startup": ("startup.py", {"model", "data_dir"}),
    "evaluate": ("evaluate.py", {"model", "data_dir", "device"}),
    "simcse": ("simcse.py", {"model", "data_dir"}),
    "scale": ("scale.py", {"model", "data_dir", "device"}),
}
BEGIN = "<!-- benchmarks: what follows is written by benchmarks/run.py -->"
END = "<!-- /benchmarks -->"


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", action="append", choices=list(BENCHMARKS), help="this one; may be repeated")
    add("--quick", action="store_true", help="small sizes, to try it: no measurement")
    add("--model", default="all-MiniLM-L6-v2", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--data_dir", type=Path, default=Path("data/sample"), help="folder of the csv files")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of those that can run on both")
    add(
        "--results",
        type=Path,
        help="folder of the records (default: benchmarks/results, and none with --quick)",
    )
    add("--readme", type=Path, default=ROOT / "README.md", help="file with the two markers")
    args = parser.parse_args(argv)
    if args.results is None and not args.quick:
        args.results = ROOT / "benchmarks/results"
    return args


def command(name: str, args: Namespace) -> list[str]:
    """What runs a benchmark."""
    file, flags = BENCHMARKS[name]
    words = [sys.executable, str(ROOT / "benchmarks" / file)]
    for flag in sorted(flags):
        words += [f"--{flag}", str(getattr(args, flag))]
    return [*words, "--quick"] if args.quick else words


def run(name: str, args: Namespace) -> bool:
    """Run a benchmark, print its tables and keep its record; whether it ended well."""
    from checkpoint import write_json

    print(f"== {name}", flush=True)
    done = call(command(name, args), stdout=PIPE, text=True)
    if done.returncode:
        return False
    *tables, record = done.stdout.splitlines()
    print("\n".join(tables), flush=True)
    if args.results:
        write_json(args.results / f"{name}.json", json.loads(record))
    return True


def section(records: Sequence[dict[str, Any]]) -> str:
    """The README's part: a line on how to read it, the table, and each benchmark's origin."""
    lines = [
        "A ratio is ours / peer: the median of turns, each with a process for either, and the least"
        " and most. Useful FLOPs leave padding out (`benchmarks/harness.py`).",
        "",
        *claim_table(records),
        "",
        "| measured by | on | versions | date, commit |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(origin(record))} |" for record in records),
    ]
    return "\n".join(lines)


def origin(record: dict[str, Any]) -> list[str]:
    """How, where and when a record was made, for people."""
    hardware, versions = record["hardware"], record["versions"]
    processor = hardware["processor"] or hardware["machine"]
    where = f"{processor}, {hardware['threads']} threads, {hardware['cpu']}"
    where += ", AMX" if hardware["amx"] else ", no AMX"
    where += f", {hardware['gpu']}" if record["device"] == "cuda" else ""
    libraries = ("torch", "transformers", "sentence-transformers")
    date = f"{record['started'][:10]}, {(record['commit'] or 'no commit')[:7]}"
    date += " with changes" if record["uncommitted_changes"] else ""
    date += ": **--quick, no measurement**" if record["quick"] else ""
    command = record["command"].replace("|", r"\|")  # a bar would end the cell
    return [
        f"`{command}`",
        where,
        ", ".join([f"Python {record['python']}", *(f"{x} {versions[x]}" for x in libraries)]),
        date,
    ]


def around(readme: Path) -> tuple[bytes, bytes]:
    """What comes before the text between the two markers, and what after it, markers included.

    Raises:
        UserError: the file does not have each marker once, in order.
    """
    from checkpoint import UserError

    content = readme.read_bytes()
    begin, end = BEGIN.encode(), END.encode()
    start, stop = content.find(begin) + len(begin), content.find(end)
    if content.count(begin) != 1 or content.count(end) != 1 or stop < start:
        raise UserError(f"{readme}: needs the lines {BEGIN!r} and {END!r}, once each, in order")
    return content[:start], content[stop:]


def rewrite(readme: Path, text: str) -> None:
    """Put `text` between the two markers, and leave every other byte as it is."""
    from checkpoint import whole_file

    before, after = around(readme)
    with whole_file(readme) as draft:
        draft.write_bytes(before + f"\n\n{text}\n\n".encode() + after)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that there are, in the order of `BENCHMARKS`."""
    from checkpoint import read_json

    paths = [folder / f"{name}.json" for name in BENCHMARKS]
    return [read_json(path) for path in paths if path.exists()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and rewrite; exit code 1 where a benchmark failed."""
    args = parse(argv)
    names = [name for name in BENCHMARKS if name in (args.only or BENCHMARKS)]
    if args.results:
        around(args.readme)  # a file without markers is refused now, not hours later
    failed = [name for name in names if not run(name, args)]
    records = read_records(args.results) if args.results else []
    if records:
        rewrite(args.readme, section(records))
    if failed:
        print(f"run.py: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    script(main)
