"""Scores and maps by the detector itself: sizes, and the verdict's rule."""

from __future__ import annotations

import math
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.results.prediction import is_anomalous

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    return helpers.detector()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Three pictures of 256x300."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(3)]
    for path, frame in zip(paths, helpers.frames(3, 256, 300, seed=40), strict=True):
        Image.fromarray(frame).save(path)
    return paths


def test_verdict_is_fail_safe():
    assert is_anomalous(0.2, 0.1) is True
    assert is_anomalous(0.1, 0.1) is False
    assert is_anomalous(math.nan, 0.1) is True
    assert is_anomalous(0.5, None) is None
    for scores in (torch.tensor([0.5, 0.25, math.nan]), np.array([0.5, 0.25, math.nan])):
        assert is_anomalous(scores, 0.25).tolist() == [True, False, True]


def test_predict_equals_the_detector_on_the_resized_image(model, pictures):
    with torch.no_grad():
        for size in ("source", "input"):
            results = list(ead.predict(model, pictures, map_size=size, batch_size=2))
            assert [r.index for r in results] == [0, 1, 2]
            for result, path in zip(results, pictures, strict=True):
                resized = Image.open(path).resize((256, 256), Image.Resampling.BILINEAR)
                image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
                out = model(image)
                assert result.score == pytest.approx(out.score.item(), abs=1e-5)
                assert result.source_size == (256, 300)
                if size == "input":
                    assert np.abs(result.anomaly_map - out.anomaly_map[0].numpy()).max() <= 1e-5
                else:
                    assert result.anomaly_map.shape == (256, 300)


def test_source_score_is_the_maximum_at_the_images_own_size(pictures):
    model = helpers.detector(score_size="source")
    path = pictures[0]
    (result,) = ead.predict(model, [path])
    assert result.score == pytest.approx(result.anomaly_map.max(), abs=1e-6)
    (small,) = ead.predict(model, [path], map_size="input")
    assert small.score == result.score
    assert small.anomaly_map.shape == (256, 256)


def test_predict_refuses_what_it_cannot_do(model):
    with pytest.raises(ValueError, match="map_size is 'full'"):
        ead.predict(model, [], map_size="full")
    with pytest.raises(ead.UncalibratedError):
        ead.predict(ead.EfficientAD("S"), [])
