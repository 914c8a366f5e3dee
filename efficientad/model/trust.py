"""What a calibration's good images say about its threshold, and what they leave open."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efficientad.model.good_images import GoodImagesSeen, GoodImageWarning
from efficientad.model.known_pictures import among_known
from efficientad.utils.files import listed, plain_text
from efficientad.utils.proportions import CONFIDENCE, exceeding_chance, upper_bound
from efficientad.utils.sampling import evenly

MOST_SCORES = 2000  # kept in a detector's file
UNLIKELY = 0.01  # chance at which a lot is said to differ, shared among the lots
_LISTED = 5  # names in a message


class Calibration(NamedTuple):
    """What a detector's calibration kept of its good images.

    Attributes:
        scores: ascending. map_means: of the same images; None in files that hold none.
    """

    scores: Sequence[float]
    map_means: Sequence[float] | None = None


def calibration_of(provenance: Mapping[str, Any]) -> Calibration | None:
    """What a detector's provenance holds to compare with; None where there is nothing."""
    kept = provenance.get("calibration")
    if not isinstance(kept, dict) or not isinstance(kept.get("scores"), list):
        return None
    scores, means = kept["scores"], kept.get("map_means")
    return Calibration(scores, means if isinstance(means, list) else None)


def kept_scores(scores: Sequence[float], map_means: Sequence[float]) -> dict[str, list[float]]:
    """Both in ascending order of the scores; of more than `MOST_SCORES` images so many, at evenly
    spaced ranks."""
    order = np.argsort(np.asarray(scores, np.float64), kind="stable")
    kept = order[evenly(len(order), MOST_SCORES)]
    return {
        "scores": np.asarray(scores, np.float64)[kept].tolist(),
        "map_means": np.asarray(map_means, np.float64)[kept].tolist(),
    }


def trust(scores: Sequence[float], map_means: Sequence[float], threshold: float) -> dict[str, Any]:
    """Facts for the record of a calibration.

    Args:
        scores: of the good images that the threshold was set from, not thinned. map_means: theirs.

    Returns:
        above_threshold: how many of them exceed it. false_reject_bound: with probability
        `confidence` no larger share of such good parts does. scores, map_means: see `kept_scores`.
    """
    above = sum(score > threshold for score in scores)
    return {
        "above_threshold": above,
        "false_reject_bound": upper_bound(above, len(scores)),
        "confidence": CONFIDENCE,
        **kept_scores(scores, map_means),
    }


def named_lots(good_images: object) -> list[Path]:
    """The folders (days, lots) in a list of what a user names; none where it is fewer than two."""
    if not isinstance(good_images, list):
        return []
    folders = [
        Path(named)
        for named in good_images
        if isinstance(named, (str, os.PathLike)) and Path(named).is_dir()
    ]
    return folders if len(folders) > 1 else []


def judge_lots(
    lots: Sequence[Path],
    images: Sequence[Path],
    scores: Sequence[float],
    threshold: float,
    rule: Callable[[Sequence[float]], float],
) -> list[dict[str, Any]]:
    """How the good images of each lot stand to the threshold, and to that of the other lots.

    Args:
        lots: folders. images, scores: of all lots, in the same order. rule: scores to a threshold.

    Returns:
        For each lot with images: folder, images, above_threshold, above_others (how many exceed the
        threshold that all other images give; None where there are none), and chance: of so many or
        more if this lot were like the others. A GoodImageWarning names the lots that are not.
    """
    values = np.asarray(scores, np.float64)
    own = [next((i for i, lot in enumerate(lots) if lot in p.parents), -1) for p in images]
    found: list[dict[str, Any]] = []
    for i, lot in enumerate(lots):
        mine, others = values[np.array(own) == i], values[np.array(own) != i]
        if not mine.size:
            continue
        facts: dict[str, Any] = {"folder": plain_text(lot), "images": len(mine)}
        facts["above_threshold"] = int((mine > threshold).sum())
        facts["above_others"] = facts["chance"] = None
        if others.size:
            limit = rule(others.tolist())
            above, beyond = int((mine > limit).sum()), int((others > limit).sum())
            facts["above_others"] = above
            facts["chance"] = exceeding_chance(above, len(mine), beyond, len(others))
        found.append(facts)
    _warn_of_lots(found)
    return found


def _warn_of_lots(found: Sequence[Mapping[str, Any]]) -> None:
    unlike = [f for f in found if f["chance"] is not None and f["chance"] < UNLIKELY / len(found)]
    if not unlike:
        return
    named = [f"{f['folder']}: {f['above_others']} of {f['images']}" for f in unlike]
    warnings.warn(
        "good images of one folder are unlike those of the others. Above the threshold that the "
        f"other folders give are of {listed(named, _LISTED)}. The next day's may be as unlike: "
        "look at these images, and calibrate on more days",
        GoodImageWarning,
        stacklevel=3,
    )


def warn_of_own(provenance: Mapping[str, Any], seen: GoodImagesSeen) -> int:
    """How many of the images seen the detector was trained on, as far as its file can tell.

    A GoodImageWarning names them.
    """
    training = provenance.get("training")
    record = training.get("known_pictures") if isinstance(training, Mapping) else None
    known = among_known(record, (digest for digest, _ in seen.digests))
    own = [plain_text(source) for digest, source in seen.digests if digest in known]
    if own:
        assert isinstance(record, Mapping)
        least = "at least " if record.get("pictures") != len(record["digests"]) else ""
        warnings.warn(
            f"{least}{len(own)} of {seen.count} good images are among those that the detector was "
            f"trained on ({listed(own, _LISTED)}): their scores are lower than those of other good "
            "parts, and so is a threshold from them. Calibrate on images of other parts, best of "
            "other days",
            GoodImageWarning,
            stacklevel=3,
        )
    return len(own)
