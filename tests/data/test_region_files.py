"""Regions as pictures and as polygons: which pixels they inspect, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientad.data.region_files import check_frames, polygon_region, read_region

WHITE = np.zeros((6, 9), dtype=bool)
WHITE[1:4, 2:7] = True


def picture(path: Path, levels: np.ndarray, **options) -> Path:
    Image.fromarray(levels).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("grey.png", WHITE * np.uint8(255)),
        ("labels.png", WHITE * np.uint8(1)),
        ("bits.png", WHITE),
        ("deep.png", WHITE * np.uint16(65535)),
        ("colour.png", np.repeat(WHITE[..., None] * np.uint8(255), 3, 2)),
        ("lossy.jpg", np.kron(WHITE, np.ones((8, 8), bool)) * np.uint8(255)),
        ("greys.png", np.where(WHITE, 255, 90).astype(np.uint8)),
    ],
)
def test_white_is_inspected(tmp_path, name, levels):
    found = read_region(picture(tmp_path / name, levels))
    expected = WHITE if found.shape == WHITE.shape else np.kron(WHITE, np.ones((8, 8), bool))
    assert found.dtype == bool
    assert np.array_equal(found, expected)


def test_what_is_painted_on_nothing_is_inspected(tmp_path):
    pixels = np.full((6, 9, 4), 255, np.uint8)
    pixels[..., 3] = WHITE * 255  # white everywhere, seen in the region alone
    assert np.array_equal(read_region(picture(tmp_path / "r.png", pixels)), WHITE)


@pytest.mark.parametrize("name", ["black.png", "black.jpg"])
def test_a_region_that_inspects_nothing_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 5 if name.endswith("jpg") else 1, (40, 40))
    path = picture(tmp_path / name, noise.astype(np.uint8))
    with pytest.raises(ValueError, match=rf"region .*{name} inspects no pixel; white is"):
        read_region(path)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_region(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        read_region(tmp_path / "gone.json")
    (tmp_path / "text.png").write_text("a region")
    with pytest.raises(ValueError, match=r"text\.png"):
        read_region(tmp_path / "text.png")
    with pytest.raises(ValueError, match="region is 3; it must be the path"):
        read_region(3)


# ---- polygons --------------------------------------------------------------------------------


def document(**parts) -> dict:
    return {"width": 9, "height": 6, **parts}


def box(x0, y0, x1, y1) -> list:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def test_polygons_inspect_the_pixels_whose_centres_they_hold(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document(inspect=[box(2, 1, 7, 4)])))
    assert np.array_equal(read_region(path), WHITE)
    assert np.array_equal(polygon_region(document(inspect=[box(1.6, 1.4, 6.6, 4.4)])), WHITE)
    triangle = polygon_region({"width": 4, "height": 4, "inspect": [[[0, 0], [4, 0], [0, 4]]]})
    assert triangle.tolist() == [[x + y < 3 for x in range(4)] for y in range(4)]


def test_the_direction_of_a_polygon_does_not_matter():
    corners = [[0, 0.2], [8.7, 2.1], [5.5, 5.9], [2.2, 3.3]]
    there = polygon_region(document(inspect=[corners]))
    assert there.any()
    assert np.array_equal(there, polygon_region(document(inspect=[corners[::-1]])))


def test_a_polygon_is_filled_as_an_independent_rule_fills_it():
    rng = np.random.default_rng(3)
    for _ in range(20):
        corners = rng.uniform(0, 30, (rng.integers(3, 9), 2))
        found = polygon_region({"width": 30, "height": 30, "inspect": [corners.tolist()]})
        y, x = (np.indices((30, 30)) + 0.5).reshape(2, -1)
        inside = np.zeros(900, dtype=bool)  # a ray to the right, point by point
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        assert np.array_equal(found.ravel(), inside)


def test_polygons_of_a_list_add_up_and_ignored_ones_go_out():
    two = polygon_region(document(inspect=[box(0, 0, 3, 6), box(2, 0, 5, 6)]))
    assert two.sum(1).tolist() == [5] * 6
    hole = polygon_region(document(inspect=[box(0, 0, 5, 6)], ignore=[box(1, 1, 2, 2)]))
    assert hole.sum() == 29
    assert not hole[1, 1]
    assert polygon_region(document(ignore=[box(0, 0, 9, 5)])).sum() == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; it must be an integer >= 1"),
        ({"height": 2.5}, "height is 2.5; it must be an integer >= 1"),
        ({"width": 10**9}, "megapixels, and the limit"),
        ({"width": 10**400}, "region"),
        ({"polygons": []}, "it has 'polygons'; its keys are width, height, inspect, ignore"),
        ({"inspect": {}}, "inspect is {}; it must be a list of polygons"),
        ({"inspect": [[[0, 0], [1, 1]]]}, r"inspect\[0\] is .*three \[x, y\] at least"),
        ({"ignore": [box(0, 0, 1, 1), [[0, 0], [1], [1, 1]]]}, r"ignore\[1\] has a corner \[1\]"),
        ({"inspect": [[[0, 0], [True, 1], [1, 1]]]}, r"a corner \[True, 1\]; .* two numbers"),
        ({"inspect": [box(0, 0, 6, 9)]}, r"a corner \[6, 9\]; it must lie in 9x6 pixels"),
        ({"inspect": [[[0, 0], [float("nan"), 1], [1, 1]]]}, "it must lie in 9x6"),
        ({"inspect": [[[0, 0], [10**400, 1], [1, 1]]]}, "it must lie in 9x6"),
        ({"inspect": [box(1.6, 1.6, 2.4, 2.4)]}, "inspects no pixel"),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused(tmp_path, change, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document(inspect=[box(0, 0, 1, 1)]) | change))
    with pytest.raises(ValueError, match=message):
        read_region(path)


@pytest.mark.parametrize(
    "text", ["[", "[]", "9" * 5000, "[" * 100_000, '{"width": 3, "height": 3}']
)
def test_a_file_that_is_no_document_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"region .*r\.json"):
        read_region(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_region(tmp_path / "r.json")


# ---- and frames ------------------------------------------------------------------------------


def test_a_region_has_the_aspect_of_the_frames(tmp_path):
    good = picture(tmp_path / "good.png", np.zeros((12, 18), np.uint8))
    turned = picture(tmp_path / "turned.png", np.zeros((9, 6), np.uint8))
    (tmp_path / "broken.png").write_text("no picture")
    check_frames(WHITE, [], (256, 256))
    check_frames(WHITE, [tmp_path / "broken.png", tmp_path / "gone.png", good, turned], (256, 256))
    check_frames(WHITE, [turned], WHITE.shape)  # of the network's input
    with pytest.raises(ValueError, match=r"region is 9x6 pixels and .*turned.png is 6x9"):
        check_frames(WHITE, [tmp_path / "broken.png", turned], (256, 256))
