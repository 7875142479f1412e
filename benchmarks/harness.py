"""What the benchmarks share: worker processes, timing, ratios, tables and records.

A benchmark is a module with these names:

    SETTINGS     the flags of run.py that it has, and their defaults
    UNIT         what a rate counts: rows, sentences, steps, ...
    CONTESTANTS  name -> a function from the settings to `Work`
    CLAIMS       the ratios and figures to report, with their targets
    check        optional: arrays that contestants returned -> figures for the record, or UserError

Each contestant is measured in its own process, in turn with the others, `--turns` times, after an
untimed pass. The ratio of ours to the peer's is computed turn by turn; the median is reported.
"""

import operator
import os
import re
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata, util
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bert import BertConfig
from engine.device import peak_memory_bytes
from engine.errors import OutOfMemory
from engine.run_dir import provenance

ROOT = Path(__file__).resolve().parent.parent
LR = 5e-5  # in every benchmark that trains
TEXT = {"model": "all-MiniLM-L6-v2", "data_dir": Path("data/sample")}
# Layers and width; most are those of Turc et al. (2019, https://arxiv.org/abs/1908.08962).
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512)}
SIZES |= {"minilm": (6, 384), "base": (12, 768), "large": (24, 1024)}
SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}  # of targets
# A peer may not be installed, or not fit in memory: the system may then kill its process.
SKIPPED = (ImportError, MemoryError, torch.OutOfMemoryError, OutOfMemory, BrokenProcessPool)
Turns = list[dict[str, float]]  # the figures of a contestant in each turn


@dataclass
class Work:
    """The work of a contestant in one timed pass."""

    run: Callable[[], Any]  # the pass; an array that it returns is kept for `check`
    units: int  # rows, sentences, steps, ... in a pass
    # Seconds of a pass -> further figures, computed after the last pass.
    figures: Callable[[float], dict[str, float]] = lambda seconds: {}
    warm_up: bool = True  # whether an untimed pass comes first


@dataclass(frozen=True)
class Claim:
    """A figure of ours, alone or divided by a peer's, and its target, such as ">= 1.8".

    `metric` is "rate" (units per second), "seconds" (per unit), "memory" (MiB: the peak of the
    process, or on a GPU of its tensors) or one of `Work.figures`, such as those of `flop_rates`.
    """

    what: str
    ours: str
    peer: str | None = None
    metric: str = "rate"
    target: str = ""


# ---------------------------------------------------------------------------- FLOPs


def bert_config(size: str) -> BertConfig:
    """A row of `SIZES`, with heads of 64 and a feed-forward network four times as wide."""
    layers, width = SIZES[size]
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return BertConfig(num_attention_heads=max(1, width // 64), **shape)


def useful_flops(
    config: BertConfig, lengths: Sequence[int], training: bool = True, pooling: str = "pooler"
) -> float:
    """FLOPs that the result of a pass needs, whatever else an implementation computes.

    Padding does not count; embeddings, LayerNorm, softmax and heads are left out. With hidden size
    D, feed-forward size F and a sentence of t tokens, a layer needs

        2 (4 D^2 + 2 D F) t + 4 t^2 D      linear layers; Q K^T and the weights times V

    and three times that in training, for the gradients of inputs and weights. If only the pooler is
    read, the last layer needs keys and values of all tokens, but the rest of the first alone.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    last = layer = 2 * (4 * width**2 + 2 * width * inner) * tokens + 4 * width * squares
    if pooling == "pooler":
        last = 4 * width**2 * tokens + 4 * width * tokens
        last += 2 * (3 * width**2 + 2 * width * inner) * len(lengths)  # with the pooler itself
    return (3 if training else 1) * float((layers - 1) * layer + last)


def matrix_rate(config: BertConfig, tokens: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of this machine on just the matrix products of a layer with this many tokens."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = [(width, width)] * 4 + [(inner, width), (width, inner)]
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = {size: torch.randn(tokens, size, dtype=dtype, device=device) for size in shapes[-1]}
    repeats = 1 if device == "cpu" else 50  # between two waits for a GPU

    @torch.inference_mode()
    def multiply() -> None:
        for weight in weights * repeats:
            F.linear(inputs[weight.size(1)], weight)

    if device == "cuda":
        multiply()  # initializes cuBLAS
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # one launch: a product may be shorter than its launch
            multiply()
        multiply = graph.replay
    times, _ = time_passes(multiply, device, passes=4, seconds=0.5)
    flops = repeats * sum(2 * tokens * weight.numel() for weight in weights)
    return flops / statistics.median(times[2:])  # the first two warm up


def flop_rates(
    args: Namespace, model: Any, lengths: Sequence[int], rows: int, training: bool, seconds: float
) -> dict[str, float]:
    """Useful GFLOP/s of a SentenceEncoder, those of its matrix products alone, their quotient.

    lengths: the tokens of every sentence in a pass over so many rows.
    """
    config, batch_tokens = model.bert.config, sum(lengths) * min(args.batch_size, rows) // rows
    useful = useful_flops(config, lengths, training, model.pooling) / seconds / 1e9
    matrix = matrix_rate(config, batch_tokens, model.dtype, args.device) / 1e9
    return {"useful": useful, "matrix": matrix, "quotient": useful / matrix}


# ---------------------------------------------------------------------------- measuring


def leave_project() -> None:
    """Let a peer import the library `datasets`, whose name a file of ours has, too."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.modules.pop("datasets", None)


def classifier_flags(args: Namespace, **flags: Any) -> list[str]:
    """A command line of classifier.py with the benchmark's settings and a new run folder."""
    settings = {"model": args.model, "data_dir": args.data_dir, "batch_size": args.batch_size}
    settings |= {"limit": args.rows, "run_dir": tempfile.mkdtemp(dir=args.scratch), **flags}
    return ["--no_test", *(f"--{name}={value}" for name, value in settings.items())]


def time_passes(
    function: Callable[[], Any], device: str, passes: int, seconds: float = 0.0
) -> tuple[list[float], Any]:
    """Call it at least `passes` times and for `seconds`; each call's seconds, the last result."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, result = [], None
    while len(times) < passes or sum(times) < seconds:
        wait()
        start = time.perf_counter()
        result = function()
        wait()
        times.append(time.perf_counter() - start)
    return times, result


def measure(work: Work, args: Namespace) -> tuple[dict[str, float], np.ndarray | None]:
    """The figures of one measurement, and the array that the last pass returned."""
    if work.warm_up:
        work.run()
    times, output = time_passes(work.run, args.device, args.passes)
    seconds = statistics.median(times)
    figures = {"rate": work.units / seconds, "seconds": seconds / work.units}
    # Before the further figures, which may use memory themselves.
    figures["memory"] = (peak_memory_bytes(torch.device(args.device)) or 0) / 2**20
    figures |= work.figures(seconds)
    return figures, output if isinstance(output, np.ndarray) else None


def measure_quietly(benchmark: str, contestant: str, args: Namespace) -> Any:
    """`measure` a contestant; the output of this process and its children is discarded."""
    for stream in (1, 2):  # standard output and error, of libraries in C too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return measure(import_module(benchmark).CONTESTANTS[contestant](args), args)


def start_worker(*call: Any) -> Any:
    """`measure_quietly` in a new process, which inherits none of our threads or imports."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure_quietly, *call).result()


def measure_in_turns(
    benchmark: str, names: Sequence[str], args: Namespace
) -> tuple[dict[str, Turns], dict[str, np.ndarray], dict[str, str]]:
    """By contestant: its figures in each turn, its output, and why it was skipped."""
    runs, outputs, skipped = {name: [] for name in names}, {}, {}
    for turn in range(args.turns):
        for name in list(runs):
            print(f"turn {turn + 1} of {args.turns}, {name}", end=": ", file=sys.stderr, flush=True)
            try:
                figures, output = start_worker(benchmark, name, args)
            except SKIPPED as error:
                skipped[name] = str(error).split(". ")[0] or "not enough memory"
                del runs[name]  # from the turns to come, too
                print("skipped:", skipped[name], file=sys.stderr)
                continue
            print(", ".join(f"{key} {x:.4g}" for key, x in figures.items()), file=sys.stderr)
            runs[name].append(figures)
            if output is not None:
                outputs[name] = output  # the same in every turn
    return runs, outputs, skipped


def machine() -> dict[str, Any]:
    """Where and when a record was made: `run_dir.provenance`, the peers' versions and the CPU."""
    facts = provenance()
    for library in ("transformers", "sentence-transformers", "accelerate"):
        installed = util.find_spec(library.replace("-", "_"))
        facts["versions"][library] = metadata.version(library) if installed else None
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    name = re.search(r"model name\s*: (.*\S)", cpuinfo.read_text() if cpuinfo.exists() else "")
    amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    facts["hardware"] |= {"processor": name and name[1], "amx": amx}
    return facts


# ---------------------------------------------------------------------------- ratios and tables


def median_and_range(values: Sequence[float]) -> list[float]:
    """Median, minimum and maximum."""
    return [statistics.median(values), min(values), max(values)]


def summarize(turns: Turns) -> dict[str, list[float]]:
    """`median_and_range` of each figure."""
    return {name: median_and_range([figures[name] for figures in turns]) for name in turns[0]}


def judge(claim: Claim, runs: dict[str, Turns]) -> dict[str, Any]:
    """A claim with both medians, the ratio (or figure) `value`, and whether it is `met`."""
    ours = [figures[claim.metric] for figures in runs[claim.ours]]
    peers = [figures[claim.metric] for figures in runs[claim.peer]] if claim.peer else []
    value = median_and_range([a / b for a, b in zip(ours, peers, strict=True)] if peers else ours)
    met = None
    if claim.target:
        sign, bound = claim.target.split()
        met = SIGNS[sign](value[0], float(bound))
    our_figure, peer_figure = statistics.median(ours), statistics.median(peers) if peers else None
    figures = {"our_figure": our_figure, "peer_figure": peer_figure}
    return {**vars(claim), **figures, "value": value, "met": met}


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
        show = partial(format_figure, claim["metric"], unit=record["units"][claim["ours"]])
        middle, low, high = (f"{x:.2f}" if claim["peer"] else show(x) for x in claim["value"])
        target = claim["target"] and f"{claim['target']}: {'met' if claim['met'] else 'missed'}"
        figures = (show(claim["our_figure"]), show(claim["peer_figure"]))
        rows.append((claim["what"], *figures, f"{middle} ({low} to {high})", target))
    rows += [(name, f"skipped: {why}", "", "", "") for name, why in record["skipped"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def origin(record: dict[str, Any]) -> str:
    """How, where and when a record was made."""
    hardware, versions = record["hardware"], record["versions"]
    commit = (record["commit"] or "unknown")[:7]
    commit += " with uncommitted changes" if record["uncommitted_changes"] else ""
    cpu = f"{hardware['processor'] or hardware['machine']}, {hardware['threads']} threads"
    cpu += f", {hardware['cpu']}, {'AMX' if hardware['amx'] else 'no AMX'}"
    cpu += f", {hardware['gpu']}" if record["device"] == "cuda" else ""
    libraries = [f"{x} {versions[x]}" for x in ("torch", "transformers", "sentence-transformers")]
    software = ", ".join([f"Python {record['python']}", *libraries])
    text = f"`{record['command']}`, {record['started'][:10]}, commit {commit}. {cpu}; {software}."
    return text + (" **--quick: no measurement.**" if record["quick"] else "")
