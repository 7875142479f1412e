"""Training: tokens per second and memory over model and batch sizes, and cost against rows.

    python benchmarks/scale.py --data_dir DATA
    python benchmarks/scale.py --data_dir DATA --device cuda --precision bf16 --only base

Sizes (`harness.SIZES`) are BERTs with random weights, trained on SST's real sentences for a pass
over `--rows`; the peer is `train.py`'s plain loop, fp32, of the same size. What does not fit in
memory is skipped, and so is CUDA without a GPU; on one nothing has been measured yet.

Cost against rows: 1,000, 10,000 and 100,000 rows (SST's, over and over) are read, tokenised and
trained on with the tiny model. `seconds` a row are to stay the same: the cost grows linearly.
`growth` is what training adds to the peak memory once all rows are read: next to nothing, however
many rows. It is the peak of a process that has trained on a few rows before.
"""

import csv
import sys
import tempfile
from argparse import Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import SIZES, TEXTS, Benchmark, Claim, Work, bert_config, main, peak_memory
from benchmarks.train import load, ours, peer_plain, token_counts
from options import script

MODELS = [size for size in SIZES if size != "minilm"]
BATCHES = (8, 128)  # with the base model, beside --batch_size
ROWS = (1000, 10000, 100000)


def in_tokens(args: Namespace, work: Work) -> Work:
    """The same, counting tokens."""
    work.units = sum(token_counts(load(args, ["sst"])))
    return work


def ours_size(args: Namespace, size: str, batch_size: int | None = None) -> Work:
    """Ours, on random weights of that size."""
    args.batch_size = batch_size or args.batch_size
    return in_tokens(args, ours(args, ["sst"], args.precision, bert_config(size)))


def peer_size(args: Namespace, size: str) -> Work:
    """The plain loop, on random weights of that size."""
    return in_tokens(args, peer_plain(args, ["sst"], bert_config(size)))


def ours_rows(args: Namespace, rows: int) -> Work:
    """Ours, on so many rows (fewer with --quick), from the file to the end of an epoch."""
    source, args.data_dir = args.data_dir, Path(tempfile.mkdtemp(dir=args.scratch))
    args.rows, few = (rows // 100 if args.quick else rows), 320
    write_rows(source / "ids-sst-train.csv", args.data_dir / "ids-sst-train.csv", args.rows)
    warm = Namespace(**{**vars(args), "rows": few})
    ours(warm, ["sst"], args.precision, bert_config("tiny")).run()
    read: list[int] = []

    def all_of_it() -> None:
        work = ours(args, ["sst"], args.precision, bert_config("tiny"))
        read[:] = [peak_memory(args.device)]
        work.run()

    def growth() -> dict[str, float]:
        return {"growth": (peak_memory(args.device) - read[0]) / 2**20}

    return Work(all_of_it, args.rows, cold=True, figures=growth)


def write_rows(source: Path, target: Path, count: int) -> None:
    """A file of so many rows: those of `source` over and over, each with an id of its own."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**rows[i % len(rows)], "id": f"row-{i}"} for i in range(count))


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "tokens",
    {
        **{f"{size}, plain, fp32": partial(peer_size, size=size) for size in MODELS},
        **{f"{size}, ours": partial(ours_size, size=size) for size in MODELS},
        **{
            f"base, ours, batches of {batch_size}": partial(
                ours_size, size="base", batch_size=batch_size
            )
            for batch_size in BATCHES
        },
        **{f"{rows} rows": partial(ours_rows, rows=rows) for rows in ROWS},
    },
    [
        *(
            Claim(f"tokens per second, {size}, to plain loop fp32", f"{size}, ours", peer)
            for size in MODELS
            for peer in [f"{size}, plain, fp32"]
        ),
        *(
            Claim(f"peak memory, {size}, to plain loop fp32", f"{size}, ours", peer, "memory")
            for size in MODELS
            for peer in [f"{size}, plain, fp32"]
        ),
        *(
            Claim(f"useful FLOP rate to matrix rate, {size}", f"{size}, ours", None, "quotient")
            for size in MODELS
        ),
        *(
            Claim(
                f"seconds a row, {many} rows, to {few}",
                f"{many} rows",
                f"{few} rows",
                "seconds",
                "<= 1.1",
            )
            for few, many in pairwise(ROWS)
        ),
        *(
            Claim(
                f"memory that training adds, {rows} rows", f"{rows} rows", None, "growth", "<= 64"
            )
            for rows in ROWS
        ),
    ],
    {**TEXTS, "rows": 128, "batch_size": 32, "device": "cpu", "precision": "auto"},
    {"rows": 32},
    units={f"{rows} rows": "rows" for rows in ROWS},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
