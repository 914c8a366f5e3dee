"""The inspected region of a detector: its masks, what lies outside, and what is found inside."""

from __future__ import annotations

import copy
import math

import helpers
import numpy as np
import pytest
import torch

from efficientad import EfficientAD
from efficientad.model.calibration import MapFile, quantile_values, set_quantiles_from_maps
from efficientad.model.region import (
    cells_of,
    fitted,
    index_of,
    map_means,
    of_cells,
    reaches_beyond,
    resized,
    share,
)

NAN = float("nan")
QUANTILES = (1.0, 3.0, 2.0, 6.0)


def rectangle(height=256, width=256, *, rows=(60, 150), columns=(40, 200)) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def fresh(region=None, **options) -> EfficientAD:
    """Calibrated by hand: its networks are not run here."""
    model = EfficientAD(**options)
    model.set_statistics(torch.full((384,), 0.5), torch.ones(384))
    model.set_region(region)
    model.set_quantiles(*QUANTILES)
    return model


def maps(n=1, h=56, w=56, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    st, ae = torch.rand(2, n, h, w, generator=g) * 8
    return st, ae


# ---- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (3, 9), (14, 10), (1, 1), (17, 3), (7, 6)])
def test_a_pixel_of_another_size_counts_where_it_overlaps_an_inspected_one(size):
    region = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) > 0.7
    found = resized(region, size)
    assert found.dtype == torch.bool
    for y in range(size[0]):
        for x in range(size[1]):
            rows = [r for r in range(7) if r * size[0] < (y + 1) * 7 and (r + 1) * size[0] > y * 7]
            cols = [c for c in range(5) if c * size[1] < (x + 1) * 5 and (c + 1) * size[1] > x * 5]
            assert bool(found[y, x]) == bool(region[rows][:, cols].any())


def test_a_pixel_of_the_input_counts_where_half_of_it_is_inspected():
    mask = np.zeros((512, 512), dtype=bool)
    mask[:101, :51] = True  # the last row and column by half
    found = fitted(mask, (256, 256))
    assert found.sum() == 51 * 26 - 1  # of the last corner a quarter
    assert found[50, 24]
    assert not found[50, 25]
    drawn_small = fitted(torch.tensor([[False, True]]), (256, 258))
    assert drawn_small.sum() == 256 * 129
    assert drawn_small[:, 129:].all()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([[True]], "region is a list; it must be a file, or a bool array"),
        (np.ones((4, 4)), r"region is float64 \(4, 4\); it must be bool \(H, W\)"),
        (np.ones((4, 4, 1), bool), r"region is bool \(4, 4, 1\); it must be bool"),
        (torch.zeros(9, 9, dtype=torch.bool), "inspects no pixel"),
        (rectangle(9000, 9000, rows=(0, 1)), "inspects 160 of 81000000 pixels, and no pixel"),
        (rectangle(rows=(0, 15)), "lies in the frame of the map"),
    ],
)
def test_what_is_no_region_is_refused_and_changes_nothing(region, message):
    model = fresh(rectangle())
    with pytest.raises(ValueError, match=message):
        model.set_region(region)
    assert model.calibrated
    assert torch.equal(model.region, torch.from_numpy(rectangle()))


def test_cells_are_those_that_an_inspected_pixel_overlaps():
    cells = cells_of(torch.from_numpy(rectangle(rows=(60, 61), columns=(40, 45))), (56, 56), 4)
    assert cells.nonzero().tolist() == [[11, 6], [11, 7]]  # 60 / 4 - 4, 40 / 4 - 4
    index = index_of(cells)
    features = torch.rand(2, 3, 56, 56)
    assert torch.equal(of_cells(features, index), features[:, :, 11:12, 6:8])
    assert of_cells(features, None) is features


def test_share_and_what_reaches_beyond():
    small, large = (torch.from_numpy(rectangle(rows=(60, end))) for end in (100, 150))
    assert share(large) == pytest.approx(90 * 160 / 65536, abs=1e-6)
    assert not reaches_beyond(small, large)
    assert reaches_beyond(large, small)
    assert not reaches_beyond(large, None)
    assert reaches_beyond(None, large)


def test_the_mean_of_a_map_is_that_of_what_is_inspected():
    st, ae = maps(2)
    region = torch.from_numpy(rectangle())
    model = fresh(rectangle())
    for size in ((256, 256), (90, 64)):
        found, _ = model.anomaly_map(st, ae, size)
        inside = resized(region, size)
        torch.testing.assert_close(map_means(found, region), found[:, inside].mean(1))
        found[:, ~inside] = NAN
        assert map_means(found, region).isfinite().all()


@pytest.mark.parametrize("region", [None, rectangle()], ids=["everything", "a region"])
def test_maps_of_another_size_have_nearly_the_same_mean(region):
    """Within a hundredth of what a threshold is made of, q_b - q_a, which is 0.1 in the map."""
    st, ae = maps(3)
    model = fresh(region)
    means = [
        map_means(model.anomaly_map(st, ae, size)[0], model.region)
        for size in ((256, 256), (300, 277), (1500, 1000))
    ]
    assert max(float((mean - means[0]).abs().max()) for mean in means[1:]) < 1e-3


# ---- the map ---------------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["nelson", "anomalib"])
@pytest.mark.parametrize("size", [(256, 256), (300, 277), (90, 64)])
def test_inside_every_bit_is_as_without_and_outside_lies_distance_zero(border, size):
    st, ae = maps(2)
    plain, model = fresh(border=border), fresh(rectangle(), border=border)
    whole, _ = plain.anomaly_map(st, ae, size)
    found, score = model.anomaly_map(st, ae, size)
    inside = resized(torch.from_numpy(rectangle()), size)
    assert torch.equal(found[:, inside], whole[:, inside])
    assert (found[:, ~inside] == model.affine[2]).all()
    nothing = plain.anomaly_map(*(torch.zeros(1, 56, 56),) * 2, (256, 256))[0][0, 128, 128]
    assert model.affine[2] == pytest.approx(float(nothing), abs=1e-6)
    assert torch.equal(score, whole[:, inside].amax(1))
    assert (score < whole.amax((1, 2))).all()


def test_a_score_inside_may_be_negative_where_the_frame_is_not_inspected():
    model = fresh(rectangle())
    assert model.anomaly_map(*(torch.zeros(1, 56, 56),) * 2, (256, 256))[1] < 0


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("size", [(256, 256), (31, 40)])
def test_what_is_not_finite_outside_reaches_neither_score_nor_map(value, size):
    st, ae = maps()
    model = fresh(rectangle())
    expected, best = model.anomaly_map(st, ae, size)
    far = torch.ones(56, 56, dtype=torch.bool)
    far[9:36, 4:48] = False  # two cells around the inspected ones
    st[:, far] = value
    found, score = model.anomaly_map(st, ae, size)
    assert torch.equal(found, expected)
    assert torch.equal(score, best)


@pytest.mark.parametrize("size", [(256, 256), (31, 40), (2, 2)])
def test_what_is_not_finite_inside_is_the_score(size):
    st, ae = maps(2)
    ae[1, 20, 30] = math.inf
    score = fresh(rectangle()).anomaly_map(st, ae, size)[1]
    assert score.isnan().tolist() == [False, True]


def test_forward_at_another_size_resizes_the_region():
    model = helpers.detector()
    model.set_region(rectangle(), keep_calibration=True)
    with torch.no_grad():
        out = model(helpers.images(1, 256, 320))
    outside = ~resized(torch.from_numpy(rectangle()), (256, 320))
    assert (out.anomaly_map[0, outside] == model.affine[2]).all()
    assert out.score[0] == out.anomaly_map.amax()


# ---- state -----------------------------------------------------------------------------------


def test_another_region_uncalibrates_and_the_same_does_not():
    model = fresh(rectangle())
    model.threshold = 0.5
    model.set_region(torch.from_numpy(rectangle()))
    assert model.threshold == 0.5
    model.set_region(rectangle(rows=(80, 100)), keep_calibration=True)
    assert model.calibrated
    model.set_region(None)
    assert not model.calibrated
    assert model.threshold is None
    assert model.region is model.region_cells is None


def test_the_region_follows_the_input_size_or_the_change_is_refused():
    model = fresh(rectangle())
    model.set_map_rule(image_size=(512, 256))
    assert torch.equal(model.region, torch.from_numpy(rectangle(512, 256, rows=(120, 300))))
    assert model.region_cells.shape == (120, 56)
    edge = fresh(rectangle(rows=(0, 17)))
    with pytest.raises(ValueError, match="lies in the frame of the map"):
        edge.set_map_rule(border="anomalib", map_padding=9)
    assert (edge.border, edge.map_padding) == ("nelson", 4)
    assert edge.calibrated


def test_copies_and_casts_keep_the_region_and_state_dicts_do_not_hold_it():
    model = fresh(rectangle())
    for other in (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).double()):
        assert torch.equal(other.region, model.region)
        assert other.region.dtype == torch.bool
    assert set(model.state_dict()) == set(EfficientAD().state_dict())
    with pytest.raises(AttributeError):
        model.region = model.region


# ---- calibration -----------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["nelson", "anomalib", "paper"])
def test_quantiles_are_those_of_the_region(border):
    padding = border == "paper"
    model = fresh(rectangle(), border=border, padding=padding)
    st, _ = maps(3, *model.feature_size())
    values = quantile_values(model, st)
    if border == "nelson":
        assert torch.equal(values, st[:, model.region_cells])
    else:
        whole = quantile_values(fresh(border=border, padding=padding), st)
        assert torch.equal(values, whole[:, model.region])


def test_a_nan_outside_does_not_reach_the_quantiles():
    model, found = fresh(rectangle()), []
    for value in (0.0, 1e6, NAN):
        st, ae = maps(4)
        st[:, ~model.region_cells] = value
        file = MapFile(56, 56)
        file.add(st, ae)
        set_quantiles_from_maps(model, file)
        file.close()
        found.append(model.quantiles.tolist())
    assert found[0] == found[1] == found[2]
    inside = st[:, model.region_cells]
    assert found[0][0] == pytest.approx(float(inside.quantile(0.9)), rel=1e-6)
