"""The numbers of a report: calibration, groups of rows, curves and maps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from datasets import Example
from report import analysis, plots
from report.analysis import Predictions
from tasks import TASKS


def make_predictions(task: str, texts, gold, logits) -> Predictions:
    """Predictions for given texts, labels and logits."""
    task, logits = TASKS[task], torch.as_tensor(logits, dtype=torch.float32)
    labels = torch.as_tensor(gold).to(task.labels.dtype)
    examples = [Example(str(i), row, None) for i, row in enumerate(texts)]
    dataset = SimpleNamespace(task=task, examples=examples, labels=labels)
    return Predictions.from_logits(dataset, logits)


@pytest.mark.parametrize("task", ["sst", "cfimdb", "para"])
def test_calibration_is_that_of_scikit_learn(task):
    rng = np.random.default_rng(1)
    labels = TASKS[task].labels
    logits = 2 * rng.normal(size=(500, labels.num_logits))
    gold = rng.integers(labels.num_classes, size=500)
    predictions = make_predictions(task, [("a",)] * 500, gold, logits)
    calibration = analysis.calibrate(predictions)
    confidence = predictions.probabilities.max(axis=1)
    right = predictions.predicted == gold
    accuracy, means = calibration_curve(right, confidence, n_bins=10)
    assert calibration.accuracy == pytest.approx(accuracy)
    assert calibration.confidence == pytest.approx(means)
    assert calibration.rows.sum() == 500
    gaps = [abs(accuracy[i] - means[i]) * n / 500 for i, n in enumerate(calibration.rows)]
    assert calibration.expected_error == pytest.approx(sum(gaps))


def test_a_confusion_matrix_shows_the_shares_of_each_gold_class():
    gold, predicted = np.random.default_rng(2).integers(3, size=(2, 90))
    gold[gold == 1] = 0  # a class without a row
    matrix = confusion_matrix(gold, predicted, labels=range(3))
    shares = confusion_matrix(gold, predicted, labels=range(3), normalize="true")
    panel, _ = plots.plot_confusion(matrix, ["a", "b", "c"]).axes
    shown = [text.get_text() for text in panel.texts]
    cells = zip(shares.flat, matrix.flat, strict=True)
    assert shown == [f"{share:.0%}\n{count}" for share, count in cells]


def test_rows_are_grouped_by_length_overlap_and_negation():
    texts = ["a b .", "A, b", "a b c d", "a !", "I don’t", "do n't", "never mind me", "nothingness"]
    gold = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    logits = np.eye(2)[[0, 1, 0, 0, 1, 1, 0, 0]]
    groups = analysis.group_scores(
        make_predictions("cfimdb", [(text,) for text in texts], gold, logits)
    )
    found = {(g.by, g.label): (g.rows, round(g.score * g.rows)) for g in groups}
    assert found == {
        ("number of words", "1"): (2, 0),
        ("number of words", "2"): (4, 3),
        ("number of words", "3 to 4"): (2, 2),
        ("negation", "not negated"): (5, 3),
        ("negation", "negated"): (3, 2),
    }
    pairs = [("a b", "B a."), ("a b", "a c"), ("a", "b"), ("", "")]
    assert [analysis.word_overlap(pair) for pair in pairs] == [1, pytest.approx(1 / 3), 0, 0]
    scores = np.arange(32.0) % 5
    noisy = scores + np.random.default_rng(3).normal(size=32)
    texts = [(f"{i} " * (1 + i), "0 1 2") for i in range(32)]
    groups = analysis.group_scores(make_predictions("sts", texts, scores, noisy[:, None]))
    first, *_ = [group for group in groups if group.by == "number of words"]
    expected = stats.pearsonr(scores[:8], noisy[:8])
    assert (first.label, first.rows) == ("4 to 11", 8)
    assert first.score == pytest.approx(expected.statistic)
    assert first.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_curves_continue_over_the_stages_of_a_run(tmp_path):
    def line(kind, step, stage, **figures):
        return json.dumps({"kind": kind, "step": step, "stage": stage, **figures})

    def train(step, stage, loss, **rates):
        return line("train", step, stage, loss=loss, task="sst", lr={"sst": 0.1, **rates})

    lines = [train(step, "probe", float(step % 2)) for step in range(80)]
    lines += [line("dev", 80, "probe", score=0, tasks={"sst": {"accuracy": 0.25}})]
    lines += [train(step, "finetune", 3.0, bert=0.01) for step in range(80)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    curves = analysis.learning_curves(tmp_path / "log.jsonl")
    assert np.transpose(curves["dev"]["sst accuracy"]).tolist() == [[80, 0.25]]
    steps, losses = curves["loss"]["sst"]
    assert steps.tolist() == list(range(160)) and losses[120:] == pytest.approx(3)
    assert losses[10:70] == pytest.approx(0.5)  # a mean of eight
    assert curves["lr"]["BERT"][0].tolist() == list(range(80, 160))


def test_a_map_shows_the_two_directions_of_most_variance():
    vectors = torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(0))
    points, shares = analysis.project(vectors)
    covariance = np.cov((vectors[:, 0] - vectors[:, 1]).abs().numpy().T)
    variances = np.linalg.eigvalsh(covariance)[::-1]
    assert np.cov(points.T) == pytest.approx(np.diag(variances[:2]), abs=1e-5)
    assert shares == pytest.approx(variances[:2] / variances.sum(), abs=1e-5)
