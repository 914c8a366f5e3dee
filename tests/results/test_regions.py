"""`Prediction.regions`: what a map marks, as boxes and areas in pixels of the original frame."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from efficientad.results.output_folder import ResultFolder
from efficientad.results.prediction import Prediction
from efficientad.results.regions import AnomalousRegion, anomalous_regions

NAN = float("nan")


def prediction(values, size=None, threshold=0.5, **options) -> Prediction:
    anomaly_map = np.array(values, np.float32)
    score = float(anomaly_map.max())
    return Prediction(0, score, threshold, anomaly_map, size or anomaly_map.shape, **options)


def test_each_connected_region_has_box_area_and_score_the_highest_first():
    found = prediction(
        [
            [0.0, 0.6, 0.7, 0.0, 0.0],
            [0.0, 0.6, 0.0, 0.0, 0.9],
            [0.0, 0.0, 0.0, 0.0, 0.5],  # 0.5 is not above
        ]
    ).regions()
    assert found == [
        AnomalousRegion((4, 1, 5, 2), 1, pytest.approx(0.9)),
        AnomalousRegion((1, 0, 3, 2), 3, pytest.approx(0.7)),
    ]


def test_pixels_that_touch_at_a_corner_are_one_region():
    (found,) = prediction([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).regions()
    assert (found.box, found.area) == ((0, 0, 3, 3), 3)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_boxes_and_areas_are_in_pixels_of_the_frame_and_boxes_rounded_outwards(kind):
    anomaly_map = np.zeros((4, 4), np.float32)
    anomaly_map[1, 2:] = 1
    made = Prediction(0, 1.0, 0.5, kind(anomaly_map), (10, 30))
    assert made.regions() == [AnomalousRegion((15, 2, 30, 5), round(2 * 300 / 16), 1.0)]
    smaller = Prediction(0, 1.0, 0.5, kind(anomaly_map), (2, 2))
    assert smaller.regions() == [AnomalousRegion((1, 0, 2, 1), 1, 1.0)]


def test_smaller_regions_than_min_area_are_left_out():
    made = prediction([[1, 0, 0, 2, 2]], size=(10, 50))
    assert [r.area for r in made.regions(min_area=100)] == [200, 100]
    assert [r.area for r in made.regions(min_area=101)] == [200]
    assert made.regions(min_area=201) == []


def test_nan_lies_above_every_threshold_and_comes_first():
    found = prediction([[NAN, 0, 9]], threshold=5).regions()
    assert [r.box for r in found] == [(0, 0, 1, 1), (2, 0, 3, 1)]
    assert math.isnan(found[0].score)
    assert found[0].to_dict() == {"box": [0, 0, 1, 1], "area": 1, "score": None}


def test_the_threshold_can_be_another():
    made = prediction([[1.0, 0, 3.0]], threshold=None)
    assert [r.score for r in made.regions(threshold=2)] == [3.0]
    assert made.regions(threshold=3) == []


def test_an_image_of_a_batch_has_its_own():
    maps = torch.zeros(2, 3, 3)
    maps[1, 0, 0] = 1
    batch = Prediction(range(2), torch.tensor([0.0, 1.0]), 0.5, maps, [(3, 3), (6, 6)])
    assert [one.regions() for one in batch] == [[], [AnomalousRegion((0, 0, 2, 2), 4, 1.0)]]
    with pytest.raises(ValueError, match="prediction of a batch; index it"):
        batch.regions()


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (prediction([[1]], threshold=None), {}, "has no threshold"),
        (Prediction(0, 1.0, 0.5, None, (1, 1)), {}, "holds no map"),
        (prediction([[1]], whole=False), {}, "at feature size"),
        (prediction([[1]]), {"min_area": -1}, "min_area is -1; it must be a finite number >= 0"),
        (prediction([[0]]), {"min_area": NAN}, "min_area is nan"),
        (prediction([[1]]), {"threshold": NAN}, "threshold is nan"),
    ],
)
def test_what_has_no_regions_is_refused(made, options, message):
    with pytest.raises(ValueError, match=message):
        made.regions(**options)


def test_views_and_host_copies_keep_whether_the_map_is_whole():
    maps, sizes = torch.ones(2, 3, 3), [(3, 3)] * 2
    batch = Prediction(range(2), torch.ones(2), 0.5, maps, sizes, whole=False)
    for one in (batch[1], batch[:1][0], batch.cpu()[0]):
        with pytest.raises(ValueError, match="at feature size"):
            one.regions()


def test_a_map_of_one_region_covers_the_frame():
    assert anomalous_regions(np.ones((3, 5)), (7, 11), 0) == [
        AnomalousRegion((0, 0, 11, 7), 77, 1.0)
    ]


# ---- in the output folder --------------------------------------------------------------------


def write(folder, made, **options) -> tuple[list, str]:
    """(images of scores.json, the report) of one image."""
    results = ResultFolder(folder, made.threshold, **options)
    image = np.full((*made.source_size, 3), 90, np.uint8)
    results.add(made, "part.png", folder / "part", image=image)
    page = results.close("Parts").read_text(encoding="utf-8")
    return json.loads((folder / "scores.json").read_text())["images"], page


def test_scores_json_and_the_report_list_regions(tmp_path):
    made = prediction([[1, 0, NAN]], size=(20, 30))
    rows, page = write(tmp_path, made)
    assert rows[0]["regions"] == [
        {"box": [20, 0, 30, 20], "area": 200, "score": None},
        {"box": [0, 0, 10, 20], "area": 200, "score": 1.0},
    ]
    assert "200 px at (0, 0) to (10, 20): 1.000" in page
    assert "regions" not in (tmp_path / "scores.csv").read_text()


def test_the_report_counts_regions_beyond_the_first_three(tmp_path):
    made = prediction([[1, 0, 2, 0, 3, 0, 4, 0, 5]])
    rows, page = write(tmp_path, made)
    assert len(rows[0]["regions"]) == 5
    assert page.count("1 px at") == 3
    assert "and 2 more regions" in page


def test_the_folder_leaves_small_regions_out(tmp_path):
    rows, page = write(tmp_path, prediction([[1, 0, 2, 2]]), min_area=2)
    assert [r["area"] for r in rows[0]["regions"]] == [2]
    assert "1 px at" not in page
    with pytest.raises(ValueError, match="min_area is -2"):
        ResultFolder(tmp_path / "other", 0.5, min_area=-2)
    assert not (tmp_path / "other").exists()


def test_without_a_threshold_regions_are_null_and_without_defects_empty(tmp_path):
    rows, _ = write(tmp_path / "a", prediction([[1]], threshold=None))
    assert rows[0]["regions"] is None
    rows, _ = write(tmp_path / "b", prediction([[0]]))
    assert rows[0]["regions"] == []
