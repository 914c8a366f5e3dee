"""What is asked of stored verdicts: history, counts, histograms, and what a threshold would do.

Scores are compared within one detector only, of one name and one digest: another file's mean
something else, and another name is another place. A score that is not a number lies above every
threshold, as in the verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from efficientad.evaluation.drift import FEWEST, find_drift
from efficientad.model.calibration import threshold_from_scores
from efficientad.model.trust import Calibration
from efficientad.utils.proportions import upper_bound
from efficientad.verdicts.database import REVIEWS, Connection

VERDICTS = {
    "anomalous": "is_anomalous = 1",
    "normal": "is_anomalous = 0",
    "none": "is_anomalous IS NULL",
}
_REVIEW = {**{word: f"review = '{word}'" for word in REVIEWS}, "open": "review IS NULL"}
LEAST_PARTS = 20  # from which a threshold is proposed
MOST_STRETCHES, LEAST_STRETCH = 60, 10  # of a course, and parts in one
BAND = (0.05, 0.95)  # quantiles of the calibration's scores

Detector = tuple[str, str]  # name and digest


def as_text(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def row_of(row: Any) -> dict[str, Any]:
    """A row of `verdicts` as JSON takes it."""
    verdict, score = row["is_anomalous"], row["score"]
    return {
        "id": row["id"],
        "time": as_text(row["time"]),
        "model": row["model"],
        "name": row["name"],
        "score": score if score is None or math.isfinite(score) else None,
        "is_anomalous": None if verdict is None else bool(verdict),
        "threshold": row["threshold"],
        "source_size": [row["height"], row["width"]],
        "boxes": json.loads(row["boxes"]),
        "review": row["review"],
        "has_picture": row["suffix"] is not None,
    }


def history(
    db: Connection,
    *,
    model: str | None = None,
    verdict: str | None = None,
    review: str | None = None,
    since: float | None = None,
    until: float | None = None,
    before: int | None = None,
    limit: int = 60,
) -> list[dict[str, Any]]:
    """The newest verdicts that fit, newest first; `before` a number goes on from there.

    verdict: a word of `VERDICTS`. review: a word of `store.REVIEWS`, or "open". since, until:
    seconds since 1970, the first inclusive.
    """
    clauses: list[str] = []
    values: list[Any] = []
    for clause, value in (
        ("model = ?", model), ("time >= ?", since), ("time < ?", until), ("id < ?", before)
    ):  # fmt: skip
        if value is not None:
            clauses.append(clause)
            values.append(value)
    clauses += [VERDICTS[verdict]] if verdict else []
    clauses += [_REVIEW[review]] if review else []
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    rows = db.execute(f"SELECT * FROM verdicts {where} ORDER BY id DESC LIMIT ?", [*values, limit])
    return [row_of(row) for row in rows]


def counts(db: Connection, detector: Detector) -> dict[str, int]:
    """Parts of a detector: in all, anomalous, rejects that nobody has reviewed, and reviews."""
    row = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE is_anomalous = 1), "
        "count(*) FILTER (WHERE is_anomalous = 1 AND review IS NULL), "
        "count(*) FILTER (WHERE review = 'good'), count(*) FILTER (WHERE review = 'bad'), "
        "count(*) FILTER (WHERE review = 'unsure') FROM verdicts WHERE model = ? AND digest = ?",
        detector,
    ).fetchone()
    names = ("parts", "anomalous", "open", "good", "bad", "unsure")
    return dict(zip(names, row, strict=True))


def what_if(db: Connection, detector: Detector, threshold: float) -> dict[str, int]:
    """What a threshold would have done to the parts that are stored.

    Returns:
        parts, rejected; and of these rejected_good, rejected_bad, rejected_unsure as reviewed;
        passed_bad: confirmed bad, and would have passed.
    """
    row = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE above), "
        "count(*) FILTER (WHERE above AND review = 'good'), "
        "count(*) FILTER (WHERE above AND review = 'bad'), "
        "count(*) FILTER (WHERE above AND review = 'unsure'), "
        "count(*) FILTER (WHERE NOT above AND review = 'bad') FROM "
        "(SELECT score IS NULL OR score > ? AS above, review FROM verdicts "
        "WHERE model = ? AND digest = ?) AS judged",
        (threshold, *detector),
    ).fetchone()
    names = (
        "parts", "rejected", "rejected_good", "rejected_bad", "rejected_unsure", "passed_bad"
    )  # fmt: skip
    return dict(zip(names, row, strict=True))


def histogram(db: Connection, detector: Detector, threshold: float | None, bins: int = 60) -> dict:
    """Counts of scores in bins of equal width, by review, from the lowest to the 99.5th percentile.

    The last bin also holds what lies above; where there is a threshold the range reaches half as
    far again beyond it.

    Returns:
        low, high; counts: review (or "open") -> a number per bin; not_a_number: scores in no bin.
    """
    where = "FROM verdicts WHERE model = ? AND digest = ? AND score IS NOT NULL"
    total, low, high = db.execute(
        f"SELECT count(*), min(score), max(score) {where}", detector
    ).fetchone()
    (missing,) = db.execute(
        "SELECT count(*) FROM verdicts WHERE model = ? AND digest = ? AND score IS NULL", detector
    ).fetchone()
    if not total:
        low = high = 0.0 if threshold is None else threshold
    else:
        (upper,) = db.execute(
            f"SELECT score {where} ORDER BY score LIMIT 1 OFFSET ?",
            (*detector, math.ceil(0.995 * (total - 1))),
        ).fetchone()
        high = min(high, max(upper, low))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold + 0.5 * max(threshold - low, 0.0))
    if not high > low:
        low, high = low - 0.1, high + 0.1
    found = {word: [0] * bins for word in (*REVIEWS, "open")}
    place = db.whole.format("(score - ?) * ?")
    rows = db.execute(
        f"SELECT CASE WHEN score < ? THEN {place} ELSE ? END, coalesce(review, 'open'), count(*) "
        f"{where} GROUP BY 1, 2",
        (high, low, bins / (high - low), bins - 1, *detector),
    )
    for bin_, review, count in rows:
        found[review][min(bin_, bins - 1)] += count
    return {"low": low, "high": high, "counts": found, "not_a_number": missing}


def course(
    db: Connection,
    detector: Detector,
    threshold: float | None,
    calibration: Calibration | None,
    parts: int,
) -> dict[str, Any]:
    """How the scores of a detector's newest parts went, and what `find_drift` says of them.

    Args:
        threshold: the one in use. calibration: what the detector's calibration kept, if anything.
        parts: so many at most.

    Returns:
        parts; threshold; stretches of as many parts each, oldest first: number and time of the
        first and the last one, parts, anomalous, median and 95 % quantile of the scores that are
        numbers, or None, and map_mean, the median of the maps' means, or None; calibration: parts,
        low, median, high (see `BAND`), map_mean: the same three, or None; or None; drift: the
        fields of `Drift`, each `since` as number and time of a part, or None; reason: a sentence
        where there is no drift to speak of.
    """
    # What is appended keeps a database from an index that it would have to sort.
    rows = db.execute(
        "SELECT id, time, score, map_mean, is_anomalous FROM verdicts "
        "WHERE model || '' = ? AND digest || '' = ? ORDER BY id DESC LIMIT ?",
        (*detector, parts),
    ).fetchall()[::-1]
    scores, means = (
        np.array([math.nan if row[name] is None else row[name] for row in rows])
        for name in ("score", "map_mean")
    )
    count = max(1, min(MOST_STRETCHES, len(rows) // LEAST_STRETCH))
    edges = [i * len(rows) // count for i in range(count + 1)]
    stretches = [
        _stretch(rows[start:end], scores[start:end], means[start:end])
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
    band = None
    if calibration:
        band = {
            "parts": len(calibration.scores),
            **_band(calibration.scores),
            "map_mean": None if calibration.map_means is None else _band(calibration.map_means),
        }
    drift, reason = None, None
    if not calibration:
        reason = "The detector's file holds no scores of a calibration to compare with."
    elif len(rows) < FEWEST:
        reason = f"{len(rows)} parts are stored; a comparison needs {FEWEST}."
    else:
        try:
            found = find_drift(scores, calibration, threshold, map_means=means)
        except ValueError as error:
            reason = f"{error}."
        else:
            drift = dataclasses.asdict(found)
            for one in (drift, drift["score"], drift["map_mean"]):
                if one is not None and one["since"] is not None:
                    since = rows[one["since"]]
                    one["since"] = {"id": since["id"], "time": as_text(since["time"])}
    return {
        "parts": len(rows), "threshold": threshold, "stretches": stretches, "calibration": band,
        "drift": drift, "reason": reason,
    }  # fmt: skip


def _band(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (BAND[0], 0.5, BAND[1])).tolist()
    return {"low": low, "median": middle, "high": high}


def _stretch(rows: list[Any], scores: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    """A row of `course`."""
    finite, means = scores[np.isfinite(scores)], means[np.isfinite(means)]
    median, high = np.quantile(finite, (0.5, 0.95)).tolist() if len(finite) else (None, None)
    return {
        "first": rows[0]["id"], "last": rows[-1]["id"],
        "from": as_text(rows[0]["time"]), "to": as_text(rows[-1]["time"]),
        "parts": len(rows), "anomalous": sum(row["is_anomalous"] == 1 for row in rows),
        "median": median, "high": high,
        "map_mean": float(np.median(means)) if len(means) else None,
    }  # fmt: skip


class TooFew(ValueError):
    """There are too few parts for a threshold."""


def proposed_threshold(db: Connection, detector: Detector, rate: float) -> dict[str, Any]:
    """The threshold that at most a share `rate` of good parts would exceed.

    Good are parts that were reviewed as good, and parts that passed and were reviewed as nothing
    else. Rejects alone would not do: they are the highest scores of the good ones. What was
    rejected and is not reviewed, or is unsure, is left out.

    Returns:
        threshold; good: parts that it rests on; reviewed_good: of these; above: of these that
        exceed it; bound: with 95 % confidence no more than this share of good parts will (exact
        binomial); left_out: rejects without a clear review.

    Raises:
        TooFew: fewer than `LEAST_PARTS` good parts. ValueError: a rate outside [0, 1).
    """
    rows = db.execute(
        "SELECT score, review FROM verdicts WHERE model = ? AND digest = ? "
        "AND score IS NOT NULL AND (review = 'good' OR (review IS NULL AND is_anomalous = 0))",
        detector,
    ).fetchall()
    scores = [row[0] for row in rows]
    if len(scores) < LEAST_PARTS:
        raise TooFew(
            f"{len(scores)} good parts are stored; a threshold needs at least {LEAST_PARTS}"
        )
    threshold = threshold_from_scores(scores, rate)
    above = sum(score > threshold for score in scores)
    (left_out,) = db.execute(
        "SELECT count(*) FROM verdicts WHERE model = ? AND digest = ? AND "
        "(review = 'unsure' OR (review IS NULL AND is_anomalous = 1))",
        detector,
    ).fetchone()
    return {
        "threshold": threshold,
        "good": len(scores),
        "reviewed_good": sum(row[1] == "good" for row in rows),
        "above": above,
        "bound": upper_bound(above, len(scores)),
        "left_out": left_out,
    }


def set_review(db: Connection, number: int, review: str | None, now: float) -> bool:
    """Note what somebody says of a part, None takes it back; whether there is such a part."""
    changed = db.execute(
        "UPDATE verdicts SET review = ?, reviewed = ? WHERE id = ?",
        (review, None if review is None else now, number),
    )
    return changed.rowcount == 1


def reviewed_good(db: Connection, model: str) -> list[tuple[int, str]]:
    """(number, suffix) of the pictures that were reviewed as good under a model's name."""
    rows = db.execute(
        "SELECT id, suffix FROM verdicts WHERE model = ? AND review = 'good' "
        "AND suffix IS NOT NULL ORDER BY id",
        (model,),
    )
    return [(row[0], row[1]) for row in rows]
