"""Leaderboard files to the byte, figures over all rows, order, and the overall score."""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from bert import BertModel
from checkpoint import UserError
from datasets import Sentences, TaskData
from scoring import (
    FrozenEmbeddings,
    embed,
    evaluate,
    overall,
    predict,
    report,
    write_predictions,
)
from tasks import TASKS, MultitaskBERT
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(2)
    tasks = [TASKS[name] for name in ("sst", "para", "sts")]
    return MultitaskBERT(BertModel.from_pretrained(tiny), tasks, pooling="mean").eval()


@pytest.fixture(scope="module")
def sets(data, tiny):
    tokenizer = BertTokenizer.from_pretrained(tiny)
    return {
        name: TaskData(data / TASKS[name].files.format("dev"), TASKS[name], tokenizer)
        for name in ("sst", "para", "sts")
    }


@pytest.mark.parametrize(
    ("name", "logits", "expected"),
    [
        (
            "sst",
            [[0.0, 9, 0, 0, 0], [0, 0, 0, 0, 1]],
            b"id \t Predicted_Sentiment \n{} , 1 \n{} , 4 \n",
        ),
        (
            "para",
            [[0.5], [-0.5]],
            b"id \t Predicted_Is_Paraphrase \n{} , 1.0 \n{} , 0.0 \n",
        ),
        (
            "sts",
            [[3.25], [-0.125]],
            b"id \t Predicted_Similiary \n{} , 3.25 \n{} , -0.125 \n",
        ),
    ],
)
def test_leaderboard_files_to_the_byte(sets, tmp_path, name, logits, expected):
    data = sets[name]
    full, data.examples = data.examples, data.examples[:2]
    try:
        write_predictions(tmp_path / "new" / "out.csv", data, torch.tensor(logits))
        ids = [e.id for e in data.examples]
    finally:
        data.examples = full
    expected = expected.decode().format(*ids).encode()
    assert (tmp_path / "new" / "out.csv").read_bytes() == expected
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.csv"]


def test_predictions_do_not_depend_on_the_batch_size(model, sets):
    for data in sets.values():
        one = torch.cat(
            [
                model.decode(data.task.name, embed(model, data.batch(np.array([row]))))
                for row in range(len(data))
            ]
        )
        for size in (1, 3, 64):
            logits = predict(model, data, size, lambda b: embed(model, b))
            torch.testing.assert_close(logits, one, atol=1e-5, rtol=1e-5)


def test_figures_are_of_all_rows_at_once(model, sets):
    embedder = partial(embed, model)
    logits = [predict(model, data, 7, embedder) for data in sets.values()]
    found = evaluate(list(sets.values()), logits)
    for name, data in sets.items():
        logits = predict(model, data, 5, lambda b: embed(model, b))
        figures = found["tasks"][name]
        assert figures["rows"] == 16
        loss = TASKS[name].loss(logits, data.labels).double().mean().item()
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)
        gold = [e.label for e in data.examples]
        if name == "sst":
            assert figures["accuracy"] == accuracy_score(gold, logits.argmax(1).numpy())
        if name == "sts":
            r = np.corrcoef(gold, logits[:, 0].numpy())[0, 1]
            assert figures["pearson"] == pytest.approx(r, abs=1e-4)
    tasks = found["tasks"]
    score = (tasks["sst"]["accuracy"] + tasks["para"]["accuracy"]) / 3
    score += (tasks["sts"]["pearson"] + 1) / 6
    assert found["score"] == pytest.approx(score)


def test_overall_is_the_courses_score():
    reports = {"sst": {"accuracy": 0.5}, "para": {"accuracy": 0.8}, "sts": {"pearson": 0.4}}
    assert math.isclose(overall(reports), (0.5 + 0.8 + 0.7) / 3)
    assert math.isclose(overall({"sts": {"pearson": -1.0}}), 0.0)


def test_frozen_embeddings_are_looked_up_and_equal(model, sets, tmp_path):
    data = sets["sts"]
    frozen = FrozenEmbeddings(model, tmp_path)
    calls = []
    hook = model.bert.register_forward_hook(lambda *_: calls.append(1))
    for rows in ([5, 2, 9], [9, 5], [2, 11]):
        batch = data.batch(np.array(rows))
        with torch.no_grad():
            expected = embed(model, batch)
        calls.clear()
        torch.testing.assert_close(frozen(batch), expected, atol=1e-6, rtol=1e-5)
        assert len(calls) == (0 if rows == [9, 5] else 1)
    hook.remove()


def test_frozen_embeddings_are_kept_for_other_runs(model, sets, tiny, tmp_path):
    """What one left the next looks up, bit for bit, and adds to; another encoder finds nothing."""
    data = sets["sts"]
    first = FrozenEmbeddings(model, tmp_path)
    left = first(data.batch(np.array([5, 2, 9])))
    first.save()
    calls = []
    hook = model.bert.register_forward_hook(lambda *_: calls.append(1))
    second = FrozenEmbeddings(model, tmp_path)
    assert torch.equal(second(data.batch(np.array([5, 2, 9]))), left)
    assert not calls
    second(data.batch(np.array([1])))
    second.save()
    third = FrozenEmbeddings(model, tmp_path)
    third(data.batch(np.array([1, 9])))
    assert len(calls) == 1
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == 2
    third.save()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    hook.remove()

    def name(model, data):
        return FrozenEmbeddings(model, tmp_path).name(data)

    other = copy.deepcopy(model)
    tokenizer = BertTokenizer.from_pretrained(tiny)
    pairs = [["a cat", "the"], ["a", "cat the"]]
    of_texts = [
        Sentences("x", Path("x"), columns, tokenizer, joint)
        for columns, joint in (
            (pairs, False),
            (pairs, True),
            (pairs[:1], False),
            (pairs[1:], False),
        )
    ]
    names = {name(model, data), name(model, sets["para"]), *(name(model, s) for s in of_texts)}
    with torch.no_grad():
        other.bert.layers[0].output.bias[0] += 1
    names.add(name(other, data))
    other.pooling = "cls"
    names.add(name(other, data))
    other.precision = torch.bfloat16
    names.add(name(other, data))
    assert len(names) == 9
    first = min(files)
    first.write_bytes(files[first][:100])
    with pytest.raises(UserError, match="damaged; delete it"):
        FrozenEmbeddings(model, tmp_path)(data.batch(np.array([1])))


def test_a_report_of_predictions_is_in_file_order(model, sets):
    data = sets["sst"]
    logits = torch.full((16, 5), -1.0)
    labels = [int(e.label) for e in data.examples]
    logits[range(16), labels] = 1.0
    assert report(data, logits)["accuracy"] == 1.0
    assert report(data, logits.flip(0))["accuracy"] == np.mean(np.array(labels) == labels[::-1])
