"""BERT's WordPiece tokenizer, on top of the `tokenizers` library.

tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
batch = tokenizer(["A fine film.", "Dull."], padding=True, truncation=True, return_tensors="pt")
batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Encoding,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import WordPiece

from engine.checkpoint import read_json, read_text, write_json, write_text
from engine.errors import UserError, reading
from engine.hub import resolve_model

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# How text is normalized: name in tokenizer_config.json -> (name in tokenizer.json, default).
NORMALIZATION = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # None: strip them if the text is lower-cased
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
# What a tokenizer.json must contain to be BERT's, where it says anything.
BERT_PIPELINE = {
    ("model", "type"): "WordPiece",
    ("model", "continuing_subword_prefix"): "##",
    ("model", "max_input_chars_per_word"): 100,
    ("normalizer", "type"): "BertNormalizer",
    ("pre_tokenizer", "type"): "BertPreTokenizer",
}
CHUNK = 8192  # texts tokenised at a time; bounds the memory of the library's Encoding objects
# A vocabulary, the stored normalization by the names of tokenizer.json, and added tokens.
Source = tuple[dict[str, int], dict[str, Any], list[dict[str, Any]]]


class BertTokenizer:
    """Text to token ids, equal to `transformers.BertTokenizerFast`.

    Attributes: `max_length`, the model's limit in tokens; `vocab_size`; `pad_token` and
    `pad_token_id`, and the same for `unk`, `cls`, `sep` and `mask`.
    """

    def __init__(self, backend: Tokenizer, settings: dict[str, Any], max_length: int):
        self.backend = backend
        self.settings = settings
        self.max_length = max_length
        for key, token in _special_tokens(settings).items():
            setattr(self, key, token)
            setattr(self, f"{key}_id", backend.token_to_id(token))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, local_files_only: bool = False
    ) -> "BertTokenizer":
        """Load the tokenizer of a model folder, a hub id or a bundled model.

        Reads `tokenizer.json`, or else `vocab.txt`; the normalization that `tokenizer_config.json`
        gives wins over what `tokenizer.json` has stored.
        """
        folder = resolve_model(name, weights=False, local_files_only=local_files_only)
        files = [folder / name for name in ("tokenizer_config.json", "config.json")]
        settings, config = (read_json(path) if path.exists() else {} for path in files)
        readers = {"tokenizer.json": _read_tokenizer_json, "vocab.txt": _read_vocabulary}
        source = next((folder / name for name in readers if (folder / name).exists()), None)
        if source is None:
            raise UserError(f"{folder}: no tokenizer; expected tokenizer.json or vocab.txt")
        vocabulary, flags, added = readers[source.name](source)
        for key, (ours, default) in NORMALIZATION.items():
            flags[ours] = value = settings.get(key, flags.get(ours, default))
            if not isinstance(value, bool) and (value, default) != (None, None):
                path, name = (files[0], key) if key in settings else (source, ours)
                raise UserError(f"{path}: {name} is {value!r}, expected true or false")
        with reading(source, "the tokenizer of a BERT"):
            backend = _build(vocabulary, _special_tokens(settings), flags, added)
        return cls(backend, settings, _max_length(folder, config, settings))

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Token ids of sentences, or of sentence pairs as "[CLS] a [SEP] b [SEP]".

        texts, pairs: one string or B strings each; `pairs` holds the second sentences. padding: to
        the longest of the batch. truncation: to `max_length` tokens (default: the model's limit),
        of a pair the longer sentence first. return_tensors: "pt" for (B, T), None for lists.

        Returns `input_ids`, `token_type_ids` (0 for the first sentence, 1 for the second) and
        `attention_mask` (1 for a token, 0 for padding).
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or None")
        single = isinstance(texts, str)  # gives lists instead of lists of lists
        texts = [texts] if single else list(texts)
        if pairs is not None:
            pairs = [pairs] if isinstance(pairs, str) else list(pairs)
        limit = (max_length or self.max_length) if truncation else None
        encodings = self.encode_batch(texts, pairs, max_length=limit)
        width = max((len(e) for e in encodings), default=0) if padding else 0

        def column(rows: list[list[int]], fill: int) -> Any:
            rows = [row + [fill] * (width - len(row)) for row in rows]
            if return_tensors == "pt":
                return torch.tensor(rows, dtype=torch.long)
            return rows[0] if single else rows

        return {
            "input_ids": column([e.ids for e in encodings], self.pad_token_id),
            "token_type_ids": column([e.type_ids for e in encodings], 0),
            "attention_mask": column([e.attention_mask for e in encodings], 0),
        }

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """The library's own encodings, unpadded; truncated ones have a non-empty `overflowing`."""
        # Truncation is a setting of the library's object, not an argument.
        if max_length is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_length, strategy="longest_first")
        if pairs is None:
            return self.backend.encode_batch(list(texts))
        rows = list(zip(texts, pairs, strict=True))
        if max_length is not None:
            rows = [self._cut(row, max_length) for row in rows]
        return self.backend.encode_batch(rows)

    def _cut(self, pair: tuple[str, str], max_length: int) -> tuple[str, str]:
        """Shorten two long texts before the library truncates their pair.

        Of a truncated pair, the library keeps every left-over piece of one sentence combined with
        every one of the other: two long texts would take quadratic time and memory. The longer
        text stays the longer one, as the library gives it the odd token.
        """
        if max(map(len, pair)) <= max_length:
            return pair  # few characters are few tokens
        # With truncation on, what a text has beyond the limit comes back in pieces.
        encodings = [self.backend.encode(text, add_special_tokens=False) for text in pair]
        pieces = [[e, *e.overflowing] for e in encodings]  # of `max_length` tokens each
        lengths = [sum(map(len, parts)) for parts in pieces]
        # Cut after whole pieces: twice the limit is kept of the longer text, once of the other.
        keep = (2, 1) if lengths[0] > lengths[1] else (1, 2)
        first, second = (
            text[: parts[n - 1].offsets[-1][1]] if len(parts) > n else text
            for text, parts, n in zip(pair, pieces, keep, strict=True)
        )
        return first, second

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, without [CLS] and [SEP]."""
        self.backend.no_truncation()
        return self.backend.encode(text, add_special_tokens=False).tokens

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids back to text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (a duplicate line in vocab.txt leaves an id unused)."""
        return max(self.backend.get_vocab().values()) + 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json`."""
        folder = Path(folder)
        self.backend.no_truncation()
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        vocab = {index: token for token, index in self.backend.get_vocab().items()}
        lines = [vocab.get(index, f"[unused line {index}]") for index in range(self.vocab_size)]
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in lines))
        tokens = {key: getattr(self, key) for key in SPECIAL_TOKENS}
        limits = {"model_max_length": self.max_length, "tokenizer_class": "BertTokenizer"}
        write_json(folder / "tokenizer_config.json", {**self.settings, **tokens, **limits})


# ---------------------------------------------------------------------------- reading files


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens; tokenizer_config.json has each as a string or as {"content": ...}."""
    special = {}
    for key, default in SPECIAL_TOKENS.items():
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        special[key] = token if isinstance(token, str) else default
    return special


def _max_length(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> int:
    """The model's limit in tokens, 512 where neither file gives one."""
    # The smallest of what the files say.
    limits = [config.get("max_position_embeddings"), settings.get("model_max_length")]
    # transformers writes 10**30 for "no limit".
    limit = min([n for n in limits if isinstance(n, int) and n < 10**9], default=512)
    if limit < 3:
        raise UserError(f"{folder}: limits texts to {limit} tokens; [CLS] x [SEP] are 3")
    return limit


def _read_tokenizer_json(path: Path) -> Source:
    """The vocabulary and settings in `tokenizer.json`, if it describes a BERT tokenizer.

    Only the data is taken; the pipeline is built from known parts (`_build`). The library's own
    loader would run any pipeline that a file describes, and crashes on some damaged files. The
    post-processor is ignored, as transformers does for BERT.
    """
    content = read_json(path)
    with reading(path, "the tokenizer of a BERT"):
        for (part, key), expected in BERT_PIPELINE.items():
            value = content[part].get(key, expected)
            if value != expected:
                raise UserError(f"{path}: {part} has {key} {value!r}; BERT's is {expected!r}")
        vocabulary = content["model"]["vocab"]
        if not all(type(index) is int and index >= 0 for index in vocabulary.values()):
            raise TypeError("vocab is not a map from tokens to ids")
        # Of the normalizer only these settings: the rest of it is the same for every BERT.
        known = [ours for ours, _ in NORMALIZATION.values()]
        stored = {key: value for key, value in content["normalizer"].items() if key in known}
        return vocabulary, stored, content.get("added_tokens") or []


def _read_vocabulary(path: Path) -> Source:
    """The vocabulary in `vocab.txt`: a token a line, its id the number of the line from 0."""
    # Not splitlines(): a token may be another character that Unicode calls a line break.
    lines = read_text(path).removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): index for index, line in enumerate(lines)}
    return vocabulary, {}, []


def _build(
    vocabulary: dict[str, int],
    special: dict[str, str],
    flags: dict[str, Any],
    added: list[dict[str, Any]],
) -> Tokenizer:
    """The tokenizer of the original BERT for this vocabulary, with the tokens added to it."""
    missing = [token for token in special.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"the vocabulary has no {missing[0]}")
    # Text -> cleaned and lower-cased -> words and punctuation marks -> pieces in the vocabulary,
    # the longest first: "unaffable" -> "una", "##ffa", "##ble".
    backend = Tokenizer(WordPiece(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **flags)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    tokens = [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in added]
    for token in tokens:
        text = token.content
        # The library would search for an empty token forever.
        if not (backend.normalizer.normalize_str(text) if token.normalized else text):
            raise ValueError(f"the added token {text!r} is empty after normalization")
    backend.add_tokens(tokens)
    # An added token gets the next free id: it must be the one the weights were trained with.
    for token in added:
        if backend.token_to_id(token["content"]) != token.get("id"):
            raise ValueError(f"the added token {token['content']!r} cannot have id {token['id']}")
    backend.add_tokens([AddedToken(token, special=True) for token in special.values()])
    # "[CLS] a [SEP]" and "[CLS] a [SEP] b [SEP]", with segment ids 1 from b on.
    sep, cls = ((special[key], vocabulary[special[key]]) for key in ("sep_token", "cls_token"))
    backend.post_processor = processors.BertProcessing(sep, cls)
    return backend
