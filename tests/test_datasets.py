"""Examples of the course's files, and batches of like length."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAIR, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import refused
from scipy import stats

from datasets import (
    TaskDataset,
    TokenizedDataset,
    read_examples,
    read_triples,
    sample_rows,
)
from engine import distributed
from tasks import TASKS
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return BertTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def sst(data, tokenizer):
    return TaskDataset(data / "ids-sst-train.csv", TASKS["sst"], tokenizer)


def sentences(lengths, tokenizer, **options) -> TokenizedDataset:
    """A set with a sentence of so many words for each of `lengths`."""
    texts = ["film " * n for n in lengths]
    return TokenizedDataset("any", Path("f.csv"), [texts], tokenizer, **options)


# ---------------------------------------------------------------------------- examples


def test_rows_without_a_label_are_counted_and_left_out(tmp_path, tokenizer):
    text = 'He said "no",\tthen  "" \u00e9t\u00e9 \u4e2d\u6587 \x85 \u2028 end'
    rows = [["a", text, "", "2.6"], ["b", "x", "", ""], ["c", "x", "y", "0"], ["d", "", "", " "]]
    write_csv(tmp_path / "f.csv", ["id", *PAIR, "similarity"], rows)
    dataset = TaskDataset(tmp_path / "f.csv", TASKS["sts"], tokenizer)
    examples = [(e.id, e.texts, e.label) for e in dataset.examples]
    assert examples == [("a", (text, ""), 2.6), ("c", ("x", "y"), 0)]
    assert dataset.unlabelled == 2
    assert "2 rows, 2 without a label left out" in str(dataset)


@pytest.mark.parametrize("labelled", [False, None])
def test_test_files_have_another_index_column_and_no_labels(tmp_path, data, tokenizer, labelled):
    path = tmp_path / "f.csv"
    path.write_text("0\t\tid\tsentence\n1\t0.0\tabc\tFine .\n", encoding="utf-8")
    dataset = TaskDataset(path, TASKS["sst"], tokenizer, labelled=labelled)
    assert [(e.id, e.texts, e.label) for e in dataset.examples] == [("abc", ("Fine .",), None)]
    assert dataset.labels is None and dataset.batch(np.arange(1)).labels is None
    refused(lambda: read_examples(path, TASKS["sst"]), "no column 'sentiment'")
    path = data / "sts-dev.csv"  # which has labels
    labels = [e.label for e in read_examples(path, TASKS["sts"])[0]]
    expected = labels if labelled is None else [None] * 16
    assert [e.label for e in read_examples(path, TASKS["sts"], labelled)[0]] == expected


GOOD = ["a", "x", "y", "1"]
FAULTS = {
    "line 3: similarity is '5.1'": [GOOD, ["b", "x", "y", "5.1"]],
    "'-0.1'; expected a number from 0 to 5": [["a", "x", "y", "-0.1"]],
    "similarity is '2,5'": [["a", "x", "y", "2,5"]],
    "similarity is 'nan'": [["a", "x", "y", "nan"]],
    "none of its 1 rows has a label": [["a", "x", "y", ""]],
    "no rows": [],
    "line 4: id 'a'": [GOOD, ["b", "x", "y", "1"], GOOD],
    "line 3: id is ' '": [GOOD, [" ", "x", "y", "1"]],
    "line 2: id is 'a\\nb'": [["a\nb", "x", "y", "1"]],
}


def test_invalid_labels_and_ids_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "broken.csv"
    for expected, rows in FAULTS.items():
        write_csv(path, ["id", *PAIR, "similarity"], rows)
        assert refused(lambda: read_examples(path, TASKS["sts"]), expected).startswith(str(path))


@pytest.mark.parametrize("name", ["sst", "cfimdb", "para"])
def test_classes_are_whole_numbers_in_their_range(tmp_path, name):
    task, path = TASKS[name], tmp_path / "f.csv"
    texts, header = ["x"] * len(task.text_columns), ["id", *task.text_columns, task.label_column]
    for label in ("0.5", str(task.labels.num_classes), "-1"):
        write_csv(path, header, [["a", *texts, label]])
        expected = f"line 2: {task.label_column} is '{label}'"
        refused(lambda: read_examples(path, task), expected, "whole")
    write_csv(path, header, [["a", *texts, "1.0"], ["b", *texts, "0"]])
    assert [e.label for e in read_examples(path, task)[0]] == [1, 0]


def test_a_limit_keeps_a_fixed_random_subset_in_file_order(data):
    path, task = data / "ids-sst-train.csv", TASKS["sst"]
    whole, _, checksum = read_examples(path, task)
    for limit in (1, 7, 40, 41):
        examples = read_examples(path, task, limit=limit)
        assert examples == read_examples(path, task, limit=limit) and examples[2] == checksum
        kept = [whole.index(example) for example in examples[0]]
        assert len(kept) == min(limit, 40) and kept == sorted(set(kept))
        assert limit != 7 or kept[-1] > 7


def test_a_limit_is_equally_likely_to_keep_any_row():
    """A file that is sorted by label, as the course's SST is, keeps its proportions."""
    kept = sample_rows(range(100_000), 2_000)
    tenths = np.bincount(np.array(kept) // 10_000, minlength=10)
    assert stats.chisquare(tenths).pvalue > 0.01


def test_triples_of_simcse(tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text('sent0,sent1,hard_neg\n"a, b",c,d\ne,f,g\n', encoding="utf-8")
    triples, checksum = read_triples(path)
    assert triples == [("a, b", "c", "d"), ("e", "f", "g")] and len(checksum) == 64
    assert read_triples(path, limit=1)[0][0] in triples
    for content, expected in (("a,,c\n", "line 2: sent1 is empty"), ("", "no rows")):
        path.write_text(f"sent0,sent1,hard_neg\n{content}", encoding="utf-8")
        refused(lambda: read_triples(path), expected)


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", [*TASKS, "joint sts"])
def test_a_batch_is_what_the_tokenizer_makes_of_its_rows(data, tokenizer, kind):
    """Pairs encoded separately are two rows of one batch."""
    name, separate, rows = kind.split()[-1], kind in TASKS, np.array([3, 0, 7])
    pair_encoding = "separate" if separate else "joint"
    dataset = TaskDataset(data / TASKS[name].file("train"), TASKS[name], tokenizer, pair_encoding)
    batch, examples = dataset.batch(rows), [dataset.examples[row] for row in rows]
    texts = list(zip(*(example.texts for example in examples), strict=True))
    assert dataset.embeddings_per_row == (len(texts) if separate else 1)
    texts = [sum(texts, ())] if separate else texts
    expected = tokenizer(*texts, padding=True, return_tensors="pt")
    assert (batch.token_type_ids is None) == separate
    for key in ("input_ids", "attention_mask", "token_type_ids")[: 2 if separate else 3]:
        torch.testing.assert_close(getattr(batch, key), expected[key])  # int64 too
    dtype = torch.int64 if name in ("sst", "cfimdb") else torch.float32
    labels = torch.tensor([example.label for example in examples], dtype=dtype)
    torch.testing.assert_close(batch.labels, labels)
    assert (len(batch), batch.task, batch.rows.tolist()) == (3, name, [3, 0, 7])
    ids = " ".join(example.id for example in examples)
    assert str(batch) == f"task {name}, rows with ids {ids}"


def test_a_batch_moves_to_a_device_with_all_its_tensors(sst):
    moved = sst.batch(np.arange(3)).to(torch.device("meta"))
    tensors = (moved.input_ids, moved.attention_mask, moved.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"} and moved.token_type_ids is None


def test_long_sentences_are_truncated_and_counted(tokenizer):
    limit = tokenizer.max_length
    dataset = sentences([500, 1, 0, limit - 2], tokenizer)
    assert dataset.truncated == 1 and "1 truncated" in str(dataset)
    assert dataset.lengths.tolist() == [limit, 3, 2, limit]


counts, seeds = st.integers(1, 50), st.integers(0, 2**63 - 1)


@settings(max_examples=60)
@given(counts, counts, st.integers(1, 3), seeds)
def test_each_pass_sees_each_row_once(tokenizer, size, batch, least, seed):
    """In an order that is a pure function of seed and epoch; no batch is too small."""
    dataset = sentences([i % 7 for i in range(size)], tokenizer, min_batch_size=least)
    batches, again = (dataset.training_batches(batch, seed, 3) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(batches, again, strict=True))
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert len(batches) == dataset.num_batches(batch)
    assert max(map(len, batches)) < batch + least
    assert min(map(len, batches)) >= min(least, batch, size)
    assert sum(len(rows) != batch for rows in batches) <= 1


def test_epochs_and_seeds_give_other_orders(sst):
    keys = [(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders = {tuple(np.concatenate(sst.training_batches(4, *key))) for key in keys}
    assert len(orders) == 4


def test_training_batches_hold_sentences_of_similar_length(tokenizer):
    """Little padding, in shuffled order."""
    dataset = sentences(np.random.default_rng(0).integers(1, 40, size=600), tokenizer)
    batches = [dataset.batch(rows) for rows in dataset.training_batches(8, 0, 0)]
    assert sum(batch.input_ids.numel() for batch in batches) <= 1.1 * dataset.lengths.sum()
    widths = [batch.input_ids.size(1) for batch in batches]
    assert widths != sorted(widths)


def test_evaluation_sees_each_row_once_longest_first(tokenizer, monkeypatch):
    dataset = sentences(np.random.default_rng(0).integers(1, 40, size=30), tokenizer)
    order = np.concatenate([batch.rows for batch in dataset.eval_batches(7)])
    assert sorted(order.tolist()) == list(range(30))
    assert dataset.lengths[order].tolist() == sorted(dataset.lengths, reverse=True)
    some = np.concatenate([b.rows for b in dataset.eval_batches(2, np.array([4, 9, 2]))])
    assert sorted(some.tolist()) == [2, 4, 9]
    monkeypatch.setattr(distributed, "_world_size", 3)
    assert [len(list(dataset.eval_batches(7, shard=shard))) for shard in (True, False)] == [2, 5]


REAL = os.environ.get("MINBERT_DATA")
ROWS = {"sst": (8544, 1101, 2210), "cfimdb": (1707, 245, 488), "sts": (6040, 863, 1725)}
ROWS["para"] = (None, 20212, None)


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
@pytest.mark.parametrize("name", ROWS)
def test_the_courses_files_have_their_known_rows(name):
    task = TASKS[name]
    for split, rows in zip(("train", "dev", "test"), ROWS[name], strict=True):
        path = Path(REAL) / task.file(split)
        examples, unlabelled, _ = read_examples(path, task, labelled=split != "test")
        assert rows is None or len(examples) == rows
        assert unlabelled == (2 if (name, split) == ("para", "dev") else 0)
        assert len({e.id for e in examples}) == len(examples)
