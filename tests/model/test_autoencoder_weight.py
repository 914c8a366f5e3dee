"""How much the autoencoder's map counts: through its quantiles, kept for the next calibration."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch

import efficientad as ead
from efficientad.checkpoint.safe_pickle import CheckpointError
from efficientad.model.calibration import MapFile, set_quantiles_from_maps


@pytest.fixture(scope="module")
def detector() -> ead.EfficientAD:
    return helpers.detector()


def quantiles(detector, weight: float) -> list[float]:
    detector.autoencoder_weight = weight
    maps = MapFile(*detector.feature_size())
    for _ in range(4):
        maps.add(*torch.rand(2, 1, *detector.feature_size(), generator=torch.manual_seed(0)))
    set_quantiles_from_maps(detector, maps)
    maps.close()
    return detector.quantiles.tolist()


def test_only_the_width_of_the_autoencoders_quantiles_changes(detector):
    own = copy.deepcopy(detector)
    plain, quarter = quantiles(own, 1.0), quantiles(own, 0.25)
    assert quarter[:3] == plain[:3]
    assert quarter[3] - quarter[2] == pytest.approx(4 * (plain[3] - plain[2]))
    grid = detector.feature_size()
    middle = own.image_size[0] // 2, own.image_size[1] // 2
    student, other = torch.full((1, *grid), plain[0]), torch.ones(1, *grid)  # at its q_a: nothing
    found = []
    for values in (plain, quarter):
        own.set_quantiles(*values)
        found.append(own.anomaly_map(student, other, own.image_size)[0][0][middle].item())
    assert found[1] == pytest.approx(found[0] / 4, rel=1e-4)


@pytest.mark.parametrize("weight", [0, -1, 1.5, float("nan"), "much"])
def test_other_weights_are_refused(detector, weight):
    with pytest.raises(ValueError, match="autoencoder_weight is "):
        quantiles(copy.deepcopy(detector), weight)


def test_the_file_keeps_it(detector, tmp_path):
    own = copy.deepcopy(detector)
    ead.save(own, tmp_path / "one.safetensors")
    own.autoencoder_weight = 0.25
    ead.save(own, tmp_path / "quarter.safetensors")
    assert ead.load(tmp_path / "one.safetensors").autoencoder_weight == 1.0
    assert ead.load(tmp_path / "quarter.safetensors").autoencoder_weight == 0.25
    own.autoencoder_weight = 7
    with pytest.raises((CheckpointError, ValueError), match="autoencoder_weight is 7"):
        ead.save(own, tmp_path / "wrong.safetensors")
    assert not (tmp_path / "wrong.safetensors").exists()
