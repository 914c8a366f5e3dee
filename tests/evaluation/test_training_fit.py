"""Training images that fit worst: found, named, bounded in number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from efficientad import EfficientAD
from efficientad.data.decoding import ImageError
from efficientad.evaluation import training_fit as module
from efficientad.evaluation.training_fit import training_fit
from efficientad.results.plain_path import RawMaps


@pytest.fixture(scope="module")
def detector():
    model = EfficientAD("S")
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.0, 1.0, 0.0, 1.0)
    return model


class Maps:
    """A `MapSource`: constant maps of the height that a file's name says; "bad" is not read."""

    def distance_maps(self, sources, *, workers=2, on_error=None):
        for index, path in enumerate(sources):
            if path.stem == "bad":
                on_error(index, path, ImageError(str(path), "no image"))
                continue
            maps = torch.full((1, 56, 56), float(path.stem))
            yield RawMaps(index, (20, 30), maps, maps)


def write(folder, stems):
    paths = [folder / f"{stem}.png" for stem in stems]
    for path in paths:
        Image.new("RGB", (30, 20), (90, 80, 70)).save(path)
    return paths


def fit(detector, paths, **options):
    return training_fit(detector, paths, predictor=Maps(), **options)


def test_the_five_highest_come_first_with_their_pictures(detector, tmp_path):
    heights = [1.0, 9.0, 2.0, 3.0, 1.5, 2.5, 1.2, 1.1]
    found = fit(detector, write(tmp_path, heights))
    assert [misfit.path.stem for misfit in found.worst] == ["9.0", "3.0", "2.5", "2.0", "1.5"]
    assert found.worst[0].score == pytest.approx(0.9)  # q_b of both maps is sent to 0.1
    assert found.worst[0].anomaly_map.shape == found.worst[0].image.shape[:2] == (20, 30)
    np.testing.assert_allclose(found.scores, [h / 10 for h in heights], rtol=1e-5)


def test_only_what_lies_far_above_all_is_said_to(detector, tmp_path):
    found = fit(detector, write(tmp_path, [1.0, 1.1, 1.2, 1.3, 1.15, 1.05, 1.25, 9.0]))
    assert [misfit.far for misfit in found.worst] == [True, False, False, False, False]


def test_a_score_that_is_no_number_is_worst_of_all(detector, tmp_path):
    found = fit(detector, write(tmp_path, ["1.0", "nan", "2.0"]))
    assert [misfit.path.stem for misfit in found.worst] == ["nan", "2.0", "1.0"]


def test_what_cannot_be_read_is_listed(detector, tmp_path):
    found = fit(detector, write(tmp_path, ["1.0", "bad"]))
    assert found.failed == [(str(tmp_path / "bad.png"), "no image")]
    assert (len(found.scores), len(found.worst), found.images) == (1, 1, 2)


def test_of_many_images_some_are_looked_at(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_IMAGES", 3)
    seen = []
    found = fit(
        detector,
        write(tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0]),
        progress=lambda what, done, total: seen.append((done, total)),
    )
    np.testing.assert_allclose(found.scores, [0.1, 0.3, 0.5], rtol=1e-5)
    assert found.images == 5
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_without_a_predictor_the_detector_itself_is_asked(detector, tmp_path):
    paths = write(tmp_path, ["0"])
    found = training_fit(detector, paths)
    assert np.isfinite(found.scores).all()
    assert found.worst[0].path == paths[0]


def test_an_uncalibrated_detector_is_refused(tmp_path):
    with pytest.raises(ValueError, match="calibrate"):
        training_fit(EfficientAD("S"), write(tmp_path, ["1.0"]))
