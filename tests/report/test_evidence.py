"""How far rows are told apart: against scipy's own tests, and Holm's method by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from condlr.report.evidence import Comparison, Mean, corrected, judged


def row(value, variance=1e-6, by_seed=(), floor=0.0):
    seeds = tuple(enumerate(by_seed))
    return Mean(
        "row", "row", 0.5, value if not seeds else float(np.mean(by_seed)), 0.0, variance, floor, seeds
    )


def test_rows_of_the_same_seeds_are_compared_seed_by_seed():
    left, right = [0.95, 0.96, 0.93, 0.97], [0.94, 0.955, 0.925, 0.95]
    pair = Comparison(row(0, by_seed=left), row(0, by_seed=right))
    test = stats.ttest_rel(left, right)
    assert pair.probability == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert pair.margin == pytest.approx((interval.high - interval.low) / 2)
    assert pair.sign == (1 if test.pvalue < 0.05 else 0)
    slack = Comparison(pair.left, pair.right, slack=0.01)
    assert slack.probability == pytest.approx(stats.ttest_1samp(np.subtract(left, right) + 0.01, 0).pvalue)


def test_the_images_drawn_bound_the_error_from_below():
    alike = [0.95, 0.951, 0.949]
    pair = Comparison(
        row(0, by_seed=alike, floor=1e-4), row(0, by_seed=[x - 0.01 for x in alike], floor=1e-4)
    )
    assert pair.error == pytest.approx(math.sqrt(2e-4)) and pair.sign == 0


@pytest.mark.parametrize("right", [[0.9, 0.91], [0.9, 0.91, 0.92, 0.9]])
def test_other_seeds_and_few_seeds_are_compared_by_their_variances(right):
    pair = Comparison(row(0.95, 4e-6, [0.94, 0.95, 0.96]), row(0.94, 5e-6, right))
    pair = Comparison(pair.left, row(0.94, 5e-6))
    assert pair.error == pytest.approx(3e-3)
    assert pair.margin == pytest.approx(stats.norm.ppf(0.975) * 3e-3)
    assert pair.probability == pytest.approx(2 * stats.norm.sf(0.01 / 3e-3))


def test_what_would_be_seen_is_seen_in_four_studies_of_five():
    pair = Comparison(row(0.95, 4e-6), row(0.95, 5e-6))
    drawn = np.random.default_rng(0).normal(pair.detectable, pair.error, 20_000)
    assert np.mean(drawn > pair.margin) == pytest.approx(0.8, abs=0.01)


def test_holms_method_by_hand():
    """Probabilities 0.01, 0.02, 0.03, 0.2: held against 0.05/4, /3 (fails), then none."""
    scores = stats.norm.isf(np.array([0.03, 0.01, 0.2, 0.02]) / 2)
    pairs = [Comparison(row(1e-3 * math.sqrt(2) * score), row(0.0)) for score in scores]
    found = corrected(pairs)
    assert [pair.sign for pair in pairs] == [1, 1, 0, 1], "each for itself"
    assert [pair.sign for pair in found] == [0, 1, 0, 0]
    assert [pair.level for pair in found] == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    assert judged("a", "b", "c", pairs).verdict == "partly"
    assert judged("a", "b", "c", pairs[1:2]).verdict == "supported"


def test_equal_rows_are_seldom_told_apart_however_many_are_compared():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        ours = row(0, by_seed=list(rng.normal(0.9, 0.01, 5)))
        others = [row(0, by_seed=list(rng.normal(0.9, 0.01, 5))) for _ in range(6)]
        wrong += any(pair.sign for pair in corrected([Comparison(ours, other) for other in others]))
    assert wrong / 400 < 0.08


def test_without_a_variance_nothing_is_decided_and_nothing_fails():
    pair = Comparison(row(0.9, math.nan), row(0.5, math.nan))
    assert pair.probability == 1 and math.isnan(pair.margin) and corrected([pair])[0].sign == 0
    exact = Comparison(row(1.0, 0.0), row(0.9, 0.0))
    assert exact.probability == 0 and exact.sign == 1
    same = Comparison(row(1.0, 0.0), row(1.0, 0.0))
    assert same.probability == 1 and same.sign == 0
