"""Drift of scores: found and placed where it is, and seldom found where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from efficientad.evaluation.drift import FEWEST, SIGNIFICANCE, find_drift, ks_distance


def normal(count, seed=0, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, count)


def test_the_distance_is_that_of_scipy():
    first, second = normal(57, 1).round(1), normal(91, 2, 0.4).round(1)
    assert ks_distance(first, second) == pytest.approx(stats.ks_2samp(first, second).statistic)


def test_like_scores_have_drifted_as_seldom_as_stated():
    """A tenth of the production is rejected, as bad parts are, far above the threshold."""
    drifted = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        known, scores = rng.normal(size=60), rng.normal(size=300)
        scores[rng.random(300) < 0.1] += 20
        drifted += find_drift(scores, known, float(known.max())).drifted
    assert drifted / 300 <= SIGNIFICANCE + 0.01


@pytest.mark.parametrize("change", [0, 300, 900])
def test_the_change_is_found_where_it_is(change):
    known, scores = normal(100), normal(1000, 1)
    scores[change:] += 1.5
    found = find_drift(scores, known, 10.0)
    assert found.drifted
    assert abs(found.since - change) <= 12
    assert found.p_value < SIGNIFICANCE
    assert found.medians[1] - found.medians[0] == pytest.approx(1.5, abs=0.4)


def test_a_late_change_is_not_drowned():
    scores = normal(5000, 1)
    scores[4900:] += 2
    found = find_drift(scores, normal(200), 10.0)
    assert found.drifted
    assert abs(found.since - 4900) <= 12


def test_a_wider_spread_is_drift():
    assert find_drift(normal(500, 1, scale=3), normal(200), 20.0).drifted


def test_a_difference_that_matters_to_nobody_is_no_drift():
    found = find_drift(normal(40_000, 1, 0.15), normal(2000), 10.0)
    assert found.p_value < SIGNIFICANCE
    assert found.distance < 0.1
    assert (found.drifted, found.since) == (False, None)


def test_places_are_those_of_the_whole_stretch():
    """Rejected images in front and between are counted, too."""
    scores = np.concatenate(
        [np.full(50, 99.0), normal(200, 1), np.full(50, np.nan), normal(200, 2)]
    )
    scores[300:] += 3
    found = find_drift(scores, normal(100), 10.0)
    assert (found.images, found.above, found.compared) == (500, 100, 400)
    assert abs(found.since - 300) <= 12


def test_where_nearly_all_is_rejected_there_is_no_verdict():
    found = find_drift(normal(100, 1, 50), normal(100), 5.0)
    assert (found.above, found.compared, found.drifted, found.since) == (100, 0, None, None)
    assert found.above_chance < 1e-20


def test_without_a_threshold_all_scores_are_compared():
    found = find_drift(normal(100, 1), normal(100), None)
    assert (found.above, found.compared, found.drifted) == (0, 100, False)


@pytest.mark.parametrize(
    ("scores", "known", "threshold", "message"),
    [
        (FEWEST - 1, 50, 9.0, "scores holds 19 scores; a comparison needs 20"),
        (50, FEWEST - 1, 9.0, "calibration holds 19 scores"),
        (50, 50, -9.0, "calibration below the threshold holds 0 scores"),
    ],
)
def test_too_few_scores_are_refused(scores, known, threshold, message):
    with pytest.raises(ValueError, match=message):
        find_drift(normal(scores), normal(known, 1), threshold)
