"""BertTokenizer against `transformers.BertTokenizerFast` on any text, from any kind of folder."""

import csv
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from checkpoint import UserError, model_folder
from tokenizer import BertTokenizer

NAME = "all-MiniLM-L6-v2"
KEYS = ["input_ids", "token_type_ids", "attention_mask"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Cased and accented entries, and a word of two Chinese characters: each flag changes the ids.
VOCABULARY = [
    *SPECIAL,
    *("hello", "Hello", "##s", "e", "E", "é", "É", "##e", "##é", "cafe", "café", "Cafe", "Café"),
    *("中", "文", "中文", "##文", "a", "##a", "b", "##b", "A", "##A", "n", "ñ", "##n", "##ñ"),
    *(".", ",", "!", "[", "]", "sep", "mask", "1", "##1"),
]

COUNT = {"deadline": None, "derandomize": True}


@pytest.fixture(scope="module")
def embedded():
    """The embedded model's tokenizer, ours and the oracle's, from the same folder."""
    folder = model_folder(NAME)
    return BertTokenizer.from_pretrained(NAME), BertTokenizerFast.from_pretrained(folder)


def assert_equal(ours, theirs, texts, pairs=None, **options):
    """All three lists, the same to the last number."""
    one, other = ours(texts, pairs, **options), theirs(texts, pairs, **options)
    for key in KEYS:
        assert one[key] == other[key], (key, texts, pairs, options)


# ------------------------------------------------------------------ any text

accents = st.text("aeionEÉéèêëñüÅåßIİıſςΣ\u0301\u0308\u030a\u0327\u0345")
chinese = st.text("中文日本語한국어のカ㐀𠀀豈。、a ")
controls = st.text("\x00\x01\t\n\r\x0b\x0c\x1f\x7f\x85\xa0\u200b\u200d\u2028\u3000\ufeff\ufffdab ")
marks = st.text("'\"`´‘’“”-–—.,!?…#@$%^&*()[]{}<>|\\/~+=_a1 ½²①Ⅳ€™😀👩🏽‍🚀🇩🇪")
words = st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            "[sep]",
            "[CLS",
            "##s",
            "##",
            "Hello",
            "unaffable",
            "naïve",
            "x" * 101,
            "a" * 100,
        ]
    )
).flatmap(lambda parts: st.sampled_from(["", " ", "  "]).map(lambda gap: gap.join(parts)))
texts = st.one_of(st.text(), accents, chinese, controls, marks, words)


@settings(**COUNT, max_examples=200)
@given(st.lists(texts, min_size=1, max_size=4))
def test_any_texts(embedded, batch):
    """A batch of anything, padded to its longest."""
    assert_equal(*embedded, batch)
    assert_equal(*embedded, batch, padding=True)


@settings(**COUNT, max_examples=100)
@given(texts, texts)
def test_one_text_and_one_pair(embedded, text, pair):
    """A string in, flat lists out.

    The oracle takes an empty second text, outside a batch, for none at all; in a batch it does
    not, and there we agree, so a single pair is compared with a batch of one.
    """
    ours, theirs = embedded
    assert_equal(ours, theirs, text)
    one, other = ours(text, pair), theirs([text], [pair])
    assert {key: [one[key]] for key in KEYS} == {key: other[key] for key in KEYS}


@settings(**COUNT, max_examples=200)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(3, 12))
def test_truncation_takes_from_the_longer_sentence(embedded, rows, max_length):
    """Singles and pairs, cut to very few tokens and padded."""
    first, second = map(list, zip(*rows, strict=True))
    options = {"truncation": True, "max_length": max_length, "padding": True}
    assert_equal(*embedded, first, **options)
    assert_equal(*embedded, first, second, **options)


lengths = st.integers(0, 12)


@settings(**COUNT, max_examples=60)
@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4), st.integers(3, 20))
def test_truncation_of_every_balance_of_lengths(embedded, sizes, max_length):
    """Pairs whose lengths straddle the limit in every way."""
    first = ["a " * one for one, _ in sizes]
    second = ["b " * other for _, other in sizes]
    assert_equal(*embedded, first, second, truncation=True, max_length=max_length)


@settings(**COUNT, max_examples=60)
@given(texts, texts, st.integers(3, 12), st.integers(5, 40))
def test_truncation_of_long_pairs_of_anything(embedded, one, other, max_length, times):
    """Texts far beyond the limit, whose ends are cut off before the pair is put together."""
    first, second = [one * times, one, one * times], [other, other * times, other * times]
    assert_equal(*embedded, first, second, truncation=True, max_length=max_length)


def test_a_pair_of_very_long_texts_is_quick_and_small(embedded):
    """Ours keeps a few left-over pieces; the library alone would keep a million pairs of them."""
    ours, _ = embedded
    text = "a fine film " * 100_000
    [encoding] = ours.encode_batch([text], [text], max_length=300)
    assert len(encoding) == 300
    assert encoding.type_ids.count(1) == 150  # 149 words, and [SEP]
    assert 0 < len(encoding.overflowing) <= 8


def test_calls_leave_nothing_behind(embedded):
    """A truncated call does not shorten the next one, nor `tokenize`."""
    ours, theirs = embedded
    long = "one two three four five six seven"
    before = ours(long)
    ours([long, long], truncation=True, max_length=4, padding=True)
    assert ours(long) == before
    ours([long], truncation=True, max_length=4)
    assert ours.tokenize(long) == theirs.tokenize(long)
    assert len(ours.encode_batch([long])[0]) == 9


def test_tensors_are_int64_and_equal(embedded):
    """`return_tensors="pt"`, for a batch and for a single string (one row)."""
    ours, theirs = embedded
    for batch in (["A fine film.", "Dull.", ""], "A fine film."):
        one = ours(batch, padding=True, return_tensors="pt")
        other = theirs(batch, padding=True, return_tensors="pt")
        assert list(one) == KEYS
        for key in KEYS:
            assert one[key].dtype == torch.int64
            assert torch.equal(one[key], other[key])


def test_empty_string_is_two_special_tokens(embedded):
    """Alone, in a pair, and in a batch."""
    ours, _ = embedded
    assert ours("")["input_ids"] == [101, 102]
    assert ours("", "")["input_ids"] == [101, 102, 102]
    assert ours("", "")["token_type_ids"] == [0, 0, 1]
    assert_equal(*embedded, ["", "word", " "], padding=True)


def test_unknown_return_type_and_unequal_pairs_are_refused(embedded):
    """Rather than ignored, or cut to the shorter list."""
    ours, _ = embedded
    with pytest.raises(ValueError, match="'tf'"):
        ours(["a"], return_tensors="tf")
    with pytest.raises(ValueError):
        ours(["a", "b"], ["c"])


def test_encode_batch_tells_what_was_cut(embedded):
    """`overflowing` is empty exactly where nothing was lost."""
    ours, _ = embedded
    short, long = ours.encode_batch(["a b", "a b c d e f"], max_length=5)
    assert not short.overflowing
    assert long.overflowing
    assert long.ids == ours("a b c")["input_ids"]


@settings(**COUNT, max_examples=100)
@given(texts)
def test_tokenize_and_decode(embedded, text):
    """Word pieces and their way back."""
    ours, theirs = embedded
    assert ours.tokenize(text) == theirs.tokenize(text)
    ids = ours(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_attributes(embedded):
    """Special tokens, sizes and limits as the oracle has them."""
    ours, theirs = embedded
    assert ours.vocab_size == len(theirs) == 30522
    assert ours.max_length == theirs.model_max_length == 512
    for key in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"):
        assert getattr(ours, key) == getattr(theirs, key)
        assert getattr(ours, f"{key}_id") == getattr(theirs, f"{key}_id")


# ------------------------------------------------------------------ folders of every kind


def vocabulary_folder(folder, newline="\n", **config):
    """A folder with vocab.txt and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(token + newline for token in VOCABULARY)
    (folder / "vocab.txt").write_bytes(text.encode("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def constructed(**config):
    """The oracle, made from a dict and keyword arguments rather than from a folder."""
    return BertTokenizerFast(vocab={t: i for i, t in enumerate(VOCABULARY)}, **config)


EXAMPLES = [
    "Hello hellos HELLO",
    "Café café CAFÉ cafe\u0301 Cafe",
    "É é e\u0301 ñ n\u0303",
    "中文 a中文b 中 文",
    "[SEP] [sep] [MASK]! ##s\x00\x07a\u200bb",
    "",
]
FLAGS = [
    dict(zip(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), values, strict=True))
    for values in itertools.product([True, False], [True, False, None], [True, False])
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_every_combination_of_flags(tmp_path, flags, kind):
    """From either kind of folder, against the oracle by keyword and from the same folder."""
    folder = vocabulary_folder(tmp_path, **flags)
    if kind == "tokenizer.json":
        constructed(**flags).save_pretrained(folder)
        (folder / "vocab.txt").unlink()
        assert (folder / "tokenizer.json").is_file()
    ours = BertTokenizer.from_pretrained(folder)
    for theirs in (constructed(**flags), BertTokenizerFast.from_pretrained(folder)):
        assert_equal(ours, theirs, EXAMPLES, padding=True)
        assert_equal(ours, theirs, EXAMPLES, EXAMPLES[::-1], truncation=True, max_length=7)


def test_the_flags_matter():
    """No two combinations that mean different things agree on all the examples."""
    seen = {}
    for flags in FLAGS:
        strips = flags["strip_accents"]
        meaning = (
            flags["do_lower_case"],
            flags["do_lower_case"] if strips is None else strips,
            flags["tokenize_chinese_chars"],
        )
        seen.setdefault(meaning, set()).add(str(constructed(**flags)(EXAMPLES)["input_ids"]))
    assert len(seen) == 8
    assert all(len(outcomes) == 1 for outcomes in seen.values())
    assert len(set.union(*seen.values())) == 8


@settings(**COUNT, max_examples=100)
@given(
    st.sampled_from(FLAGS),
    st.text("".join(sorted({c for token in VOCABULARY for c in token})) + "\u0301 ã", max_size=30),
)
def test_any_text_with_any_flags(tmp_path_factory, flags, text):
    """Text of the vocabulary's own letters, so that pieces are found."""
    folder = vocabulary_folder(tmp_path_factory.getbasetemp() / "any", **flags)
    assert_equal(BertTokenizer.from_pretrained(folder), constructed(**flags), [text], [text[::-1]])


@pytest.mark.parametrize("flags", FLAGS[::3], ids=str)
def test_settings_win_over_what_tokenizer_json_stored(tmp_path, flags):
    """tokenizer_config.json decides."""
    constructed(
        do_lower_case=False, strip_accents=False, tokenize_chinese_chars=False
    ).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags), encoding="utf-8")
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert_equal(ours, BertTokenizerFast.from_pretrained(tmp_path), EXAMPLES, padding=True)


def test_what_tokenizer_json_stored_holds_where_settings_are_silent(tmp_path):
    """transformers 5 would lower-case here; the file that was trained with says not to."""
    flags = {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False}
    constructed(**flags).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert_equal(BertTokenizer.from_pretrained(tmp_path), constructed(**flags), EXAMPLES)


def test_vocabulary_alone_is_enough(tmp_path):
    """No tokenizer_config.json: uncased, as the first BERT."""
    folder = vocabulary_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert_equal(BertTokenizer.from_pretrained(folder), constructed(), EXAMPLES)


def test_vocabulary_with_windows_line_ends_and_without_the_last(tmp_path):
    """A file that went through an editor still numbers its tokens by line."""
    folder = vocabulary_folder(tmp_path, newline="\r\n")
    assert_equal(BertTokenizer.from_pretrained(folder), constructed(), EXAMPLES)
    (folder / "vocab.txt").write_bytes("\n".join(VOCABULARY).encode("utf-8"))
    assert_equal(BertTokenizer.from_pretrained(folder), constructed(), EXAMPLES)


def test_line_separators_of_unicode_are_tokens(tmp_path):
    """Only a newline ends a line: BERT's multilingual vocabulary has U+2028 on a line."""
    folder = vocabulary_folder(tmp_path)
    tokens = [*SPECIAL, "\u2028", "\x85", "a", "\x1c"]
    (folder / "vocab.txt").write_bytes("\n".join(tokens).encode("utf-8"))
    assert BertTokenizer.from_pretrained(folder)("a")["input_ids"] == [2, 7, 3]


def test_embedded_vocabulary_alone_equals_its_tokenizer_json(embedded, tmp_path):
    """Both routes to the same tokenizer, on a full vocabulary."""
    shutil.copy(model_folder(NAME) / "vocab.txt", tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert_equal(ours, embedded[1], EXAMPLES, EXAMPLES[::-1], padding=True)


@pytest.mark.parametrize("as_object", [False, True])
def test_special_tokens_of_another_name(tmp_path, as_object):
    """`tokenizer_config.json` may rename them, by a string or by an object."""
    renamed = {"pad_token": "a", "unk_token": "b", "cls_token": "e", "sep_token": "."}
    given = {key: {"content": token} if as_object else token for key, token in renamed.items()}
    folder = vocabulary_folder(tmp_path, **given)
    ours = BertTokenizer.from_pretrained(folder)
    theirs = constructed(**renamed)
    assert ours.pad_token_id == VOCABULARY.index("a")
    assert ours.sep_token_id == VOCABULARY.index(".")
    options = {"padding": True, "truncation": True, "max_length": 8}
    assert_equal(ours, theirs, ["hello", "Café zzz 中文 hello hello"], ["1", "q"], **options)


def test_saved_tokenizer_loads_equal_everywhere(tmp_path):
    """Our save, then ours and the oracle's load; from tokenizer.json and from vocab.txt alone."""
    flags = {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}
    ours = BertTokenizer.from_pretrained(vocabulary_folder(tmp_path / "first", **flags))
    ours("hello", truncation=True, max_length=3)
    ours.save_pretrained(tmp_path / "saved")
    expected = constructed(**flags)
    for left in ("tokenizer.json", "vocab.txt"):
        folder = shutil.copytree(tmp_path / "saved", tmp_path / left)
        (folder / {"tokenizer.json": "vocab.txt", "vocab.txt": "tokenizer.json"}[left]).unlink()
        for again in (
            BertTokenizer.from_pretrained(folder),
            BertTokenizerFast.from_pretrained(folder),
        ):
            assert_equal(again, expected, EXAMPLES, EXAMPLES[::-1], padding=True)
    again = BertTokenizer.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        first, last = ((tmp_path / f / file).read_bytes() for f in ("saved", "again"))
        assert first == last, file


def test_a_vocabulary_with_a_line_twice_keeps_its_numbers(tmp_path):
    """From either of the files that are written, tokens have the numbers that they had."""
    lines = [*SPECIAL, "film", "film", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first = BertTokenizer.from_pretrained(tmp_path)
    first.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "vocab.txt"):
        again = BertTokenizer.from_pretrained(tmp_path / "saved")
        assert again("film b c") == first("film b c"), name
        (tmp_path / "saved" / "tokenizer.json").unlink(missing_ok=True)


def test_embedded_tokenizer_saves_and_loads_equal(embedded, tmp_path):
    """The full vocabulary, byte for byte, and the oracle reads it; no stored truncation."""
    ours, theirs = embedded
    ours.save_pretrained(tmp_path)
    vocabulary = (model_folder(NAME) / "vocab.txt").read_bytes()
    assert (tmp_path / "vocab.txt").read_bytes().split() == vocabulary.split()
    long = ["word " * 300, *EXAMPLES]
    for again in (
        BertTokenizer.from_pretrained(tmp_path),
        BertTokenizerFast.from_pretrained(tmp_path),
    ):
        assert_equal(again, theirs, long, padding=True)


def test_oracle_save_loads_in_ours(embedded, tmp_path):
    """What transformers writes today is read."""
    _, theirs = embedded
    theirs.save_pretrained(tmp_path)
    assert_equal(BertTokenizer.from_pretrained(tmp_path), theirs, EXAMPLES, EXAMPLES[::-1])


# ------------------------------------------------------------------ the model's limit


@pytest.mark.parametrize(
    ("positions", "model_max_length", "limit"),
    [
        (9, None, 9),
        (None, 7, 7),
        (9, 7, 7),
        (7, 9, 7),
        (9, 10**30, 9),
        (None, None, 512),
        (None, 10**30, 512),
    ],
)
def test_truncation_to_the_model_limit(tmp_path, positions, model_max_length, limit):
    """The smaller of config.json's positions and tokenizer_config.json's limit; else 512."""
    config = {} if model_max_length is None else {"model_max_length": model_max_length}
    folder = vocabulary_folder(tmp_path, **config)
    if positions is not None:
        text = json.dumps({"max_position_embeddings": positions})
        (folder / "config.json").write_text(text, encoding="utf-8")
    ours = BertTokenizer.from_pretrained(folder)
    assert ours.max_length == limit
    long = "a " * (limit + 20)
    for texts in (([long, "b"],), ([long, "b"], [long, "b"])):
        expected = constructed()(*texts, truncation=True, max_length=limit)
        cut = ours(*texts, truncation=True)
        assert all(cut[key] == expected[key] for key in KEYS)
    assert len(ours(long, truncation=True)["input_ids"]) == limit
    assert len(ours(long)["input_ids"]) == limit + 22


# ------------------------------------------------------------------ refusals


def refused(folder, *parts):
    """Loading is a UserError of one line that holds every part."""
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_folder_without_tokenizer_files_is_refused(tmp_path):
    """It names what was expected."""
    refused(tmp_path, tmp_path, "tokenizer.json", "vocab.txt")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": 1}', '{"model": {"type": "WordPiece"}}', '{"normalizer": 3}'],
)
def test_broken_tokenizer_json_is_refused(tmp_path, content):
    """Even where a good vocab.txt lies beside it: which one is meant is not for us to guess."""
    folder = vocabulary_folder(tmp_path)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    refused(folder, folder / "tokenizer.json")


def test_truncated_tokenizer_json_is_refused(tmp_path):
    """Half a download."""
    constructed().save_pretrained(tmp_path)
    data = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data[: len(data) // 2])
    refused(tmp_path, tmp_path / "tokenizer.json")


def test_tokenizer_of_another_kind_is_refused(tmp_path):
    """GPT's byte pairs are not BERT's word pieces."""
    constructed().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused(tmp_path, tmp_path / "tokenizer.json", "BPE", "WordPiece")


@pytest.mark.parametrize("token", SPECIAL)
def test_vocabulary_without_a_special_token_is_refused(tmp_path, token):
    """By the token and the file."""
    folder = vocabulary_folder(tmp_path)
    lines = [line for line in VOCABULARY if line != token]
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    refused(folder, folder / "vocab.txt", token)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe[\x00U\x00", b"[PAD]\n[UNK]\n\xe9\n"])
def test_unreadable_vocabulary_is_refused(tmp_path, content):
    """Empty, or not UTF-8."""
    folder = vocabulary_folder(tmp_path)
    (folder / "vocab.txt").write_bytes(content)
    refused(folder, folder / "vocab.txt")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_broken_settings_are_refused(tmp_path, file):
    """The file that is broken is the one that is named."""
    folder = vocabulary_folder(tmp_path)
    (folder / file).write_text("{", encoding="utf-8")
    refused(folder, folder / file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_lower_case", "yes"), ("strip_accents", 1), ("tokenize_chinese_chars", None)],
)
@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_setting_of_a_wrong_type_is_refused(tmp_path, kind, key, value):
    """By its name, with the file's."""
    folder = vocabulary_folder(tmp_path)
    if kind == "tokenizer.json":
        constructed().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value}), encoding="utf-8")
    refused(folder, key)


# ------------------------------------------------------------------ real data

DATA = os.environ.get("MINBERT_DATA")
FILES = sorted(Path(DATA).glob("*.csv")) if DATA else []
real_data = pytest.mark.skipif(not FILES, reason="MINBERT_DATA names no folder with csv files")
BATCH = 4096


def columns(path):
    """The text columns of a course file, each a list of sentences."""
    with open(path, encoding="utf-8", newline="") as file:
        delimiter = "," if path.name.startswith("nli") else "\t"
        rows = list(csv.DictReader(file, delimiter=delimiter))
    known = ("sentence", "sentence1", "sentence2", "sent0", "sent1", "hard_neg")
    wanted = [column for column in rows[0] if column in known]
    return [[row[column] or "" for row in rows] for column in wanted]


def ids(encodings):
    """Everything that the model sees of each."""
    return [(e.ids, e.type_ids, e.attention_mask) for e in encodings]


@real_data
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_sentence_of_the_real_data(embedded, path):
    """Singles, and pairs where a row has two sentences."""
    ours, theirs = embedded
    oracle = theirs.backend_tokenizer
    oracle.no_truncation()
    oracle.no_padding()
    texts = columns(path)
    assert texts and min(map(len, texts)) > 100
    singles = list(dict.fromkeys(itertools.chain(*texts)))
    pairs = list(zip(texts[0], texts[1], strict=True)) if len(texts) > 1 else []
    for start in range(0, len(singles), BATCH):
        part = singles[start : start + BATCH]
        assert ids(ours.encode_batch(part)) == ids(oracle.encode_batch_fast(part))
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        first, second = zip(*part, strict=True)
        assert ids(ours.encode_batch(first, second)) == ids(oracle.encode_batch_fast(part))
