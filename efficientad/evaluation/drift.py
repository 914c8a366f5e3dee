"""Whether a stretch of production still looks like the calibration's images, and since when not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from efficientad.model.trust import Calibration
from efficientad.utils.proportions import exceeding_chance
from efficientad.utils.sampling import evenly

SIGNIFICANCE = 0.01  # chance at which like scores are called drifted
LEAST_DISTANCE = 0.1  # between distribution functions; what is less is no drift, however sure
FEWEST = 20  # scores on either side of a comparison
_PLACES = 400  # looked at for the change, evenly spread


@dataclass(frozen=True)
class Comparison:
    """Of one figure of a stretch's images with that of the calibration's.

    Attributes:
        p_value: of the test, corrected for the number of comparisons.
        distance: largest difference of the distribution functions, calibration and `since` to end.
        since: place in the stretch from which on they differ; None without drift.
        medians: of the calibration, and of what is compared with it from `since` on, or all.
    """

    p_value: float
    distance: float
    since: int | None
    medians: tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """What a comparison found.

    Attributes:
        images: scores of the stretch. above: those that exceed the threshold, or are no numbers.
        above_chance: of so many or more above it if all were good parts like the calibration's.
        compared, reference: images of the stretch and of the calibration at or below the threshold.
        score, map_mean: how they compare; None where too few of the stretch are compared, and for
            the map's mean where it is not known.
        drifted: the verdict, of either; None where it cannot be told.
        since: the earlier place of the two from which on images differ; None without drift.
    """

    images: int
    above: int
    above_chance: float
    compared: int
    reference: int
    score: Comparison | None
    map_mean: Comparison | None
    drifted: bool | None
    since: int | None


def find_drift(
    scores: Sequence[float] | np.ndarray,
    calibration: Calibration,
    threshold: float | None,
    *,
    map_means: Sequence[float] | np.ndarray | None = None,
) -> Drift:
    """Compare the scores and map means of a stretch of production with those of a calibration.

    A stretch holds bad parts, too, so only images whose score is at or below the threshold are
    compared, on both sides; those above are counted apart. The two-sample Kolmogorov-Smirnov test
    is made of the whole stretch and of its last half, quarter and so on while `FEWEST` images are
    left, so that a late change is not drowned; of each figure the smallest p-value counts, times
    the number of all tests (Bonferroni). Drift is a p-value below `SIGNIFICANCE` and a distance of
    at least `LEAST_DISTANCE`.

    It began where the calibration with all images before, and all images from there on, lie
    farthest apart: the distance times sqrt(n1 n2 / (n1 + n2)) is greatest.

    The p-value is of independent images. Pictures of one hour are alike, and make it too small.

    Args:
        scores: in the order of production; NaN counts as above the threshold.
        calibration: of the detector, see `model.trust.calibration_of`.
        threshold: the detector's; None compares all finite scores.
        map_means: of the same images (`model.region.map_means`); None, or one that is no number
            beside a score that is compared, leaves them out.

    Raises:
        ValueError: fewer than `FEWEST` scores of either, or of the calibration's below the
            threshold, or as many map means as there are no scores.
    """
    values, known = np.asarray(scores, np.float64), np.asarray(calibration.scores, np.float64)
    limit = np.inf if threshold is None else threshold
    inside, reference = np.flatnonzero(values <= limit), np.flatnonzero(known <= limit)
    for name, count in (
        ("scores", len(values)),
        ("calibration", len(known)),
        ("calibration below the threshold", len(reference)),
    ):
        if count < FEWEST:
            raise ValueError(f"{name} holds {count} scores; a comparison needs {FEWEST} at least")
    figures = {"score": (values[inside], known[reference])}
    if map_means is not None and calibration.map_means is not None:
        pair = np.asarray(map_means, np.float64), np.asarray(calibration.map_means, np.float64)
        for name, means, own in zip(("stretch", "calibration"), pair, (values, known), strict=True):
            if len(means) != len(own):
                raise ValueError(f"the {name} has {len(own)} scores and {len(means)} map means")
        means, known_means = pair[0][inside], pair[1][reference]
        if np.isfinite(means).all() and np.isfinite(known_means).all():
            figures["map_mean"] = means, known_means
    above, beyond = len(values) - len(inside), len(known) - len(reference)
    found: dict[str, Comparison] = {}
    if len(inside) >= FEWEST:
        found = {name: _compare(*pair, len(figures)) for name, pair in figures.items()}
    placed = {
        name: one if one.since is None else replace(one, since=int(inside[one.since]))
        for name, one in found.items()
    }
    since = min((one.since for one in placed.values() if one.since is not None), default=None)
    return Drift(
        images=len(values),
        above=above,
        above_chance=exceeding_chance(above, len(values), beyond, len(known)),
        compared=len(inside),
        reference=len(reference),
        score=placed.get("score"),
        map_mean=placed.get("map_mean"),
        drifted=since is not None if found else None,
        since=since,
    )


def _compare(values: np.ndarray, reference: np.ndarray, figures: int) -> Comparison:
    """One figure, of so many that are compared; `since` counts the values."""
    from scipy.stats import ks_2samp

    tails = [values]
    while len(tails[-1]) // 2 >= FEWEST:
        tails.append(tails[-1][-(len(tails[-1]) // 2) :])
    least = min(float(ks_2samp(tail, reference).pvalue) for tail in tails)
    p_value = min(1.0, figures * len(tails) * least)
    since, apart = None, values
    if p_value < SIGNIFICANCE:
        since = _change(values, reference)
        apart = values[since:]
    distance = ks_distance(apart, reference)
    if distance < LEAST_DISTANCE:
        since, apart = None, values
    medians = float(np.median(reference)), float(np.median(apart))
    return Comparison(p_value, distance, since, medians)


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
