"""What stored verdicts answer: counts, histograms, thresholds."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from efficientad.evaluation.drift import find_drift
from efficientad.model.trust import Calibration
from efficientad.verdicts import queries
from efficientad.verdicts.store import Record, Store

NAN = float("nan")
SCREW = ("screw", "d")


def fill(store: Store, *parts: tuple[float, str | None], threshold=0.5, **changes) -> None:
    """Parts of (score, review)."""
    for score, review in parts:
        verdict = None if threshold is None else not score <= threshold
        values = {
            "model": "screw", "digest": "d", "score": score, "map_mean": 0.05,
            "threshold": threshold, "is_anomalous": verdict, "size": (4, 6), "boxes": [],
            "picture": b"x", "suffix": "png",
        }  # fmt: skip
        number = store.add(Record(**values | changes)).result()
        store.submit(
            lambda step, n=number, r=review: queries.set_review(step.db, n, r, 7.0)
        ).result()


@pytest.fixture
def store(tmp_path, database):
    with Store(tmp_path, durable=False, database=database) as opened:
        yield opened


PARTS = [
    (0.1, None), (0.2, "good"), (0.3, None), (0.55, "good"),
    (0.6, "bad"), (0.7, None), (0.9, "bad"), (0.45, "bad"), (NAN, "unsure"),
]  # fmt: skip


def test_counts(store):
    fill(store, *PARTS)
    fill(store, (0.9, None), digest="another file of the same name")
    fill(store, (0.9, None), model="the same file at another place")
    with store.reading() as db:
        assert queries.counts(db, SCREW) == {
            "parts": 9, "anomalous": 5, "open": 1, "good": 2, "bad": 3, "unsure": 1
        }  # fmt: skip
        assert queries.counts(db, ("screw", "unknown")) == dict.fromkeys(
            queries.counts(db, SCREW), 0
        )


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, (5, 1, 2, 1, 1)),
        (0.55, (4, 0, 2, 1, 1)),  # a score on the threshold passes
        (-1.0, (9, 2, 3, 1, 0)),
        (2.0, (1, 0, 0, 1, 3)),  # what is not a number is always rejected
    ],
)
def test_what_a_threshold_would_have_done(store, threshold, expected):
    fill(store, *PARTS)
    fill(store, (0.9, "bad"), digest="another")
    names = ("rejected", "rejected_good", "rejected_bad", "rejected_unsure", "passed_bad")
    with store.reading() as db:
        found = queries.what_if(db, SCREW, threshold)
        assert found == {"parts": 9, **dict(zip(names, expected, strict=True))}
        none = queries.what_if(db, ("screw", "unknown"), threshold)
        assert set(none.values()) == {0}


def test_the_histogram_holds_every_number_once(store):
    fill(store, *PARTS)
    with store.reading() as db:
        found = queries.histogram(db, SCREW, 0.5, bins=10)
    sums = {word: sum(counts) for word, counts in found["counts"].items()}
    assert sums == {"good": 2, "bad": 3, "unsure": 0, "open": 3}
    assert found["not_a_number"] == 1
    assert found["low"] == 0.1
    assert found["high"] >= 0.5 + 0.5 * 0.4
    width = (found["high"] - found["low"]) / 10
    assert found["counts"]["good"][int((0.2 - 0.1) / width)] == 1


def test_a_long_tail_goes_into_the_last_bin(store):
    fill(store, *[(0.1 + i / 1000, None) for i in range(300)], (50.0, "bad"))
    with store.reading() as db:
        found = queries.histogram(db, SCREW, 0.3, bins=20)
    assert found["high"] < 1
    assert found["counts"]["bad"][-1] == 1
    assert sum(found["counts"]["open"]) == 300


@pytest.mark.parametrize("threshold", [None, 0.25])
@pytest.mark.parametrize("scores", [(), (0.25,), (NAN,)])
def test_a_histogram_of_next_to_nothing(store, scores, threshold):
    fill(store, *[(score, None) for score in scores])
    with store.reading() as db:
        found = queries.histogram(db, SCREW, threshold)
    assert found["low"] < found["high"]
    assert sum(found["counts"]["open"]) == sum(not math.isnan(score) for score in scores)


def test_the_history_is_filtered_and_goes_on_from_a_number(store):
    fill(store, *PARTS)
    fill(store, (0.3, None), threshold=None, model="other", digest="o", time=1000.0)

    def numbers(**filters) -> list[int]:
        with store.reading() as db:
            return [row["id"] for row in queries.history(db, **filters)]

    assert numbers() == list(range(10, 0, -1))
    assert numbers(limit=3) == [10, 9, 8]
    assert numbers(limit=3, before=8) == [7, 6, 5]
    assert numbers(model="other") == [10]
    assert numbers(verdict="anomalous") == [9, 7, 6, 5, 4]
    assert numbers(verdict="none") == [10]
    assert numbers(verdict="anomalous", review="open") == [6]
    assert numbers(review="bad", verdict="normal") == [8]
    assert numbers(until=1001) == [10]
    assert numbers(since=1000, until=1000) == []
    assert 10 not in numbers(since=1000.5)


def test_a_review_is_kept_and_taken_back(store):
    fill(store, (0.7, "bad"))
    with store.reading() as db:
        (row,) = queries.history(db)
        assert row["review"] == "bad"
        assert db.execute("SELECT reviewed FROM verdicts").fetchone()[0] == 7.0
    assert store.submit(lambda step: queries.set_review(step.db, 1, None, 8.0)).result()
    assert not store.submit(lambda step: queries.set_review(step.db, 99, "good", 8.0)).result()
    with store.reading() as db:
        assert db.execute("SELECT review, reviewed FROM verdicts").fetchone()[:] == (None, None)


def test_a_threshold_rests_on_parts_that_passed_and_false_rejects(store):
    fill(store, *[(i / 100, None) for i in range(48)])  # passed
    fill(store, (0.55, "good"), (0.65, "good"))  # rejected, and good
    fill(store, (0.4, "bad"), (0.9, "bad"), (0.7, None), (0.45, "unsure"), (NAN, "good"))
    with store.reading() as db:
        found = queries.proposed_threshold(db, SCREW, 0.02)
    assert found == {
        "threshold": 0.55,  # one of 50 lies above
        "good": 50,
        "reviewed_good": 2,
        "above": 1,
        "bound": pytest.approx(stats.beta.ppf(0.95, 2, 49)),
        "left_out": 2,
    }


def test_too_few_good_parts_give_no_threshold(store):
    fill(store, *[(0.1, None)] * 19, *[(0.9, None)] * 50)
    with store.reading() as db, pytest.raises(queries.TooFew, match="19 good parts are stored"):
        queries.proposed_threshold(db, SCREW, 0.01)


@pytest.mark.parametrize(("found", "of"), [(0, 59), (1, 100), (5, 60), (7, 7)])
def test_the_bound_is_the_exact_one(found, of):
    bound = queries.upper_bound(found, of)
    # At the bound, so few or fewer are seen with 5 %.
    assert stats.binom.cdf(found, of, bound) == pytest.approx(0.05 if found < of else 1.0)


def went(store: Store, scores, threshold: float | None = 0.5, means=None, **changes) -> None:
    """Parts of a detector, one second after another."""
    values = {"model": "screw", "digest": "d", **changes}
    means = [None] * len(scores) if means is None else means
    rows = [
        (float(i), values["model"], values["digest"], None if score != score else score, mean,
         None if threshold is None else not score <= threshold)
        for i, (score, mean) in enumerate(zip(scores, means, strict=True))
    ]  # fmt: skip
    statement = (
        "INSERT INTO verdicts (time, model, digest, score, map_mean, is_anomalous, height, width, "
        "boxes, bytes) VALUES (?, ?, ?, ?, ?, ?, 1, 1, '[]', 0)"
    )
    store.submit(lambda step: [step.db.execute(statement, row) for row in rows]).result()


def course(store: Store, threshold=0.5, calibration=None, parts=10_000) -> dict:
    with store.reading() as db:
        return queries.course(db, SCREW, threshold, calibration, parts)


KNOWN = np.random.default_rng(0).uniform(0.1, 0.3, 200).tolist()
CALIBRATION = Calibration(KNOWN)
LIKE_IT = np.random.default_rng(1).uniform(0.1, 0.3, 300).tolist()
HIGHER = np.random.default_rng(2).uniform(0.2, 0.4, 150).tolist()


def test_a_course_is_of_stretches_that_hold_each_part_once(store):
    scores = [i / 1000 for i in range(100)] + [NAN, math.inf, 0.9]
    went(store, scores)
    went(store, [0.4] * 50, digest="another file of the same name")
    found = course(store)
    assert (found["parts"], found["threshold"], found["calibration"]) == (103, 0.5, None)
    stretches = found["stretches"]
    assert [one["parts"] for one in stretches] == [10, 10, 10, 11, 10, 10, 11, 10, 10, 11]
    assert (stretches[0]["first"], stretches[-1]["last"]) == (1, 103)
    assert all(a["last"] + 1 == b["first"] for a, b in itertools.pairwise(stretches))
    assert stretches[0]["median"] == pytest.approx(0.0045)
    assert stretches[0]["high"] == pytest.approx(np.quantile(scores[:10], 0.95))
    assert stretches[0]["from"] == "1970-01-01T00:00:00.000+00:00"
    assert stretches[0]["to"] == "1970-01-01T00:00:09.000+00:00"
    assert [one["anomalous"] for one in stretches] == [0] * 9 + [3]
    assert stretches[-1]["median"] == pytest.approx(0.096)  # of what is a number
    newest = course(store, parts=25)
    assert (newest["parts"], newest["stretches"][0]["first"]) == (25, 79)
    assert len(course(store, parts=5)["stretches"]) == 1


def test_a_course_of_no_part_and_of_no_number(store):
    assert course(store)["stretches"] == []
    assert course(store)["parts"] == 0
    went(store, [NAN] * 12)
    (stretch,) = course(store, calibration=CALIBRATION)["stretches"]
    assert (stretch["median"], stretch["high"], stretch["anomalous"]) == (None, None, 12)


def test_a_course_stands_beside_the_calibration(store):
    went(store, LIKE_IT)
    found = course(store, calibration=CALIBRATION)
    band = found["calibration"]
    assert (band["parts"], band["median"]) == (200, pytest.approx(np.median(KNOWN)))
    assert band["low"] == pytest.approx(np.quantile(KNOWN, 0.05))
    assert band["high"] == pytest.approx(np.quantile(KNOWN, 0.95))
    assert (band["map_mean"], found["stretches"][0]["map_mean"]) == (None, None)
    assert (found["drift"]["drifted"], found["drift"]["since"]) == (False, None)
    assert found["reason"] is None
    json.dumps(found, allow_nan=False)


def test_a_course_names_the_part_from_which_on_scores_drift(store):
    scores = [*LIKE_IT, *HIGHER]
    went(store, [0.9] * 7, model="another place")
    went(store, scores)
    drift = course(store, calibration=CALIBRATION)["drift"]
    expected = find_drift(scores, CALIBRATION, 0.5)
    assert drift["drifted"] is True
    assert abs(expected.since - 300) < 30
    assert drift["since"] == {"id": 7 + expected.since + 1, "time": queries.as_text(expected.since)}
    assert drift["score"]["p_value"] == expected.score.p_value
    assert drift["score"]["since"] == drift["since"]
    assert drift["map_mean"] is None
    newest = course(store, calibration=CALIBRATION, parts=150)["drift"]
    assert newest["since"]["id"] == 307 + find_drift(HIGHER, CALIBRATION, 0.5).since + 1


def test_a_course_of_the_map_means_beside_the_scores(store):
    means = [0.02 + 0.001 * (i % 10) for i in range(200)] + [0.08] * 100
    went(store, LIKE_IT, means=means)
    known = Calibration(KNOWN, [0.02 + 0.001 * (i % 10) for i in range(200)])
    found = course(store, calibration=known)
    assert found["stretches"][0]["map_mean"] == pytest.approx(np.median(means[:10]))
    assert found["stretches"][-1]["map_mean"] == pytest.approx(0.08)
    assert found["calibration"]["map_mean"]["median"] == pytest.approx(0.0245)
    drift = found["drift"]
    assert (drift["score"]["since"], drift["drifted"]) == (None, True)
    assert drift["since"] == drift["map_mean"]["since"]
    assert abs(drift["since"]["id"] - 201) < 10
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("count", "calibration", "threshold", "reason"),
    [
        (30, None, 0.5, "The detector's file holds no scores of a calibration to compare with."),
        (19, CALIBRATION, 0.5, "19 parts are stored; a comparison needs 20."),
        (
            30,
            Calibration(KNOWN[:5]),
            0.5,
            "calibration holds 5 scores; a comparison needs 20",
        ),
        (30, CALIBRATION, 0.1, "calibration below the threshold holds 0 scores; a comparison"),
    ],
)
def test_a_course_says_why_there_is_no_comparison(store, count, calibration, threshold, reason):
    went(store, LIKE_IT[:count])
    found = course(store, threshold, calibration)
    assert found["drift"] is None
    assert found["reason"].startswith(reason)
    assert len(found["stretches"]) >= 1
