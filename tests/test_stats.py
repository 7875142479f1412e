"""Comparisons of two models, against scipy, against formulas, and against simulated truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.stats import compare, format_p, holm, score_interval


def test_accuracy_is_compared_by_mcnemars_exact_test():
    """It is then a binomial test on the rows that only one of the models gets right."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 5, 400)
    first, second = (np.where(rng.random(400) < share, gold, 9) for share in (0.6, 0.5))
    result = compare(gold, first, second, correlation=False)
    only = [int(np.sum((a == gold) & (b != gold))) for a, b in ((first, second), (second, first))]
    assert result.difference == pytest.approx((only[0] - only[1]) / 400)
    expected = stats.binomtest(only[0], sum(only)).pvalue
    assert result.p == pytest.approx(expected, rel=0.25, abs=0.003)
    # The bootstrap interval is close to the normal approximation.
    margin = 1.96 * np.std((first == gold) * 1.0 - (second == gold) * 1.0) / 20
    assert result.low == pytest.approx(result.difference - margin, abs=0.012)
    assert result.high == pytest.approx(result.difference + margin, abs=0.012)


def test_a_clear_difference_of_correlations_is_significant_and_noise_is_not():
    rng = np.random.default_rng(1)
    gold = rng.uniform(0, 5, 500)
    good, other, bad = (gold + noise * rng.normal(size=500) for noise in (1.0, 1.0, 4.0))
    clear = compare(gold, good, bad, correlation=True)
    assert clear.p < 0.01 and 0 < clear.low < clear.difference < clear.high
    unclear = compare(gold, good, other, correlation=True)
    assert unclear.p > 0.05 and unclear.low < 0 < unclear.high


def test_exchanging_the_models_mirrors_the_result():
    rng = np.random.default_rng(2)
    gold = rng.uniform(0, 5, 200)
    first, second = gold + rng.normal(size=200), gold + 2 * rng.normal(size=200)
    result = compare(gold, first, second, correlation=True)
    mirrored = compare(gold, second, first, correlation=True)
    values = (-mirrored.difference, -mirrored.high, -mirrored.low, mirrored.p)
    assert (result.difference, result.low, result.high, result.p) == pytest.approx(values)


def test_a_model_does_not_differ_from_itself_but_from_constant_predictions():
    """A constant has correlation zero."""
    gold = np.arange(6.0) % 3
    for correlation in (False, True):
        result = compare(gold, gold, gold, correlation)
        assert (result.difference, result.p) == (0, 1)
    result = compare(gold, gold, np.ones(6), correlation=True)
    assert result.difference == pytest.approx(1)


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    """The k-th smallest of m is rejected while it is at most level / (m - k + 1) (Holm 1979)."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[i] * (len(p_values) - rank) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_p_values_are_printed_with_four_decimals():
    texts = [format_p(p) for p in (1, 0.05, 0.0001, 0.00009)]
    assert texts == ["1.0000", "0.0500", "0.0001", "< 0.0001"]


@pytest.mark.parametrize(("right", "rows"), [(0, 7), (7, 7), (3, 8), (900, 1101)])
def test_the_interval_of_an_accuracy_holds_the_rates_that_a_z_test_accepts(right, rows):
    """Wilson's: the rates p with |accuracy - p| below 1.96 standard errors, those under p."""
    rates = np.linspace(0, 1, 100_001)
    error = np.abs(right / rows - rates)
    accepted = rates[error <= stats.norm.ppf(0.975) * np.sqrt(rates * (1 - rates) / rows)]
    expected = accepted.min(), accepted.max()
    assert score_interval(right / rows, rows, correlation=False) == pytest.approx(
        expected, abs=1e-4
    )


def test_the_interval_of_a_correlation_is_scipys():
    x, y = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 30).T
    result = stats.pearsonr(x, y)
    interval = score_interval(result.statistic, 30, correlation=True)
    assert interval == pytest.approx(tuple(result.confidence_interval()))
    assert np.isnan(score_interval(0.5, 3, correlation=True)).all()
    assert np.isnan(score_interval(1.0, 9, correlation=True)).all()
