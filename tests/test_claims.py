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
from experiments.tables import CLAIMS, Claim

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
@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_intervals_cover_the_truth_as_often_as_they_say(components, seeds):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        low, high = crossed_effect(simulate(rng, components, seeds, truth=0.1)).interval()
        covered += low < 0.1 < high
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize("metric", ["fisher_z", "pearson"])
@pytest.mark.parametrize("seeds", [4, 8])
def test_intervals_of_correlations_cover_the_truth_too(seeds, metric):
    """Two methods whose expected Fisher z differ by .2, on the same rows; runs differ."""
    rng, covered = np.random.default_rng(2), 0
    z = rng.normal(size=100_000) * 0.05
    truth = 0.2 if metric == "fisher_z" else np.mean(np.tanh(1.2 + z) - np.tanh(1.0 + z))
    for _ in range(1000):
        gold, shared = rng.normal(size=(2, 300))
        cells = []
        for z in (1.2, 1.0):
            r = np.tanh(z + 0.05 * rng.normal(size=(seeds, 1)))
            noise = 0.8 * shared + 0.6 * rng.normal(size=(seeds, 300))
            cells.append(row_values(gold, r * gold + (1 - r**2) ** 0.5 * noise, metric))
        low, high = crossed_effect(cells[0] - cells[1]).interval()
        covered += low < truth < high
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize("encoders, runs", [(8, 1), (4, 2)])
def test_intervals_of_accuracies_cover_the_truth_with_shared_encoders_too(encoders, runs):
    """Right or wrong by the sign of ability minus difficulty; runs of an encoder share ability."""
    rng, covered, count = np.random.default_rng(3), 0, encoders * runs
    groups = list(range(encoders)) * runs

    def right(rows, ability):
        shared = 0.1 * rng.normal(size=(encoders, 1))
        own = ability + np.tile(shared, (runs, 1)) + 0.05 * rng.normal(size=(count, 1))
        return (own + rows + 0.5 * rng.normal(size=(count, len(rows))) > 0).astype(float)

    spread = (1 + 0.25 + 0.01 + 0.0025) ** 0.5
    truth = stats.norm.cdf(0.5 / spread) - stats.norm.cdf(0.3 / spread)
    for _ in range(1000):
        rows = rng.normal(size=300)
        values = average_groups(right(rows, 0.5) - right(rows, 0.3), groups)
        low, high = crossed_effect(values).interval()
        covered += low < truth < high
    assert 0.93 <= covered / 1000 <= 0.97


def test_equivalence_is_claimed_wrongly_no_more_often_than_the_level():
    """The truth is the margin itself; and a true difference of zero is found to be within it."""
    rng, components = np.random.default_rng(3), COMPONENTS["both matter"]
    margin = 3.2 * standard_error(components)
    for truth, low, high in ((margin, 0.03, 0.07), (-margin, 0.03, 0.07), (0.0, 0.7, 1.0)):
        effects = [crossed_effect(simulate(rng, components, truth=truth)) for _ in range(1000)]
        share = np.mean([effect.p_equivalence(margin) < 0.05 for effect in effects])
        assert low <= share <= high


def test_both_tests_of_all_differences_keep_the_chance_of_any_error_at_the_level():
    """Half of the differences are zero, and half are the margin: each can be claimed wrongly."""
    rng, components, wrong = np.random.default_rng(4), COMPONENTS["both matter"], []
    margin = 3.2 * standard_error(components, rows=60)
    for _ in range(1000):
        truths = [0.0, margin] * 4
        effects = [crossed_effect(simulate(rng, components, 8, 60, truth)) for truth in truths]
        tests = [p for e in effects for p in (e.p_difference(), e.p_equivalence(margin))]
        corrected = np.reshape(holm(tests), (8, 2))
        wrong.append(min(corrected[::2, 0].min(), corrected[1::2, 1].min()) < 0.05)
    assert 0.01 <= np.mean(wrong) <= 0.065


def test_a_detectable_difference_is_found_as_often_as_stated():
    rng, components = np.random.default_rng(5), COMPONENTS["both matter"]
    # Of an experiment with exactly the expected standard error.
    df = np.mean([crossed_effect(simulate(rng, components)).df for _ in range(200)])
    planted = Effect(0.0, standard_error(components), df).detectable(power=0.8)
    effects = [crossed_effect(simulate(rng, components, truth=planted)) for _ in range(1000)]
    found = np.mean([effect.p_difference() < 0.05 for effect in effects])
    assert found == pytest.approx(0.8, abs=0.05)


def test_with_one_source_of_variance_it_is_the_t_test():
    """If rows differ by nothing, only seeds are left, and scipy has that test."""
    by_seed = np.random.default_rng(6).normal(0.3, 1, size=7)
    effect = crossed_effect(np.repeat(by_seed[:, None], 40, axis=1))
    expected = stats.ttest_1samp(by_seed, 0)
    assert effect.p_difference() == pytest.approx(expected.pvalue)
    assert effect.interval() == pytest.approx(expected.confidence_interval(0.95))
    # If all seeds are equal, only rows are left; and the two are treated alike.
    by_row = np.random.default_rng(7).normal(0.1, 1, size=50)
    equal = crossed_effect(np.repeat(by_row[None], 6, axis=0))
    assert equal.se == pytest.approx(stats.sem(by_row))
    values = simulate(np.random.default_rng(8), COMPONENTS["both matter"])
    assert crossed_effect(values).se == pytest.approx(crossed_effect(values.T).se)
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
    values = simulate(np.random.default_rng(8), (0.05, 0.4, 0.4), seeds=12, rows=400, truth=0.3)
    low, high = pigeonhole_interval(values)
    t_low, t_high = crossed_effect(values).interval()
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert 0.8 < (high - low) / (t_high - t_low) < 1.3


def test_superiority_counts_pairs_of_runs():
    assert superiority([3, 4], [1, 2]) == 1 and superiority([1, 1], [1, 1]) == 0.5
    assert superiority([1, 4], [2, 3, 4]) == pytest.approx((0 + 2.5) / 6)


def test_an_effect_without_any_spread_is_certain():
    zero = crossed_effect(np.zeros((3, 5)))
    assert zero.interval() == (0, 0) and zero.p_difference() == 1 and zero.p_equivalence(0.1) == 0
    assert crossed_effect(np.ones((3, 5))).p_difference() == 0


GOLD = np.arange(200) % 5


def record(cell, seed, wrong, **more):
    """A run on SST with the wrong answer in these rows, (200,) bool."""
    predicted = np.where(wrong, (GOLD + 1) % 5, GOLD)
    dev = {"sst": {"accuracy": float(np.mean(~wrong))}}
    facts = {"cell": cell, "seed": seed, "dev": dev, "head_steps": {"sst": 9}, **more}
    return {**facts, "predictions": {"sst": "".join(map(str, predicted))}}


def test_cells_are_paired_by_seed_and_by_encoder():
    """Of seeds that both cells have; runs of one SimCSE encoder are one unit."""
    rng = np.random.default_rng(0)
    wrong = {seed: rng.random(200) < 0.1 * seed for seed in range(1, 9)}
    none = np.zeros(200, dtype=bool)
    cells = {
        "finetune": [record("finetune", seed, wrong[seed]) for seed in wrong],
        "lpft": [record("lpft", seed, none) for seed in (2, 3, 5, 6)],
        "finetune-simcse": [
            record("finetune-simcse", seed, wrong[seed], model_checksum=f"{seed % 4}")
            for seed in wrong
        ],
        "probe": [record("probe", seed, none) for seed in (7, 8)],
        "untouched": [{"cell": "untouched", "predictions": {"sst": "0" * 200}}],
    }

    def values(first, second):
        runs = claims.pair_runs(cells, first, second)
        return claims.paired_differences(runs, "sst", GOLD, "accuracy")

    expected = [wrong[seed] for seed in (2, 3, 5, 6)]
    np.testing.assert_array_equal(values("lpft", "finetune"), expected)
    expected = [(1.0 * wrong[2] + wrong[6]) / 2, wrong[3], wrong[5]]
    np.testing.assert_array_equal(values("lpft", "finetune-simcse"), expected)
    np.testing.assert_array_equal(values("finetune-simcse", "lpft"), -np.array(expected))
    np.testing.assert_array_equal(values("lpft", "untouched"), [GOLD != 0] * 4)
    with pytest.raises(UserError, match="probe and lpft: an interval needs two seeds"):
        values("probe", "lpft")
    shown = claims.compare_cells(cells, "lpft", "finetune", "sst", GOLD)
    scores = [1 - wrong[seed].mean() for seed in (2, 3, 5, 6)]
    assert shown["difference"] == pytest.approx(1 - np.mean(scores))
    assert (shown["n"], shown["superiority"]) == (
        4,
        1,
    )  # of the runs that are compared, and no other


@pytest.mark.parametrize("shares", [(0.3, 0.5), (0.5, 0.3), (0.4, 0.402)])
def test_a_difference_is_judged_by_its_sign_and_its_size(shares):
    """Of the shares of wrong answers; the paper says that the first cell scores higher."""
    rng = np.random.default_rng(1)
    first, second = "without-sts", "finetune"
    cells = {
        cell: [record(cell, seed, rng.permutation(200) < 200 * share) for seed in range(1, 9)]
        for cell, share in zip((first, second), shares, strict=True)
    }
    claim = Claim("a claim", ((first, second, "sst"),))
    row = claims.judge_difference(cells, claim, claim.contrasts[0], GOLD)
    found = [[1 - 5e-3 * round(200 * s)] * 8 for s in shares]
    assert row["difference"] == pytest.approx(found[0][0] - found[1][0], abs=0.005)
    assert (row["paper"], row["margin"], row["at_majority"]) == (0.007, 0.02, False)
    assert row["above"] == (row["difference"] > 0)
    assert (row["p"] < 1e-4) == (abs(row["difference"]) > 0.1)
    no_gain = claims.judge_difference(cells, Claim("", (), True), claim.contrasts[0], GOLD)
    assert no_gain["p_margin"] <= row["p_margin"]  # only a gain has to be excluded, no loss


def test_claims_compare_heads_that_have_had_the_same_number_of_steps():
    cells = {"probe": [], "probe-simcse": []}
    for seed in (1, 2):
        wrong = np.arange(200) < 40 + seed
        cells["probe"].append(record("probe", seed, wrong))
        cells["probe-simcse"].append(record("probe-simcse", seed, wrong, head_steps={"sst": 8}))
    with pytest.raises(UserError, match=r"unlike numbers of steps of the sst head \(8 and 9\)"):
        claims.judge_difference(cells, CLAIMS[0], CLAIMS[0].contrasts[0], GOLD)


def row(paper=0.1, above=True, p=1.0, margin=1.0, majority=False, no_gain=False, n=8):
    names = {"p_corrected": p, "p_margin_corrected": margin, "at_majority": majority, "n": n}
    return {"paper": paper, "above": above, "no_gain": no_gain, **names}


ANSWERS = {
    "holds": row(p=0.01),
    "fails": row(p=0.01, above=False),
    "holds, within the margin": row(-0.1, above=False, p=0.01, margin=0.01),
    "fails, within the margin": row(-0.1, p=0.01, margin=0.01),
    "no difference within the margin": row(margin=0.01),
    "inconclusive": row(),
    "inconclusive, neither above the majority class": row(p=0.01, margin=0.01, majority=True),
    "inconclusive, too few runs": row(p=0.01, n=2),
}
NO_GAIN = {
    "holds": row(margin=0.01, no_gain=True),
    "fails": row(p=0.01, no_gain=True),
    "holds, within the margin": row(above=False, p=0.01, margin=0.01, no_gain=True),
    "fails, within the margin": row(p=0.01, margin=0.01, no_gain=True),
    "inconclusive": row(no_gain=True),
}


@pytest.mark.parametrize("answers", [ANSWERS, NO_GAIN])
def test_answers_follow_from_the_corrected_p_values(answers):
    assert {text: claims.answer(case) for text, case in answers.items()} == {a: a for a in answers}
