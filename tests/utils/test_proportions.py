"""Bounds and chances of shares against the binomial distribution, and against drawn samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from efficientad.utils.proportions import exceeding_chance, upper_bound


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 30), (1, 30), (7, 8), (40, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_so_few_are_as_unlikely_as_stated_at_the_bound(count, of, confidence):
    bound = upper_bound(count, of, confidence)
    assert stats.binom.cdf(count, of, bound) == pytest.approx(1 - confidence)


def test_all_cases_allow_everything():
    assert upper_bound(5, 5) == 1.0


def test_it_holds_for_a_threshold_from_the_same_sample():
    """The highest but one of 40 scores: the share above it exceeds the bound in 5 % of samples."""
    draws = np.sort(np.random.default_rng(0).random((4000, 40)), axis=1)
    shares = 1 - draws[:, -2]  # of uniform scores, above the threshold
    assert (shares > upper_bound(1, 40)).mean() == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "of is 0"),
        ((-1, 5), "count is -1"),
        ((6, 5), "count is 6; it must be at most of, which is 5"),
        ((1, 5, 0.0), "confidence is 0.0"),
        ((1, 5, 1.0), "confidence is 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        upper_bound(*arguments)


@pytest.mark.parametrize(
    ("count", "of", "beyond", "others"),
    [(0, 5, 0, 1), (1, 1, 0, 9), (3, 40, 1, 60), (40, 40, 2, 3), (12, 2000, 0, 1000)],
)
def test_the_chance_is_that_of_the_beta_binomial(count, of, beyond, others):
    expected = stats.betabinom.sf(count - 1, of, beyond + 1, others - beyond)
    assert exceeding_chance(count, of, beyond, others) == pytest.approx(expected, rel=1e-8)


def test_one_more_score_is_the_highest_as_often_as_any():
    assert exceeding_chance(1, 1, 0, 9) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 1), "of is 0"),
        ((0, 1, 0, 0), "others is 0"),
        ((2, 1, 0, 1), "count is 2; it must be at most 1"),
        ((0, 1, 1, 1), "beyond is 1; it must be at most 0"),
        ((-1, 1, 0, 1), "count is -1"),
    ],
)
def test_impossible_counts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        exceeding_chance(*arguments)
