"""Sentences per second from text to token ids.

    python benchmarks/run.py tokenization --data_dir DATA

Ours is `BertTokenizer.encode_batch`, the peer `transformers.BertTokenizerFast`; both return lists
of ids, which are checked to be equal.
"""

from argparse import Namespace
from functools import partial

import numpy as np

from benchmarks.encode import sentences
from benchmarks.harness import TEXT, Claim, Work
from engine.errors import UserError
from tokenizer import BertTokenizer


def peer(args: Namespace) -> Work:
    """`transformers`."""
    import transformers

    texts = sentences(args)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    options = {"truncation": True, "return_attention_mask": False, "return_token_type_ids": False}
    return Work(lambda: flatten(tokenizer(texts, **options)["input_ids"]), len(texts))


def ours(args: Namespace) -> Work:
    """This project's."""
    texts = sentences(args)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    encode = partial(tokenizer.encode_batch, texts, max_length=tokenizer.max_length)
    return Work(lambda: flatten([e.ids for e in encode()]), len(texts))


def flatten(rows: list[list[int]]) -> np.ndarray:
    """All ids in one array, those of each sentence after their number."""
    return np.array([number for row in rows for number in (len(row), *row)], dtype=np.int32)


def check(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """How many ids are equal: all of them."""
    if not {"ours", "transformers"} <= set(outputs):
        return {}
    if not np.array_equal(outputs["ours"], outputs["transformers"]):
        raise UserError("the ids differ from those of transformers")
    return {"ids that are equal": len(outputs["ours"])}


SETTINGS = {**TEXT, "rows": 10000, "passes": 5}
UNIT = "sentences"
CONTESTANTS = {"transformers": peer, "ours": ours}
CLAIMS = [
    Claim("tokenise, to transformers' fast tokenizer", "ours", "transformers"),
    Claim("peak memory, tokenise, to transformers", "ours", "transformers", "memory"),
]
