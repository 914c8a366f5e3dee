"""Drift of scores: found and placed where it is, and seldom found where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from efficientad.evaluation.drift import FEWEST, SIGNIFICANCE, find_drift, ks_distance
from efficientad.model.trust import Calibration, calibration_of


def normal(count, seed=0, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, count)


def known(count, seed=0):
    return Calibration(normal(count, seed))


def test_the_distance_is_that_of_scipy():
    first, second = normal(57, 1).round(1), normal(91, 2, 0.4).round(1)
    assert ks_distance(first, second) == pytest.approx(stats.ks_2samp(first, second).statistic)


def test_like_scores_have_drifted_as_seldom_as_stated():
    """A tenth of the production is rejected, as bad parts are, far above the threshold."""
    drifted = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        (good, means), (scores, new) = rng.normal(size=(2, 60)), rng.normal(size=(2, 300))
        scores[rng.random(300) < 0.1] += 20
        limit = float(good.max())
        drifted += find_drift(scores, Calibration(good, means), limit, map_means=new).drifted
    assert drifted / 300 <= SIGNIFICANCE + 0.01


@pytest.mark.parametrize("change", [0, 300, 900])
def test_the_change_is_found_where_it_is(change):
    scores = normal(1000, 1)
    scores[change:] += 1.5
    found = find_drift(scores, known(100), 10.0)
    assert found.drifted
    assert abs(found.since - change) <= 12
    assert found.score.p_value < SIGNIFICANCE
    assert found.score.medians[1] - found.score.medians[0] == pytest.approx(1.5, abs=0.4)
    assert found.map_mean is None


def test_a_change_of_the_map_means_alone_is_drift():
    """As by a brighter light, which no single place of a map shows."""
    means = normal(600, 1)
    means[400:] += 1.5
    found = find_drift(
        normal(600, 2), Calibration(normal(100, 3), normal(100, 4)), 10.0, map_means=means
    )
    assert found.drifted
    assert abs(found.since - 400) <= 12
    assert (found.score.since, found.map_mean.since) == (None, found.since)
    assert found.map_mean.medians[1] - found.map_mean.medians[0] == pytest.approx(1.5, abs=0.4)


def test_of_two_changes_the_earlier_one_counts():
    scores, means = normal(600, 1), normal(600, 2)
    scores[300:] += 3
    means[100:] += 3
    found = find_drift(scores, Calibration(normal(100, 3), normal(100, 4)), 10.0, map_means=means)
    assert abs(found.score.since - 300) <= 12
    assert found.since == found.map_mean.since
    assert abs(found.since - 100) <= 12


def test_map_means_of_rejected_images_are_not_compared():
    """On either side, and each mean stays beside its own score."""
    scores, means = normal(200, 1), normal(200, 2)
    scores[::4] += 50
    means[::4] = np.nan
    good, of_good = np.sort(normal(120, 3)), normal(120, 4)
    good[-20:] += 50
    of_good[-20:] = 1e6
    found = find_drift(scores, Calibration(good, of_good), 10.0, map_means=means)
    assert (found.compared, found.reference, found.drifted) == (150, 100, False)
    below = scores < 10
    assert found.map_mean.distance == ks_distance(means[below], of_good[:-20])
    means[1] = np.nan  # of one that counts: nothing is known of it
    assert find_drift(scores, Calibration(good, of_good), 10.0, map_means=means).map_mean is None


def test_two_figures_make_twice_the_tests():
    scores, means = normal(60, 1, 0.3), normal(60, 2)
    both = Calibration(normal(50), normal(50, 3))
    alone = find_drift(scores, Calibration(both.scores), 10.0, map_means=means).score
    beside = find_drift(scores, both, 10.0, map_means=means).score
    assert beside.p_value == pytest.approx(min(1.0, 2 * alone.p_value))


def test_as_many_map_means_as_scores_are_asked_for():
    both = Calibration(normal(50), normal(50))
    with pytest.raises(ValueError, match="stretch has 40 scores and 39 map means"):
        find_drift(normal(40), both, 10.0, map_means=normal(39))
    with pytest.raises(ValueError, match="calibration has 50 scores and 49 map means"):
        find_drift(normal(40), both._replace(map_means=normal(49)), 10.0, map_means=normal(40))


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({}, None),
        ({"calibration": "by hand"}, None),
        ({"calibration": {"scores": [1.0]}}, Calibration([1.0])),
        ({"calibration": {"scores": [1.0], "map_means": [2.0]}}, Calibration([1.0], [2.0])),
    ],
)
def test_what_a_provenance_holds(provenance, expected):
    assert calibration_of(provenance) == expected


def test_a_late_change_is_not_drowned():
    scores = normal(5000, 1)
    scores[4900:] += 2
    found = find_drift(scores, known(200), 10.0)
    assert found.drifted
    assert abs(found.since - 4900) <= 12


def test_a_wider_spread_is_drift():
    assert find_drift(normal(500, 1, scale=3), known(200), 20.0).drifted


def test_a_difference_that_matters_to_nobody_is_no_drift():
    found = find_drift(normal(40_000, 1, 0.15), known(2000), 10.0)
    assert found.score.p_value < SIGNIFICANCE
    assert found.score.distance < 0.1
    assert (found.drifted, found.since) == (False, None)


def test_places_are_those_of_the_whole_stretch():
    """Rejected images in front and between are counted, too."""
    scores = np.concatenate(
        [np.full(50, 99.0), normal(200, 1), np.full(50, np.nan), normal(200, 2)]
    )
    scores[300:] += 3
    found = find_drift(scores, known(100), 10.0)
    assert (found.images, found.above, found.compared) == (500, 100, 400)
    assert abs(found.since - 300) <= 12


def test_where_nearly_all_is_rejected_there_is_no_verdict():
    found = find_drift(normal(100, 1, 50), known(100), 5.0)
    assert (found.above, found.compared, found.drifted, found.since) == (100, 0, None, None)
    assert found.above_chance < 1e-20


def test_without_a_threshold_all_scores_are_compared():
    found = find_drift(normal(100, 1), known(100), None)
    assert (found.above, found.compared, found.drifted) == (0, 100, False)


@pytest.mark.parametrize(
    ("scores", "good", "threshold", "message"),
    [
        (FEWEST - 1, 50, 9.0, "scores holds 19 scores; a comparison needs 20"),
        (50, FEWEST - 1, 9.0, "calibration holds 19 scores"),
        (50, 50, -9.0, "calibration below the threshold holds 0 scores"),
    ],
)
def test_too_few_scores_are_refused(scores, good, threshold, message):
    with pytest.raises(ValueError, match=message):
        find_drift(normal(scores), Calibration(normal(good, 1)), threshold)
