"""BertTokenizer against `transformers.BertTokenizerFast`, on any text and from any folder."""

import csv
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_files import edit_json, refused
from tokenizers import AddedToken
from transformers import BertTokenizerFast

from engine.checkpoint import write_json
from hub.models import resolve_model
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


@pytest.fixture(scope="module")
def embedded():
    """Our tokenizer of the embedded model, and that of transformers, from the same folder."""
    folder = resolve_model(NAME)
    return BertTokenizer.from_pretrained(NAME), BertTokenizerFast.from_pretrained(folder)


def assert_equal(ours, theirs, texts, pairs=None, **options):
    one, other = ours(texts, pairs, **options), theirs(texts, pairs, **options)
    for key in KEYS:
        assert one[key] == other[key], (key, texts, pairs, options)


# ---------------------------------------------------------------------------- any text

accents = st.text("aeionEÉéèêëñüÅåßIİıſςΣ\u0301\u0308\u030a\u0327\u0345")
chinese = st.text("中文日本語한국어のカ㐀𠀀豈。、a ")
controls = st.text("\x00\x01\t\n\r\x0b\x0c\x1f\x7f\x85\xa0\u200b\u200d\u2028\u3000\ufeff\ufffdab ")
marks = st.text("'\"`´‘’“”-–—.,!?…#@$%^&*()[]{}<>|\\/~+=_a1 ½²①Ⅳ€™😀👩🏽‍🚀🇩🇪")
WORDS = [*SPECIAL, "[sep]", "[CLS", "##s", "##", "Hello", "unaffable", "naïve"]
WORDS += ["x" * 101, "a" * 100]  # a word of more than 100 characters is [UNK]
words = st.lists(st.sampled_from(WORDS)).flatmap(
    lambda parts: st.sampled_from(["", " ", "  "]).map(lambda gap: gap.join(parts))
)
texts = st.one_of(st.text(), accents, chinese, controls, marks, words)
long_texts = st.builds(lambda text, times: text * times, texts, st.sampled_from([1, 1, 5, 12]))
long_texts |= st.integers(0, 20).map(lambda count: "a " * count)


@settings(max_examples=200)
@given(st.lists(texts, min_size=1, max_size=4))
def test_any_texts(embedded, batch):
    assert_equal(*embedded, batch)
    assert_equal(*embedded, batch, padding=True)


@settings(max_examples=100)
@given(texts, texts)
def test_one_text_and_one_pair(embedded, text, pair):
    """A string in, flat lists out. (Alone, transformers takes an empty second text for none.)"""
    ours, theirs = embedded
    assert_equal(ours, theirs, text)
    one, other = ours(text, pair), theirs([text], [pair])
    assert {key: [one[key]] for key in KEYS} == {key: other[key] for key in KEYS}


@settings(max_examples=200)
@given(st.lists(st.tuples(long_texts, long_texts), min_size=1, max_size=4), st.integers(3, 12))
@example([("a " * 9, "b " * 7)], 4)  # both beyond the limit, of which the longer gets the odd token
def test_truncation_takes_from_the_longer_sentence(embedded, rows, max_length):
    """Also of texts far beyond the limit, whose ends are cut off before the pair is made."""
    first, second = map(list, zip(*rows, strict=True))
    options = {"truncation": True, "max_length": max_length, "padding": True}
    assert_equal(*embedded, first, **options)
    assert_equal(*embedded, first, second, **options)


def test_a_pair_of_very_long_texts_is_truncated_quickly(embedded):
    """The library alone would keep 160,000 combinations of left-over pieces."""
    text = "a fine film " * 20_000
    [encoding] = embedded[0].encode_batch([text], [text], max_length=300)
    assert len(encoding) == 300
    assert encoding.type_ids.count(1) == 150  # 149 words, and [SEP]
    assert 0 < len(encoding.overflowing) <= 20


def test_a_call_does_not_affect_the_next(embedded):
    """And `encode_batch` tells which texts were truncated."""
    (ours, theirs), text = embedded, "one two three four five six seven"
    before = ours(text)
    ours([text, text], truncation=True, max_length=4, padding=True)
    assert ours(text) == before
    short, long = ours.encode_batch(["a b", text], max_length=5)
    assert long.overflowing and not short.overflowing
    assert ours.tokenize(text) == theirs.tokenize(text)


@pytest.mark.parametrize("batch", [["A fine film.", "Dull.", ""], "A fine film."], ids=type)
def test_tensors_are_int64_and_equal(embedded, batch):
    """A single string becomes one row."""
    one, other = (kind(batch, padding=True, return_tensors="pt") for kind in embedded)
    assert list(one) == KEYS
    for key in KEYS:
        assert one[key].dtype == torch.int64
        assert torch.equal(one[key], other[key])


PADDING = [{}] + [{"padding": value} for value in ("longest", "do_not_pad", "max_length")]
TRUNCATION = [{"truncation": value} for value in ("longest_first", "only_first", "only_second")]


@pytest.mark.parametrize("padding", PADDING, ids=str)
@pytest.mark.parametrize("truncation", [{"truncation": "do_not_truncate"}, *TRUNCATION], ids=str)
def test_every_way_to_pad_and_truncate(embedded, padding, truncation):
    first = ["one two three four five six", "a b c d"]
    second = ["seven eight nine ten eleven", "e f g h i"]
    assert_equal(*embedded, first, second, max_length=10, **padding, **truncation)
    if truncation != {"truncation": "only_second"}:
        assert_equal(*embedded, first, max_length=5, **padding, **truncation)


def test_what_it_cannot_do_is_refused_by_name(embedded, tmp_path):
    for option in ({"return_tensors": "tf"}, {"padding": "max"}, {"truncation": "longest"}):
        with pytest.raises(ValueError, match=f"'{next(iter(option.values()))}'"):
            embedded[0](["a"], **option)
    with pytest.raises(ValueError):
        embedded[0](["a", "b"], ["c"])
    with pytest.raises(TypeError, match="use_fast"):
        BertTokenizer.from_pretrained(vocabulary_folder(tmp_path), use_fast=True)


def test_a_batch_has_attributes_and_moves_to_a_device(embedded):
    batch = embedded[0](["a b"], return_tensors="pt")
    assert batch.input_ids is batch["input_ids"] and not hasattr(batch, "labels")
    assert all(tensor.is_meta for tensor in batch.to("meta").values())


@settings(max_examples=100)
@given(texts, texts)
def test_the_methods_of_the_courses_tokenizer(embedded, text, pair):
    ours, theirs = embedded
    assert len(ours) == len(theirs)
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        tokens = ours.convert_ids_to_tokens(torch.tensor(ids))
        assert tokens == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_tokens_to_ids(tokens) == ids
        assert ours.decode(torch.tensor(ids)) == ours.decode(ids)
    assert ours.encode(text, pair) == ours(text, pair)["input_ids"]
    assert ours.convert_tokens_to_ids(pair) == theirs.convert_tokens_to_ids(pair)


def test_threads_may_share_a_tokenizer(embedded):
    """Each with a truncation of its own, which the library keeps in its object."""
    ours, lengths = embedded[0], [*range(3, 13), None]

    def tokenise(length):
        return [len(ours.encode_batch(["a " * 50], max_length=length)[0]) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for length, results in zip(lengths, threads.map(tokenise, lengths), strict=True):
            assert set(results) == {length or 52}


@settings(max_examples=100)
@given(texts)
def test_tokenize_and_decode(embedded, text):
    ours, theirs = embedded
    assert ours.tokenize(text) == theirs.tokenize(text)
    ids = ours(text)["input_ids"]
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_and_sizes(embedded):
    ours, theirs = embedded
    assert ours.vocab_size == len(theirs) == 30522
    assert ours.max_length == 256  # of sentence_bert_config.json, as for sentence-transformers
    for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"):
        for key in (name, f"{name}_id"):
            assert getattr(ours, key) == getattr(theirs, key)


# ---------------------------------------------------------------------------- folders of any kind


def vocabulary_folder(folder, tokens=VOCABULARY, **config):
    """A folder with vocab.txt and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    write_json(folder / "tokenizer_config.json", config)
    return folder


def constructed(**config):
    """transformers' tokenizer, from a dict and keyword arguments rather than from a folder."""
    return BertTokenizerFast(vocab={t: i for i, t in enumerate(VOCABULARY)}, **config)


EXAMPLES = ["Hello hellos HELLO", "Café café CAFÉ cafe\u0301 Cafe", "É é e\u0301 ñ n\u0303"]
EXAMPLES += ["中文 a中文b 中 文", "[SEP] [sep] [MASK]! ##s\x00\x07a\u200bb", ""]
FLAGS = [
    dict(zip(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), values, strict=True))
    for values in itertools.product([True, False], [True, False, None], [True, False])
]
CASED = {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False}


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_every_combination_of_flags(tmp_path, flags, kind):
    """From both kinds of folder, against transformers by keyword and from the same folder."""
    folder = vocabulary_folder(tmp_path, **flags)
    if kind == "tokenizer.json":
        constructed(**flags).save_pretrained(folder)
        (folder / "vocab.txt").unlink()
    ours = BertTokenizer.from_pretrained(folder)
    for theirs in (constructed(**flags), BertTokenizerFast.from_pretrained(folder)):
        assert_equal(ours, theirs, EXAMPLES, padding=True)
        assert_equal(ours, theirs, EXAMPLES, EXAMPLES[::-1], truncation=True, max_length=7)


@settings(max_examples=100)
@given(st.sampled_from(FLAGS), st.text("".join(VOCABULARY) + "\u0301 ã", max_size=30))
def test_any_text_with_any_flags(tmp_path_factory, flags, text):
    folder = vocabulary_folder(tmp_path_factory.getbasetemp() / "any", **flags)
    assert_equal(BertTokenizer.from_pretrained(folder), constructed(**flags), [text], [text[::-1]])


def test_tokenizer_config_wins_over_what_tokenizer_json_has_stored(tmp_path):
    """Where it is silent, transformers 5 lower-cases; the stored flags of the training hold."""
    constructed(**CASED).save_pretrained(tmp_path)
    for flags in [*FLAGS[::3], {}]:
        write_json(tmp_path / "tokenizer_config.json", flags)
        ours = BertTokenizer.from_pretrained(tmp_path)
        theirs = BertTokenizerFast.from_pretrained(tmp_path) if flags else constructed(**CASED)
        assert_equal(ours, theirs, EXAMPLES, padding=True)


@pytest.mark.parametrize("lines", ["\n".join(VOCABULARY), "\r\n".join([*VOCABULARY, ""])])
def test_a_vocabulary_alone_is_enough(tmp_path, lines):
    """Uncased, as the first BERT; Windows line ends, and none at the end of the file."""
    (tmp_path / "vocab.txt").write_bytes(lines.encode())
    assert_equal(BertTokenizer.from_pretrained(tmp_path), constructed(), EXAMPLES)


def test_a_vocabulary_with_odd_lines_keeps_its_ids(tmp_path):
    """A duplicate, and what Unicode calls a line break: the multilingual BERT has U+2028.

    Spaces and tabs at the end of a line are no part of its token.
    """
    tokens = ["[PAD] ", *SPECIAL[1:], "film", "film \t", "\u2028", "\x85", "a", "\x1c", "  "]
    ours = BertTokenizer.from_pretrained(vocabulary_folder(tmp_path / "first", tokens))
    assert ours("film a")["input_ids"] == [2, 6, 9, 3]
    ours.save_pretrained(tmp_path)
    for _ in range(2):  # from tokenizer.json, then from vocab.txt
        assert BertTokenizer.from_pretrained(tmp_path)("film a") == ours("film a")
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)


@pytest.mark.parametrize("as_object", [False, True])
def test_special_tokens_of_another_name(tmp_path, as_object):
    """`tokenizer_config.json` may rename them, by a string or by an object."""
    renamed = {"pad_token": "a", "unk_token": "b", "cls_token": "e", "sep_token": "."}
    config = {key: {"content": token} if as_object else token for key, token in renamed.items()}
    ours = BertTokenizer.from_pretrained(vocabulary_folder(tmp_path, **config))
    assert ours.pad_token_id == VOCABULARY.index("a")
    batch = ["hello", "Café zzz 中文 hello hello"]
    assert_equal(ours, constructed(**renamed), batch, ["1", "q"], padding=True)


def test_added_tokens_keep_their_ids_and_flags(tmp_path):
    theirs = constructed()
    theirs.add_tokens(["<e1>", AddedToken("hello", lstrip=True, single_word=True), "Cafés"])
    theirs.add_special_tokens({"additional_special_tokens": ["[E2]"]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BertTokenizer.from_pretrained(tmp_path / "theirs")
    assert ours.vocab_size == len(theirs) == len(VOCABULARY) + 3
    batch = ["a <e1> b", "<E1> hello hellos", "a cafés [E2][SEP]", "Cafés", "n[e2]", "b hello"]
    assert_equal(ours, theirs, batch)
    ours.save_pretrained(tmp_path / "ours")
    assert_equal(BertTokenizer.from_pretrained(tmp_path / "ours"), theirs, batch)


@pytest.mark.parametrize("generation", ["added_tokens.json", "added_tokens_decoder"])
def test_tokens_added_to_a_vocabulary_by_slow_tokenizers(tmp_path, generation):
    """Before tokenizer.json; older ones are in a file of their own, special ones in another."""
    folder = vocabulary_folder(tmp_path, model_max_length=50)
    count, special = len(VOCABULARY), "[sep]"
    if generation == "added_tokens.json":
        write_json(folder / generation, {"covid": count, special: count + 1})
        tokens = {"additional_special_tokens": ["sep", special], "mask_token": "[MASK]"}
        write_json(folder / "special_tokens_map.json", tokens)
    else:
        flags = {"lstrip": False, "rstrip": False, "single_word": True, "normalized": True}
        added = {f"{count + 1}": {"content": special, **flags, "special": True}}
        added[f"{count}"] = {"content": "covid", **flags, "special": False}
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    ours, theirs = (kind.from_pretrained(folder) for kind in (BertTokenizer, BertTokenizerFast))
    batch = ["a COVID b covids", "[sep] hello[SEP]sep", "covid ##s seps"]
    assert ours.vocab_size == count + 2
    assert_equal(ours, theirs, batch)
    ours.save_pretrained(tmp_path / "saved")
    for removed in ("vocab.txt", "tokenizer.json"):
        again = shutil.copytree(tmp_path / "saved", tmp_path / removed.replace(".", "-"))
        (again / removed).unlink()
        assert_equal(BertTokenizer.from_pretrained(again), theirs, batch)


def test_other_software_tokenises_as_the_settings_in_force(tmp_path):
    """Case as tokenizer.json alone says, or an argument: what is saved says it again."""
    constructed(**CASED).save_pretrained(tmp_path / "cased")
    (tmp_path / "cased" / "tokenizer_config.json").unlink()
    cased = BertTokenizer.from_pretrained(tmp_path / "cased")
    changed = BertTokenizer.from_pretrained(vocabulary_folder(tmp_path / "uncased"), **CASED)
    for ours in (cased, changed):
        ours.save_pretrained(tmp_path / "saved")
        assert_equal(ours, constructed(**CASED), EXAMPLES)
        assert_equal(ours, BertTokenizerFast.from_pretrained(tmp_path / "saved"), EXAMPLES)


def test_a_saved_tokenizer_loads_equal_everywhere(tmp_path):
    """In ours and in transformers, from tokenizer.json and from vocab.txt alone."""
    flags = {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}
    ours = BertTokenizer.from_pretrained(vocabulary_folder(tmp_path / "first", **flags))
    ours("hello", truncation=True, max_length=3)
    ours.save_pretrained(tmp_path / "saved")
    for removed in ("tokenizer.json", "vocab.txt"):
        folder = shutil.copytree(tmp_path / "saved", tmp_path / removed)
        (folder / removed).unlink()
        for kind in (BertTokenizer, BertTokenizerFast):
            again = kind.from_pretrained(folder)
            assert_equal(again, constructed(**flags), EXAMPLES, EXAMPLES[::-1], padding=True)
    BertTokenizer.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


LIMITS = [(9, None, 9), (None, 7, 7), (9, 7, 7), (7, 9, 7), (9, 10**30, 9), (None, 10**30, 512)]


@pytest.mark.parametrize(("positions", "model_max_length", "limit"), LIMITS)
def test_texts_are_truncated_to_the_models_limit(tmp_path, positions, model_max_length, limit):
    """The smaller of config.json's positions and tokenizer_config.json's limit; else 512.

    sentence-transformers has a third file for it.
    """
    folder = vocabulary_folder(tmp_path, model_max_length=600)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": model_max_length})
    assert BertTokenizer.from_pretrained(folder).max_length == min(model_max_length or 600, 600)
    (folder / "sentence_bert_config.json").unlink()
    vocabulary_folder(tmp_path, model_max_length=model_max_length)
    write_json(folder / "config.json", {"max_position_embeddings": positions})
    ours, long = BertTokenizer.from_pretrained(folder), "a " * (limit + 20)
    assert ours.max_length == limit
    for batch in (([long, "b"],), ([long, "b"], [long, "b"])):
        expected = constructed()(*batch, truncation=True, max_length=limit)
        truncated = ours(*batch, truncation=True)
        assert all(truncated[key] == expected[key] for key in KEYS)


# ---------------------------------------------------------------------------- damaged files


def refused_load(folder, *parts):
    refused(lambda: BertTokenizer.from_pretrained(folder), *parts)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    refused_load(tmp_path, tmp_path, "tokenizer.json", "vocab.txt")


def added(content, number, **flags):
    return {"added_tokens": [{"id": number, "content": content, **flags}]}


# What makes it not BERT's -> where, the values there, what the message says.
NOT_BERT = {
    "replacing text": (["normalizer"], {"type": "Replace"}, "'Replace'"),
    "a regular expression": (["pre_tokenizer"], {"type": "Split"}, "'Split'"),
    "another model": (["model"], {"type": "BPE", "merges": []}, "'BPE'"),
    "another prefix": (["model"], {"continuing_subword_prefix": "@"}, "'@'"),
    "endless words": (["model"], {"max_input_chars_per_word": 10**9}, "max_input_chars_per_word"),
    "no normalizer": ([], {"normalizer": None}, "damaged or not"),
    "a negative id": (["model", "vocab"], {"film": -1}, "vocab"),
    "a fractional id": (["model", "vocab"], {"film": 1.0}, "vocab"),
    "no boolean": (["normalizer"], {"lowercase": 1}, "lowercase is 1"),
    "an empty added token": ([], added("", 5), "''"),
    "one that normalizes to nothing": ([], added("\u200b", 5, normalized=True), "'\\u200b'"),
    "one with the id of another": ([], added("hello", 1), "'hello' cannot have id 1"),
    "an unknown flag": ([], added("film", 5, lstrip="yes"), "damaged or not"),
}


@pytest.mark.parametrize(("keys", "values", "expected"), NOT_BERT.values(), ids=NOT_BERT)
def test_a_tokenizer_json_that_is_not_berts_is_refused(tmp_path, keys, values, expected):
    """Nor does the library get to see what it would crash on or search for forever."""
    constructed().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # whose settings would win
    edit_json(tmp_path / "tokenizer.json", *keys, **values)
    refused_load(tmp_path, tmp_path / "tokenizer.json", expected)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_of_another_class_is_refused(tmp_path, file):
    """Its vocab.txt looks like BERT's, but its words were split by another program first."""
    folder = vocabulary_folder(tmp_path)
    for name in ("BertJapaneseTokenizer", "HerbertTokenizerFast", 3, []):
        write_json(folder / file, {"tokenizer_class": name})
        refused_load(folder, folder / file, repr(name))


def test_truncating_or_padding_on_the_left_is_refused(tmp_path):
    for key in ("truncation_side", "padding_side"):
        folder = vocabulary_folder(tmp_path, **{key: "left"})
        refused_load(folder, folder / "tokenizer_config.json", key, "'left'")


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    for token in SPECIAL:
        folder = vocabulary_folder(tmp_path, [line for line in VOCABULARY if line != token])
        refused_load(folder, folder / "vocab.txt", token)


def test_a_setting_of_a_wrong_type_or_size_is_refused(tmp_path):
    wrong = {"do_lower_case": "yes", "strip_accents": 1, "tokenize_chinese_chars": None}
    for key, value in wrong.items():
        folder = vocabulary_folder(tmp_path, **{key: value})
        refused_load(folder, f"{folder / 'tokenizer_config.json'}: {key} is {value!r}")
    vocabulary_folder(tmp_path, model_max_length=2)  # no room for [CLS] x [SEP]
    refused_load(tmp_path, tmp_path, "2 tokens")


# ---------------------------------------------------------------------------- real data

DATA = os.environ.get("MINBERT_DATA")
TABLES = sorted(Path(DATA).glob("*.csv")) if DATA else []
COLUMNS = ("sentence", "sentence1", "sentence2", "sent0", "sent1", "hard_neg")


def ids(encodings):
    return [(e.ids, e.type_ids, e.attention_mask) for e in encodings]


@pytest.mark.skipif(not TABLES, reason="MINBERT_DATA names no folder with csv files")
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_sentence_and_pair_of_the_real_data(embedded, path):
    ours, oracle = embedded[0], embedded[1].backend_tokenizer
    oracle.no_truncation()
    oracle.no_padding()
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="," if path.name.startswith("nli") else "\t")
        rows = [[row[column] or "" for column in COLUMNS if column in row] for row in rows]
    assert len(rows) > 100
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        for column in zip(*part, strict=True):
            different = list(set(column))
            assert ids(ours.encode_batch(different)) == ids(oracle.encode_batch_fast(different))
        if len(part[0]) > 1:
            first, second, *_ = zip(*part, strict=True)
            expected = oracle.encode_batch_fast(list(zip(first, second, strict=True)))
            assert ids(ours.encode_batch(first, second)) == ids(expected)
