"""The time and memory of an AdamW step against PyTorch's, on 22.7M and on 110M parameters.

    python benchmarks/optimizer.py

The parameters of a BERT as large as all-MiniLM-L6-v2 and of BERT-base, with random weights and
gradients, decayed as in training. The peers are `torch.optim.AdamW` as a loop over tensors, as
`foreach` and as `fused`. A time is the median over the steps of a measurement.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is an optimizer.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import Benchmark, Claim, Work, bert_config, main
from options import script

MODELS = {"22.7M": "minilm", "110M": "base"}
PEERS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def step(args: Namespace, size: str, make: Any) -> Work:
    """A step of the optimizer that `make` gives for the parameters of a model of that size."""
    import torch

    from bert import BertModel
    from optimizer import parameter_groups

    torch.manual_seed(0)
    bert = BertModel(bert_config(size))
    for parameter in bert.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameter_groups(bert, 0.01))
    optimizer.step()  # makes the moments; the harness warms up once more
    return Work(optimizer.step, 1)


def peer_step(args: Namespace, size: str, how: str) -> Work:
    """PyTorch's."""
    import torch

    return step(args, size, lambda groups: torch.optim.AdamW(groups, 1e-6, eps=1e-6, **PEERS[how]))


def ours_step(args: Namespace, size: str) -> Work:
    """This project's."""
    from optimizer import AdamW

    return step(args, size, lambda groups: AdamW(groups, lr=1e-6, eps=1e-6))


def claims(count: str) -> list[Claim]:
    """What is claimed of the steps on so many parameters."""
    ours = f"{count}, ours"
    return [
        Claim(f"AdamW step, {count}, to fused", ours, f"{count}, fused", "seconds", "<= 1.05"),
        Claim(f"AdamW step, {count}, to foreach", ours, f"{count}, foreach", "seconds", "<= 0.3"),
        Claim(f"AdamW step, {count}, to a loop", ours, f"{count}, loop", "seconds"),
        Claim(f"memory, AdamW, {count}, to fused", ours, f"{count}, fused", "memory", "<= 1.0"),
    ]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "steps",
    {
        f"{count}, {name}": make
        for count, size in MODELS.items()
        for name, make in {
            "ours": partial(ours_step, size=size),
            **{how: partial(peer_step, size=size, how=how) for how in PEERS},
        }.items()
    },
    [claim for count in MODELS for claim in claims(count)],
    {"passes": 15},
    {"passes": 2},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
