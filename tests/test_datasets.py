"""Examples of the course's files, batches of like length, and the mixing of tasks."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAIR, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from datasets import (
    TaskDataset,
    TaskMixture,
    TokenizedDataset,
    read_examples,
    read_triples,
    sample_rows,
)
from engine import distributed
from engine.errors import UserError
from tasks import TASKS
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return BertTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def sets(data, tokenizer):
    """SST and Quora with 40 training rows, STS with 20."""
    return [
        TaskDataset(data / TASKS[name].files.format("train"), TASKS[name], tokenizer)
        for name in ("sst", "para", "sts")
    ]


def sentences(lengths, tokenizer, **options) -> TokenizedDataset:
    """A set with a sentence of so many words for each of `lengths`."""
    return TokenizedDataset(
        "any", Path("f.csv"), [["film " * n for n in lengths]], tokenizer, **options
    )


# ---------------------------------------------------------------------------- examples


def test_an_example_is_its_row(tmp_path):
    text = 'He said "no",\tthen  "" \u00e9t\u00e9 \u4e2d\u6587 \x85 \u2028 end'
    write_csv(tmp_path / "f.csv", ["id", *PAIR, "similarity"], [["a", text, "", "2.6"]])
    examples, unlabelled, _ = read_examples(tmp_path / "f.csv", TASKS["sts"])
    assert [(e.id, e.texts, e.label) for e in examples] == [("a", (text, ""), 2.6)]
    assert unlabelled == 0


@pytest.mark.parametrize("labelled", [False, None])
def test_test_files_have_another_index_column_and_no_labels(tmp_path, data, labelled):
    path = tmp_path / "f.csv"
    path.write_text("0\t\tid\tsentence\n1\t0.0\tabc\tFine .\n", encoding="utf-8")
    examples, _, _ = read_examples(path, TASKS["sst"], labelled)
    assert [(e.id, e.texts, e.label) for e in examples] == [("abc", ("Fine .",), None)]
    with pytest.raises(UserError, match="no column 'sentiment'"):
        read_examples(path, TASKS["sst"])
    path = data / "sts-dev.csv"  # which has labels
    found = read_examples(path, TASKS["sts"], labelled)[0]
    labels = [e.label for e in read_examples(path, TASKS["sts"])[0]]
    assert [e.label for e in found] == (labels if labelled is None else [None] * 16)


def test_rows_without_a_label_are_counted_and_left_out(tmp_path, tokenizer):
    rows = [["a", "x", "y", "1.0"], ["b", "x", "", ""], ["c", "x", "", "0.0"], ["d", "", "", " "]]
    write_csv(tmp_path / "f.csv", ["id", *PAIR, "is_duplicate"], rows)
    dataset = TaskDataset(tmp_path / "f.csv", TASKS["para"], tokenizer)
    assert [e.id for e in dataset.examples] == ["a", "c"]
    assert dataset.unlabelled == 2
    assert "2 rows, 2 without a label left out" in str(dataset)


FAULTS = {
    "above the range": ([["a", "x", "y", "1"], ["b", "x", "y", "5.1"]], "line 3: similarity is"),
    "negative": ([["a", "x", "y", "-0.1"]], "expected a number from 0 to 5"),
    "text": ([["a", "x", "y", "good"]], "'good'"),
    "not a number": ([["a", "x", "y", "nan"]], "'nan'"),
    "infinite": ([["a", "x", "y", "1e400"]], "'1e400'"),
    "decimal comma": ([["a", "x", "y", "2,5"]], "'2,5'"),
    "no label at all": ([["a", "x", "y", ""]], "none of its 1 rows has a label"),
    "no rows": ([], "no rows"),
    "duplicate id": (
        [["a", "x", "y", "1"], ["b", "x", "y", "1"], ["a", "x", "y", "1"]],
        "line 4: id 'a'",
    ),
    "empty id": ([["a", "x", "y", "1"], [" ", "x", "y", "1"]], "line 3: id is ' '"),
    "id of two lines": ([["a\nb", "x", "y", "1"]], "line 2: id is 'a\\nb'"),
}


@pytest.mark.parametrize(("rows", "expected"), FAULTS.values(), ids=FAULTS)
def test_invalid_labels_and_ids_are_named_with_file_and_line(tmp_path, rows, expected):
    path = tmp_path / "broken.csv"
    write_csv(path, ["id", *PAIR, "similarity"], rows)
    with pytest.raises(UserError) as caught:
        read_examples(path, TASKS["sts"])
    message = str(caught.value)
    assert message.startswith(str(path)) and expected in message and message.isprintable()


@pytest.mark.parametrize("name", ["sst", "cfimdb", "para"])
def test_classes_are_whole_numbers_in_their_range(tmp_path, name):
    task = TASKS[name]
    path = tmp_path / "f.csv"
    texts = ["x"] * len(task.text_columns)
    header = ["id", *task.text_columns, task.label_column]
    for label in ("0.5", str(task.labels.num_classes), "-1"):
        write_csv(path, header, [["a", *texts, label]])
        with pytest.raises(UserError, match=f"line 2: {task.label_column} is '{label}'.*whole"):
            read_examples(path, task)
    write_csv(path, header, [["a", *texts, "1.0"], ["b", *texts, "0"]])
    assert [e.label for e in read_examples(path, task)[0]] == [1, 0]


def test_a_limit_keeps_a_fixed_random_subset_in_file_order(data):
    everything, _, checksum = read_examples(data / "ids-sst-train.csv", TASKS["sst"])
    places = {example: place for place, example in enumerate(everything)}
    for limit in (1, 7, len(everything) - 1, len(everything), len(everything) + 1):
        found = read_examples(data / "ids-sst-train.csv", TASKS["sst"], limit=limit)
        assert found == read_examples(data / "ids-sst-train.csv", TASKS["sst"], limit=limit)
        assert found[2] == checksum
        kept = [places[example] for example in found[0]]
        assert len(kept) == min(limit, len(everything))
        assert kept == sorted(set(kept))
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
    assert triples == [("a, b", "c", "d"), ("e", "f", "g")]
    assert len(checksum) == 64
    assert read_triples(path, limit=1)[0][0] in triples
    for content, expected in (("a,,c\n", "line 2: sent1 is empty"), ("", "no rows")):
        path.write_text(f"sent0,sent1,hard_neg\n{content}", encoding="utf-8")
        with pytest.raises(UserError, match=expected):
            read_triples(path)


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", TASKS)
def test_labels_keep_their_tasks_dtype(data, tokenizer, name):
    task = TASKS[name]
    path = data / task.files.format("train")
    labels = TaskDataset(path, task, tokenizer).labels
    assert labels.dtype == (torch.int64 if name in ("sst", "cfimdb") else torch.float32)
    with open(path, encoding="utf-8", newline="") as file:
        stored = [float(row[task.label_column]) for row in csv.DictReader(file, delimiter="\t")]
    np.testing.assert_allclose(labels.numpy(), stored, rtol=1e-6)
    test = TaskDataset(data / task.files.format("test-student"), task, tokenizer, labelled=False)
    assert test.labels is None and test.batch(np.arange(2)).labels is None


def assert_tokenized(tokenizer, batch, *texts):
    """The batch is what the tokenizer makes of the texts, padded to a multiple of 8 tokens."""
    expected = tokenizer(*texts, padding=True, return_tensors="pt")
    width = expected["input_ids"].size(1)
    assert batch.input_ids.size(1) == -(-width // 8) * 8
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        found = getattr(batch, key)
        if found is None:
            assert key == "token_type_ids" and not expected[key].any()
        else:
            assert found.dtype == torch.int64
            assert torch.equal(found[:, :width], expected[key])
            assert not found[:, width:].any()  # [PAD] is 0 here


def test_a_pair_is_two_rows_of_one_batch(sets, tokenizer):
    dataset, rows = sets[2], np.array([3, 0, 7])
    batch = dataset.batch(rows)
    firsts, seconds = zip(*(dataset.examples[r].texts for r in rows), strict=True)
    assert dataset.embeddings_per_row == 2
    assert_tokenized(tokenizer, batch, [*firsts, *seconds])
    assert torch.equal(batch.labels, dataset.labels[[3, 0, 7]])
    assert (len(batch), batch.task, batch.rows.tolist()) == (3, "sts", [3, 0, 7])
    assert str(batch) == "task sts, rows with ids " + " ".join(dataset.examples[r].id for r in rows)


def test_a_joint_pair_is_one_row_with_segment_ids(data, tokenizer):
    joint = TaskDataset(data / "sts-train.csv", TASKS["sts"], tokenizer, "joint")
    rows = np.arange(20)
    firsts, seconds = zip(*(joint.examples[r].texts for r in rows), strict=True)
    assert joint.embeddings_per_row == 1
    assert_tokenized(tokenizer, joint.batch(rows), firsts, seconds)
    assert joint.batch(rows).token_type_ids.any()


def test_a_batch_moves_to_a_device_with_all_its_tensors(sets):
    moved = sets[0].batch(np.arange(3)).to(torch.device("meta"))
    assert {moved.input_ids.device.type, moved.attention_mask.device.type} == {"meta"}
    assert moved.labels.device.type == "meta" and moved.token_type_ids is None


def test_long_sentences_are_truncated_and_counted(tokenizer):
    """The padding to a multiple of 8 never goes beyond the model's limit."""
    limit = tokenizer.max_length
    dataset = sentences([500, 1, 0, limit - 2], tokenizer)
    assert dataset.truncated == 1
    assert dataset.lengths.tolist() == [limit, 3, 2, limit]
    assert "1 truncated" in str(dataset)
    tokenizer.max_length = 45
    try:
        assert sentences([500], tokenizer).batch(np.arange(1)).input_ids.shape == (1, 45)
    finally:
        tokenizer.max_length = limit


@settings(max_examples=60)
@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 50),
    least=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_pass_sees_each_row_once(tokenizer, size, batch, least, seed):
    """In an order that is a pure function of seed and epoch; no batch is too small."""
    dataset = sentences([i % 7 for i in range(size)], tokenizer, min_batch_size=least)
    batches = dataset.training_batches(batch, seed, 3)
    again = dataset.training_batches(batch, seed, 3)
    assert all(np.array_equal(x, y) for x, y in zip(batches, again, strict=True))
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert len(batches) == dataset.num_batches(batch)
    assert max(map(len, batches)) < batch + least
    assert min(map(len, batches)) >= min(least, batch, size)
    assert sum(len(rows) != batch for rows in batches) <= 1


def test_epochs_and_seeds_give_other_orders(sets):
    orders = {
        tuple(np.concatenate(sets[0].training_batches(4, seed, epoch)))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_training_batches_hold_sentences_of_similar_length(tokenizer):
    """Little padding, in shuffled order."""
    rng = np.random.default_rng(0)
    dataset = sentences(rng.integers(1, 40, size=600), tokenizer)
    batches = [dataset.batch(rows) for rows in dataset.training_batches(8, 0, 0)]
    longest = [len(batch) * int(batch.attention_mask.sum(1).max()) for batch in batches]
    assert sum(longest) <= 1.1 * dataset.lengths.sum()
    widths = [batch.input_ids.size(1) for batch in batches]
    assert widths != sorted(widths)


def test_evaluation_sees_each_row_once_longest_first(tokenizer):
    dataset = sentences(np.random.default_rng(0).integers(1, 40, size=30), tokenizer)
    batches = list(dataset.eval_batches(7))
    order = np.concatenate([batch.rows for batch in batches])
    assert sorted(order.tolist()) == list(range(30))
    assert dataset.lengths[order].tolist() == sorted(dataset.lengths, reverse=True)
    some = np.concatenate([b.rows for b in dataset.eval_batches(2, np.array([4, 9, 2]))])
    assert sorted(some.tolist()) == [2, 4, 9]


def test_processes_share_the_rows(sets, monkeypatch):
    """Every process gets its slice of each training batch, and whole evaluation batches."""
    steps = list(TaskMixture(sets, 8, 1, epochs=1).steps(0))
    monkeypatch.setattr(distributed, "_world_size", 3)
    slices, evaluated = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "_rank", rank)
        slices.append(list(TaskMixture(sets, 8, 1, epochs=1).steps(0)))
        evaluated += [int(row) for batch in sets[0].eval_batches(7) for row in batch.rows]
        assert len(list(sets[0].eval_batches(7, shard=False))) == 6
    for (whole,), *parts in zip(steps, *slices, strict=True):
        rows = np.concatenate([part.rows for (part,) in parts])
        assert rows.tolist() == whole.rows.tolist()
        assert all(part.global_rows.tolist() == rows.tolist() for (part,) in parts)
    assert sorted(evaluated) == list(range(40))


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


def test_round_robin_takes_turns_for_one_pass_over_the_smallest(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=4)
    order = [step[0].task for step in mixture.steps(0)]
    assert order == ["sst", "para", "sts"] * 3  # ceil(20 / 8) steps of STS
    assert mixture.epoch_steps(0) == 9
    rows = Counter(seen(mixture, [0]))
    assert {row for (task, row) in rows if task == "sts"} == set(range(20))


def test_larger_sets_continue_where_they_stopped(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=5)
    # 5 steps of SST make a pass; 3 a round-robin epoch: passes end inside epochs 1, 3 and 4.
    stream = [row for task, row in seen(mixture, range(5)) if task == "sst"]
    assert len(stream) == 3 * 40
    for start in (0, 40, 80):
        assert sorted(stream[start : start + 40]) == list(range(40))
    assert seen(mixture, [2]) == seen(TaskMixture(sets, 8, 1, epochs=5), [2])


def test_proportional_sees_every_row_of_every_task_once_an_epoch(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=2, sampling="proportional")
    for epoch in (0, 1):
        rows = seen(mixture, [epoch])
        assert len(rows) == len(set(rows)) == 100
    orders = [[step[0].task for step in mixture.steps(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_annealed_moves_from_proportional_towards_equal(sets):
    mixture = TaskMixture(sets, 1, 1, epochs=5, sampling="annealed")
    steps = [mixture.task_steps(epoch) for epoch in range(5)]
    assert steps[0] == [40, 40, 20]
    assert all(sum(of) == 100 for of in steps)
    assert [of[2] for of in steps] == sorted(of[2] for of in steps)
    weights = np.array([40.0, 40.0, 20.0]) ** 0.2  # Stickland & Murray's last exponent
    np.testing.assert_allclose(steps[-1], weights / weights.sum() * 100, atol=1)


def test_a_step_has_a_batch_of_every_task_for_gradient_surgery(sets):
    mixture = TaskMixture(sets, 8, 1, epochs=2, accumulate=2, all_tasks=True)
    for step in mixture.steps(1):
        assert sorted({batch.task for batch in step}) == ["para", "sst", "sts"]
    assert mixture.epoch_steps(1) == len(list(mixture.steps(1))) == 2
    alone = TaskMixture(sets, 8, 1, epochs=2, accumulate=2)
    assert sorted(seen(mixture, [0, 1])) == sorted(seen(alone, [0, 1]))


@settings(max_examples=25)
@given(
    batch=st.integers(1, 45),
    accumulate=st.integers(1, 4),
    sampling=st.sampled_from(["roundrobin", "proportional", "annealed"]),
    seed=st.integers(0, 1000),
    skip=st.floats(0, 1),
)
def test_every_stream_is_pass_after_pass(sets, batch, accumulate, sampling, seed, skip):
    """And a resumed epoch is the rest of an uninterrupted one."""
    mixture = TaskMixture(sets, batch, seed, 3, sampling, accumulate)
    epochs = [list(mixture.steps(epoch)) for epoch in range(3)]
    steps = [step for of in epochs for step in of]
    assert [len(of) for of in epochs] == [mixture.epoch_steps(epoch) for epoch in range(3)]
    for dataset, used in zip(sets, mixture.rows_used(), strict=True):
        stream = [r for s in steps if s[0].dataset is dataset for b in s for r in b.rows]
        for start in range(0, len(stream), len(dataset)):
            chunk = stream[start : start + len(dataset)]
            assert len(set(chunk)) == len(chunk)
        assert sorted(set(stream)) == sorted(used)
    assert all(len({b.task for b in step}) == 1 and len(step) <= accumulate for step in steps)
    first = int(skip * len(epochs[2]))
    rest = [[batch.rows.tolist() for batch in step] for step in mixture.steps(2, first)]
    assert rest == [[batch.rows.tolist() for batch in step] for step in epochs[2][first:]]


# ---------------------------------------------------------------------------- real data

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
        examples, unlabelled, _ = read_examples(path, task, labelled=split != "test-student")
        assert rows is None or len(examples) == rows
        assert unlabelled == (2 if (name, split) == ("para", "dev") else 0)
        assert len({e.id for e in examples}) == len(examples)
