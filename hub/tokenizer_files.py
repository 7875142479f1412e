"""The files of a BERT tokenizer, as several generations of software have written them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import read_json, read_text
from engine.errors import UserError, reading

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
# The values that a BERT tokenizer.json must have, if it has these keys.
BERT_PIPELINE = {
    ("model", "type"): "WordPiece",
    ("model", "continuing_subword_prefix"): "##",
    ("model", "max_input_chars_per_word"): 100,
    ("normalizer", "type"): "BertNormalizer",
    ("pre_tokenizer", "type"): "BertPreTokenizer",
}
# Tokenizers that do the same as BERT's; any other class would do something before or after it.
CLASSES = ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast"]
CLASSES += ["ElectraTokenizer", "ElectraTokenizerFast", "PreTrainedTokenizerFast"]
CLASSES += ["TokenizersBackend"]  # of transformers 5: whatever tokenizer.json describes
CONFIG_FILES = (
    "tokenizer_config.json",
    "config.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The content of each of `CONFIG_FILES`, {} for one that is missing.
Files = dict[str, dict[str, Any]]
# A vocabulary, its stored normalization by the names of tokenizer.json, and added tokens.
Source = tuple[dict[str, int], dict[str, Any], list[dict[str, Any]]]


@dataclass
class TokenizerFiles:
    """The contents of a tokenizer's files, whichever of them exist."""

    source: Path  # the file of the vocabulary
    vocabulary: dict[str, int]
    special: dict[str, str]  # key of `SPECIAL_TOKENS` -> token
    normalization: dict[str, Any]  # key of `NORMALIZATION` -> the setting in use
    added: list[dict[str, Any]]  # tokens added to the vocabulary, as tokenizer.json lists them
    max_length: int


def read_tokenizer(folder: Path, settings: dict[str, Any]) -> TokenizerFiles:
    """Read the tokenizer in a model folder: `tokenizer.json`, or else `vocab.txt`.

    settings: entries of `tokenizer_config.json` to change. Its settings for normalization
    override those stored in `tokenizer.json`. UserError for anything that is not BERT's tokenizer.
    """
    paths = {name: folder / name for name in CONFIG_FILES}
    files = {name: read_json(path) if path.exists() else {} for name, path in paths.items()}
    _check_supported(folder, files)
    settings = {**files["tokenizer_config.json"], **settings}
    source = next((folder / name for name in READERS if (folder / name).exists()), None)
    if source is None:
        raise UserError(f"{folder}: no tokenizer; expected tokenizer.json or vocab.txt")
    vocabulary, stored, added = READERS[source.name](source, files)
    normalization = {}
    for key, (name, default) in NORMALIZATION.items():
        normalization[key] = value = settings.get(key, stored.get(name, default))
        if not isinstance(value, bool) and (value, default) != (None, None):
            path, key = (paths["tokenizer_config.json"], key) if key in settings else (source, name)
            raise UserError(f"{path}: {key} is {value!r}, expected true or false")
    special = _special_tokens(settings, files["special_tokens_map.json"])
    limit = _max_length(folder, files, settings)
    return TokenizerFiles(source, vocabulary, special, normalization, added, limit)


def _content(token: Any) -> Any:
    """A token, stored as a string or as {"content": ..., ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _check_supported(folder: Path, files: Files) -> None:
    """UserError for a tokenizer that does not work like BERT's."""
    # A vocabulary alone does not tell whether a morphological analyser must split words first.
    for name in ("tokenizer_config.json", "config.json"):
        kind = files[name].get("tokenizer_class")
        if kind is not None and kind not in CLASSES:
            raise UserError(f"{folder / name}: tokenizer_class {kind!r} is not BERT's tokenizer")
    for key in ("truncation_side", "padding_side"):
        side = files["tokenizer_config.json"].get(key, "right")
        if side != "right":
            raise UserError(f"{folder / 'tokenizer_config.json'}: {key} {side!r} is not supported")


def _special_tokens(settings: dict[str, Any], legacy: dict[str, Any]) -> dict[str, str]:
    """The special tokens; special_tokens_map.json has what older tokenizer_config.json lack."""
    special = {}
    for key, default in SPECIAL_TOKENS.items():
        token = _content(settings.get(key, legacy.get(key)))
        special[key] = token if isinstance(token, str) else default
    return special


def _max_length(folder: Path, files: Files, settings: dict[str, Any]) -> int:
    """The model's limit in tokens, the smallest in its files; 512 if there is none."""
    limits = [
        files["config.json"].get("max_position_embeddings"),
        files["sentence_bert_config.json"].get("max_seq_length"),
        settings.get("model_max_length"),
    ]
    # transformers writes 10**30 for "no limit".
    limit = min([n for n in limits if isinstance(n, int) and n < 10**9], default=512)
    if limit < 3:
        raise UserError(f"{folder}: limits texts to {limit} tokens; [CLS] x [SEP] are 3")
    return limit


def _read_tokenizer_json(path: Path, files: Files) -> Source:
    """The vocabulary and settings in `tokenizer.json`, if it describes a BERT tokenizer.

    Only the data is used; the pipeline is built from known parts. The library's own loader would
    run any pipeline that a file describes, and crashes on some damaged files. The
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


def _read_vocabulary(path: Path, files: Files) -> Source:
    """The vocabulary in `vocab.txt`: one token per line, whose id is the line number from 0.

    Tokens added later are in tokenizer_config.json, or with older software in
    added_tokens.json and, for special tokens, in special_tokens_map.json.
    """
    # Not splitlines(): a token may be another character that Unicode calls a line break.
    lines = read_text(path).removesuffix("\n").split("\n")
    # Spaces at the end of a line are not part of a token, as in BERT's original tokenizer.
    tokens = [line.rstrip(" \t\r") or line for line in lines]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    settings, legacy = files["tokenizer_config.json"], files["special_tokens_map.json"]
    with reading(path.with_name("tokenizer_config.json"), "a tokenizer's configuration"):
        decoder = settings.get("added_tokens_decoder", {})
        if decoder:
            added = [{"id": int(index), **token} for index, token in decoder.items()]
            return vocabulary, {}, sorted(added, key=lambda token: token["id"])
        key = "additional_special_tokens"
        special = [_content(token) for token in settings.get(key) or legacy.get(key) or []]
        ids = {token: vocabulary[token] for token in special if token in vocabulary}
        ids |= files["added_tokens.json"]
        added = [
            {"id": index, "content": token, "special": token in vocabulary}
            for token, index in sorted(ids.items(), key=lambda item: item[1])
        ]
        return vocabulary, {}, added


READERS = {"tokenizer.json": _read_tokenizer_json, "vocab.txt": _read_vocabulary}  # in this order
