"""BERT's WordPiece tokenizer: a thin layer over the `tokenizers` library.

tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
batch = tokenizer(["A fine film.", "Dull."], padding=True, truncation=True, return_tensors="pt")
batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
"""

import json
import os
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

from checkpoint import UserError, model_folder, read_json, read_text, write_json, write_text

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


SOURCES = ("tokenizer.json", "vocab.txt")
# What tokenizer_config.json may say of the text's clean-up; null accents: as lower-casing does.
SETTINGS = {
    "do_lower_case": bool,
    "strip_accents": bool | None,
    "tokenize_chinese_chars": bool,
}


# The same under the names of tokenizer.json, and the original BERT's values.
STORED = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
ORIGINAL = {"lowercase": True, "strip_accents": None, "handle_chinese_chars": True}

# What a tokenizer.json must say, if it says anything there: how BERT's text becomes tokens.
STEPS = {
    ("model", "type"): "WordPiece",
    ("model", "continuing_subword_prefix"): "##",
    ("model", "max_input_chars_per_word"): 100,
    ("normalizer", "type"): "BertNormalizer",
    ("pre_tokenizer", "type"): "BertPreTokenizer",
}
LARGEST_VOCABULARY = 10**6  # tokens; LaBSE's, the largest known, has half as many
TOKENISED_AT_ONCE = 8192  # texts; bounds the memory of the library's own objects
LARGEST_ADDED = 10**6  # characters of all added tokens, of which 10^6 take the library 5 s
# A vocabulary, the flags of the text's clean-up by the names of tokenizer.json, added tokens.
Source = tuple[dict[str, int], dict[str, Any], list[dict[str, Any]]]


class BertTokenizer:
    """Text to token ids, equal to `transformers.BertTokenizerFast`.

    Attributes: `max_length`, the model's limit in tokens; `vocab_size`; `pad_token_id`,
    `unk_token_id`, `cls_token_id`, `sep_token_id`, `mask_token_id`.
    """

    def __init__(self, backend: Tokenizer, settings: dict[str, Any], max_length: int):
        self.backend = backend
        self.settings = settings
        self.max_length = max_length
        # A tokenizer.json may carry somebody's padding and truncation; a call here says its own.
        backend.no_padding()
        backend.no_truncation()
        for key, default in SPECIAL_TOKENS.items():
            token = _content(settings.get(key), default)
            index = backend.token_to_id(token)
            if index is None:
                raise UserError(f"the vocabulary has no {token} ({key})")
            setattr(self, key, token)
            setattr(self, f"{key}_id", index)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, local_files_only: bool = False
    ) -> "BertTokenizer":
        """Load the tokenizer of a model folder, a hub id or an embedded model.

        Reads `tokenizer.json`, or else `vocab.txt`; `tokenizer_config.json` says how to lower-case,
        strip accents and split Chinese characters.

        Raises:
            UserError: no such model, or a file that is missing, damaged or not of a BERT.
        """
        folder = model_folder(name, weights=False, local_files_only=local_files_only)
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if os.path.lexists(settings_file) else {}
        config_file = folder / "config.json"
        limits = [
            read_json(config_file).get("max_position_embeddings")
            if os.path.lexists(config_file)
            else None,
            settings.get("model_max_length"),
        ]
        # transformers writes 10**30 for "no limit".
        limits = [n for n in limits if isinstance(n, int) and n < 10**9]
        if limits and min(limits) < 3:
            raise UserError(f"{folder}: its limit is {min(limits)} tokens; [CLS] x [SEP] need 3")
        _check_settings(settings_file, settings, SETTINGS)
        source = next((folder / n for n in SOURCES if os.path.lexists(folder / n)), None)
        if source is None:
            raise UserError(f"{folder}: no tokenizer; expected {' or '.join(SOURCES)}")
        read_source = {"tokenizer.json": _read_tokenizer_json, "vocab.txt": _read_vocabulary}
        vocabulary, stored, added = read_source[source.name](source)
        # tokenizer_config.json wins over what tokenizer.json has stored.
        flags = {ours: settings.get(key, stored[ours]) for key, ours in STORED.items()}
        try:
            backend = _build(vocabulary, settings, flags, added)
            return cls(backend, settings, min(limits, default=512))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except Exception as error:  # whatever tokens lead the library to
            raise UserError(f"{source}: not a BERT's ({error}): fetch it again") from None

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
        """Token ids of sentences, or of sentence pairs ("[CLS] a [SEP] b [SEP]").

        Args:
            texts, pairs: a string, or a list of B; `pairs` holds the second sentences.
            padding: pad to the longest of the batch.
            truncation: cut to `max_length` tokens (default: the model's limit); of a pair, the
                longer sentence first.
            return_tensors: "pt" for int64 tensors (B, T), None for lists.

        Returns:
            `input_ids`, `token_type_ids` (0 for the first sentence, 1 for the second) and
            `attention_mask` (1 for a token, 0 for padding).
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        if pairs is not None:
            pairs = [pairs] if isinstance(pairs, str) else list(pairs)
        limit = (max_length or self.max_length) if truncation else None
        encodings = self.encode_batch(texts, pairs, max_length=limit)
        columns = {
            "input_ids": ([e.ids for e in encodings], self.pad_token_id),
            "token_type_ids": ([e.type_ids for e in encodings], 0),
            "attention_mask": ([e.attention_mask for e in encodings], 0),
        }
        if padding:
            width = max((len(e) for e in encodings), default=0)
            columns = {
                key: ([row + [fill] * (width - len(row)) for row in rows], fill)
                for key, (rows, fill) in columns.items()
            }
        result: dict[str, Any] = {key: rows for key, (rows, _) in columns.items()}
        if return_tensors == "pt":
            return {key: torch.tensor(rows, dtype=torch.long) for key, rows in result.items()}
        if return_tensors is not None:
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or None")
        return {key: rows[0] for key, rows in result.items()} if single else result

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """The fast path: the library's own encodings, unpadded, cut to `max_length` where given.

        An encoding that was cut has a non-empty `overflowing`.
        """
        if max_length is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_length, strategy="longest_first")
        if pairs is None:
            return self.backend.encode_batch(list(texts))
        if max_length is not None:
            texts, pairs = ([self._cut(t, max_length) for t in column] for column in (texts, pairs))
        return self.backend.encode_batch(list(zip(texts, pairs, strict=True)))

    def _cut(self, text: str, tokens: int) -> str:
        """The start of a text that its first `tokens` tokens come from.

        Of a pair that it truncates, the library keeps every left-over piece of the first sentence
        with every one of the second: two long texts would take time and memory without bound.
        """
        if len(text) <= tokens:  # short: there is little to be left over
            return text
        encoding = self.backend.encode(text, add_special_tokens=False)  # truncation is on
        return text[: encoding.offsets[-1][1]] if encoding.overflowing else text

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, without [CLS] and [SEP]."""
        self.backend.no_truncation()
        return self.backend.encode(text, add_special_tokens=False).tokens

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids back to text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest (a line twice in vocab.txt takes two)."""
        return max(self.backend.get_vocab().values()) + 1

    def fingerprint(self) -> str:
        """All that decides the ids of a text, as JSON."""
        self.backend.no_truncation()
        return json.dumps([self.backend.to_str(), self.max_length])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json`, for any software."""
        folder = Path(folder)
        self.backend.no_truncation()
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        tokens = {index: token for token, index in vocabulary.items()}
        # A line twice in the vocab.txt that was read left a number without a token.
        lines = [tokens.get(index, f"[unused line {index}]") for index in range(self.vocab_size)]
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in lines))
        own = {key: getattr(self, key) for key in SPECIAL_TOKENS}
        limits = {"model_max_length": self.max_length, "tokenizer_class": "BertTokenizer"}
        write_json(folder / "tokenizer_config.json", {**self.settings, **own, **limits})


def _content(token: Any, default: str) -> str:
    """A special token in `tokenizer_config.json`: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else default


def _check_settings(path: Path, given: dict[str, Any], types: dict[str, Any]) -> None:
    """UserError where one of these settings has another type."""
    for key, expected in types.items():
        if key in given and not isinstance(given[key], expected):
            raise UserError(f"{path}: {key} is {given[key]!r}, not true or false")


def _read_tokenizer_json(path: Path) -> Source:
    """What `tokenizer.json` holds.

    The rest of a BERT's tokenizer is known (`STEPS`), and what differs is refused by name. The
    library's own reader would run whatever steps a file asks for, some without end, and some
    damaged files stop the interpreter. How [CLS] and [SEP] are put in is not read, as transformers
    does not for its BertTokenizer.
    """
    given = read_json(path)
    for (part, key), expected in STEPS.items():
        if not isinstance(given.get(part), dict):
            raise UserError(f"{path}: {part} is {given.get(part)!r}, which is not a BERT's")
        found = given[part].get(key, expected)
        if found != expected:
            raise UserError(f"{path}: {part} has {key} {found!r}; BERT's is {expected!r}")
    vocabulary = given["model"].get("vocab")
    if not isinstance(vocabulary, dict) or not all(
        type(index) is int and 0 <= index < LARGEST_VOCABULARY for index in vocabulary.values()
    ):
        raise UserError(f"{path}: has no vocab of tokens with numbers: fetch it again")
    stored = {key: given["normalizer"].get(key, value) for key, value in ORIGINAL.items()}
    _check_settings(path, stored, {ours: SETTINGS[key] for key, ours in STORED.items()})
    added = given.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and {"id", "content"} <= token.keys() for token in added
    ):
        raise UserError(f"{path}: added_tokens is no list of tokens: fetch it again")
    return vocabulary, stored, added


def _read_vocabulary(path: Path) -> Source:
    """What `vocab.txt` holds: one token a line, its number is the line's."""
    # Only "\n" ends a line: the vocabulary may hold other characters that Unicode calls breaks.
    text = read_text(path)
    if text.count("\n") > LARGEST_VOCABULARY:
        raise UserError(
            f"{path}: more than {LARGEST_VOCABULARY:,} lines; no vocabulary has so many"
        )
    lines = text.split("\n")
    tokens = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    return {token: index for index, token in enumerate(tokens)}, ORIGINAL, []


def _build(
    vocabulary: dict[str, int],
    settings: dict[str, Any],
    flags: dict[str, Any],
    added: list[dict[str, Any]],
) -> Tokenizer:
    """The WordPiece tokenizer of the original BERT, from its vocabulary and what was added to it.

    Raises:
        UserError: a special token that is missing, an added one that cannot be.
        Exception: tokens that the library cannot take.
    """
    special = {key: _content(settings.get(key), token) for key, token in SPECIAL_TOKENS.items()}
    absent = [token for token in special.values() if token not in vocabulary]
    if absent:
        raise UserError(f"the vocabulary has no {absent[0]}")
    backend = Tokenizer(WordPiece(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **flags)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add(backend, added)
    _add(backend, [{"content": token, "special": True} for token in special.values()])
    # "[CLS] a [SEP]" and "[CLS] a [SEP] b [SEP]", the segment ids of the latter half 1.
    sep, cls = ((special[key], vocabulary[special[key]]) for key in ("sep_token", "cls_token"))
    backend.post_processor = processors.BertProcessing(sep, cls)
    return backend


def _add(backend: Tokenizer, added: list[dict[str, Any]]) -> None:
    """Add tokens that are found in a text as they are, each with its number where that is given."""
    tokens = [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in added]
    if sum(len(token.content) for token in tokens) > LARGEST_ADDED:
        raise UserError(f"its added tokens have more than {LARGEST_ADDED:,} characters")
    for token in tokens:
        # The library looks for a token that is nothing for ever.
        if not token.content or (
            token.normalized and not backend.normalizer.normalize_str(token.content)
        ):
            raise UserError(f"the added token {token.content!r} is nothing once it is cleaned up")
    backend.add_tokens(tokens)
    for token in added:
        number = backend.token_to_id(token["content"])
        if token.get("id", number) != number:
            raise UserError(f"the added token {token['content']!r} is not number {token['id']!r}")
