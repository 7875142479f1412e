"""Reading the course's files, batches, and the mixing of tasks."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from checkpoint import UserError
from datasets import Mixture, Sentences, TaskData, read, some
from tasks import TASKS
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return BertTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def sets(data, tokenizer):
    """SST and Quora with 40 training rows, STS with 20."""
    return [
        TaskData(data / TASKS[name].files.format("train"), TASKS[name], tokenizer)
        for name in ("sst", "para", "sts")
    ]


# ---------------------------------------------------------------------------- reading


def test_text_survives_quotes_and_unicode(tmp_path):
    text = 'He said "no",\tthen  "" \u00e9t\u00e9 \u4e2d\u6587 \x85 \u2028 end'
    write_csv(tmp_path / "f.csv", ["id", "sentence", "sentiment"], [["a", text, 3]])
    examples, unlabelled = read(tmp_path / "f.csv", TASKS["sst"])
    assert (examples[0].id, examples[0].texts, examples[0].label) == ("a", (text,), 3.0)
    assert unlabelled == 0


def test_the_test_files_of_the_course_have_another_index_column(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("0\t\tid\tsentence\n1\t0.0\tabc\tFine .\n", encoding="utf-8")
    examples, _ = read(path, TASKS["sst"], labelled=False)
    assert [(e.id, e.texts, e.label) for e in examples] == [("abc", ("Fine .",), None)]


def test_byte_order_mark_crlf_column_order_and_extra_columns_are_harmless(tmp_path):
    path = tmp_path / "f.csv"
    path.write_bytes("\ufeffsimilarity\tnote\tsentence2\tid\tsentence1\r\n".encode())
    with open(path, "ab") as file:
        file.write(b"2.6\tx\tb\tid1\ta\r\n")
    examples, _ = read(path, TASKS["sts"])
    assert (examples[0].id, examples[0].texts, examples[0].label) == ("id1", ("a", "b"), 2.6)


def test_rows_without_a_label_are_counted_and_left_out(tmp_path, tokenizer):
    rows = [["a", "x", "y", "1.0"], ["b", "x", "", ""], ["c", "x", "", "0.0"]]
    write_csv(tmp_path / "f.csv", ["id", "sentence1", "sentence2", "is_duplicate"], rows)
    data = TaskData(tmp_path / "f.csv", TASKS["para"], tokenizer)
    assert [e.id for e in data.examples] == ["a", "c"]  # an empty sentence is a sentence
    assert data.unlabelled == 1
    assert "1 without a label" in str(data)


def test_limit_keeps_rows_of_the_whole_file_in_order(data):
    everything, _ = read(data / "ids-sst-train.csv", TASKS["sst"])
    places = {example: place for place, example in enumerate(everything)}
    for limit in (1, 7, len(everything) - 1, len(everything), len(everything) + 1):
        few, _ = read(data / "ids-sst-train.csv", TASKS["sst"], limit=limit)
        assert few == read(data / "ids-sst-train.csv", TASKS["sst"], limit=limit)[0]
        assert len(few) == min(limit, len(everything))
        found = [places[example] for example in few]
        assert found == sorted(set(found))
        assert limit != 7 or found[-1] > 7


def test_limit_is_as_likely_to_keep_any_row():
    """A file that is sorted by label, as the course's SST is, keeps its shares."""
    kept = some(range(100_000), 2_000)
    tenths = np.bincount(np.array(kept) // 10_000, minlength=10)
    assert stats.chisquare(tenths).pvalue > 0.01


HEADER = "\tid\tsentence1\tsentence2\tsimilarity\n"
BROKEN = {
    "empty file": (b"", "empty"),
    "header alone": (HEADER.encode(), "no rows"),
    "commas": (HEADER.replace("\t", ",").encode() + b"0,a,x,y,1.0\n", "tabs"),
    "missing column": (b"\tid\tsentence1\tsimilarity\n0\ta\tx\t1.0\n", "sentence2"),
    "header in capitals": (HEADER.upper().encode() + b"0\ta\tx\ty\t1\n", "line 1: no column 'id'"),
    "too large": (HEADER.encode() + b"0\ta\tx\ty\t1.0\n1\tb\tx\ty\t5.1\n", "line 3: similarity"),
    "negative": (HEADER.encode() + b"0\ta\tx\ty\t-0.1\n", "from 0 to 5"),
    "text": (HEADER.encode() + b"0\ta\tx\ty\tgood\n", "'good'"),
    "nan": (HEADER.encode() + b"0\ta\tx\ty\tnan\n", "'nan'"),
    "infinite": (HEADER.encode() + b"0\ta\tx\ty\t1e400\n", "'1e400'"),
    "no label at all": (HEADER.encode() + b"0\ta\tx\ty\t\n", "none of its 1 rows has a label"),
    "short row": (HEADER.encode() + b"0\ta\tx\n", "line 2: has not the 5 columns"),
    "long row": (HEADER.encode() + b"0\ta\tx\ty\t1\t2\n", "line 2: has not the 5 columns"),
    "open quote": (HEADER.encode() + b'0\ta\t"x\ty\t1\n1\tb\tx"\ty\t1\n', "line 2: a quoted field"),
    "open quote at the end": (HEADER.encode() + b'0\ta\tx\t"y\t1', "unexpected end of data"),
    "quote in the index": (HEADER.encode() + b'"0\ta\tx\ty\t1\n1"\tb\tx\ty\t1\n', "swallows"),
    "text after a quote": (HEADER.encode() + b'0\ta\t"x" z\ty\t1\n', "line 2: not csv"),
    "latin-1": (HEADER.encode() + b"0\ta\t\xe9t\xe9\ty\t1\n", "not UTF-8 (byte 0xe9"),
    "two sentences": (HEADER.encode() + b"0\ta\tx\ty\t2,5\n", "'2,5'"),
}


@pytest.mark.parametrize(("content", "expected"), BROKEN.values(), ids=BROKEN)
def test_faults_are_named_with_file_and_line(tmp_path, content, expected):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path, TASKS["sts"])
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_are_whole_numbers(tmp_path):
    write_csv(tmp_path / "f.csv", ["id", "sentence", "sentiment"], [["a", "x", "1.5"]])
    with pytest.raises(UserError, match=r"line 2: sentiment is '1.5'; expected a whole number"):
        read(tmp_path / "f.csv", TASKS["sst"])


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv: no such file: fetch"):
        read(tmp_path / "nothing.csv", TASKS["sst"])
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, TASKS["sst"])


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["sst", "cfimdb", "para", "sts"])
def test_labels_keep_their_tasks_dtype(data, tokenizer, name):
    task = TASKS[name]
    path = data / task.files.format("train")
    labels = TaskData(path, task, tokenizer).labels
    assert labels.dtype == (torch.int64 if name in ("sst", "cfimdb") else torch.float32)
    with open(path, encoding="utf-8", newline="") as file:
        stored = [float(row[task.label]) for row in csv.DictReader(file, delimiter="\t")]
    np.testing.assert_allclose(labels.numpy(), stored, rtol=1e-6)


def test_a_pair_is_two_rows_of_one_batch(sets, tokenizer):
    data = sets[2]
    rows = np.array([3, 0, 7])
    batch = data.batch(rows)
    texts = [data.examples[r].texts[0] for r in rows] + [data.examples[r].texts[1] for r in rows]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert batch.token_type_ids is None
    assert torch.equal(batch.labels, data.labels[[3, 0, 7]])


def test_a_joint_pair_is_one_row_with_segment_ids(data, tokenizer):
    joint = TaskData(data / "sts-train.csv", TASKS["sts"], tokenizer, "joint")
    rows = np.array([1, 4])
    batch = joint.batch(rows)
    firsts, seconds = zip(*(joint.examples[r].texts for r in rows), strict=True)
    expected = tokenizer(firsts, seconds, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.token_type_ids, expected["token_type_ids"])


@pytest.mark.parametrize(("name", "encoding"), [("sst", "separate"), ("sts", "joint")])
def test_token_ids_that_were_left_are_taken_up(tiny, data, tokenizer, tmp_path, name, encoding):
    """Not tokenised again; what else decides the ids finds nothing, nor does a damaged file."""
    task, path = TASKS[name], data / TASKS[name].files.format("dev")

    def load(tokens, tokenizer=tokenizer, **more):
        return TaskData(path, task, tokenizer, encoding, tokens=tokens, **more)

    first = load(tmp_path)
    first.save_tokens()
    [file] = tmp_path.iterdir()
    encoded = []

    class Counting(BertTokenizer):
        def encode_batch(self, *args, **options):
            encoded.append(len(args[0]))
            return super().encode_batch(*args, **options)

    counting = Counting.from_pretrained(tiny)
    again = load(tmp_path, counting)
    assert not encoded
    rows = np.arange(len(first))
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        ours, theirs = (getattr(of.batch(rows), key) for of in (first, again))
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert first.truncated == again.truncated
    load(tmp_path, counting, limit=5)
    assert encoded == [5]
    tensors = load_file(file)
    flat, lengths = tensors["ids.0"], tensors["lengths.0"]
    broken = [
        {**tensors, "ids.0": flat[:-1]},
        {**tensors, "ids.0": flat + counting.vocab_size},
        {**tensors, "lengths.0": lengths[:-1]},
        {**tensors, "lengths.0": torch.tensor(3)},
        {key: value for key, value in tensors.items() if key != "truncated"},
    ]
    for damaged in broken:
        save_file(damaged, file)
        assert load(tmp_path, counting).batch(rows).input_ids.equal(first.batch(rows).input_ids)
        assert encoded.pop() == len(first)
    file.write_bytes(file.read_bytes()[:100])
    load(tmp_path, counting)
    assert encoded.pop() == len(first)


def test_long_sentences_are_truncated_and_counted(tmp_path, tokenizer):
    rows = [["a", "film " * 500, 1], ["b", "film", 1], ["c", "", 1]]
    write_csv(tmp_path / "f.csv", ["id", "sentence", "sentiment"], rows)
    data = TaskData(tmp_path / "f.csv", TASKS["sst"], tokenizer)
    assert data.truncated == 1
    assert data.lengths.tolist() == [tokenizer.max_length, 3, 2]
    assert "1 truncated" in str(data)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**63 - 1))
def test_each_row_once_a_pass_and_a_pure_function_of_seed_and_epoch(tokenizer, size, batch, seed):
    data = Sentences("any", Path("f.csv"), [["film " * (i % 7) for i in range(size)]], tokenizer)
    batches = data.training_batches(batch, seed, 3)
    again = data.training_batches(batch, seed, 3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert max(map(len, batches)) <= batch
    assert len(batches) == -(-size // batch)
    assert all(np.array_equal(x, y) for x, y in zip(batches, again, strict=True))


def test_epochs_and_seeds_give_other_orders(sets):
    orders = {
        tuple(np.concatenate(sets[0].training_batches(4, seed, epoch)))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_hold_sentences_of_like_length(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    rows = [[f"r{i}", "film " * n, 1] for i, n in enumerate(rng.integers(1, 40, size=600))]
    write_csv(tmp_path / "f.csv", ["id", "sentence", "sentiment"], rows)
    data = TaskData(tmp_path / "f.csv", TASKS["sst"], tokenizer)
    batches = [data.batch(rows) for rows in data.training_batches(8, 0, 0)]
    padded = sum(batch.input_ids.numel() for batch in batches)
    assert padded <= 1.1 * data.lengths.sum()
    widths = [batch.input_ids.size(1) for batch in batches]
    assert widths != sorted(widths)


def test_evaluation_sees_each_row_once_longest_first(sets):
    batches = list(sets[1].in_order(7))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(40))
    widths = [b.input_ids.size(1) for b in batches]
    assert widths == sorted(widths, reverse=True)


# ---------------------------------------------------------------------------- mixtures


def seen(mixture, epochs):
    """(task, row) of every row of the epochs' steps, in order."""
    return [
        (batch.task, int(row))
        for epoch in epochs
        for step in mixture.steps(epoch)
        for batch in step
        for row in batch.rows
    ]


def test_round_robin_takes_turns_and_one_pass_over_the_smallest(sets):
    mixture = Mixture(sets, 8, 1, epochs=4)
    order = [step[0].task for step in mixture.steps(0)]
    assert order == ["sst", "para", "sts"] * 3  # ceil(20 / 8) steps of STS
    assert mixture.steps_in(0) == 9
    rows = Counter(seen(mixture, [0]))
    assert {row for (task, row) in rows if task == "sts"} == set(range(20))


def test_larger_sets_go_on_where_they_stopped(sets):
    mixture = Mixture(sets, 8, 1, epochs=5)
    # 5 steps of SST make a pass; 3 a round-robin epoch: passes end inside epochs 1, 3 and 4.
    stream = [row for task, row in seen(mixture, range(5)) if task == "sst"]
    assert len(stream) == 3 * 40
    for start in (0, 40, 80):
        assert sorted(stream[start : start + 40]) == list(range(40))
    assert seen(mixture, [2]) == seen(Mixture(sets, 8, 1, epochs=5), [2])


def test_proportional_sees_every_row_of_every_task_once_an_epoch(sets):
    mixture = Mixture(sets, 8, 1, epochs=2, sampling="proportional")
    for epoch in (0, 1):
        rows = seen(mixture, [epoch])
        assert len(rows) == len(set(rows)) == 100
    orders = [[step[0].task for step in mixture.steps(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_annealed_moves_from_proportional_towards_equal(sets):
    mixture = Mixture(sets, 4, 1, epochs=5, sampling="annealed")
    shares = [mixture.shares(epoch) for epoch in range(5)]
    assert shares[0] == [10, 10, 5]
    assert all(sum(share) == 25 for share in shares)
    assert [share[2] for share in shares] == sorted(share[2] for share in shares)
    weights = np.array([40.0, 40.0, 20.0]) ** 0.2
    np.testing.assert_allclose(shares[-1], weights / weights.sum() * 25, atol=1)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 45),
    accumulate=st.integers(1, 4),
    sampling=st.sampled_from(["roundrobin", "proportional", "annealed"]),
    seed=st.integers(0, 1000),
)
def test_every_stream_is_pass_after_pass(sets, batch, accumulate, sampling, seed):
    mixture = Mixture(sets, batch, seed, 3, sampling, accumulate)
    steps = [step for epoch in range(3) for step in mixture.steps(epoch)]
    assert len(steps) == sum(mixture.steps_in(epoch) for epoch in range(3))
    for data in sets:
        stream = [r for s in steps if s[0].source is data for b in s for r in b.rows]
        for start in range(0, len(stream), len(data)):
            chunk = stream[start : start + len(data)]
            assert len(set(chunk)) == len(chunk)
    assert all(len({b.task for b in step}) == 1 and len(step) <= accumulate for step in steps)


# ---------------------------------------------------------------------------- the course's data

REAL = os.environ.get("MINBERT_DATA")
ROWS = {
    "sst": (8544, 1101, 2210),
    "cfimdb": (1707, 245, 488),
    "sts": (6040, 863, 1725),
    "para": (None, 20212, None),
}


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
@pytest.mark.parametrize("name", ROWS)
def test_the_courses_files_have_their_known_rows(name):
    task = TASKS[name]
    for split, rows in zip(("train", "dev", "test-student"), ROWS[name], strict=True):
        path = Path(REAL) / task.files.format(split)
        examples, unlabelled = read(path, task, labelled=split != "test-student")
        assert rows is None or len(examples) == rows
        assert unlabelled == (2 if (name, split) == ("para", "dev") else 0)
        assert len({e.id for e in examples}) == len(examples)
