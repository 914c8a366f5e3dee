"""The record of a calibration: what is kept of its scores and said of its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from efficientad.model.trust import MOST_SCORES, kept_scores, trust
from efficientad.utils.proportions import upper_bound


def test_kept_scores_are_the_scores_in_order():
    scores = np.random.default_rng(0).normal(size=MOST_SCORES).tolist()
    assert kept_scores(scores) == sorted(scores)


def test_of_many_scores_evenly_spaced_ranks_are_kept():
    scores = np.random.default_rng(0).permutation(50_001) / 50_000
    kept = kept_scores(scores)
    assert len(kept) == MOST_SCORES
    assert (kept[0], kept[-1]) == (0, 1)
    np.testing.assert_allclose(kept, np.linspace(0, 1, MOST_SCORES), atol=2e-5)


def test_a_score_at_the_threshold_is_not_above_it():
    facts = trust([0.1, 0.3, 0.2, 0.4], 0.3)
    assert facts["above_threshold"] == 1
    assert facts["false_reject_bound"] == pytest.approx(upper_bound(1, 4))
    assert facts["scores"] == [0.1, 0.2, 0.3, 0.4]
