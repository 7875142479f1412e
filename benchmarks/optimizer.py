"""The time of an AdamW step against PyTorch's, in one run.

    python benchmarks/optimizer.py --model all-MiniLM-L6-v2

The model's parameters with random gradients, decayed as in training. The peers are
`torch.optim.AdamW` as a loop over tensors, as `foreach` and as `fused`. Steps are taken in turn; a
ratio is ours / peer of one turn.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from options import POSITIVE, Parser, script


def steps(model: str) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of parameters, and what takes a step, by the name of the optimizer."""
    import torch

    from bert import BertModel
    from optimizer import AdamW, parameter_groups

    torch.manual_seed(0)
    bert = BertModel.from_pretrained(model)
    for parameter in bert.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups = {"lr": 1e-6, "eps": 1e-6}
    peers = {
        "loop": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    optimizers = {"ours": AdamW(parameter_groups(bert, 0.01), **groups)}
    for name, how in peers.items():
        optimizers[name] = torch.optim.AdamW(parameter_groups(bert, 0.01), **groups, **how)
    count = sum(parameter.numel() for parameter in bert.parameters())
    return count, {name: optimizer.step for name, optimizer in optimizers.items()}


def compare(args: argparse.Namespace) -> dict:
    """Each optimizer's milliseconds a step, and ours to each peer's, as median, least and most."""
    count, takers = steps(args.model)
    found: dict[str, list[float]] = {name: [] for name in takers}
    for turn in range(args.turns + 2):  # the first two touch the memory, and compile
        for name, step in takers.items():
            started = time.perf_counter()
            step()
            if turn >= 2:
                found[name].append(1000 * (time.perf_counter() - started))
    table: dict[str, dict] = {}
    for name, times in found.items():
        ratios = [ours / peer for ours, peer in zip(found["ours"], times, strict=True)]
        spread = [statistics.median(ratios), min(ratios), max(ratios)]
        table[name] = {"milliseconds": statistics.median(times), "ours_to_it": spread}
    return {"parameters": count, "steps": table}


def main() -> None:
    """Print a Markdown table and a line of JSON."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a folder, or a hub id")
    parser.add_argument("--turns", type=POSITIVE, default=15)
    found = compare(parser.parse_args())
    print(
        f"| AdamW, {found['parameters'] / 1e6:.1f}M parameters | ms a step | ours / it (min-max) |"
    )
    print("|---|---|---|")
    for name, row in found["steps"].items():
        middle, low, high = row["ours_to_it"]
        print(f"| {name} | {row['milliseconds']:.1f} | {middle:.2f} ({low:.2f}-{high:.2f}) |")
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version(), **found}))


if __name__ == "__main__":
    script(lambda _: main())
