"""Anomaly maps as pictures: one scale, colours in order, untouched pixels, the outline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientad.results.overlay import (
    NAN_COLOR,
    REGION_COLOR,
    colorbar,
    colorize,
    map_scale,
    overlay,
    resize_map,
    shrink_map,
)


@pytest.mark.parametrize("threshold", [0.1, 0.25, 3.0, 0.02, 0.0, -0.4])
def test_threshold_is_the_middle_of_the_scale(threshold):
    low, high = map_scale(threshold)
    assert (low + high) / 2 == pytest.approx(threshold)
    assert high > low
    assert low == 0 or threshold <= 0  # the frame of a map, which is 0, stays without colour


def test_scale_starts_at_zero_for_ordinary_thresholds_and_has_a_default():
    assert map_scale(0.3) == (0.0, 0.6)
    for threshold in (None, float("nan"), float("inf")):
        assert map_scale(threshold) == pytest.approx((0.0, 0.2))


def test_colours_grow_lighter_along_the_scale():
    bar = colorbar(256, 3)
    assert bar.shape == (3, 256, 3)
    assert bar.dtype == np.uint8
    linear = (bar[0] / 255.0) ** 2.2
    lightness = (linear @ [0.2126, 0.7152, 0.0722]) ** (1 / 3)
    assert (np.diff(lightness) > -2e-3).all()  # rounding to 8 bits
    assert (np.diff(lightness[::8]) > 0).all()


def test_colorize_clips_and_marks_nan():
    values = np.array([[-9.0, 0.0, 0.2, 9.0, np.nan, np.inf, -np.inf]])
    colors = colorize(values, (0.0, 0.2))[0]
    assert (colors[0] == colors[1]).all()
    assert (colors[2] == colors[3]).all()
    assert (colors[5] == colors[3]).all()
    assert (colors[6] == colors[0]).all()
    assert tuple(colors[4]) == NAN_COLOR
    assert not (colorbar()[0] == NAN_COLOR).all(1).any()


@pytest.mark.parametrize("size", [(96, 160), (40, 20), (64, 48), (1, 1), (63, 65)])
def test_resize_is_torchs_bilinear(size):
    values = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    wide = torch.from_numpy(values).double()[None, None]  # float32 would round torch's positions
    wanted = torch.nn.functional.interpolate(wide, size=size, mode="bilinear")[0, 0]
    np.testing.assert_allclose(resize_map(values, size), wanted, atol=2e-6)


def test_one_nan_spoils_only_its_neighbours():
    values = np.zeros((8, 8), np.float32)
    values[4, 4] = np.nan
    assert np.isnan(resize_map(values, (8, 8))).sum() == 1
    bad = np.isnan(resize_map(values, (32, 32)))
    assert 16 <= bad.sum() <= 64
    assert not bad[:12].any()


def picture(height=60, width=90):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_at_or_below_low_are_unchanged():
    image = picture()
    values = np.full((60, 90), -0.3, np.float32)
    values[:10] = 0
    values[40:50, 20:40] = 0.2
    out = overlay(image, values, 0.5)
    quiet = values <= 0
    assert (out[quiet] == image[quiet]).all()
    assert (out[~quiet] != image[~quiet]).any(1).mean() > 0.9


def test_opacity_grows_with_the_map():
    image = np.full((1, 100, 3), 128, np.uint8)
    values = np.linspace(0, 1, 100, dtype=np.float32)[None]
    out = overlay(image, values, 0.5, contour=False).astype(float)
    color = colorize(values, (0.0, 1.0)).astype(float)
    far = np.abs(color - 128) > 40
    alpha = np.where(far, (out - 128) / np.where(far, color - 128, 1), np.nan)
    mean = np.nanmean(alpha[0], axis=1)
    assert (np.diff(mean) > -0.02).all()
    assert mean[-1] == pytest.approx(0.8, abs=0.02)


def test_outline_follows_the_threshold():
    image = np.full((64, 64, 3), 90, np.uint8)
    values = np.zeros((64, 64), np.float32)
    values[20:40, 24:50] = 0.9
    out = overlay(image, values, 0.5)
    white = (out == 255).all(2)
    inside = np.zeros((64, 64), bool)
    inside[20:40, 24:50] = True
    inner = np.zeros_like(inside)
    inner[21:39, 25:49] = True
    assert (white == (inside & ~inner)).all()
    assert tuple(out[19, 30]) == (20, 20, 24)
    assert not (overlay(image, values, 0.95) == 255).all(2).any()
    assert not (overlay(image, values, None) == 255).all(2).any()
    assert not (overlay(image, values, 0.5, contour=False) == 255).all(2).any()


def test_the_same_value_has_the_same_colour_in_every_picture():
    image = np.full((8, 8, 3), 50, np.uint8)
    weak, strong = np.full((8, 8), 0.2), np.full((8, 8), 0.2)
    strong[:4] = 40.0
    a, b = (overlay(image, m, 0.5, contour=False) for m in (weak, strong))
    assert (a[6] == b[6]).all()


def test_overlay_resizes_the_map_to_a_non_square_image_and_shows_nan():
    values = np.full((8, 16), -1.0, np.float32)
    values[0, 0] = np.nan
    image = picture(80, 120)
    before = image.copy()
    out = overlay(image, values, 0.3)
    assert out.shape == image.shape
    assert (image == before).all()
    assert (out[60:] == image[60:]).all()
    wanted = np.rint(image[0, 0] + 0.8 * (np.array(NAN_COLOR) - image[0, 0].astype(float)))
    assert np.abs(out[0, 0] - wanted).max() <= 1


@pytest.mark.parametrize(
    ("image", "values", "text"),
    [
        (np.zeros((8, 8)), np.zeros((8, 8)), "image is float64"),
        (np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8)), "uint8 \\(H, W, 3\\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8)), "anomaly_map has shape"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8)), "anomaly_map has shape"),
    ],
)
def test_bad_arguments_are_named(image, values, text):
    with pytest.raises(ValueError, match=text):
        overlay(image, values, 0.5)


def test_bad_scale_and_strength_are_named():
    with pytest.raises(ValueError, match="low < high"):
        colorize(np.zeros((2, 2)), (0.5, 0.5))
    with pytest.raises(ValueError, match="strength is 2"):
        overlay(picture(), np.zeros((4, 4)), 0.5, strength=2)
    with pytest.raises(ValueError, match="length is 1"):
        colorbar(1)


def test_the_region_is_outlined_and_nothing_outside_it():
    image = np.full((40, 60, 3), 90, np.uint8)
    region = torch.zeros(20, 30, dtype=torch.bool)
    region[5:15, 10:20] = True
    drawn = overlay(image, np.zeros((20, 30)), 0.5, region=region)
    blue = (drawn == REGION_COLOR).all(-1)
    inside = np.zeros((40, 60), bool)
    inside[10:30, 20:40] = True
    core = np.zeros_like(inside)
    core[11:29, 21:39] = True
    assert np.array_equal(blue, inside & ~core)
    assert (drawn[~blue] == 90).all()
    above = np.zeros((20, 30), np.float32)
    above[:, 25:] = 0.6  # above the threshold, and outside
    without = overlay(image, above, 0.5, region=region, strength=0)
    assert np.array_equal(without, overlay(image, above, 0.5, region=region, strength=0,
                                           contour=False))  # fmt: skip
    whole = overlay(image, above, 0.5, region=torch.ones(2, 2, dtype=torch.bool))
    assert np.array_equal(whole, overlay(image, above, 0.5))


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 11), (1, 30), (31, 2), (20, 21)])
def test_a_shrunk_map_holds_the_maximum_of_every_block(size):
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    values[-1, -1] = np.nan
    block = max(1, min(max(size) // 4, *size))
    expected = [
        [values[y : y + block, x : x + block].max() for x in range(0, size[1], block)]
        for y in range(0, size[0], block)
    ]
    shrunk = shrink_map(values, 4)
    assert np.array_equal(shrunk, np.array(expected, np.float32), equal_nan=True)
    assert shrunk.flags.c_contiguous
