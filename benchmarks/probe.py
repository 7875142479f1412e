"""Ten epochs of linear probing on SST, from the files' text to dev scores.

    python benchmarks/run.py probe --data_dir DATA

Ours is the job of `classifier.py --option pretrain`, including the run folder that it writes: the
frozen encoder embeds each row once. The peer does it the usual way: `transformers.BertModel`
without gradients on every batch of every epoch, padded to its longest sentence, a linear head on
the pooler's output, fused `torch.optim.AdamW`, dev predicted after each epoch. Both times include
loading the model and tokenising, and there is no warm-up.
"""

from argparse import Namespace
from functools import partial

import torch
from torch import nn

import classifier
from benchmarks.harness import TEXT, Claim, Work, classifier_flags
from benchmarks.peers import PlainLoop
from datasets import read_examples
from multitask_classifier import run_training
from tasks import TASKS

EPOCHS = 10


def probe_as_usual(args: Namespace) -> int:
    """Run the encoder in every epoch; the number of dev rows that are right."""
    loop = PlainLoop(args)
    bert = loop.bert.eval().requires_grad_(False)  # frozen, and without dropout
    batches = {}
    for split in ("train", "dev"):
        path = args.data_dir / TASKS["sst"].file(split)
        examples, *_ = read_examples(path, TASKS["sst"], limit=args.rows)
        labels = torch.tensor([int(example.label) for example in examples])
        batches[split] = loop.batches([[e.texts[0] for e in examples]], labels, split == "train")
    head, dropout = nn.Linear(loop.width, 5).to(args.device), nn.Dropout(0.1)
    step = loop.optimize(head, lr=1e-2)  # the default rate of our heads
    for _ in range(EPOCHS):
        for [inputs], labels in batches["train"]:
            logits = head(dropout(bert(**inputs).pooler_output))
            step(nn.functional.cross_entropy(logits, labels))
        right = 0
        for [inputs], labels in batches["dev"]:
            right += (head(bert(**inputs).pooler_output).argmax(-1) == labels).sum().item()
    return right


def ours(args: Namespace, precision: str) -> Work:
    """`classifier.py --option pretrain`."""
    flags = {"option": "pretrain", "epochs": EPOCHS, "precision": precision, "device": args.device}
    parsed = classifier.parse_args(classifier_flags(args, **flags))
    return Work(lambda: run_training(parsed), 1, warm_up=False)


SETTINGS = {**TEXT, "rows": 2000, "batch_size": 32, "device": "cpu"}
UNIT = "runs"
PEER, FP32, AUTO = "the usual way, fp32", "ours, fp32", "ours, auto"
CONTESTANTS = {
    PEER: lambda args: Work(partial(probe_as_usual, args), 1, warm_up=False),
    FP32: partial(ours, precision="fp32"),
    AUTO: partial(ours, precision="auto"),
}
JOB, TO_PEER = "ten epochs of probing", "to the usual way"
CLAIMS = [
    Claim(f"{JOB}, fp32, {TO_PEER}", FP32, PEER, target=">= 9"),
    Claim(f"{JOB}, default precision, {TO_PEER}", AUTO, PEER, target=">= 9"),
    Claim(f"peak memory, probing, {TO_PEER}", FP32, PEER, "memory"),
]
