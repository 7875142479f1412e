"""The statistics of experiments, against scipy and against simulated experiments of known truth."""

import numpy as np
import pytest
from scipy import stats

from engine.errors import UserError
from engine.stats import holm
from experiments import claims
from experiments.stats import (
    Effect,
    average_groups,
    crossed_effect,
    pigeonhole_interval,
    row_values,
    superiority,
)

# Standard deviations of seeds, rows and the rest: what a difference of two cells may be made of.
COMPONENTS = {
    "rows matter most": (0.01, 0.4, 0.4),
    "seeds matter most": (0.1, 0.1, 0.3),
    "both matter": (0.03, 0.5, 0.3),
    "no seeds": (0.0, 0.5, 0.5),
    "no rows": (0.05, 0.0, 0.5),
}


def simulate(rng, components, seeds=8, rows=250, truth=0.0):
    """Differences (seeds, rows) whose expected mean is `truth`."""
    by_seed, by_row, noise = components
    values = truth + by_seed * rng.normal(size=(seeds, 1)) + by_row * rng.normal(size=rows)
    return values + noise * rng.normal(size=(seeds, rows))


def standard_error(components, seeds=8, rows=250):
    by_seed, by_row, noise = components
    return (by_seed**2 / seeds + by_row**2 / rows + noise**2 / seeds / rows) ** 0.5


@pytest.mark.parametrize("components", COMPONENTS.values(), ids=COMPONENTS)
@pytest.mark.parametrize("seeds", [4, 8])
def test_intervals_cover_the_truth_as_often_as_they_say(components, seeds):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        low, high = crossed_effect(simulate(rng, components, seeds, truth=0.1)).interval()
        covered += low < 0.1 < high
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize("seeds", [4, 8])
def test_intervals_of_correlations_cover_the_truth_too(seeds):
    """Two methods whose expected Fisher z differ by .2, on the same rows, with luck by seed."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(1000):
        gold, shared = rng.normal(size=(2, 300))
        cells = []
        for z in (1.2, 1.0):
            r = np.tanh(z + 0.05 * rng.normal(size=(seeds, 1)))
            noise = 0.8 * shared + 0.6 * rng.normal(size=(seeds, 300))
            cells.append(row_values(gold, r * gold + (1 - r**2) ** 0.5 * noise, "fisher_z"))
        low, high = crossed_effect(cells[0] - cells[1]).interval()
        covered += low < 0.2 < high
    assert 0.93 <= covered / 1000 <= 0.97


def test_equivalence_is_claimed_wrongly_no_more_often_than_the_level():
    """The truth is the margin itself; and a true difference of zero is found to be within it."""
    rng, components = np.random.default_rng(3), COMPONENTS["both matter"]
    margin = 3.2 * standard_error(components)
    for truth, low, high in ((margin, 0.03, 0.07), (-margin, 0.03, 0.07), (0.0, 0.7, 1.0)):
        effects = [crossed_effect(simulate(rng, components, truth=truth)) for _ in range(1000)]
        share = np.mean([effect.p_equivalence(margin) < 0.05 for effect in effects])
        assert low <= share <= high


def test_holm_keeps_the_chance_of_any_false_claim_at_the_level():
    rng, components, wrong = np.random.default_rng(4), COMPONENTS["both matter"], 0
    for _ in range(1000):
        effects = [crossed_effect(simulate(rng, components, rows=60)) for _ in range(10)]
        wrong += min(holm([effect.p_difference() for effect in effects])) < 0.05
    assert wrong / 1000 <= 0.07


def test_a_detectable_difference_is_found_as_often_as_stated():
    rng, components = np.random.default_rng(5), COMPONENTS["both matter"]
    # Of an experiment with exactly the expected standard error.
    df = np.mean([crossed_effect(simulate(rng, components)).df for _ in range(200)])
    planted = Effect(0.0, standard_error(components), df).detectable(power=0.8)
    effects = [crossed_effect(simulate(rng, components, truth=planted)) for _ in range(1000)]
    found = np.mean([effect.p_difference() < 0.05 for effect in effects])
    assert found == pytest.approx(0.8, abs=0.05)


def test_without_rows_or_noise_it_is_the_t_test():
    """If rows differ by nothing, only seeds are left, and scipy has that test."""
    by_seed = np.random.default_rng(6).normal(0.3, 1, size=7)
    effect = crossed_effect(np.repeat(by_seed[:, None], 40, axis=1))
    expected = stats.ttest_1samp(by_seed, 0)
    assert effect.p_difference() == pytest.approx(expected.pvalue)
    assert effect.interval() == pytest.approx(expected.confidence_interval(0.95))
    margin = stats.ttest_1samp(by_seed, 0.9, alternative="less").pvalue
    assert effect.p_below(0.9) == pytest.approx(margin)
    assert effect.p_equivalence(0.9) >= effect.p_below(0.9)


def test_row_values_average_to_the_metrics_and_spread_as_their_sampling_error():
    rng = np.random.default_rng(7)
    gold = rng.normal(size=400)
    predicted = gold + rng.normal(size=(2, 400))
    r = [stats.pearsonr(gold, row).statistic for row in predicted]
    values = row_values(gold, predicted, "pearson")
    np.testing.assert_allclose(values.mean(axis=1), r)
    z = row_values(gold, predicted, "fisher_z")
    np.testing.assert_allclose(z.mean(axis=1), np.arctanh(r))
    # Fisher's z has a variance of about 1 / N whatever r is (Fisher 1921).
    np.testing.assert_allclose(z.std(axis=1), 1, rtol=0.15)
    resampled = stats.bootstrap(
        (gold, predicted[0]),
        lambda x, y: stats.pearsonr(x, y)[0],
        paired=True,
        vectorized=False,
        n_resamples=500,
        rng=rng,
    )
    assert values[0].std() / 20 == pytest.approx(resampled.standard_error, rel=0.15)
    classes = rng.integers(0, 3, size=(2, 400))
    right = row_values(classes[0], classes, "accuracy")
    np.testing.assert_array_equal(right.mean(axis=1), [1, np.mean(classes[0] == classes[1])])
    assert not row_values(gold, np.ones((1, 400)), "pearson").any()  # a constant has r = 0


def test_the_pigeonhole_bootstrap_agrees_with_the_t_interval():
    """It is conservative: a little wider, by the noise that it counts twice."""
    values = simulate(np.random.default_rng(8), (0.05, 0.4, 0.4), seeds=12, rows=400, truth=0.3)
    low, high = pigeonhole_interval(values)
    t_low, t_high = crossed_effect(values).interval()
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert 0.8 < (high - low) / (t_high - t_low) < 1.3


def test_runs_that_share_an_encoder_count_as_one():
    values = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(
        average_groups(values, ["a", "b", "a", "b"]),
        [values[[0, 2]].mean(0), values[[1, 3]].mean(0)],
    )
    # Two runs an encoder are no evidence beyond the encoders: the interval is as wide as of four.
    rng, widths = np.random.default_rng(9), []
    encoders = 0.2 * rng.normal(size=(4, 1)) + 0.1 * rng.normal(size=(4, 50))
    doubled = np.repeat(encoders, 2, axis=0)
    for runs in (encoders, average_groups(doubled, [0, 0, 1, 1, 2, 2, 3, 3])):
        low, high = crossed_effect(runs).interval()
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1])


def test_superiority_counts_pairs_of_runs():
    assert superiority([3, 4], [1, 2]) == 1 and superiority([1, 1], [1, 1]) == 0.5
    assert superiority([1, 4], [2, 3, 4]) == pytest.approx((0 + 2.5) / 6)


def test_an_effect_without_any_spread_is_certain():
    zero = crossed_effect(np.zeros((3, 5)))
    assert zero.interval() == (0, 0) and zero.p_difference() == 1 and zero.p_equivalence(0.1) == 0
    assert crossed_effect(np.ones((3, 5))).p_difference() == 0


def record(seed, predicted):
    return {"seed": seed, "predictions": {"sst": "".join(map(str, predicted))}}


def test_cells_are_paired_by_seed_and_by_encoder():
    """Of seeds that both cells have; SimCSE's four encoders are four units, whatever the seeds."""
    gold = np.arange(40) % 5
    rng = np.random.default_rng(0)
    wrong = {seed: rng.random(40) < 0.1 * seed for seed in range(1, 9)}
    runs = [record(seed, np.where(wrong[seed], (gold + 1) % 5, gold)) for seed in wrong]
    perfect = [record(seed, gold) for seed in (2, 3, 5, 6)]
    cells = {"finetune": runs, "lpft": perfect, "finetune-simcse": runs, "probe": runs[6:]}
    cells["untouched"] = [{"predictions": {"sst": "0" * 40}}]
    values = claims.difference(cells, "lpft", "finetune", "sst", gold, "accuracy")
    np.testing.assert_array_equal(values, [wrong[seed] for seed in (2, 3, 5, 6)])
    values = claims.difference(cells, "lpft", "finetune-simcse", "sst", gold, "accuracy")
    np.testing.assert_array_equal(values, [wrong[5], (1.0 * wrong[2] + wrong[6]) / 2, wrong[3]])
    values = claims.difference(cells, "lpft", "untouched", "sst", gold, "accuracy")
    np.testing.assert_array_equal(values, [gold != 0] * 4)
    with pytest.raises(UserError, match="probe and lpft: no two seeds in common"):
        claims.difference(cells, "probe", "lpft", "sst", gold, "accuracy")


def row(expected="above 0", difference=0.1, p=1.0, margin=1.0, majority=False):
    names = {"p_corrected": p, "p_margin_corrected": margin, "at_majority": majority}
    return {"expected": expected, "difference": difference, **names}


ANSWERS = {
    "holds": row(p=0.01),
    "fails": row(p=0.01, difference=-0.1),
    "holds, within the margin": row("below 0", -0.001, p=0.01, margin=0.01),
    "no difference within the margin": row(margin=0.01),
    "inconclusive": row(),
    "inconclusive, both at the commonest class": row(margin=0.01, majority=True),
}
NO_GAIN = {
    "holds": row("not above 0", -0.2, p=0.01, margin=0.01),
    "fails": row("not above 0", p=0.01),
    "inconclusive": row("not above 0", -0.01),
}


@pytest.mark.parametrize("answers", [ANSWERS, NO_GAIN])
def test_answers_follow_from_the_corrected_p_values(answers):
    assert {text: claims.answer(case) for text, case in answers.items()} == {a: a for a in answers}
