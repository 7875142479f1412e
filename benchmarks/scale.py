"""Training speed and memory by model size, and training cost by number of rows.

    python benchmarks/run.py scale --data_dir DATA
    python benchmarks/run.py scale --data_dir DATA --device cuda --only base

Sizes (`harness.SIZES`) are BERTs with random weights, trained for an epoch on `--rows` sentences of
SST: ours in the default precision, the peer with the plain loop of `train` in fp32. Models that do
not fit in memory are skipped.

Cost by rows: the tiny model reads, tokenises and trains on 1,000, 10,000 and 100,000 rows (SST's,
repeated). If the seconds per row stay the same, cost grows linearly. "Memory that training adds" is
counted from when all rows have been read, in a process that has already trained on a few rows.
"""

import csv
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.harness import SIZES, TEXT, Claim, Work
from benchmarks.train import load, ours, plain, token_counts
from engine.device import peak_memory_bytes

MODELS = [size for size in SIZES if size != "minilm"]
ROWS = (1000, 10000, 100000)


def train_size(args: Namespace, size: str, make: Callable[..., Work]) -> Work:
    """An epoch of SST on a model of that size, counted in tokens."""
    work = make(args, ["sst"], size=size)
    work.units = sum(token_counts(load(args, ["sst"])))
    return work


def train_rows(args: Namespace, rows: int) -> Work:
    """Ours on so many rows (--quick: a hundredth), from the file to the end of an epoch."""
    rows //= 100 if args.quick else 1
    source, device = args.data_dir / "ids-sst-train.csv", torch.device(args.device)
    args.data_dir = Path(tempfile.mkdtemp(dir=args.scratch))
    write_rows(source, args.data_dir / source.name, rows)
    make = partial(ours, names=["sst"], precision="auto", size="tiny")
    # What the first steps allocate once and for all is not to count as growth.
    make(Namespace(**{**vars(args), "rows": 320})).run()
    args.rows = rows
    growth = {}

    def read_and_train() -> None:
        work = make(args)
        before = peak_memory_bytes(device)
        work.run()
        growth["growth"] = (peak_memory_bytes(device) - before) / 2**20

    return Work(read_and_train, rows, lambda seconds: growth, warm_up=False)


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write so many rows: those of `source`, repeated, each with an id of its own."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    # The reader refuses an id that it has seen.
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**rows[i % len(rows)], "id": f"row-{i}"} for i in range(count))


SETTINGS = {**TEXT, "rows": 128, "batch_size": 32, "device": "cpu"}
UNIT = "tokens"
CONTESTANTS, CLAIMS = {}, []
for size in MODELS:
    our_name, peer = f"{size}, ours", f"{size}, plain, fp32"
    CONTESTANTS[peer] = partial(train_size, size=size, make=plain)
    CONTESTANTS[our_name] = partial(train_size, size=size, make=partial(ours, precision="auto"))
    CLAIMS += [
        Claim(f"tokens per second, {size}, to plain loop fp32", our_name, peer),
        Claim(f"peak memory, {size}, to plain loop fp32", our_name, peer, "memory"),
        Claim(f"useful FLOP rate to matrix rate, {size}", our_name, metric="quotient"),
    ]
for rows in ROWS:
    name = f"{rows} rows"
    CONTESTANTS[name] = partial(train_rows, rows=rows)
    CLAIMS.append(Claim(f"memory that training adds, {name}", name, None, "growth", "<= 64"))
for few, many in pairwise(ROWS):
    title = f"seconds a row, {many} rows, to {few}"
    CLAIMS.append(Claim(title, f"{many} rows", f"{few} rows", "seconds", "<= 1.1"))
