"""What the benchmarks share: processes, turns, figures, the machine's own speed, tables, records.

A benchmark is a table of contestants and a table of claims about them. Each contestant is measured
in a process of its own, all of them in turn, `--turns` times; a figure is the median over the
turns, with the least and the most, and a ratio (ours / peer) is taken turn by turn. Warm-up passes
are not timed, for ours and peers alike.

Figures: `rate` (units a second: sentences, steps, ...), `seconds` (a unit), `memory` (the most that
the process, or on a GPU its tensors, held: MiB), `useful` and `matrix` (GFLOP/s), `quotient` (of
those two).

Useful FLOPs are those that the result needs, of real tokens only: padding, and what an
implementation wastes or does twice, do not count. With D hidden size, F feed-forward size, L layers
and a sentence of t tokens (embeddings, LayerNorm, softmax and heads left out):

    linear layers   2 (4 D^2 + 2 D F) t a layer, and 2 D^2 for the pooler
    attention       4 t^2 D a layer: Q K^T, and the weights times V
    training        3 times that (6 FLOPs a weight and token): the gradients of inputs and weights

Where only the first token is read (`pooler`), the last layer needs keys and values of all tokens,
but query, output and feed-forward of that one alone: 2 (2 D^2 t + 2 D^2 + 2 D F) + 4 t D.

`matrix` is this machine's rate of plain matrix products, in the same process and dtype, at the
shapes of the model's linear layers and a batch's real tokens.
"""

import argparse
import json
import operator
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from options import POSITIVE, Parser

ROOT = Path(__file__).resolve().parent.parent
LR = 5e-5  # in every benchmark that trains
SKIPPED = 3  # exit code of a contestant that cannot be measured here
# Layers and width; most are Turc et al.'s (2019, https://arxiv.org/abs/1908.08962).
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "minilm": (6, 384),
    "base": (12, 768),
    "large": (24, 1024),
}
FLAGS: dict[str, dict[str, Any]] = {
    "model": {"help": "a folder, a hub id, or all-MiniLM-L6-v2"},
    "data_dir": {"type": Path, "help": "folder of the csv files"},
    "rows": {"type": POSITIVE, "help": "rows read of each file, or sentences"},
    "batch_size": {"type": POSITIVE, "help": "rows in a batch"},
    "turns": {"type": POSITIVE, "help": "times that each is measured"},
    "passes": {"type": POSITIVE, "help": "timed passes in each measurement, of which the median"},
    "precision": {"choices": ["auto", "fp32", "bf16"], "help": "of ours"},
    "device": {"choices": ["cpu", "cuda"], "help": "where it runs"},
}
# The flags, and their defaults, of a benchmark that reads text.
TEXTS = {"model": "all-MiniLM-L6-v2", "data_dir": Path("data/sample")}


@dataclass
class Work:
    """What a contestant does, ready to be timed.

    Args:
        run: one pass; an array that it returns is kept for the benchmark's `check`.
        units: of a pass: sentences, steps, ...
        flops: useful ones of a pass, 0 where they say nothing.
        config, tokens: of the model whose linear layers are the yardstick, and in a batch.
        dtype: of the matrix products, as torch calls it.
        cold: whether the first pass counts.
        figures: others, by name, asked for after the last pass.
    """

    run: Callable[[], Any]
    units: int
    flops: float = 0.0
    config: Any = None
    tokens: int = 1
    dtype: str = "float32"
    cold: bool = False
    figures: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Claim:
    """A figure of ours, as it is or divided by a peer's, and what it is meant to be.

    `metric` is the figure's name; `target` such as ">= 1.8", or empty.
    """

    what: str
    ours: str
    peer: str | None = None
    metric: str = "rate"
    target: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        file: of the script.
        doc: its docstring, whose first line `--help` shows.
        unit: what `rate` counts; `units` has what it counts for some contestants instead.
        contestants: name -> what makes its `Work` from the command line.
        claims: see there.
        settings: its flags (of `FLAGS`) and their defaults.
        quick: other defaults for `--quick`, to try it.
        check: takes what each contestant's passes returned; raises `Wrong`, or gives figures for
            the record.
    """

    file: str
    doc: str
    unit: str
    contestants: dict[str, Callable[[Namespace], Work]]
    claims: Sequence[Claim]
    settings: dict[str, Any]
    quick: dict[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], dict[str, float]] = lambda found: {}
    units: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The script's name."""
        return Path(self.file).stem


class Wrong(ValueError):
    """What a benchmark promises of its results, equality for one, does not hold."""


class Missing(ValueError):
    """A contestant needs what this machine lacks."""


# ---------------------------------------------------------------------------- FLOPs


def bert_config(size: str) -> Any:
    """The `BertConfig` of a row of `SIZES`: heads of 64, feed-forward four times as wide."""
    from bert import BertConfig

    layers, width = SIZES[size]
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )


def useful_flops(
    config: Any, lengths: Sequence[int], training: bool = True, pooling: str = "pooler"
) -> float:
    """Useful FLOPs of one pass over sentences of so many tokens (the formula is at the top).

    Args:
        config: a BERT's, ours or transformers'.
        lengths: tokens of each sentence, [CLS] and [SEP] among them.
        training: whether gradients are computed too.
        pooling: `pooler` or `mean`.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, squares = sum(map(int, lengths)), sum(int(t) ** 2 for t in lengths)
    layer = 2 * (4 * width**2 + 2 * width * inner) * tokens + 4 * width * squares
    last = layer
    if pooling == "pooler":
        last = 4 * width**2 * tokens + 4 * width * tokens
        last += 2 * (3 * width**2 + 2 * width * inner) * len(lengths)  # and the pooler itself
    return (3 if training else 1) * float((layers - 1) * layer + last)


def matrix_rate(config: Any, tokens: int, dtype: str, device: str, seconds: float = 0.5) -> float:
    """FLOP/s of the products of a layer's linear layers with so many tokens, and nothing else."""
    import torch

    width, inner = config.hidden_size, config.intermediate_size
    settings = {"dtype": getattr(torch, dtype), "device": device}
    shapes = [(width, width)] * 4 + [(inner, width), (width, inner)]
    weights = [torch.randn(shape, **settings) for shape in shapes]
    inputs = {size: torch.randn(tokens, size, **settings) for size in (width, inner)}
    times = []
    ends = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < ends or len(times) < 4:
            started = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.size(1)], weight)
            synchronise(device)
            times.append(time.perf_counter() - started)
    flops = sum(2 * tokens * weight.numel() for weight in weights)
    return flops / statistics.median(times[2:])  # the first ones prepare the library


def synchronise(device: str) -> None:
    """Wait for what a GPU has been given to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------------------- one measurement


def leave_project() -> None:
    """Make the project's files unimportable: peers import a library that is called `datasets`."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT:
            del sys.modules[name]


def need(*libraries: str) -> None:
    """Missing, unless these libraries (by the names that pip knows) are installed."""
    for library in libraries:
        try:
            metadata.version(library)
        except metadata.PackageNotFoundError:
            raise Missing(f"needs {library}: pip install -r requirements-dev.txt") from None


def measure(work: Work, args: Namespace, kept: Path) -> dict[str, float]:
    """The figures of one measurement; what the last pass returned goes to `kept`."""
    if not work.cold:
        work.run()
    times, found = [], None
    for _ in range(args.passes):
        synchronise(args.device)
        started = time.perf_counter()
        found = work.run()
        synchronise(args.device)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    figures = {
        "rate": work.units / seconds,
        "seconds": seconds / work.units,
        "memory": peak_memory(args.device) / 2**20,
        **work.figures(),
    }
    if work.flops:
        figures["useful"] = work.flops / seconds / 1e9
        figures["matrix"] = matrix_rate(work.config, work.tokens, work.dtype, args.device) / 1e9
        figures["quotient"] = figures["useful"] / figures["matrix"]
    if found is not None and hasattr(found, "dtype"):
        import numpy as np

        np.save(kept, found)
    return figures


def peak_memory(device: str) -> int:
    """Bytes: a GPU's tensors at most, or RAM of this process or the largest that it started."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) * unit


def work_on(benchmark: Benchmark, args: Namespace) -> None:
    """Be one contestant's process: measure it, and print its figures as the last line."""
    try:
        if args.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise Missing("there is no GPU here")
        work = benchmark.contestants[args.worker](args)
        figures = measure(work, args, kept_file(args.scratch, args.worker))
    except (Missing, MemoryError) as error:
        sys.stderr.write(f"{error or 'too little memory'}\n")
        sys.exit(SKIPPED)
    except Exception as error:  # a peer's too, whose process may have left the project
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            traceback.print_exc()
            sys.exit(1)
        sys.stderr.write("too little memory\n")
        sys.exit(SKIPPED)
    print(f"\n{json.dumps(figures)}")


def kept_file(scratch: Path, contestant: str) -> Path:
    """Where a contestant's results go."""
    return scratch / (re.sub(r"\W+", "-", contestant) + ".npy")


# ---------------------------------------------------------------------------- all of them, in turn


def parse(benchmark: Benchmark, argv: Sequence[str] | None) -> Namespace:
    """The command line of a benchmark, checked."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(benchmark.doc.splitlines()[0])
    settings = {"turns": 3, **benchmark.settings}
    if "--quick" in words:
        settings.update(benchmark.quick, turns=1)
    for name, default in settings.items():
        parser.add_argument(f"--{name}", default=default, **FLAGS[name])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--only", help="only contestants whose names match this regular expression")
    parser.add_argument("--worker", choices=list(benchmark.contestants), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu", passes=1)
    args = parser.parse_args(words)
    args.flags = list(settings)
    try:
        args.names = [name for name in benchmark.contestants if re.search(args.only or "", name)]
    except re.error as error:
        parser.error(f"--only {args.only}: not a regular expression ({error})")
    if not args.names:
        parser.error(f"--only {args.only}: there are {', '.join(benchmark.contestants)}")
    folder = getattr(args, "data_dir", ROOT)
    mine = ROOT not in (folder.resolve() / "file").parents  # of this machine alone
    said = ["DATA" if mine and word == str(folder) else word for word in words]
    args.command = shlex.join(["python", f"benchmarks/{Path(benchmark.file).name}", *said])
    return args


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> None:
    """Measure, then print two Markdown tables and a line of JSON."""
    args = parse(benchmark, argv)
    if args.worker:
        work_on(benchmark, args)
        return
    record = compare(benchmark, args)
    print("\n".join([*contestant_table(record), "", *claim_table([record])]))
    print(json.dumps(record))


def compare(benchmark: Benchmark, args: Namespace) -> dict[str, Any]:
    """Measure every contestant `--turns` times, in turn; the benchmark's record.

    Raises:
        UserError: a contestant that failed, or results that are not what they are to be.
    """
    from checkpoint import UserError, model_folder

    settings = {name: getattr(args, name) for name in args.flags}
    if "data_dir" in settings:
        settings["data_dir"] = args.data_dir.name
        args.data_dir = args.data_dir.resolve()
        if not args.data_dir.is_dir():
            raise UserError(f"--data_dir {args.data_dir}: no such folder")
        args.model = str(model_folder(args.model).resolve())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.names}
    skipped: dict[str, str] = {}
    units = {name: benchmark.units.get(name, benchmark.unit) for name in args.names}
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        for turn in range(args.turns):
            for name in [name for name in args.names if name not in skipped]:
                done = start(benchmark, args, name)
                said = done.stderr.strip().splitlines()
                said = said[-1] if said else f"it ended with {done.returncode}"
                if done.returncode == -9:  # by the system, as nobody else would
                    skipped[name] = said = "killed: too little memory"
                elif done.returncode == SKIPPED:
                    skipped[name] = said
                elif done.returncode:
                    raise UserError(f"{name}: {said}")
                else:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
                    said = figure_line(found[name][-1], units[name])
                print(f"turn {turn + 1} of {args.turns}, {name}: {said}", file=sys.stderr)
        checked = check(benchmark, args)
    measured = {name: runs for name, runs in found.items() if name not in skipped}
    return {
        "benchmark": benchmark.name,
        "units": units,
        "command": args.command,
        "quick": args.quick,
        "settings": settings,
        **machine(args.device),
        "contestants": {name: summarised(runs) for name, runs in measured.items()},
        "skipped": skipped,
        "checked": checked,
        "claims": [
            judge(c, measured)
            for c in benchmark.claims
            if {c.ours, c.peer or c.ours} <= set(measured)
        ],
    }


def start(benchmark: Benchmark, args: Namespace, name: str) -> "subprocess.CompletedProcess[str]":
    """One measurement, in a process of its own, whose working directory is elsewhere."""
    command = [sys.executable, str(Path(benchmark.file).resolve()), "--worker", name]
    command += ["--scratch", str(args.scratch)]
    for flag in args.flags:
        command += [f"--{flag}", str(getattr(args, flag))]
    command += ["--quick"] if args.quick else []
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=args.scratch
    )


def check(benchmark: Benchmark, args: Namespace) -> dict[str, float]:
    """What the benchmark's own check found; UserError where that is wrong."""
    import numpy as np

    from checkpoint import UserError

    files = {name: kept_file(args.scratch, name) for name in args.names}
    kept = {name: np.load(file) for name, file in files.items() if file.exists()}
    try:
        return benchmark.check(kept)
    except Wrong as error:
        failure = UserError(f"WRONG: {error}")
        failure.exit_code = 1
        raise failure from None


def machine(device: str) -> dict[str, Any]:
    """What a record says of where and when it was made: `checkpoint.provenance`, and the peers."""
    from checkpoint import provenance

    facts = provenance()
    del facts["command"]
    for library in ("transformers", "sentence-transformers", "accelerate"):
        try:
            facts["versions"][library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            facts["versions"][library] = None
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        cpuinfo = ""
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    facts["hardware"]["processor"] = model.group(1).strip() if model else None
    facts["hardware"]["amx"] = " amx_bf16" in cpuinfo
    return {"device": device, **facts}


# ---------------------------------------------------------------------------- figures


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


def summarised(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The `spread` of each figure over the turns."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def judge(claim: Claim, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """A claim with its figures: ours and the peer's medians, `value` (ratio or figure), `met`."""
    ours = [run[claim.metric] for run in found[claim.ours]]
    peers = [run[claim.metric] for run in found[claim.peer]] if claim.peer else None
    value = spread([a / b for a, b in zip(ours, peers, strict=True)] if peers else ours)
    met = None
    if claim.target:
        sign, bound = claim.target.split()
        signs = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
        met = signs[sign](value[0], float(bound))
    return {
        **vars(claim),
        "our_figure": statistics.median(ours),
        "peer_figure": statistics.median(peers) if peers else None,
        "value": value,
        "met": met,
    }


def shown(metric: str, value: float | None, unit: str) -> str:
    """A figure for people."""
    if value is None:
        return "-"
    if metric == "seconds":
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if metric == "quotient":
        return f"{value:.0%}"
    if metric == "rate":
        return f"{value:,.0f} {unit}/s" if value >= 100 else f"{value:.3g} {unit}/s"
    return f"{value:,.0f} {'GFLOP/s' if metric in ('useful', 'matrix') else 'MiB'}"


def figure_line(figures: dict[str, float], unit: str) -> str:
    """All figures of a measurement in a line."""
    return ", ".join(f"{name} {shown(name, value, unit)}" for name, value in figures.items())


def contestant_table(record: dict[str, Any]) -> list[str]:
    """A Markdown table of every contestant's medians."""
    metrics = ["rate", "seconds", "memory", "useful", "matrix", "quotient"]
    metrics += sorted({key for row in record["contestants"].values() for key in row} - set(metrics))
    rows = [
        [name, *(shown(m, row.get(m, [None])[0], record["units"][name]) for m in metrics)]
        for name, row in record["contestants"].items()
    ]
    rows += [
        [name, f"skipped: {why}", *[""] * (len(metrics) - 1)]
        for name, why in record["skipped"].items()
    ]
    return table([record["benchmark"], *metrics], rows)


def claim_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of the claims of some records."""
    rows = []
    for record in records:
        for claim in record["claims"]:
            unit = record["units"][claim["ours"]]
            numbers = [
                f"{x:.2f}" if claim["peer"] else shown(claim["metric"], x, unit)
                for x in claim["value"]
            ]
            figures = [
                shown(claim["metric"], claim[key], unit) for key in ("our_figure", "peer_figure")
            ]
            verdict = {None: "", True: "met", False: "missed"}[claim["met"]]
            target = f"{claim['target']}: {verdict}" if claim["target"] else ""
            middle, low, high = numbers
            rows.append([claim["what"], *figures, f"{middle} ({low} to {high})", target])
    return table(["", "ours", "peer", "ratio, or figure (min to max)", "target"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
