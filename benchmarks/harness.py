"""What the benchmarks share: worker processes, timing, ratios, tables and records.

A benchmark is a module with these names:

    SETTINGS     the flags of run.py that it has, and their defaults
    UNIT         what a rate counts: rows, sentences, steps, ...
    CONTESTANTS  name -> a function from the settings to `Work`
    CLAIMS       the ratios and figures to report, with their targets
    check        optional: arrays that contestants returned -> figures for the record, or `Wrong`

Each contestant is measured in a process of its own, all of them in turn, `--turns` times. A ratio,
ours to the peer's, is taken turn by turn; the median is reported, with the minimum and the maximum.
An untimed pass comes first, for ours and peers alike.
"""

import operator
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bert import BertConfig
from engine.device import peak_memory_bytes
from engine.errors import UserError
from engine.hub import resolve_model
from engine.run_dir import provenance

ROOT = Path(__file__).resolve().parent.parent
LR = 5e-5  # in every benchmark that trains
TEXT = {"model": "all-MiniLM-L6-v2", "data_dir": Path("data/sample"), "device": "cpu"}
QUICK = {"quick": True, "rows": 32, "turns": 1, "passes": 1}
OUT_OF_MEMORY = "out of memory|(not enough|can't allocate) memory"
# Layers and width; most are those of Turc et al. (2019, https://arxiv.org/abs/1908.08962).
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "minilm": (6, 384),
    "base": (12, 768),
    "large": (24, 1024),
}


@dataclass
class Work:
    """What a contestant does in one timed pass.

    Args:
        run: the pass; an array that it returns is kept for `check`.
        units: rows, sentences, steps, ... in a pass.
        config, lengths: the BERT and the tokens of every sentence in a pass, where the rate of
            useful FLOPs is wanted.
        dtype, training, pooling: of that BERT.
        warm_up: whether an untimed pass comes first.
        figures: further figures, read after the last pass.
    """

    run: Callable[[], Any]
    units: int
    config: BertConfig | None = None
    lengths: Sequence[int] = ()
    dtype: torch.dtype = torch.float32
    training: bool = True
    pooling: str = "pooler"
    warm_up: bool = True
    figures: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Claim:
    """A figure of ours, alone or divided by a peer's, and its target, such as ">= 1.8".

    `metric` is "rate" (units per second), "seconds" (per unit), "memory" (MiB: the peak of the
    process, or on a GPU of its tensors), "quotient" (`useful_flops` per second / `matrix_rate`) or
    one of `Work.figures`.
    """

    what: str
    ours: str
    peer: str | None = None
    metric: str = "rate"
    target: str = ""


class Wrong(UserError):
    """A contestant's results are not what they must be, such as those of its peer."""

    exit_code = 1


# ---------------------------------------------------------------------------- FLOPs


def bert_config(size: str) -> BertConfig:
    """A row of `SIZES`, with heads of 64 and a feed-forward network four times as wide."""
    layers, width = SIZES[size]
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )


def useful_flops(
    config: BertConfig, lengths: Sequence[int], training: bool = True, pooling: str = "pooler"
) -> float:
    """FLOPs that the result of a pass needs, whatever an implementation computes besides.

    Padding does not count; embeddings, LayerNorm, softmax and heads are left out. With hidden size
    D, feed-forward size F and a sentence of t tokens, a layer needs

        2 (4 D^2 + 2 D F) t + 4 t^2 D      linear layers; Q K^T and the weights times V

    and three times that in training, for the gradients of inputs and weights. If only the pooler is
    read, the last layer needs keys and values of all tokens, but the rest of the first alone.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    layer = 2 * (4 * width**2 + 2 * width * inner) * tokens + 4 * width * squares
    last = layer
    if pooling == "pooler":
        last = 4 * width**2 * tokens + 4 * width * tokens
        last += 2 * (3 * width**2 + 2 * width * inner) * len(lengths)  # with the pooler itself
    return (3 if training else 1) * float((layers - 1) * layer + last)


def matrix_rate(
    config: BertConfig, tokens: int, dtype: torch.dtype, device: str, seconds: float = 0.5
) -> float:
    """FLOP/s of this machine on the matrix products of a layer with so many tokens, alone."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = [(width, width)] * 4 + [(inner, width), (width, inner)]
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = {size: torch.randn(tokens, size, dtype=dtype, device=device) for size in shapes[-1]}
    repeats = 1 if device == "cpu" else 50  # so that waiting for a GPU does not count
    times = []
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end or len(times) < 4:
            start = time.perf_counter()
            for weight in weights * repeats:
                torch.nn.functional.linear(inputs[weight.size(1)], weight)
            synchronize(device)
            times.append(time.perf_counter() - start)
    flops = repeats * sum(2 * tokens * weight.numel() for weight in weights)
    return flops / statistics.median(times[2:])  # the first two warm up


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------- a worker process


def leave_project() -> None:
    """Let a peer import the library that is called `datasets`, as a file of ours is."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.modules.pop("datasets", None)


def measure(work: Work, args: Namespace) -> tuple[dict[str, float], np.ndarray | None]:
    """The figures of one measurement, and the array that the last pass returned."""
    if work.warm_up:
        work.run()
    times, output = [], None
    for _ in range(args.passes):
        synchronize(args.device)
        start = time.perf_counter()
        output = work.run()
        synchronize(args.device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    figures = {
        "rate": work.units / seconds,
        "seconds": seconds / work.units,
        "memory": (peak_memory_bytes(torch.device(args.device)) or 0) / 2**20,
        **work.figures(),
    }
    if work.config is not None:
        flops = useful_flops(work.config, work.lengths, work.training, work.pooling)
        batch_tokens = max(1, sum(work.lengths) * min(args.batch_size, work.units) // work.units)
        figures["useful"] = flops / seconds / 1e9
        figures["matrix"] = matrix_rate(work.config, batch_tokens, work.dtype, args.device) / 1e9
        figures["quotient"] = figures["useful"] / figures["matrix"]
    return figures, output if isinstance(output, np.ndarray) else None


def measure_contestant(benchmark: str, contestant: str, args: Namespace) -> dict[str, Any]:
    """`figures` and `output` of a contestant, or the reason why it was `skipped` or `failed`."""
    try:
        work = import_module(benchmark).CONTESTANTS[contestant](args)
        figures, output = measure(work, args)
    except ImportError as error:  # a peer's library may not be installed
        return {"skipped": str(error)}
    except Exception as error:
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            return {"skipped": "not enough memory"}
        return {"failed": traceback.format_exc()}
    return {"figures": figures, "output": output}


def run_worker(results: Connection, *call: Any) -> None:
    """Send what `measure_contestant` returns; whatever is printed is thrown away."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    results.send(measure_contestant(*call))


def start_worker(*call: Any) -> dict[str, Any]:
    """`measure_contestant` in a new process, which takes over none of our threads or imports."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_worker, args=(sender, *call))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:  # killed by the system, as nobody else would
            return {"skipped": "killed: not enough memory"}
        return {"failed": f"its process ended with {process.exitcode}"}
    finally:
        process.join()


# ---------------------------------------------------------------------------- all contestants


def run_benchmark(
    benchmark: ModuleType, settings: dict[str, Any], only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure the contestants (whose names contain one of `only`) in turns; for the record.

    Raises:
        UserError: there is no such contestant, one failed, or its results are wrong.
    """
    args = Namespace(**{"device": "cpu", **settings})
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    if "data_dir" in settings:
        args.data_dir = args.data_dir.resolve()
        args.model = str(resolve_model(args.model).resolve())
    names = [n for n in benchmark.CONTESTANTS if any(text in n for text in only or [""])]
    if not names:
        raise UserError(f"--only {' '.join(only)}: there are {', '.join(benchmark.CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        runs, outputs, skipped = measure_in_turns(benchmark.__name__, names, args)
    claims = [c for c in benchmark.CLAIMS if {c.ours, c.peer or c.ours} <= set(runs)]
    return {
        "contestants": {name: summarize(of) for name, of in runs.items()},
        "skipped": skipped,
        "checked": benchmark.check(outputs) if hasattr(benchmark, "check") else {},
        "claims": [judge(claim, runs) for claim in claims],
    }


def measure_in_turns(
    benchmark: str, names: Sequence[str], args: Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, np.ndarray], dict[str, str]]:
    """By contestant: its figures in each turn, its output, and why it was skipped."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    outputs: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for turn in range(args.turns):
        for name in list(runs):
            found = start_worker(benchmark, name, args)
            if "failed" in found:
                print(found["failed"], file=sys.stderr)
                raise UserError(f"{name}: {found['failed'].splitlines()[-1]}")
            if "skipped" in found:
                skipped[name] = said = found["skipped"]
                del runs[name]
            else:
                runs[name].append(found["figures"])
                said = ", ".join(f"{k} {v:.4g}" for k, v in found["figures"].items())
                if found["output"] is not None:
                    outputs[name] = found["output"]
            print(f"turn {turn + 1} of {args.turns}, {name}: {said}", file=sys.stderr)
    return runs, outputs, skipped


def machine() -> dict[str, Any]:
    """Where and when a record was made: `run_dir.provenance`, the peers' versions and the CPU."""
    facts = provenance()
    for library in ("transformers", "sentence-transformers", "accelerate"):
        try:
            facts["versions"][library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            facts["versions"][library] = None
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    facts["hardware"]["processor"] = model.group(1).strip() if model else None
    facts["hardware"]["amx"] = " amx_bf16" in text
    return facts


# ---------------------------------------------------------------------------- ratios and tables


def median_and_range(values: Sequence[float]) -> list[float]:
    """Median, minimum and maximum."""
    return [statistics.median(values), min(values), max(values)]


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """`median_and_range` of each figure over the turns."""
    return {name: median_and_range([run[name] for run in runs]) for name in runs[0]}


def judge(claim: Claim, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """A claim with both medians, the ratio (or figure) `value`, and whether it is `met`."""
    ours = [run[claim.metric] for run in runs[claim.ours]]
    peers = [run[claim.metric] for run in runs[claim.peer]] if claim.peer else None
    ratios = [a / b for a, b in zip(ours, peers, strict=True)] if peers else ours
    value = median_and_range(ratios)
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


def format_figure(metric: str, value: float | None, unit: str) -> str:
    """A figure with its unit."""
    if value is None:
        return "-"
    if metric == "seconds":
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if metric == "quotient":
        return f"{value:.0%}"
    if metric == "rate":
        return f"{value:,.0f} {unit}/s" if value >= 100 else f"{value:.3g} {unit}/s"
    return f"{value:,.0f} MiB"


def claim_table(record: dict[str, Any]) -> str:
    """The claims of a record, and what was skipped, as a Markdown table."""
    rows = [("", "ours", "peer", "ratio, or figure (min to max)", "target"), ["---"] * 5]
    for claim in record["claims"]:
        unit, metric = record["units"][claim["ours"]], claim["metric"]
        ours, peer = (format_figure(metric, claim[k], unit) for k in ("our_figure", "peer_figure"))
        middle, low, high = (
            f"{value:.2f}" if claim["peer"] else format_figure(metric, value, unit)
            for value in claim["value"]
        )
        verdict = f"{claim['target']}: {'met' if claim['met'] else 'missed'}"
        target = verdict if claim["target"] else ""
        rows.append((claim["what"], ours, peer, f"{middle} ({low} to {high})", target))
    rows += [(name, f"skipped: {why}", "", "", "") for name, why in record["skipped"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def origin(record: dict[str, Any]) -> str:
    """How, where and when a record was made."""
    hardware, versions = record["hardware"], record["versions"]
    cpu = f"{hardware['processor'] or hardware['machine']}, {hardware['threads']} threads"
    cpu += f", {hardware['cpu']}, {'AMX' if hardware['amx'] else 'no AMX'}"
    gpu = f", {hardware['gpu']}" if record["device"] == "cuda" else ""
    libraries = [f"{x} {versions[x]}" for x in ("torch", "transformers", "sentence-transformers")]
    changes = " with uncommitted changes" if record["uncommitted_changes"] else ""
    return (
        f"`{record['command']}`, {record['started'][:10]}, commit"
        f" {(record['commit'] or 'unknown')[:7]}{changes}. {cpu}{gpu}; Python {record['python']},"
        f" {', '.join(libraries)}." + (" **--quick: no measurement.**" if record["quick"] else "")
    )
