"""Is one model better than another? Paired tests and confidence intervals over dev rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

SIGNIFICANCE = 0.05  # p-values below it count as a difference


@dataclass(frozen=True)
class Comparison:
    """The difference between two models' primary metrics, first minus second, on one task.

    `low` and `high` bound its 95% confidence interval. `p` is the probability of a difference at
    least as large if both models were equally good.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(
    gold: np.ndarray, first: np.ndarray, second: np.ndarray, correlation: bool
) -> Comparison:
    """Compare two models on the same rows.

    The interval is a percentile bootstrap over rows. The test is McNemar's, as a permutation test,
    for accuracy, and the bootstrap itself for a correlation. Neither says anything about other
    seeds: for that, see `experiments/stats.py`.

    gold, first, second: labels and predictions, (N,). correlation: compare Pearson's r, else
    accuracy.
    """
    if correlation:
        return _compare_correlations(gold, first, second)
    rng = np.random.default_rng(0)
    resamples = 9999
    # Each row adds -1, 0 or 1 to the difference. So a resample only has to draw how often each
    # value occurs: hundreds of times faster than drawing rows.
    values = np.array([-1, 0, 1])
    counts = np.bincount((first == gold).astype(int) - (second == gold) + 1, minlength=3)
    difference = values @ counts / len(gold)
    resampled = rng.multinomial(len(gold), counts / len(gold), size=resamples) @ values / len(gold)
    # The permutation test exchanges the models' answers to a row: its value changes sign.
    flipped = rng.binomial(counts, 0.5, size=(resamples, 3))
    permuted = (counts - 2 * flipped) @ values / len(gold)
    extreme = np.sum(np.abs(permuted) >= abs(difference) - 1e-12)
    low, high = np.quantile(resampled, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    p = (1 + extreme) / (1 + resamples)  # the data itself is one of the permutations
    return Comparison(float(difference), float(low), float(high), float(p))


def _compare_correlations(gold: np.ndarray, first: np.ndarray, second: np.ndarray) -> Comparison:
    """`compare` for Pearson's r."""
    from scipy import stats  # half a second

    def difference(
        gold: np.ndarray, first: np.ndarray, second: np.ndarray, axis: int = -1
    ) -> np.ndarray:
        return pearson(gold, first, axis) - pearson(gold, second, axis)

    samples, resamples = (gold, first, second), 1999
    options = {"n_resamples": resamples, "batch": 64, "rng": np.random.default_rng(0)}
    bootstrap = stats.bootstrap(samples, difference, paired=True, method="percentile", **options)
    resampled = bootstrap.bootstrap_distribution
    tails = [(1 + np.sum(tail)) / (1 + resamples) for tail in (resampled <= 0, resampled >= 0)]
    low, high = bootstrap.confidence_interval
    p = min(1.0, 2 * min(tails))
    return Comparison(float(difference(*samples)), float(low), float(high), p)


def pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pearson's r along an axis, for many resamples at once; 0 where one side is constant."""
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    # Not scipy's, which returns NaN there, with a warning.
    scale = np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))
    return np.divide((x * y).sum(axis=axis), scale, out=np.zeros_like(scale), where=scale > 0)


def score_interval(score: float, rows: int, correlation: bool) -> tuple[float, float]:
    """The 95% confidence interval of an accuracy (Wilson's) or of Pearson's r (Fisher's z).

    NaN for a correlation of fewer than four rows, or of 0 or 1 exactly, where one side is constant
    or there is no noise.
    """
    if not correlation:
        from scipy import stats  # half a second

        proportion = stats.binomtest(round(score * rows), rows).proportion_ci(method="wilson")
        return float(proportion.low), float(proportion.high)
    if rows < 4 or score == 0 or abs(score) >= 1:
        return float("nan"), float("nan")
    # arctanh(r) is about normal with variance 1 / (N - 3) (Fisher 1921).
    half_width = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2) / np.sqrt(rows - 3)
    low, high = np.tanh(np.arctanh(score) + half_width * np.array([-1, 1]))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for multiple tests (Holm 1979), in the given order."""
    order, count = np.argsort(p_values), len(p_values)
    # Multiply the smallest p-value by the number of tests, the next one by one less, ...
    scaled = np.minimum(1, np.arange(count, 0, -1) * np.take(p_values, order))
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted.tolist()


def format_p(p: float) -> str:
    """A p-value for a table."""
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"
