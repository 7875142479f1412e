"""Contrastive training on NLI triples: speed and memory.

    python benchmarks/run.py simcse --data_dir DATA

Supervised SimCSE with mean pooling at a temperature of 0.05. The peers: the plain loop of `train`
in fp32, and sentence-transformers' trainer with its MultipleNegativesRankingLoss in the default
precision. Ours is `ContrastiveBackward` in `Trainer`, as `simcse.py` uses them. Rows are tokenised
before the clock starts; sentence-transformers tokenises as it goes, so against it ours ("from
text") reads and tokenises within the time.
"""

from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.harness import TEXT, Claim, Work
from benchmarks.train import epoch_of, token_counts
from bert import BertModel
from datasets import NLI_COLUMNS, TokenizedDataset, read_triples
from engine.device import setup_device
from model import SentenceEncoder
from simcse import ContrastiveBackward
from tokenizer import BertTokenizer

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
    batches = loop.batches(texts, range(len(texts[0])))
    step = loop.optimize(loop.bert)

    def embed(batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"][:, :, None]
        mean = (loop.bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)

    def epoch() -> None:
        for sides, _ in batches:
            anchors, positives, negatives = map(embed, sides)
            scores = anchors @ torch.cat([positives, negatives]).T / TEMPERATURE
            step(F.cross_entropy(scores, torch.arange(len(anchors), device=args.device)))

    return Work(epoch, len(texts[0]))


def st_trainer(args: Namespace) -> Work:
    """The trainer of sentence-transformers, from text."""
    return peers.st_trainer(
        args,
        {"nli": dict(zip(NLI_COLUMNS, columns(args), strict=True))},
        lambda losses, bert: losses.MultipleNegativesRankingLoss(bert, scale=1 / TEMPERATURE),
    )


def ours(args: Namespace, precision: str, from_text: bool = False) -> Work:
    """This project's."""
    device, dtype = setup_device(0, args.device, precision)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    model = SentenceEncoder(BertModel.from_pretrained(args.model), pooling="mean").to(device)
    model.dtype = dtype

    def load() -> TokenizedDataset:
        path = args.data_dir / FILE
        return TokenizedDataset("nli", path, columns(args), tokenizer, min_batch_size=2)

    data = load()
    loss = Namespace(pooling="mean", temperature=TEMPERATURE, hard_negative_weight=1.0)
    backward = ContrastiveBackward(model, loss)
    epoch = epoch_of(args, model, backward, lambda: [load() if from_text else data])
    lengths = token_counts([data])
    return Work(epoch, len(data), model.bert.config, lengths, dtype, pooling="mean")


SETTINGS = {**TEXT, "rows": 320, "batch_size": 32}
UNIT = "rows"
PEER = "plain, fp32"
CONTESTANTS = {
    PEER: plain,
    "sentence-transformers, auto": st_trainer,
    "ours, fp32": partial(ours, precision="fp32"),
    "ours, auto": partial(ours, precision="auto"),
    "ours, auto, from text": partial(ours, precision="auto", from_text=True),
}
CLAIMS = [
    Claim("SimCSE, default precision, to plain loop fp32", "ours, auto", PEER),
    Claim("SimCSE, fp32, to plain loop fp32", "ours, fp32", PEER),
    Claim(
        "SimCSE from text, to sentence-transformers' trainer, same precision",
        "ours, auto, from text",
        "sentence-transformers, auto",
    ),
    Claim("useful FLOP rate to matrix rate, SimCSE, fp32", "ours, fp32", metric="quotient"),
    Claim("peak memory, SimCSE, fp32, to plain loop", "ours, fp32", PEER, "memory"),
]
