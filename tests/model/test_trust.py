"""The record of a calibration: what is kept of its scores and said of its threshold."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from efficientad.model.calibration import threshold_from_scores
from efficientad.model.good_images import GoodImagesSeen, GoodImageWarning
from efficientad.model.known_pictures import MOST_DIGESTS, known_pictures
from efficientad.model.trust import (
    MOST_SCORES,
    judge_lots,
    kept_scores,
    named_lots,
    trust,
    warn_of_own,
)
from efficientad.utils.proportions import upper_bound


def test_kept_scores_are_the_scores_in_order():
    scores = np.random.default_rng(0).normal(size=MOST_SCORES).tolist()
    means = [-score for score in scores]
    kept = kept_scores(scores, means)
    assert kept == {"scores": sorted(scores), "map_means": sorted(means, reverse=True)}


def test_of_many_scores_evenly_spaced_ranks_are_kept():
    scores = np.random.default_rng(0).permutation(50_001) / 50_000
    found = kept_scores(scores, 1 - scores)
    kept = found["scores"]
    assert len(kept) == MOST_SCORES
    assert found["map_means"] == [1 - score for score in kept]
    assert (kept[0], kept[-1]) == (0, 1)
    np.testing.assert_allclose(kept, np.linspace(0, 1, MOST_SCORES), atol=2e-5)


def test_a_score_at_the_threshold_is_not_above_it():
    facts = trust([0.1, 0.3, 0.2, 0.4], [1.0, 3.0, 2.0, 4.0], 0.3)
    assert facts["above_threshold"] == 1
    assert facts["false_reject_bound"] == pytest.approx(upper_bound(1, 4))
    assert facts["scores"] == [0.1, 0.2, 0.3, 0.4]
    assert facts["map_means"] == [1.0, 2.0, 3.0, 4.0]


def rule(scores):
    return threshold_from_scores(scores, 0.01)


def lots(scores: dict[str, list[float]]):
    """Arguments of `judge_lots`: folders with so many images of these scores."""
    images = [Path(name) / f"{i}.png" for name in scores for i in range(len(scores[name]))]
    values = [score for own in scores.values() for score in own]
    return list(map(Path, scores)), images, values


def test_each_lot_is_held_against_the_threshold_of_the_others():
    values = np.random.default_rng(0).normal(size=(2, 40))
    folders, images, scores = lots({"a": values[0].tolist(), "b": (values[1] + 3).tolist()})
    with pytest.warns(GoodImageWarning, match=r"Above the threshold .* are of b: \d+ of 40\."):
        first, second = judge_lots(folders, images, scores, rule(scores), rule)
    assert (first["folder"], first["images"], first["above_threshold"]) == ("a", 40, 0)
    assert first["above_others"] == 0
    assert second["above_others"] == sum(values[1] + 3 > values[0].max())
    assert second["chance"] < 1e-6 < first["chance"]


def test_like_lots_are_not_warned_of():
    values = np.random.default_rng(1).normal(size=(3, 40)).tolist()
    folders, images, scores = lots(dict(zip("abc", values, strict=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judge_lots(folders, images, scores, rule(scores), rule)
    assert [lot["images"] for lot in found] == [40, 40, 40]


def test_like_lots_are_warned_of_as_seldom_as_stated():
    """One of three lots in a hundred calibrations; scores of lots that are alike."""
    rng = np.random.default_rng(2)
    chances = []
    for values in rng.normal(size=(700, 3, 30)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GoodImageWarning)
            found = judge_lots(*lots(dict(zip("abc", values.tolist(), strict=True))), 9.0, rule)
        chances += [lot["chance"] for lot in found]
    assert (np.array(chances) < 0.01).mean() <= 0.015
    assert (np.array(chances) < 0.1).mean() == pytest.approx(0.05, abs=0.05)


def test_a_lot_without_images_and_files_beside_the_lots():
    folders, images, scores = lots({"a": [0.1, 0.2], "b": []})
    images.append(Path("elsewhere/0.png"))
    found = judge_lots(folders, images, [*scores, 0.15], 0.2, rule)
    assert [(lot["folder"], lot["above_others"]) for lot in found] == [("a", 1)]
    alone = judge_lots(folders, images[:2], scores, 0.2, rule)
    assert (alone[0]["above_others"], alone[0]["chance"]) == (None, None)


def test_lots_are_folders_two_at_least(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    file = tmp_path / "0.png"
    file.touch()
    assert named_lots([tmp_path / "a", file]) == []
    assert named_lots([str(tmp_path / "b"), file, tmp_path / "a"]) == [
        tmp_path / "b",
        tmp_path / "a",
    ]


def seen_of(pixels) -> GoodImagesSeen:
    seen = GoodImagesSeen("the threshold")
    for i, image in enumerate(pixels):
        seen.add_pixels(image, f"{i}.png")
    return seen


def test_images_of_the_training_are_named():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), np.uint8)
    trained = known_pictures(digest for digest, _ in seen_of(pixels[:4]).digests)
    provenance = {"training": {"known_pictures": trained}}
    message = r"^2 of 3 good images are among those .* trained on \(0\.png, 2\.png\)"
    with pytest.warns(GoodImageWarning, match=message):
        assert warn_of_own(provenance, seen_of(pixels[[1, 5, 3]])) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_of_own(provenance, seen_of(pixels[4:])) == 0


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"training": "by hand"},
        {"training": {}},
        {"training": {"known_pictures": {"digests": 3}}},
        {"training": {"known_pictures": {"digests": [None, ["x"]]}}},
    ],
)
def test_a_file_that_tells_nothing_is_taken_as_it_is(provenance):
    pixels = np.zeros((2, 8, 9, 3), np.uint8)
    assert warn_of_own(provenance, seen_of(pixels)) == 0


def test_of_many_pictures_so_many_are_kept_and_the_rest_is_said(monkeypatch):
    assert known_pictures(["b", "a", "b"]) == {"pictures": 2, "digests": ["a", "b"]}
    many = known_pictures(f"{i:012x}" for i in range(MOST_DIGESTS + 5))
    assert (many["pictures"], len(many["digests"])) == (MOST_DIGESTS + 5, MOST_DIGESTS)
    monkeypatch.setattr("efficientad.model.good_images.picture_digest", lambda pixels: f"{0:012x}")
    with pytest.warns(GoodImageWarning, match="^at least 1 of 1 good images"):
        warn_of_own({"training": {"known_pictures": many}}, seen_of(np.zeros((1, 8, 9, 3))))
