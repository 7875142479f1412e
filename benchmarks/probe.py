"""Ten epochs of linear probing on SST, from the files' text to dev scores.

    python benchmarks/run.py probe --data_dir DATA

Ours is the job of `classifier.py --option pretrain`, with the run folder that it writes: the frozen
encoder embeds each row once. The peer does it the usual way: `transformers.BertModel` without
gradients on every batch of every epoch, padded to its longest sentence, a linear head on the
pooler's output, fused `torch.optim.AdamW`, dev predicted after each epoch. Loading the model and
tokenising are within the time of both, and nothing is warmed up.
"""

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import classifier
from benchmarks.harness import TEXT, Claim, Work
from benchmarks.peers import PlainLoop
from datasets import read_examples
from multitask_classifier import run_training
from tasks import TASKS

EPOCHS = 10
SST = TASKS["sst"]


def usual_way(args: Namespace) -> Work:
    """The encoder in every epoch."""

    def probe() -> None:
        loop = PlainLoop(args)
        loop.bert.eval()
        batches = {}
        for split in ("train", "dev"):
            path = args.data_dir / SST.files.format(split)
            examples, *_ = read_examples(path, SST, limit=args.rows)
            labels = [int(e.label) for e in examples]
            batches[split] = loop.batches(
                [[e.texts[0] for e in examples]], labels, split == "train"
            )
        head = nn.Linear(loop.width, 5).to(args.device)
        dropout = nn.Dropout(0.1)
        step = loop.optimize(head, lr=1e-2)

        @torch.no_grad()
        def embed(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return loop.bert(**inputs).pooler_output

        for _ in range(EPOCHS):
            for [inputs], labels in batches["train"]:
                step(nn.functional.cross_entropy(head(dropout(embed(inputs))), labels))
            right = sum(
                (head(embed(inputs)).argmax(-1) == labels).sum().item()
                for [inputs], labels in batches["dev"]
            )
        print(f"{right} right")

    return Work(probe, 1, warm_up=False)


def ours(args: Namespace, precision: str) -> Work:
    """`classifier.py --option pretrain`."""
    run_dir = Path(tempfile.mkdtemp(dir=args.scratch)) / "run"
    flags = {"model": args.model, "data_dir": args.data_dir, "limit": args.rows}
    flags |= {"option": "pretrain", "epochs": EPOCHS, "batch_size": args.batch_size}
    flags |= {"precision": precision, "device": args.device, "run_dir": run_dir}
    words = [f"--{name}={value}" for name, value in flags.items()]
    parsed = classifier.parse_args([*words, "--no_test"])
    return Work(lambda: run_training(parsed), 1, warm_up=False)


SETTINGS = {**TEXT, "rows": 2000, "batch_size": 32}
UNIT = "runs"
PEER = "the usual way, fp32"
CONTESTANTS = {
    PEER: usual_way,
    "ours, fp32": partial(ours, precision="fp32"),
    "ours, auto": partial(ours, precision="auto"),
}
TO_PEER = "to the usual way"
CLAIMS = [
    Claim(f"ten epochs of probing, fp32, {TO_PEER}", "ours, fp32", PEER, target=">= 9"),
    Claim(
        f"ten epochs of probing, default precision, {TO_PEER}", "ours, auto", PEER, target=">= 9"
    ),
    Claim(f"peak memory, probing, {TO_PEER}", "ours, fp32", PEER, "memory"),
]
