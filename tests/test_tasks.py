"""The table of tasks: losses, predictions, metrics; and a fifth task, which is one row."""

import numpy as np
import pytest
import torch
from conftest import NOUNS, VERBS, write_csv
from sklearn import metrics
from torch import nn

import multitask_classifier
from engine.checkpoint import read_json
from engine.errors import UserError
from model import HEADS, MultitaskBERT
from tasks import TASKS, BinaryClassification, Classification, Regression, Task, find_tasks


def random_rows(name: str):
    """A task's labels, logits (40, C) in float64, and gold labels (40,) of the task's dtype."""
    labels, rng = TASKS[name].labels, np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(40, labels.num_logits)))
    gold = rng.uniform(labels.low, labels.high + labels.integer, size=40)
    gold = np.floor(gold) if labels.integer else gold
    return labels, logits, torch.tensor(gold, dtype=labels.dtype)


def test_the_table_is_consistent():
    for name, task in TASKS.items():
        assert task.name == name and "{}" in task.files
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
    labels, logits, gold = random_rows(name)
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


@pytest.mark.parametrize("name", ["sst", "para"])
def test_disagreement_is_the_symmetric_divergence_of_torch(name):
    torch.manual_seed(0)
    labels, logits = TASKS[name].labels, 3 * torch.randn(2, 9, TASKS[name].labels.num_logits)
    p, q = (labels.probabilities(x.double()) for x in logits)
    both = [torch.nn.functional.kl_div(b.log(), a, reduction="none") for a, b in ((p, q), (q, p))]
    expected = sum(both).sum(dim=-1) / 2
    found = labels.disagreement(*logits)
    assert found.shape == (9,) and (found > 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert labels.disagreement(100 * logits[0], -100 * logits[0]).isfinite().all()


def test_scores_disagree_by_their_squared_difference():
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]])
    assert Regression(0, 5).disagreement(first, second).tolist() == [9.0, 0.0]


def test_predictions_are_in_the_units_of_the_labels():
    logits = torch.tensor([[0.0, 3, 1, 1, 2], [5.0, 0, 0, 0, 0]])
    assert Classification(5).predict(logits).tolist() == [1, 0]
    logits = torch.tensor([[-0.1], [0.1], [9.0]])
    assert BinaryClassification().predict(logits).tolist() == [0.0, 1.0, 1.0]
    assert Regression(0, 5).predict(logits).tolist() == logits[:, 0].tolist()  # not clipped


@pytest.mark.parametrize("name", TASKS)
def test_metrics_begin_with_the_primary_one(name):
    labels, logits, gold = random_rows(name)
    predicted = labels.predict(logits).numpy()
    (primary, value), *others = labels.metrics(predicted, gold.numpy()).items()
    if name == "sts":
        assert (primary, value) == ("pearson", pytest.approx(np.corrcoef(predicted, gold)[0, 1]))
    else:
        assert (primary, value) == ("accuracy", metrics.accuracy_score(gold, predicted))
        matrix = metrics.confusion_matrix(gold, predicted, labels=range(labels.num_classes))
        assert dict(others)["confusion"] == matrix.tolist()


def test_the_courses_score_is_from_0_to_1():
    assert Classification(5).course_score(0.5) == BinaryClassification().course_score(0.5) == 0.5
    scores = [Regression(0, 5).course_score(pearson) for pearson in (-1, 0.4, 1)]
    assert scores == pytest.approx([0, 0.7, 1])


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
    rng, film, cat = np.random.default_rng(3), NOUNS[0], NOUNS[6]
    for split, count in (("train", 48), ("dev", 24), ("test-student", 6)):
        rows = []
        for i in range(count):
            label, verb = int(rng.integers(3)), VERBS[int(rng.integers(5))]
            a, b = ((film, film), (cat, cat), (film, cat))[label]
            rows.append([f"t{split}{i}", f"the {a} {verb}", f"the {b} {verb}", label])
        columns = ["id", "left", "right", "shared"][: 3 if split == "test-student" else 4]
        write_csv(folder / f"topic-{split}.csv", columns, [row[: len(columns)] for row in rows])


def test_a_fifth_task_is_one_row(tmp_path, monkeypatch, train):
    """It trains beside another, with all its flags, from its own files to a leaderboard file."""
    monkeypatch.setitem(TASKS, "topic", TOPIC)
    write_topic_data(tmp_path)
    flags = ["--tasks", "topic,sst", "--option", "finetune", "--epochs", 12, "--lr", "2e-3"]
    flags += ["--head_lr", "1e-2", "--pooling", "mean", "--topic_decoder", "dot"]
    for split, name in {"train": "train", "dev": "dev", "test": "test-student"}.items():
        flags += [f"--topic_{split}", tmp_path / f"topic-{name}.csv"]
    train(multitask_classifier, tmp_path / "run", *flags, "--topic_dev_out", tmp_path / "out.csv")
    result = read_json(tmp_path / "run" / "result.json")
    accuracies = [result["dev"][name]["accuracy"] for name in ("topic", "sst")]
    assert accuracies[0] >= 0.9 and result["overall"] == pytest.approx(np.mean(accuracies))
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert model.decoders == {"topic": "dot", "sst": "linear"}
    assert MultitaskBERT(model.bert, [TOPIC]).decoders == {"topic": "concat"}
    lines = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
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


def test_a_new_head_is_one_class_and_one_row(tmp_path, monkeypatch, run_script, train):
    """Any task's --TASK_decoder selects it, and what it has learnt is saved and loaded."""
    flags = ["--tasks", "sts,para", "--sts_decoder", "difference"]
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 2 and "--sts_decoder" in err
    monkeypatch.setitem(HEADS, "difference", DifferenceHead)
    train(multitask_classifier, tmp_path / "run", *flags)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["decoders"] == {"sts": "difference", "para": "dot"}
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert type(model.heads["sts"]) is DifferenceHead
    assert model.heads["sts"].dense.bias.item() != 0
