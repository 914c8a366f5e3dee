"""What a calibration's good images say about its threshold, and what they leave open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from efficientad.utils.proportions import CONFIDENCE, upper_bound

MOST_SCORES = 2000  # kept in a detector's file


def kept_scores(scores: Sequence[float]) -> list[float]:
    """Ascending; of more than `MOST_SCORES` so many, at evenly spaced ranks."""
    ordered = np.sort(np.asarray(scores, np.float64))
    if len(ordered) > MOST_SCORES:
        ordered = ordered[np.linspace(0, len(ordered) - 1, MOST_SCORES).round().astype(int)]
    return ordered.tolist()


def trust(scores: Sequence[float], threshold: float) -> dict[str, Any]:
    """Facts for the record of a calibration.

    Args:
        scores: of the good images that the threshold was set from, not thinned.

    Returns:
        above_threshold: how many of them exceed it. false_reject_bound: with probability
        `confidence` no larger share of such good parts does. scores: see `kept_scores`.
    """
    above = sum(score > threshold for score in scores)
    return {
        "above_threshold": above,
        "false_reject_bound": upper_bound(above, len(scores)),
        "confidence": CONFIDENCE,
        "scores": kept_scores(scores),
    }
