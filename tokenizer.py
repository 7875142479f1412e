"""BERT's WordPiece tokenizer, on top of the `tokenizers` library.

tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
batch = tokenizer(["A fine film.", "Dull."], padding=True, truncation=True, return_tensors="pt")
batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor

from engine.checkpoint import write_json, write_text
from engine.errors import reading
from hub.models import resolve_model
from hub.tokenizer_files import NORMALIZATION, SPECIAL_TOKENS, TokenizerFiles, read_tokenizer

TRUNCATION = ("longest_first", "only_first", "only_second")


class BatchEncoding(dict):
    """Token ids and masks by name, also as attributes: `batch.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        """An entry as an attribute."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name} here; there are {', '.join(self)}") from None

    def to(self, device: torch.device | str) -> "BatchEncoding":
        """The same batch with its tensors on `device`."""
        return BatchEncoding({name: tensor.to(device) for name, tensor in self.items()})


class BertTokenizer:
    """Text to token ids, equal to `transformers.BertTokenizerFast`.

    Attributes: `max_length`, the model's limit in tokens; `pad_token` and `pad_token_id`, and the
    same for `unk`, `cls`, `sep` and `mask`.
    """

    def __init__(self, files: TokenizerFiles):
        self.files = files
        self.max_length = files.max_length
        with reading(files.source, "the tokenizer of a BERT"):
            self.backend = build_backend(files)
        # Truncation is a setting of the library's object: one copy per setting keeps threads apart.
        self._truncating: dict[tuple[int, str], Tokenizer] = {}
        for key, token in files.special.items():
            setattr(self, key, token)
            setattr(self, f"{key}_id", self.backend.token_to_id(token))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> "BertTokenizer":
        """Load the tokenizer of a model folder, a hub id or a bundled model.

        settings: entries of `tokenizer_config.json` to change, such as `do_lower_case=False`.
        """
        # An argument without effect would be misleading: refuse it.
        for key in settings:
            if key not in {*NORMALIZATION, *SPECIAL_TOKENS, "model_max_length"}:
                raise TypeError(f"BertTokenizer.from_pretrained: {key} is not supported")
        options = {"local_files_only": local_files_only, "cache_dir": cache_dir}
        folder = resolve_model(name, weights=False, revision=revision, **options)
        return cls(read_tokenizer(folder, settings))

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Token ids of sentences, or of sentence pairs as "[CLS] a [SEP] b [SEP]".

        texts, pairs: a string or B strings each, the first and the second sentences. padding: to
        the "longest" of the batch (True) or "max_length". truncation: to `max_length` tokens
        (default: the model's limit); of a pair "longest_first" (True), "only_first" or
        "only_second". return_tensors: "pt" for (B, T), None for lists.

        Returns `input_ids`, `token_type_ids` (1 for the second sentence) and `attention_mask`.
        """
        tensors = _option("return_tensors", return_tensors or False, "None", "pt") == "pt"
        single = isinstance(texts, str)  # gives lists instead of lists of lists
        texts, pairs = ([x] if isinstance(x, str) else x for x in (texts, pairs))
        limit = max_length or self.max_length
        truncation = _option("truncation", truncation, "do_not_truncate", *TRUNCATION)
        encodings = self._encode(texts, pairs, limit, truncation)
        widths = {"do_not_pad": 0, "longest": max(map(len, encodings), default=0)}
        widths["max_length"] = limit
        width = widths[_option("padding", padding, *widths)]

        def column(rows: list[list[int]], fill: int) -> Any:
            rows = [row + [fill] * (width - len(row)) for row in rows]
            if tensors:
                return torch.tensor(rows, dtype=torch.long)
            return rows[0] if single else rows

        return BatchEncoding(
            input_ids=column([e.ids for e in encodings], self.pad_token_id),
            token_type_ids=column([e.type_ids for e in encodings], 0),
            attention_mask=column([e.attention_mask for e in encodings], 0),
        )

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """The library's own encodings, unpadded; truncated ones have a non-empty `overflowing`."""
        strategy = "do_not_truncate" if max_length is None else "longest_first"
        return self._encode(texts, pairs, max_length, strategy)

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        max_length: int | None,
        strategy: str,
    ) -> list[Encoding]:
        if strategy == "do_not_truncate":
            backend = self.backend
        else:
            key = (max_length, strategy)
            if key not in self._truncating:
                backend = copy.deepcopy(self.backend)
                backend.enable_truncation(max_length, strategy=strategy)
                self._truncating[key] = backend
            backend = self._truncating[key]
        if pairs is None:
            return backend.encode_batch(list(texts))
        rows = list(zip(texts, pairs, strict=True))
        # The other strategies cut one sentence only, so there are no combinations of pieces.
        if strategy == "longest_first":
            rows = [self._cut(row, max_length, backend) for row in rows]
        return backend.encode_batch(rows)

    def _cut(self, pair: tuple[str, str], max_length: int, backend: Tokenizer) -> tuple[str, str]:
        """Shorten two long texts before the library truncates their pair.

        For a truncated pair, the library returns all combinations of both sentences' left-over
        pieces: quadratic time and memory for two long texts. The longer text must stay the longer
        one, because the library gives it the odd token.
        """
        if max(map(len, pair)) <= max_length:
            return pair  # few characters are few tokens
        # With truncation on, the rest of a text comes back in pieces.
        encodings = [backend.encode(text, add_special_tokens=False) for text in pair]
        pieces = [[e, *e.overflowing] for e in encodings]  # of `max_length` tokens each
        lengths = [sum(map(len, parts)) for parts in pieces]
        # Cut after whole pieces: keep twice the limit of the longer text, once of the other.
        keep = (2, 1) if lengths[0] > lengths[1] else (1, 2)
        first, second = (
            text[: parts[n - 1].offsets[-1][1]] if len(parts) > n else text
            for text, parts, n in zip(pair, pieces, keep, strict=True)
        )
        return first, second

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, without [CLS] and [SEP]."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def encode(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        """The token ids of a sentence or a pair."""
        return self.backend.encode(text, pair, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Token ids (T,) back to text."""
        ids = [int(index) for index in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or of each of several; unknown tokens get the id of [UNK]."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend.token_to_id(tokens)  # None if it is not in the vocabulary
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor) -> str | list[str]:
        """The token of an id, or of each of several."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(int(index)) for index in ids]

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (a duplicate line in vocab.txt leaves an id unused)."""
        # Not the number of tokens: the weights have a row for every id up to the largest.
        return max(self.backend.get_vocab().values()) + 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json`.

        The last has all settings in use, whatever file they came from: another library would use
        its own default for a missing one.
        """
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        # No added tokens in vocab.txt: a loader would take them for word pieces.
        vocab = {index: token for token, index in self.backend.get_vocab(False).items()}
        lines = [vocab.get(index, f"[unused line {index}]") for index in range(max(vocab) + 1)]
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in lines))
        # For software that reads vocab.txt, which does not say which tokens were added, and how.
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = {
            str(index): {flag: getattr(token, flag) for flag in flags}
            for index, token in self.backend.get_added_tokens_decoder().items()
        }
        settings = {"tokenizer_class": "BertTokenizer", "model_max_length": self.max_length}
        settings |= {
            **self.files.special,
            **self.files.normalization,
            "added_tokens_decoder": added,
        }
        write_json(folder / "tokenizer_config.json", settings)


def _option(name: str, value: bool | str, off: str, *choices: str) -> str:
    """A bool or a string as a string: False means `off`, True the first choice."""
    if isinstance(value, bool):  # as in transformers
        return choices[0] if value else off
    if value not in (off, *choices):
        raise ValueError(f"{name}={value!r}: expected a bool, {off} or {', '.join(choices)}")
    return value


def build_backend(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer of the original BERT for a vocabulary, with the tokens added to it."""
    # Only these parts, whatever pipeline tokenizer.json describes: nothing in a file is executed.
    vocabulary, special = files.vocabulary, files.special
    missing = [token for token in special.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"the vocabulary has no {missing[0]}")
    # Text -> cleaned and lower-cased -> words and punctuation marks -> pieces in the vocabulary,
    # the longest first: "unaffable" -> "una", "##ffa", "##ble".
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    flags = {name: files.normalization[key] for key, (name, _) in NORMALIZATION.items()}
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **flags)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    tokens = [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in files.added]
    for token in tokens:
        text = token.content
        # The library would search for an empty token forever.
        if not (backend.normalizer.normalize_str(text) if token.normalized else text):
            raise ValueError(f"the added token {text!r} is empty after normalization")
    backend.add_tokens(tokens)
    # An added token gets the next free id, which must be the one the weights were trained with.
    for token in files.added:
        if backend.token_to_id(token["content"]) != token.get("id"):
            raise ValueError(f"the added token {token['content']!r} cannot have id {token['id']}")
    backend.add_tokens([AddedToken(token, special=True) for token in special.values()])
    # "[CLS] a [SEP]" and "[CLS] a [SEP] b [SEP]", with segment ids 1 from b on.
    sep, cls = ((special[key], vocabulary[special[key]]) for key in ("sep_token", "cls_token"))
    backend.post_processor = BertProcessing(sep, cls)
    return backend
