"""Training over model sizes, and its cost against the number of rows.

    python benchmarks/run.py scale --data_dir DATA
    python benchmarks/run.py scale --data_dir DATA --device cuda --only base

Sizes (`harness.SIZES`) are BERTs with random weights, trained for an epoch on `--rows` sentences of
SST, ours in the default precision. The peer is the plain loop of `train` in fp32, of the same size.
What does not fit in memory is skipped.

Cost against rows: 1,000, 10,000 and 100,000 rows (SST's, repeated) are read, tokenised and trained
on with the tiny model. If the seconds per row stay the same, cost grows linearly. `growth` is what
training adds to the peak memory once all rows are read, in a process that has trained on a few rows
before: next to nothing, however many rows.
"""

import csv
import tempfile
from argparse import Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.harness import SIZES, TEXT, Claim, Work, bert_config
from benchmarks.train import load, ours, plain, token_counts
from engine.device import peak_memory_bytes

MODELS = [size for size in SIZES if size != "minilm"]
ROWS = (1000, 10000, 100000)


def count_tokens(args: Namespace, work: Work) -> Work:
    """The same work, whose units are tokens."""
    work.units = sum(token_counts(load(args, ["sst"])))
    return work


def plain_size(args: Namespace, size: str) -> Work:
    """The plain loop on a model of that size."""
    return count_tokens(args, plain(args, ["sst"], bert_config(size)))


def our_size(args: Namespace, size: str) -> Work:
    """Ours on a model of that size."""
    return count_tokens(args, ours(args, ["sst"], "auto", bert_config(size)))


def our_rows(args: Namespace, rows: int) -> Work:
    """Ours on so many rows (--quick: a hundredth), from the file to the end of an epoch."""
    rows = rows // 100 if args.quick else rows
    source, args.data_dir = args.data_dir, Path(tempfile.mkdtemp(dir=args.scratch))
    write_rows(source / "ids-sst-train.csv", args.data_dir / "ids-sst-train.csv", rows)
    device = torch.device(args.device)
    few = Namespace(**{**vars(args), "rows": 320})
    ours(few, ["sst"], "auto", bert_config("tiny")).run()
    args.rows = rows
    before = 0

    def read_and_train() -> None:
        nonlocal before
        work = ours(args, ["sst"], "auto", bert_config("tiny"))
        before = peak_memory_bytes(device)
        work.run()

    def growth() -> dict[str, float]:
        return {"growth": (peak_memory_bytes(device) - before) / 2**20}

    return Work(read_and_train, rows, warm_up=False, figures=growth)


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write so many rows: those of `source`, repeated, each with an id of its own."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**rows[i % len(rows)], "id": f"row-{i}"} for i in range(count))


SETTINGS = {**TEXT, "rows": 128, "batch_size": 32}
UNIT = "tokens"
CONTESTANTS = {
    **{f"{size}, plain, fp32": partial(plain_size, size=size) for size in MODELS},
    **{f"{size}, ours": partial(our_size, size=size) for size in MODELS},
    **{f"{rows} rows": partial(our_rows, rows=rows) for rows in ROWS},
}
CLAIMS = []
for size in MODELS:
    own, peer = f"{size}, ours", f"{size}, plain, fp32"
    CLAIMS += [
        Claim(f"tokens per second, {size}, to plain loop fp32", own, peer),
        Claim(f"peak memory, {size}, to plain loop fp32", own, peer, "memory"),
        Claim(f"useful FLOP rate to matrix rate, {size}", own, metric="quotient"),
    ]
for few, many in pairwise(ROWS):
    names = (f"{many} rows", f"{few} rows")
    CLAIMS.append(Claim(f"seconds a row, {many} rows, to {few}", *names, "seconds", "<= 1.1"))
for rows in ROWS:
    what, name = f"memory that training adds, {rows} rows", f"{rows} rows"
    CLAIMS.append(Claim(what, name, metric="growth", target="<= 64"))
