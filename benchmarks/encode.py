"""Sentences per second from text to embeddings, many at a time and one at a time.

    python benchmarks/run.py encode --data_dir DATA

The peer is `SentenceTransformer.encode`, fp32 and bf16, on the same distinct sentences of the
training files of SST, Quora and STS, in the same random order and batch size, with mean pooling.
"auto" is our default precision: bf16 where the hardware multiplies faster in it, else fp32. The
embeddings are checked: scaled to unit length, ours in fp32 differ from the peer's by at most 1e-5,
and those of other precisions have a cosine of at least .999 to them. One at a time, ours are
encoded inside `with model.evaluating():`, which casts the weights once.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import TEXT, Claim, Work, Wrong, leave_project
from bert import BertModel
from datasets import read_examples
from engine.device import setup_device
from model import SentenceEncoder
from tasks import TASKS
from tokenizer import BertTokenizer

ALONE = 200  # sentences that are encoded one at a time
PEER = "sentence-transformers, fp32"
OURS = "ours, fp32"


def sentences(args: Namespace) -> list[str]:
    """Up to `--rows` distinct sentences of the training files, in random order."""
    texts: dict[str, None] = {}
    for name in ("sst", "para", "sts"):
        path = args.data_dir / TASKS[name].files.format("train")
        examples, *_ = read_examples(path, TASKS[name], limit=args.rows)
        texts.update(dict.fromkeys(text for example in examples for text in example.texts))
    shuffled = np.random.default_rng(0).permutation(np.array(list(texts), dtype=object))
    return shuffled[: args.rows].tolist()


def token_counts(args: Namespace, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text."""
    tokenizer = BertTokenizer.from_pretrained(args.model)
    return [len(e.ids) for e in tokenizer.encode_batch(texts, max_length=tokenizer.max_length)]


def encoding(
    texts: Sequence[str],
    encode: Callable[[list[str]], Any],
    alone: bool,
    context: Callable[[], AbstractContextManager] = nullcontext,
    **facts: Any,
) -> Work:
    """Encode all texts, or the first ones one at a time within `context`."""
    if not alone:
        return Work(lambda: encode(texts), len(texts), **facts)
    texts = texts[:ALONE]

    def one_at_a_time() -> list[Any]:
        with context():
            return [encode([text]) for text in texts]

    return Work(one_at_a_time, len(texts))


def st_encode(args: Namespace, dtype: torch.dtype, alone: bool = False) -> Work:
    """`SentenceTransformer.encode`."""
    texts = sentences(args)
    leave_project()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.model, device=args.device).to(dtype)
    return encoding(texts, partial(model.encode, batch_size=args.batch_size), alone)


def ours_encode(args: Namespace, precision: str, alone: bool = False) -> Work:
    """`SentenceEncoder.encode`."""
    device, dtype = setup_device(0, args.device, precision)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    model = SentenceEncoder(BertModel.from_pretrained(args.model), tokenizer, "mean").to(device)
    model.dtype = dtype
    texts = sentences(args)
    return encoding(
        texts,
        partial(model.eval().encode, batch_size=args.batch_size),
        alone,
        model.evaluating,  # as `encode` advises for many small calls
        config=model.bert.config,
        lengths=token_counts(args, texts),
        dtype=dtype,
        training=False,
        pooling="mean",
    )


def check(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """The least cosines and the largest difference to the peer's embeddings, if small enough."""
    units = {
        name: vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        for name, vectors in outputs.items()
    }
    figures: dict[str, float] = {}
    if PEER not in units:
        return figures
    for name, vectors in units.items():
        cosine = float((vectors * units[PEER]).sum(axis=1).min())
        figures[f"least cosine, {name}"] = cosine
        if name.startswith("ours") and not cosine >= 0.999:
            raise Wrong(f"{name}: the least cosine to the embeddings of {PEER} is {cosine:.6f}")
    if OURS in units:
        difference = float(np.abs(units[OURS] - units[PEER]).max())
        figures[f"largest difference, {OURS}"] = difference
        if not difference <= 1e-5:
            raise Wrong(f"{OURS}: an embedding differs from that of {PEER} by {difference:.2e}")
    return figures


SETTINGS = {**TEXT, "rows": 10000, "batch_size": 32}
UNIT = "sentences"
ONE = "one at a time"
CONTESTANTS = {
    PEER: partial(st_encode, dtype=torch.float32),
    "sentence-transformers, bf16": partial(st_encode, dtype=torch.bfloat16),
    OURS: partial(ours_encode, precision="fp32"),
    "ours, auto": partial(ours_encode, precision="auto"),
    f"{ONE}, {PEER}": partial(st_encode, dtype=torch.float32, alone=True),
    f"{ONE}, {OURS}": partial(ours_encode, precision="fp32", alone=True),
    f"{ONE}, ours, auto": partial(ours_encode, precision="auto", alone=True),
}
TO_PEER = "to SentenceTransformer.encode fp32"
CLAIMS = [
    Claim(f"encode, default precision, {TO_PEER}", "ours, auto", PEER, target=">= 2.5"),
    Claim(f"encode, fp32, {TO_PEER}", OURS, PEER, target=">= 1.2"),
    Claim(
        "encode, default precision, to SentenceTransformer.encode bf16",
        "ours, auto",
        "sentence-transformers, bf16",
    ),
    Claim(
        f"time of one sentence, default precision, {TO_PEER}",
        f"{ONE}, ours, auto",
        f"{ONE}, {PEER}",
        "seconds",
        "<= 0.6",
    ),
    Claim(f"time of one sentence, fp32, {TO_PEER}", f"{ONE}, {OURS}", f"{ONE}, {PEER}", "seconds"),
    Claim("useful FLOP rate to matrix rate, encode, fp32", OURS, metric="quotient"),
    Claim("peak memory, encode, fp32, to SentenceTransformer.encode", OURS, PEER, "memory"),
]
