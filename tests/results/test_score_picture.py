"""Scores as a picture: what is where, and on which side a score at the threshold is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from efficientad.results.score_bins import score_bins
from efficientad.results.score_picture import (
    ALARM_SOFT,
    COLORS,
    Card,
    save_picture,
    score_picture,
)


def card(name="part/0.png", score=0.4, size=(40, 60), color=(10, 200, 30)):
    return Card(name, score, np.full((*size, 3), color, np.uint8), np.zeros((5, 6), np.float32))


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def of_color(picture, color) -> np.ndarray:
    """Where a picture has exactly this colour, as a mask."""
    return (pixels(picture) == np.array(ImageColor.getrgb(color))).all(-1)


@pytest.mark.parametrize("threshold", [0.3, 0.1 + 0.2, 1 / 3])
def test_a_score_at_the_threshold_is_below_it(threshold):
    above = float(np.nextafter(threshold, 1))
    bins = score_bins({"good": [0.1, threshold], "bad": [above, 0.9]}, threshold)
    place = bins.edges.tolist().index(threshold)
    assert (bins.counts["good"][:place].sum(), bins.counts["good"][place:].sum()) == (2, 0)
    assert (bins.counts["bad"][:place].sum(), bins.counts["bad"][place:].sum()) == (0, 2)


def test_no_score_is_lost():
    scores = [0.0, 0.1, 0.2, 900.0, math.nan, math.inf]
    bins = score_bins({"good": scores, "none": [math.nan]}, 0.3)
    assert list(bins.counts) == ["good"]
    assert bins.counts["good"].sum() == 4
    assert (bins.beyond, bins.not_finite) == (1, 3)
    assert score_bins({"good": [math.nan], "bad": []}, 0.3) is None


def test_bars_lie_on_their_side_of_the_threshold():
    groups = {"good": [0.1, 0.15, 0.2], "defective": [0.5, 0.6]}
    picture = score_picture(groups, 0.3, title="parts")
    alarm = np.flatnonzero(of_color(picture, ALARM_SOFT).any(0))
    good = np.flatnonzero(of_color(picture, COLORS["good"])[:, 250:].any(0)) + 250
    bad = np.flatnonzero(of_color(picture, COLORS["defective"])[:, 250:].any(0)) + 250
    assert good.max() < alarm.min() < bad.min()


def test_bars_are_as_high_as_their_counts():
    picture = score_picture({"good": [0.1] * 4 + [0.5] * 2}, None, title="parts")
    high = of_color(picture, COLORS["good"])[:, 250:].sum(0)
    columns = np.flatnonzero(high)
    assert high[columns[0]] == pytest.approx(2 * high[columns[-1]], abs=2)
    assert not of_color(picture, ALARM_SOFT).any()


def test_cards_show_image_and_overlay():
    picture = score_picture({"good": [0.1]}, 0.3, title="parts", cards=[card()] * 6)
    assert of_color(picture, "#0ac81e").mean() > 0.1
    fewer = score_picture({"good": [0.1]}, 0.3, title="parts", cards=[card()] * 5)
    assert picture.height > fewer.height


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3)])
def test_images_of_any_shape_fit(size):
    picture = score_picture({"good": [0.1]}, 0.3, title="parts", cards=[card(size=size)] * 5)
    assert picture.width == 1600


def test_long_and_foreign_names_are_drawn_within_their_card():
    def right_end(name):
        picture = score_picture({"good": [0.1]}, 0.3, title="x", cards=[card(name)])
        ink = (pixels(picture)[-105:] < 120).any(-1)
        return np.flatnonzero(ink.any(0)).max()

    assert right_end("x" * 300 + "\N{SNOWMAN}é.png") < 360
    assert right_end("a.png") < right_end("x" * 300)


def test_the_file_is_a_png(tmp_path):
    path = tmp_path / "new" / "scores.png"
    picture = score_picture({"good": [0.1, math.nan]}, 0.3, title="parts", lines=["one"])
    save_picture(picture, path)
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("groups", [{}, {"good": []}, {"good": [math.nan]}])
def test_nothing_to_draw_is_refused(groups):
    with pytest.raises(ValueError, match="at least one score must be finite"):
        score_picture(groups, 0.3, title="parts")
