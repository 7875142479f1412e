"""Metrics of predictions and embeddings against scikit-learn, scipy, numpy and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cosine, pdist
from sklearn import metrics as sklearn_metrics

from engine.metrics import (
    alignment,
    classification_metrics,
    correlation_metrics,
    similarity_metrics,
    uniformity,
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_classification_metrics_by_counting(rows):
    """F1 is averaged over the classes that occur, gold or predicted, as scikit-learn's is."""
    gold, predicted = np.array(rows).T
    found = classification_metrics(5, predicted, gold)
    assert list(found) == ["accuracy", "macro_f1", "confusion"]
    confusion = np.zeros((5, 5), dtype=int)
    for a, b in rows:
        confusion[a, b] += 1  # rows gold, columns predicted
    assert found["confusion"] == confusion.tolist()
    assert found["accuracy"] == pytest.approx(np.trace(confusion) / len(rows))
    f1 = [
        2 * confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum())
        for c in set(gold) | set(predicted)
    ]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    expected = sklearn_metrics.f1_score(gold, predicted, average="macro")
    assert found["macro_f1"] == pytest.approx(expected)


def test_correlations_against_numpy_and_by_ranks():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 50)).astype(np.float32)
    y[:20] = np.round(y[:20])  # with ties
    found = correlation_metrics(x, y)
    assert list(found) == ["pearson", "spearman"]
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    ranks = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert found["spearman"] == pytest.approx(ranks, abs=1e-9)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1], [2])])
def test_correlations_with_a_constant_are_zero(x, y):
    found = correlation_metrics(np.array(x, dtype=float), np.array(y, dtype=float))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_alignment_and_uniformity_are_wang_and_isolas():
    """Also over more rows than are computed at a time, and whatever the vectors' lengths."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1500, 3))
    u, v = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in (x, y))
    expected = np.mean(np.sum((u - v) ** 2, axis=1))
    assert alignment(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    expected = np.log(np.mean(np.exp(-2 * pdist(u, "sqeuclidean"))))
    assert uniformity(torch.from_numpy(x)) == pytest.approx(expected)
    longer = torch.from_numpy(x * rng.uniform(1, 9, size=(1500, 1)))
    assert uniformity(longer) == pytest.approx(expected)


def test_embeddings_are_judged_by_their_cosines():
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(30, 2, 8))
    gold = rng.integers(0, 11, size=30) / 2
    found = similarity_metrics(torch.from_numpy(embeddings), torch.from_numpy(gold))
    cosines = np.array([1 - cosine(u, v) for u, v in embeddings])
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, gold).statistic)
    assert found["alignment"] == pytest.approx(np.mean(2 - 2 * cosines[gold >= 4]))
    units = embeddings.reshape(60, 8)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    assert found["uniformity"] == pytest.approx(np.log(np.mean(np.exp(-2 * pdist(units) ** 2))))
    low = similarity_metrics(torch.from_numpy(embeddings), torch.zeros(30))
    assert (low["spearman"], low["alignment"]) == (0.0, None)  # no positive pairs
