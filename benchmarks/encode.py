"""Sentences per second from text to vectors, many at a time and one at a time.

    python benchmarks/encode.py --data_dir DATA

The peer is `SentenceTransformer.encode`, fp32 and bf16, on the same distinct sentences of the
training files of SST, Quora and STS, in the same random order and batch size. "auto" is the default
precision; where that is fp32, since bf16 is slower, bf16 is skipped. The products of a sentence's
tokens with the encoder's weights, and nothing else, show how fast one sentence can be at most: the
weights come from memory for each. Vectors are those of mean pooling. That they are the same is
checked: scaled to unit length, ours in fp32 differ from the peer's by at most 1e-5, and those of
every other precision have a cosine of at least .999 to them. `--device cuda` runs on a GPU, where
nothing has been measured yet.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import (
    TEXTS,
    Benchmark,
    Claim,
    Missing,
    Work,
    Wrong,
    leave_project,
    main,
    useful_flops,
)
from benchmarks.train import default_dtype
from options import script

ALONE = 200  # sentences that are encoded one at a time
PEER = "sentence-transformers, fp32"
OURS = "ours, fp32"


def sentences(args: Namespace) -> list[str]:
    """Distinct sentences of the training files, as many as `--rows` or all, in random order."""
    import numpy as np

    from datasets import read
    from tasks import TASKS

    texts: dict[str, None] = {}
    for name in ("sst", "para", "sts"):
        path = args.data_dir / TASKS[name].files.format("train")
        examples, _ = read(path, TASKS[name], limit=args.rows)
        texts.update(dict.fromkeys(text for example in examples for text in example.texts))
    shuffled = np.random.default_rng(0).permutation(np.array(list(texts), dtype=object))
    return shuffled[: args.rows].tolist()


def encoding(
    args: Namespace,
    texts: Sequence[str],
    encode: Callable[[list[str]], Any],
    config: Any,
    lengths: Sequence[int],
    dtype: str,
    alone: bool,
) -> Work:
    """A pass of `encode` over the texts, or over a few of them one at a time."""
    if alone:
        texts = texts[:ALONE]
        return Work(lambda: [encode([text]) for text in texts], len(texts), dtype=dtype)
    return Work(
        lambda: encode(texts),
        len(texts),
        useful_flops(config, lengths, training=False, pooling="mean"),
        config,
        max(1, sum(lengths) * min(args.batch_size, len(texts)) // len(texts)),
        dtype,
    )


def token_counts(args: Namespace, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, with [CLS] and [SEP]."""
    from tokenizer import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(args.model)
    return [len(e.ids) for e in tokenizer.encode_batch(texts, max_length=tokenizer.max_length)]


def peer_encode(args: Namespace, dtype: str, alone: bool = False) -> Work:
    """`SentenceTransformer.encode`."""
    texts = sentences(args)
    lengths = token_counts(args, texts)
    if dtype == "bfloat16" and default_dtype(args) != dtype:
        raise Missing("this machine multiplies slower in bf16 than in fp32")
    leave_project()
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.model, device=args.device).to(getattr(torch, dtype))

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, batch_size=args.batch_size)

    return encoding(args, texts, encode, model[0].auto_model.config, lengths, dtype, alone)


def ours_encode(args: Namespace, precision: str, alone: bool = False) -> Work:
    """`MultitaskBERT.encode`."""
    from bert import BertModel
    from tasks import MultitaskBERT
    from tokenizer import BertTokenizer
    from train import prepare

    texts = sentences(args)
    device, dtype = prepare(0, args.device, precision)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    bert = BertModel.from_pretrained(args.model)
    model = MultitaskBERT(bert, [], pooling="mean", tokenizer=tokenizer).to(device).eval()
    model.precision = dtype
    encode = partial(model.encode, batch_size=args.batch_size)
    name = str(dtype).removeprefix("torch.")
    return encoding(args, texts, encode, bert.config, token_counts(args, texts), name, alone)


def products(args: Namespace) -> Work:
    """The linear layers of the encoder, one sentence at a time, in fp32."""
    import torch
    from torch.nn import functional as F

    from bert import BertModel

    bert = BertModel.from_pretrained(args.model).to(args.device)
    weights = [weight for layer in bert.layers for weight in layer.parameters() if weight.ndim == 2]
    lengths = token_counts(args, sentences(args)[:ALONE])
    inputs = {
        (length, size): torch.randn(length, size, device=args.device)
        for length in set(lengths)
        for size in {weight.size(1) for weight in weights}
    }

    @torch.inference_mode()
    def multiply() -> None:
        for length in lengths:
            for weight in weights:
                F.linear(inputs[length, weight.size(1)], weight)

    return Work(multiply, len(lengths))


def check(found: dict[str, Any]) -> dict[str, float]:
    """Wrong, unless all vectors are the peer's; the largest difference, and the least cosine."""
    import numpy as np

    units = {
        name: vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        for name, vectors in found.items()
    }
    figures: dict[str, float] = {}
    peer = units.get(PEER)
    if peer is None:
        return figures
    for name, vectors in units.items():
        cosine = float((vectors * peer).sum(axis=1).min())
        figures[f"least cosine, {name}"] = cosine
        if name.startswith("ours") and not cosine >= 0.999:
            raise Wrong(f"{name}: the least cosine to the vectors of {PEER} is {cosine:.6f}")
    if OURS in units:
        difference = float(np.abs(units[OURS] - peer).max())
        figures[f"largest difference, {OURS}"] = difference
        if not difference <= 1e-5:
            raise Wrong(f"{OURS}: a vector differs from that of {PEER} by {difference:.2e}")
    return figures


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "sentences",
    {
        PEER: partial(peer_encode, dtype="float32"),
        "sentence-transformers, bf16": partial(peer_encode, dtype="bfloat16"),
        OURS: partial(ours_encode, precision="fp32"),
        "ours, auto": partial(ours_encode, precision="auto"),
        "one at a time, sentence-transformers, fp32": partial(
            peer_encode, dtype="float32", alone=True
        ),
        "one at a time, ours, fp32": partial(ours_encode, precision="fp32", alone=True),
        "one at a time, ours, auto": partial(ours_encode, precision="auto", alone=True),
        "one at a time, matrix products, fp32": products,
    },
    [
        Claim(
            "encode, default precision, to SentenceTransformer.encode fp32",
            "ours, auto",
            PEER,
            target=">= 2.5",
        ),
        Claim(
            "encode, fp32, to SentenceTransformer.encode fp32",
            OURS,
            PEER,
            target=">= 1.2",
        ),
        Claim(
            "encode, default precision, to SentenceTransformer.encode bf16",
            "ours, auto",
            "sentence-transformers, bf16",
        ),
        Claim(
            "time of one sentence, default precision, to SentenceTransformer.encode fp32",
            "one at a time, ours, auto",
            "one at a time, sentence-transformers, fp32",
            "seconds",
            "<= 0.6",
        ),
        Claim(
            "time of one sentence, fp32, to SentenceTransformer.encode fp32",
            "one at a time, ours, fp32",
            "one at a time, sentence-transformers, fp32",
            "seconds",
        ),
        Claim(
            "time of one sentence's matrix products alone, to SentenceTransformer.encode fp32",
            "one at a time, matrix products, fp32",
            "one at a time, sentence-transformers, fp32",
            "seconds",
        ),
        Claim("useful FLOP rate to matrix rate, encode, fp32", OURS, None, "quotient"),
        Claim("peak memory, encode, fp32, to SentenceTransformer.encode", OURS, PEER, "memory"),
    ],
    {**TEXTS, "rows": 10000, "batch_size": 32, "device": "cpu"},
    {"rows": 64},
    check,
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
