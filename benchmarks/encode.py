"""Sentences per second from text to embeddings, many at a time and one at a time.

    python benchmarks/run.py encode --data_dir DATA

The peer is `SentenceTransformer.encode`, fp32 and bf16, on the same distinct sentences of the
training files of SST, Quora and STS, in the same random order and batch size, with mean pooling.
The embeddings are checked: scaled to unit length, ours in fp32 differ from the peer's by at most
1e-5, and in other precisions their cosine to the peer's is at least .999. For one sentence at a
time, ours run inside `with model.evaluating():`, which casts the weights once.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import TEXT, Claim, Work, flop_rates, leave_project
from bert import BertModel
from datasets import TokenizedDataset, read_examples
from engine.device import setup_device
from engine.errors import UserError
from model import SentenceEncoder
from tasks import TASKS
from tokenizer import BertTokenizer

ST, ST_BF16 = "sentence-transformers, fp32", "sentence-transformers, bf16"
FP32, AUTO = "ours, fp32", "ours, auto"
ALONE = 200  # sentences that are encoded one at a time


def sentences(args: Namespace) -> list[str]:
    """Up to `--rows` distinct sentences of the training files, in random order."""
    texts: dict[str, None] = {}
    for task in (TASKS["sst"], TASKS["para"], TASKS["sts"]):
        examples, *_ = read_examples(args.data_dir / task.file("train"), task, limit=args.rows)
        texts |= dict.fromkeys(text for example in examples for text in example.texts)
    # As objects: numpy would give every string the size of the longest.
    shuffled = np.random.default_rng(0).permutation(np.array(list(texts), dtype=object))
    return shuffled[: args.rows].tolist()


def encoding(encode: Callable[..., Any], texts: list[str], alone: bool, **options: Any) -> Work:
    """Encode all texts in one call, or the first ones in a call each."""
    if not alone:
        return Work(lambda: encode(texts), len(texts), **options)
    texts = texts[:ALONE]
    return Work(lambda: [encode([text]) for text in texts], len(texts))


def peer(args: Namespace, dtype: torch.dtype, alone: bool = False) -> Work:
    """`SentenceTransformer.encode`."""
    texts = sentences(args)
    leave_project()  # after the last import of ours
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.model, device=args.device).to(dtype)
    return encoding(partial(model.encode, batch_size=args.batch_size), texts, alone)


def our_encoder(args: Namespace, precision: str) -> SentenceEncoder:
    """The model with mean pooling."""
    device, dtype = setup_device(0, args.device, precision)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    model = SentenceEncoder(BertModel.from_pretrained(args.model), tokenizer, "mean").to(device)
    model.dtype = dtype
    return model


def ours(args: Namespace, precision: str, alone: bool = False) -> Work:
    """`SentenceEncoder.encode`."""
    model, texts = our_encoder(args, precision), sentences(args)
    lengths = TokenizedDataset("", Path("texts"), [texts], model.tokenizer).lengths.tolist()
    rates = partial(flop_rates, args, model, lengths, len(texts), False)
    work = encoding(partial(model.encode, batch_size=args.batch_size), texts, alone, figures=rates)
    work.run = model.evaluating()(work.run)  # once around all calls, as `encode` advises
    return work


def check(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """The least cosines and the largest difference to the peer's embeddings, if small enough."""
    units = {n: v / np.linalg.norm(v.astype(float), axis=1)[:, None] for n, v in outputs.items()}
    if ST not in units:
        return {}
    figures = {f"least cosine, {n}": float((v * units[ST]).sum(1).min()) for n, v in units.items()}
    if FP32 in units:
        figures[f"largest difference, {FP32}"] = float(np.abs(units[FP32] - units[ST]).max())
    for name, value in figures.items():
        close = value <= 1e-5 if "difference" in name else value >= 0.999  # NaN is neither
        if "ours" in name and not close:
            raise UserError(f"{name}, to the embeddings of {ST}: {value:.6g}")
    return figures


one = "one at a time, {}".format
SETTINGS = {**TEXT, "rows": 10000, "batch_size": 32, "device": "cpu"}
UNIT = "sentences"
CONTESTANTS = {
    ST: partial(peer, dtype=torch.float32),
    ST_BF16: partial(peer, dtype=torch.bfloat16),
    FP32: partial(ours, precision="fp32"),
    AUTO: partial(ours, precision="auto"),
    one(ST): partial(peer, dtype=torch.float32, alone=True),
    one(FP32): partial(ours, precision="fp32", alone=True),
    one(AUTO): partial(ours, precision="auto", alone=True),
}
TO_PEER, TIME = "to SentenceTransformer.encode", "time of one sentence"
CLAIMS = [
    Claim(f"encode, default precision, {TO_PEER} fp32", AUTO, ST, target=">= 2.5"),
    Claim(f"encode, fp32, {TO_PEER} fp32", FP32, ST, target=">= 1.2"),
    Claim(f"encode, default precision, {TO_PEER} bf16", AUTO, ST_BF16),
    Claim(f"{TIME}, default precision, {TO_PEER} fp32", one(AUTO), one(ST), "seconds", "<= 0.6"),
    Claim(f"{TIME}, fp32, {TO_PEER} fp32", one(FP32), one(ST), "seconds"),
    Claim("useful FLOP rate to matrix rate, encode, fp32", FP32, metric="quotient"),
    Claim(f"peak memory, encode, fp32, {TO_PEER}", FP32, ST, "memory"),
]
