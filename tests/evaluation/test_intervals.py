"""Bootstrap intervals of the image AU-ROC."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from efficientad.evaluation import intervals
from efficientad.evaluation.intervals import au_roc_interval


def drawn(normal: int, anomalous: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores on a grid, so that there are ties; the anomalous ones one deviation higher."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(0, 1, normal), rng.normal(1, 1, anomalous)])
    return np.repeat([0, 1], [normal, anomalous]), scores.round(1)


def test_it_is_the_plain_bootstrap_within_its_noise():
    labels, scores = drawn(40, 60, 0)
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(4000):
        normal, anomalous = rng.choice(scores[:40], 40), rng.choice(scores[40:], 60)
        above = np.sign(anomalous[:, None] - normal)  # Mann and Whitney: pairs in the right order
        areas.append((1 + above.mean()) / 2)
    expected = np.quantile(areas, (0.05, 0.95))
    found = au_roc_interval(labels, scores, level=0.9, resamples=4000)
    assert found == pytest.approx(expected, abs=0.005)  # the quantiles' own noise is 0.0015
    assert found[0] < roc_auc_score(labels, scores) < found[1]


def test_it_covers_the_truth_about_as_often_as_it_says():
    truth = 0.760250  # the normal distribution's at 1 / sqrt(2)
    inside = 0
    for seed in range(200):
        low, high = au_roc_interval(*drawn(60, 60, seed), resamples=400)
        inside += low <= truth <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_same_call_gives_the_same_interval_in_blocks_of_any_size(monkeypatch):
    labels, scores = drawn(30, 30, 2)
    whole = au_roc_interval(labels, scores)
    assert au_roc_interval(labels[::-1], scores[::-1]) == whole
    monkeypatch.setattr(intervals, "_AT_ONCE", 700)
    assert au_roc_interval(labels, scores) == pytest.approx(whole, abs=0.01)


def test_kinds_that_are_apart_and_one_kind_alone():
    assert au_roc_interval([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) == (1, 1)
    assert au_roc_interval([0, 0], [0.1, 0.2]) is None
    assert au_roc_interval([], []) is None
