"""The bound on a share against the binomial distribution, and against drawn samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from efficientad.utils.proportions import upper_bound


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
