"""The table of tasks: losses, predictions, metrics; and a fifth task, which is one row."""

import json

import numpy as np
import pytest
import torch
from conftest import NOUNS, VERBS, write_csv
from sklearn import metrics
from torch import nn

import multitask_classifier
from engine.errors import UserError
from model import HEADS, MultitaskBERT
from tasks import TASKS, BinaryClassification, Classification, Regression, Task, find_tasks


def logits_and_labels(task: Task, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits (N, C) in float64, and labels of the task's own dtype."""
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(rows, task.labels.num_logits)))
    if task.labels.integer:
        labels = rng.integers(0, task.labels.num_classes, size=rows)
    else:
        labels = rng.uniform(task.labels.low, task.labels.high, size=rows)
    return logits, torch.tensor(labels, dtype=task.labels.dtype)


def test_the_table_is_consistent():
    for name, task in TASKS.items():
        assert task.name == name
        assert "{}" in task.files
        assert len(task.text_columns) == HEADS[task.head].num_embeddings
        if task.labels.integer:
            assert len(task.class_names) == task.labels.num_classes
            assert (task.labels.low, task.labels.high) == (0, len(task.class_names) - 1)
    assert find_tasks(["sts", "sst"]) == [TASKS["sts"], TASKS["sst"]]
    for names in (["sts", "nli"], [""]):
        with pytest.raises(UserError, match="no such task; there are sst, cfimdb, para, sts"):
            find_tasks(names)


@pytest.mark.parametrize("name", TASKS)
def test_losses_of_each_row_against_scikit_learn(name):
    labels = TASKS[name].labels
    logits, gold = logits_and_labels(TASKS[name])
    loss = labels.loss(logits, gold.double() if name in ("para", "sts") else gold)
    assert loss.shape == gold.shape
    for row in range(len(gold)):
        if name == "sts":
            expected = metrics.mean_squared_error(gold[row : row + 1], logits[row])
        else:
            odds = logits[row].exp() if name != "para" else torch.tensor([1, logits[row].exp()])
            share = (odds / odds.sum()).tolist()
            expected = metrics.log_loss([int(gold[row])], [share], labels=range(len(share)))
        assert loss[row].item() == pytest.approx(expected, rel=1e-6)


def test_predictions_are_in_the_units_of_the_labels():
    logits = torch.tensor([[0.0, 3, 1, 1, 2], [5.0, 0, 0, 0, 0]])
    assert Classification(5).predict(logits).tolist() == [1, 0]
    logits = torch.tensor([[-0.1], [0.1], [9.0]])
    assert BinaryClassification().predict(logits).tolist() == [0.0, 1.0, 1.0]
    logits = torch.tensor([[2.75], [-0.5], [7.0]])
    assert Regression(0, 5).predict(logits).tolist() == [2.75, -0.5, 7.0]  # not clipped


@pytest.mark.parametrize("name", ["sst", "cfimdb", "para"])
def test_probabilities_are_those_of_the_predictions(name):
    labels = TASKS[name].labels
    logits, _ = logits_and_labels(TASKS[name])
    shares = labels.probabilities(logits)
    assert shares.shape == (40, labels.num_classes)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(40, dtype=torch.float64))
    assert shares.argmax(dim=1).tolist() == labels.predict(logits).tolist()
    odds = shares[:, 1].log() - shares[:, 0].log()
    expected = logits[:, 0] if name == "para" else logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(odds, expected)


@pytest.mark.parametrize("name", TASKS)
def test_metrics_begin_with_the_primary_one(name):
    labels = TASKS[name].labels
    logits, gold = logits_and_labels(TASKS[name])
    predicted = labels.predict(logits).numpy()
    found = labels.metrics(predicted, gold.numpy())
    if name == "sts":
        expected = np.corrcoef(predicted, gold)[0, 1]
    else:
        expected = metrics.accuracy_score(gold, predicted)
        matrix = metrics.confusion_matrix(gold, predicted, labels=range(labels.num_classes))
        assert found["confusion"] == matrix.tolist()
    assert next(iter(found)) == ("pearson" if name == "sts" else "accuracy")
    assert next(iter(found.values())) == pytest.approx(expected, abs=1e-6)


def test_the_courses_score_is_from_0_to_1():
    assert Classification(5).course_score(0.5) == BinaryClassification().course_score(0.5) == 0.5
    scores = [Regression(0, 5).course_score(pearson) for pearson in (-1, 0.4, 1)]
    assert scores == pytest.approx([0, 0.7, 1])


# ---------------------------------------------------------------------------- a fifth task

TOPIC = Task(
    name="topic",
    title="Topic of a pair",
    files="topic-{}.csv",
    text_columns=("left", "right"),
    label_column="shared",
    labels=Classification(3),
    header="Predicted_Topic",
    head="concat",
    class_names=("film", "cat", "neither"),
)


def write_topic_data(folder) -> None:
    """Pairs that are both about a film, both about a cat, or about one each."""
    rng = np.random.default_rng(3)
    for split, count in (("train", 48), ("dev", 24), ("test-student", 6)):
        rows = []
        for i in range(count):
            label = int(rng.integers(3))
            a, b = ([NOUNS[0], NOUNS[0]], [NOUNS[6], NOUNS[6]], [NOUNS[0], NOUNS[6]])[label]
            verb = VERBS[int(rng.integers(5))]
            rows.append([f"t{split}{i}", f"the {a} {verb}", f"the {b} {verb}", label])
        columns = ["id", "left", "right", "shared"][: 3 if split == "test-student" else 4]
        rows = [row[: len(columns)] for row in rows]
        write_csv(folder / f"topic-{split}.csv", columns, rows)


def test_a_fifth_task_is_one_row(tiny, tmp_path, data, monkeypatch, run_script):
    """It trains beside another, with all its flags, from its own files to a leaderboard file."""
    monkeypatch.setitem(TASKS, "topic", TOPIC)
    write_topic_data(tmp_path)
    moved = (tmp_path / "topic-dev.csv").rename(tmp_path / "elsewhere.csv")
    flags = ["--tasks", "topic,sst", "--option", "finetune", "--model", tiny, "--data_dir", data]
    flags += ["--topic_dev", moved, "--topic_dev_out", tmp_path / "dev out.csv", "--epochs", 12]
    flags += ["--topic_train", tmp_path / "topic-train.csv", "--batch_size", 8]
    flags += ["--topic_test", tmp_path / "topic-test-student.csv", "--run_dir", tmp_path / "run"]
    flags += ["--lr", "2e-3", "--head_lr", "1e-2", "--pooling", "mean", "--topic_decoder", "dot"]
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["dev"]["topic"]["accuracy"] >= 0.9
    accuracies = [result["dev"][name]["accuracy"] for name in ("topic", "sst")]
    assert result["overall"] == pytest.approx(np.mean(accuracies))
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert model.decoders == {"topic": "dot", "sst": "linear"}
    assert MultitaskBERT(model.bert, [TOPIC]).decoders == {"topic": "concat"}
    lines = (tmp_path / "dev out.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id \t Predicted_Topic " and lines[1].startswith("tdev0 , ")
    assert len(lines) == 25


class DifferenceHead(nn.Module):
    """logits = W |u - v| + b."""

    num_embeddings = 2

    def __init__(self, width, task, dropout):
        super().__init__()
        self.dense = nn.Linear(width, task.labels.num_logits)

    def forward(self, u, v):
        return self.dense((u - v).abs())


def test_a_new_head_is_one_class_and_one_row(tiny, tmp_path, data, monkeypatch, run_script):
    """Any task's --TASK_decoder selects it, and what it has learnt is saved and loaded."""
    flags = ["--tasks", "sts,para", "--model", tiny, "--data_dir", data, "--epochs", 2]
    flags += ["--sts_decoder", "difference", "--run_dir", tmp_path / "run"]
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 2 and "--sts_decoder" in err
    monkeypatch.setitem(HEADS, "difference", DifferenceHead)
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["decoders"] == {"sts": "difference", "para": "dot"}
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert type(model.heads["sts"]) is DifferenceHead
    assert model.heads["sts"].dense.bias.item() != 0
