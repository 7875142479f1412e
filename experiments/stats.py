"""Differences between training methods, with intervals that hold for other seeds and other rows.

Two methods are trained with the same S seeds and evaluated on the same N rows. A seed affects
all rows, and a row is easier or harder for all seeds: the two are crossed random effects.
Shapes: S paired runs, N dev rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from engine.stats import SIGNIFICANCE

Estimate = list[float | None]  # a mean over seeds, and the ends of its interval


@dataclass(frozen=True)
class Effect:
    """An estimate whose error is about t-distributed, with `df` degrees of freedom."""

    estimate: float
    se: float
    df: float

    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval."""
        half_width = stats.t.ppf(1 - SIGNIFICANCE / 2, self.df) * self.se
        return self.estimate - half_width, self.estimate + half_width

    def p_above(self, value: float) -> float:
        """One-sided p-value of the null hypothesis that the truth is at most `value`."""
        if self.se == 0:  # all runs are equal on all rows
            return float(self.estimate <= value)
        return float(stats.t.sf((self.estimate - value) / self.se, self.df))

    def p_below(self, value: float) -> float:
        """One-sided p-value of the null hypothesis that the truth is at least `value`."""
        return Effect(-self.estimate, self.se, self.df).p_above(-value)

    def p_difference(self) -> float:
        """Two-sided p-value of the null hypothesis of no difference."""
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def p_equivalence(self, margin: float) -> float:
        """P-value of a difference of `margin` or more, either way (TOST, Schuirmann 1987)."""
        return max(self.p_above(-margin), self.p_below(margin))

    def detectable(self, power: float = 0.8) -> float:
        """The smallest true difference that this many runs detect with this probability.

        At the two-sided level of 5%, without correction (Bloom 1995).
        """
        return float(
            (stats.t.ppf(1 - SIGNIFICANCE / 2, self.df) + stats.t.ppf(power, self.df)) * self.se
        )


def row_values(gold: np.ndarray, predicted: np.ndarray, metric: str) -> np.ndarray:
    """Each row's contribution to a metric, (S, N); the mean over rows is each run's score.

    For "accuracy", 1 or 0. For "pearson", the score plus the row's influence on it (Devlin et al.
    1975), u v - r (u^2 + v^2) / 2 with standardized u, v; for "fisher_z", arctanh r plus the
    influence over 1 - r^2. Either way the spread over rows gives the metric's sampling variance.

    gold: (N,); predicted: (S, N). A constant side has r = 0.
    """
    if metric == "accuracy":
        return (predicted == gold).astype(float)
    u, v = (x - x.mean(axis=-1, keepdims=True) for x in (np.atleast_2d(gold), predicted))
    u, v = (x / np.maximum(x.std(axis=-1, keepdims=True), 1e-12) for x in (u, v))
    r = (u * v).mean(axis=-1, keepdims=True)  # (S, 1)
    influence = u * v - r * (u**2 + v**2) / 2
    return r + influence if metric == "pearson" else np.arctanh(r) + influence / (1 - r**2)


def crossed_effect(values: np.ndarray) -> Effect:
    """The mean of (S, N) differences, S and N at least 2, where both axes are samples.

    In value = mean + seed + row + noise, the variance of the mean is that of the seeds' means over
    S plus the row component over N, both from mean squares (Searle et al. 1992, ch. 4), with
    Satterthwaite's (1946) degrees of freedom.
    """
    count, rows = values.shape
    by_seed, by_row = values.mean(axis=1), values.mean(axis=0)
    residuals = values - by_seed[:, None] - by_row + values.mean()
    # Mean squares divided by S N: the part of each in the variance of the mean.
    seeds = by_seed.var(ddof=1) / count
    row_part = by_row.var(ddof=1) / rows
    noise = (residuals**2).sum() / ((count - 1) * (rows - 1)) / (count * rows)
    parts = [(seeds, count - 1)]
    if row_part > noise:  # else the row component is estimated as 0
        parts += [(row_part, rows - 1), (-noise, (count - 1) * (rows - 1))]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts)
    # At least the smallest df of the parts: the subtracted part can push it below.
    least = min(count, rows) - 1
    df = max(least, variance**2 / spread) if spread > 0 else least
    return Effect(float(values.mean()), float(np.sqrt(variance)), float(df))


def average_groups(values: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """The mean (G, N) of the runs (S, N) of each group, such as those that share an encoder.

    Runs of a group are not independent of each other; the means of the groups are.
    """
    members = [[other == group for other in groups] for group in dict.fromkeys(groups)]
    return np.stack([values[mask].mean(axis=0) for mask in members])


def pigeonhole_interval(values: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """The 95% percentile interval of the mean, seeds and rows resampled independently.

    (Owen 2007, "The pigeonhole bootstrap".) values: (S, N).
    """
    rng = np.random.default_rng(0)
    counts = [np.full(size, 1 / size) for size in values.shape]
    means = [
        rng.multinomial(len(seeds), seeds) @ values @ rng.multinomial(len(rows), rows) / values.size
        for seeds, rows in [counts] * resamples
    ]
    low, high = np.quantile(means, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return float(low), float(high)


def superiority(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of pairs of runs in which the first scores higher, ties counting half."""
    return float(np.mean((np.sign(np.subtract.outer(first, second)) + 1) / 2))


def mean_interval(values: np.ndarray) -> Estimate:
    """The mean of a value per seed, (S,), and its 95% interval by Student's t; of one seed: None.

    All None if a value is NaN: the remaining seeds could be a biased selection.
    """
    count, mean = len(values), np.mean(values)
    margin = np.nan
    if count > 1:
        margin = stats.t.ppf(1 - SIGNIFICANCE / 2, count - 1) * stats.sem(values)
    return [float(x) if np.isfinite(x) else None for x in (mean, mean - margin, mean + margin)]
