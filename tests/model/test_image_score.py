"""The image score: the maximum, or the mean of the k largest cells, whatever the map's size."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

from efficientad import EfficientAD
from efficientad.model import image_score as module
from efficientad.model.image_score import check_score, described, image_score, pixels_of
from efficientad.model.region import resized

NAN = float("nan")
QUANTILES = (1.0, 3.0, 2.0, 6.0)


new = functools.cache(EfficientAD)


def fresh(score="max", region=None, **options) -> EfficientAD:
    """Calibrated by hand: its networks are not run here."""
    model = copy.deepcopy(new(**options))
    model.score = score
    model.set_statistics(torch.full((384,), 0.5), torch.ones(384))
    model.set_region(region)
    model.set_quantiles(*QUANTILES)
    return model


def maps(n=2, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    st, ae = torch.rand(2, n, 56, 56, generator=torch.Generator().manual_seed(seed)) * 8
    return st, ae


def mean_of_largest(values: np.ndarray, count: int) -> float:
    return float(np.sort(values.ravel().astype(np.float64))[-count:].mean())


@pytest.mark.parametrize(
    ("size", "pixels"), [((256, 256), 160), ((300, 277), 203), ((64, 64), 10), ((20, 16), 1)]
)
@pytest.mark.parametrize("border", ["nelson", "anomalib"])
def test_it_is_the_mean_of_as_many_pixels_as_the_cells_have(size, pixels, border):
    st, ae = maps()
    whole, maximum = fresh(border=border).anomaly_map(st, ae, size)
    found, score = fresh(10, border=border).anomaly_map(st, ae, size)
    assert torch.equal(found, whole)
    assert pixels == pixels_of(10, size, (56, 56), 4)
    for one, expected in zip(score, found.numpy(), strict=True):
        assert float(one) == pytest.approx(mean_of_largest(expected, pixels), rel=1e-6)
    assert (score < maximum).all() if pixels > 1 else torch.equal(score, maximum)


def test_of_the_cells_themselves_it_is_the_mean_of_k():
    assert pixels_of(7, (56, 56), (56, 56), 0) == 7
    assert pixels_of(3136, (256, 256), (56, 56), 4) == 3136 * 16
    assert pixels_of("max", (256, 256), (56, 56), 4) is None


def test_a_region_counts_alone_and_may_have_fewer():
    st, ae = maps()
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[100:110, 60:70] = True
    whole, _ = fresh().anomaly_map(st, ae, (256, 256))
    for k, count in ((2, 32), (50, 100)):  # 800 pixels of cells, where there are 100
        _, score = fresh(k, region).anomaly_map(st, ae, (256, 256))
        for one, expected in zip(score, whole[:, region].numpy(), strict=True):
            assert float(one) == pytest.approx(mean_of_largest(expected, count), rel=1e-6)
        inside = resized(region, (512, 500))
        own, score = fresh(k, region).anomaly_map(st, ae, (512, 500))
        count = min(pixels_of(k, (512, 500), (56, 56), 4), int(inside.sum()))
        for one, expected in zip(score, own[:, inside].numpy(), strict=True):
            assert float(one) == pytest.approx(mean_of_largest(expected, count), rel=1e-6)


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [(256, 256), (20, 16)])
def test_what_is_not_finite_makes_it_nan_as_with_the_maximum(value, size):
    st, ae = maps()
    st[1, 3, 5] = value
    for score in ("max", 10):
        found = fresh(score).anomaly_map(st, ae, size)[1]
        assert found.isnan().tolist() == [False, True]
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[100:200, 60:200] = True
    assert not fresh(10, region).anomaly_map(st, ae, size)[1].isnan().any()


@pytest.mark.parametrize("pixels", [1, 5, 7, 60])
def test_large_maps_are_searched_in_parts_with_the_same_result(pixels, monkeypatch):
    values = torch.rand(3, 6, 10, generator=torch.Generator().manual_seed(2))
    region = torch.zeros(6, 10, dtype=torch.bool)
    region[1:4, 2:9] = True
    arguments = values, values.amax((1, 2)), pixels
    whole = image_score(*arguments), image_score(*arguments, region)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert torch.equal(image_score(*arguments), whole[0])
    assert torch.equal(image_score(*arguments, region), whole[1])
    assert float(whole[0][1]) == pytest.approx(mean_of_largest(values[1].numpy(), pixels))


@pytest.mark.parametrize(
    "value", [0, -1, 3137, True, 2.0, "10", "mean", None, NAN, torch.tensor([1, 2])]
)
def test_what_is_no_score_is_refused_and_changes_nothing(value):
    model = fresh(10)
    model.threshold = 0.5
    with pytest.raises(ValueError, match=r"score is .*; it must be 'max' or a number of cells, 1 "):
        model.score = value
    assert (model.score, model.threshold) == (10, 0.5)


def test_another_score_takes_the_threshold_and_its_record_along():
    model = fresh()
    model.threshold = 0.5
    model.provenance = {"calibration": {"scores": [0.1]}, "training": {}}
    model.score = "max"
    assert model.threshold == 0.5
    model.score = np.int64(10)
    assert model.score == 10
    assert type(model.score) is int
    assert model.threshold is None
    assert model.provenance == {"training": {}}
    assert model.calibrated


def test_an_input_size_with_fewer_cells_than_k_is_refused():
    model = fresh(5000, image_size=(512, 512))
    with pytest.raises(ValueError, match=r"1 to 3136 \(56x56\)"):
        model.set_map_rule(image_size=(256, 256))
    assert model.image_size == (512, 512)
    assert model.calibrated


def test_in_words():
    assert [described(check_score(value, (56, 56))) for value in ("max", 1, 10)] == [
        "maximum of the map",
        "mean of the largest cell",
        "mean of the 10 largest cells",
    ]
