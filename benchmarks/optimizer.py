"""The time and memory of an AdamW step against PyTorch's, on 22.7M and on 110M parameters.

    python benchmarks/run.py optimizer

The parameters are those of a BERT as large as all-MiniLM-L6-v2 and of BERT-base, with random
weights and gradients and the weight decay of training. Ours is `AdamW(fused=True)`, as in the
scripts; the peers are `torch.optim.AdamW` as a loop over tensors, as `foreach` and as `fused`.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Claim, Work, bert_config
from bert import BertModel
from optimizer import AdamW, parameter_groups

MODELS = {"22.7M": "minilm", "110M": "base"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": partial(AdamW, fused=True),
    "loop": partial(torch.optim.AdamW, foreach=False, fused=False),
    "foreach": partial(torch.optim.AdamW, foreach=True),
    "fused": partial(torch.optim.AdamW, fused=True),
}


def step(args: Namespace, size: str, make: Callable[..., torch.optim.Optimizer]) -> Work:
    """A step on the parameters of a model of that size."""
    torch.manual_seed(0)
    bert = BertModel(bert_config(size)).to(args.device)
    for parameter in bert.parameters():  # no backward pass: its buffers would add to the memory
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameter_groups(bert, 0.01), lr=1e-6, eps=1e-6)
    optimizer.step()  # allocates the moments
    return Work(optimizer.step, 1)


SETTINGS = {"passes": 15, "device": "cpu"}
UNIT = "steps"
CONTESTANTS, CLAIMS = {}, []
for count, size in MODELS.items():
    for name, make in OPTIMIZERS.items():
        CONTESTANTS[f"{count}, {name}"] = partial(step, size=size, make=make)
    ours, loop, foreach, fused = (f"{count}, {name}" for name in OPTIMIZERS)
    CLAIMS += [
        Claim(f"AdamW step, {count}, to fused", ours, fused, "seconds", "<= 1.05"),
        Claim(f"AdamW step, {count}, to foreach", ours, foreach, "seconds", "<= 0.3"),
        Claim(f"AdamW step, {count}, to a loop", ours, loop, "seconds"),
        Claim(f"memory, AdamW, {count}, to fused", ours, fused, "memory", "<= 1.0"),
    ]
