"""Contrastive training on NLI triples: speed and memory.

    python benchmarks/run.py simcse --data_dir DATA

Supervised SimCSE with mean pooling at a temperature of 0.05. The peers are the plain loop of
`train` and the trainer of sentence-transformers with its MultipleNegativesRankingLoss, which
tokenises during training: compared with it, our time ("from text") includes reading and tokenising,
too. Ours is `ContrastiveBackward` in `Trainer`, as in `simcse.py`.
"""

from argparse import Namespace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.encode import our_encoder
from benchmarks.harness import TEXT, Claim, Work
from benchmarks.train import train_epochs
from datasets import NLI_COLUMNS, TokenizedDataset, read_triples
from simcse import ContrastiveBackward

FILE = "nli_for_simcse.csv"
TEMPERATURE = 0.05


def columns(args: Namespace) -> list[tuple[str, ...]]:
    """The premises, entailments and contradictions."""
    triples, _ = read_triples(args.data_dir / FILE, args.rows)
    return list(zip(*triples, strict=True))


def plain(args: Namespace) -> Work:
    """The plain loop."""
    loop = peers.PlainLoop(args)
    texts = columns(args)
    rows = len(texts[0])
    batches = loop.batches(texts, torch.arange(rows))
    step = loop.optimize(loop.bert)

    def embed(batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"][:, :, None]
        mean = (loop.bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)

    def epoch() -> None:
        for sides, _ in batches:
            anchors, positives, negatives = map(embed, sides)
            # A row's candidates are the second and third sentences of all rows.
            scores = anchors @ torch.cat([positives, negatives]).T / TEMPERATURE
            step(F.cross_entropy(scores, torch.arange(len(anchors), device=args.device)))

    return Work(epoch, rows)


def st_trainer(args: Namespace) -> Work:
    """The trainer of sentence-transformers, from text."""
    tables = {"nli": dict(zip(NLI_COLUMNS, columns(args), strict=True))}
    return peers.st_trainer(args, tables, "MultipleNegativesRankingLoss", scale=1 / TEMPERATURE)


def ours(args: Namespace, precision: str, from_text: bool = False) -> Work:
    """This project's."""
    model = our_encoder(args, precision)

    def read() -> list[TokenizedDataset]:
        path, texts = args.data_dir / FILE, columns(args)
        return [TokenizedDataset("nli", path, texts, model.tokenizer, min_batch_size=2)]

    # The defaults of simcse.py, but for the pooling.
    loss = Namespace(pooling="mean", temperature=TEMPERATURE, hard_negative_weight=1.0)
    backward = ContrastiveBackward(model, loss)
    return train_epochs(args, model, backward, read if from_text else cache(read))


SETTINGS = {**TEXT, "rows": 320, "batch_size": 32, "device": "cpu"}
UNIT = "rows"
PEER, ST, FROM_TEXT = "plain, fp32", "sentence-transformers, auto", "ours, auto, from text"
CONTESTANTS = {
    PEER: plain,
    ST: st_trainer,
    "ours, fp32": partial(ours, precision="fp32"),
    "ours, auto": partial(ours, precision="auto"),
    FROM_TEXT: partial(ours, precision="auto", from_text=True),
}
TO_ST = "to sentence-transformers' trainer, same precision"
CLAIMS = [
    Claim("SimCSE, default precision, to plain loop fp32", "ours, auto", PEER),
    Claim("SimCSE, fp32, to plain loop fp32", "ours, fp32", PEER),
    Claim(f"SimCSE from text, {TO_ST}", FROM_TEXT, ST),
    Claim("useful FLOP rate to matrix rate, SimCSE, fp32", "ours, fp32", metric="quotient"),
    Claim("peak memory, SimCSE, fp32, to plain loop", "ours, fp32", PEER, "memory"),
]
