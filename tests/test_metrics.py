"""Metrics of predictions and embeddings against counting, numpy and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cosine, pdist

from engine.metrics import classification_metrics, correlation_metrics, similarity_metrics


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_classification_metrics_by_counting(rows):
    """F1 is averaged over the classes that occur, gold or predicted."""
    gold, predicted = np.array(rows).T
    metrics = classification_metrics(5, predicted, gold)
    assert list(metrics) == ["accuracy", "macro_f1", "confusion"]
    confusion = np.zeros((5, 5), dtype=int)
    for row in rows:
        confusion[row] += 1  # rows gold, columns predicted
    assert metrics["confusion"] == confusion.tolist()
    assert metrics["accuracy"] == pytest.approx(np.trace(confusion) / len(rows))
    totals = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = [2 * confusion[c, c] / totals[c] for c in range(5) if totals[c]]
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1))


def test_correlations_against_numpy_and_by_ranks():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 50)).astype(np.float32)
    y[:20] = np.round(y[:20])  # with ties
    metrics = correlation_metrics(x, y)
    assert list(metrics) == ["pearson", "spearman"]
    assert metrics["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    ranks = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert metrics["spearman"] == pytest.approx(ranks, abs=1e-9)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1], [2])])
def test_correlations_with_a_constant_are_zero(x, y):
    assert correlation_metrics(np.array(x), np.array(y)) == {"pearson": 0.0, "spearman": 0.0}


def test_embeddings_are_judged_by_their_cosines():
    """And by Wang and Isola's formulas, over more rows than are computed at a time."""
    rng = np.random.default_rng(1)
    embeddings, gold = rng.normal(size=(700, 2, 3)), rng.integers(0, 11, size=700) / 2
    metrics = similarity_metrics(torch.from_numpy(embeddings), torch.from_numpy(gold))
    cosines = [1 - cosine(u, v) for u, v in embeddings]
    assert metrics["spearman"] == pytest.approx(stats.spearmanr(cosines, gold).statistic)
    units = embeddings / np.linalg.norm(embeddings, axis=2, keepdims=True)
    distances = ((units[:, 0] - units[:, 1]) ** 2).sum(axis=1)
    assert metrics["alignment"] == pytest.approx(np.mean(distances[gold >= 4]))
    expected = np.log(np.mean(np.exp(-2 * pdist(units.reshape(1400, 3), "sqeuclidean"))))
    assert metrics["uniformity"] == pytest.approx(expected)
    metrics = similarity_metrics(torch.from_numpy(embeddings), torch.zeros(700))
    assert (metrics["spearman"], metrics["alignment"]) == (0.0, None)  # no positive pairs
