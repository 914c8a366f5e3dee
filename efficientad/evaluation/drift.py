"""Whether a stretch of production scores still looks like the calibration's, and since when not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efficientad.utils.proportions import exceeding_chance
from efficientad.utils.sampling import evenly

SIGNIFICANCE = 0.01  # chance at which like scores are called drifted
LEAST_DISTANCE = 0.1  # between distribution functions; what is less is no drift, however sure
FEWEST = 20  # scores on either side of a comparison
_PLACES = 400  # looked at for the change, evenly spread


@dataclass(frozen=True)
class Drift:
    """What a comparison found.

    Attributes:
        images: scores of the stretch. above: those that exceed the threshold, or are no numbers.
        above_chance: of so many or more above it if all were good parts like the calibration's.
        compared, reference: scores of the stretch and of the calibration at or below the threshold.
        p_value: of the test, corrected for the number of its comparisons; None where too few scores
            lie below the threshold to be compared.
        distance: largest difference of the distribution functions, calibration and `since` to end.
        drifted: the verdict; None where it cannot be told.
        since: place in the stretch from which on scores differ; None without drift.
        medians: of the calibration, and of what is compared with it from `since` on, or all.
    """

    images: int
    above: int
    above_chance: float
    compared: int
    reference: int
    p_value: float | None
    distance: float | None
    drifted: bool | None
    since: int | None
    medians: tuple[float, float] | None


def calibration_scores(provenance: Mapping[str, Any]) -> list[float] | None:
    """The scores that a detector's calibration kept; None where there are none."""
    calibration = provenance.get("calibration")
    known = calibration.get("scores") if isinstance(calibration, dict) else None
    return known if isinstance(known, list) else None


def find_drift(
    scores: Sequence[float] | np.ndarray, calibration: Sequence[float], threshold: float | None
) -> Drift:
    """Compare the scores of a stretch of production with those that a calibration kept.

    A stretch holds bad parts, too, so only scores at or below the threshold are compared, on both
    sides; those above are counted apart. The two-sample Kolmogorov-Smirnov test is made of the
    whole stretch and of its last half, quarter and so on while `FEWEST` scores are left, so that a
    late change is not drowned; the smallest p-value times their number counts (Bonferroni). Drift
    is a p-value below `SIGNIFICANCE` and a distance of at least `LEAST_DISTANCE`.

    It began where the calibration with all scores before, and all scores from there on, lie
    farthest apart: the distance times sqrt(n1 n2 / (n1 + n2)) is greatest.

    The p-value is of independent scores. Pictures of one hour are alike, and make it too small.

    Args:
        scores: in the order of production; NaN counts as above the threshold.
        calibration: `provenance["calibration"]["scores"]` of the detector. threshold: the
            detector's; None compares all finite scores.

    Raises:
        ValueError: fewer than `FEWEST` scores of either, or of the calibration's below the
            threshold.
    """
    from scipy.stats import ks_2samp

    values, known = np.asarray(scores, np.float64), np.asarray(calibration, np.float64)
    limit = np.inf if threshold is None else threshold
    inside, reference = np.flatnonzero(values <= limit), known[known <= limit]
    for name, count in (
        ("scores", len(values)),
        ("calibration", len(known)),
        ("calibration below the threshold", len(reference)),
    ):
        if count < FEWEST:
            raise ValueError(f"{name} holds {count} scores; a comparison needs {FEWEST} at least")
    below = values[inside]
    above, beyond = len(values) - len(below), len(known) - len(reference)
    facts: dict[str, Any] = {
        "images": len(values),
        "above": above,
        "above_chance": exceeding_chance(above, len(values), beyond, len(known)),
        "compared": len(below),
        "reference": len(reference),
    }
    if len(below) < FEWEST:
        return Drift(**facts, p_value=None, distance=None, drifted=None, since=None, medians=None)
    tails = [below]
    while len(tails[-1]) // 2 >= FEWEST:
        tails.append(tails[-1][-(len(tails[-1]) // 2) :])
    p_value = min(1.0, len(tails) * min(float(ks_2samp(t, reference).pvalue) for t in tails))
    since, apart = None, below
    if p_value < SIGNIFICANCE:
        since = _change(below, reference)
        apart = below[since:]
    distance = ks_distance(apart, reference)
    if distance < LEAST_DISTANCE:
        since, apart = None, below
    return Drift(
        **facts,
        p_value=p_value,
        distance=distance,
        drifted=since is not None,
        since=None if since is None else int(inside[since]),
        medians=(float(np.median(reference)), float(np.median(apart))),
    )


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of the empirical distribution functions of two samples."""
    both = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def _change(scores: np.ndarray, reference: np.ndarray) -> int:
    """Index of the first score after the change, by the rule of `find_drift`."""
    places = evenly(len(scores) - FEWEST + 1, _PLACES)
    pooled = np.concatenate([reference, scores])
    order = np.argsort(pooled, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(pooled[order]) > 0, True))  # the last of equal scores
    positions = order - len(reference)

    def apart(place: int) -> float:
        after = len(scores) - place
        before = len(pooled) - after
        later = np.cumsum(positions >= place)[ends]
        distance = np.abs(later / after - (ends + 1 - later) / before).max()
        return float(distance * np.sqrt(before * after / len(pooled)))

    return int(max(places.tolist(), key=apart))
