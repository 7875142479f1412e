"""Sentences per second from text to token ids. (`tokenize` is a module of Python's own.)

    python benchmarks/tokenization.py --data_dir DATA

Ours is `BertTokenizer.encode_batch`, as `datasets.py` uses it, to lists of ids; the peer is
`transformers.BertTokenizerFast`, to the same. That the ids are equal is checked.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.encode import sentences
from benchmarks.harness import TEXTS, Benchmark, Claim, Work, Wrong, main
from options import script


def peer_tokenize(args: Namespace) -> Work:
    """`transformers`."""
    import transformers

    texts = sentences(args)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    settings = {"return_attention_mask": False, "return_token_type_ids": False}

    def tokenise() -> Any:
        return flat(tokenizer(texts, truncation=True, **settings)["input_ids"])

    return Work(tokenise, len(texts))


def ours_tokenize(args: Namespace) -> Work:
    """This project's."""
    from tokenizer import BertTokenizer

    texts = sentences(args)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    limit = tokenizer.max_length

    def tokenise() -> Any:
        return flat([e.ids for e in tokenizer.encode_batch(texts, max_length=limit)])

    return Work(tokenise, len(texts))


def flat(rows: list[list[int]]) -> Any:
    """All ids in one array, each sentence after its length."""
    import numpy as np

    return np.array([number for row in rows for number in (len(row), *row)], dtype=np.int32)


def check(found: dict[str, Any]) -> dict[str, float]:
    """Wrong, unless both gave the same ids; how many."""
    if {"ours", "transformers"} <= set(found):
        if not (found["ours"].tolist() == found["transformers"].tolist()):
            raise Wrong("the ids differ from those of transformers")
        return {"ids that are equal": len(found["ours"])}
    return {}


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "sentences",
    {"transformers": peer_tokenize, "ours": ours_tokenize},
    [
        Claim("tokenise, to transformers' fast tokenizer", "ours", "transformers"),
        Claim("peak memory, tokenise, to transformers", "ours", "transformers", "memory"),
    ],
    {**TEXTS, "rows": 10000, "passes": 5},
    {"rows": 64, "passes": 1},
    check,
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
