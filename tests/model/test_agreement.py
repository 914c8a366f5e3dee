"""Differences of maps: their scale, NaN, infinity, shapes, and the order of the bounds."""

import math

import pytest
import torch

from efficientad.model.agreement import BOUNDS, Difference, difference, scale_of, worst


def test_differences_are_parts_of_the_largest_value():
    expected = torch.tensor([[0.5, -4.0], [1.0, 2.0]])
    found = expected + torch.tensor([[0.0, 0.0], [0.4, 0.0]])
    assert scale_of(expected) == 4
    assert difference(found, expected) == pytest.approx((0.1, 0.05))  # 0.4 / 4; that / sqrt(4)
    assert difference(found, expected, scale=8.0) == pytest.approx((0.05, 0.025))
    assert difference(expected, expected) == (0, 0)


@pytest.mark.parametrize("expected", [torch.zeros(2, 3), torch.full((2, 3), -0.05)])
def test_small_maps_are_judged_on_a_tenth(expected):
    assert scale_of(expected) == 0.1
    assert difference(expected + 0.01, expected) == pytest.approx((0.1, 0.1))


def test_half_precision_does_not_limit_the_difference():
    found, expected = (torch.full((4,), v, dtype=torch.float16) for v in (60000.0, -60000.0))
    assert difference(found, expected) == (2, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["found", "expected", "both"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_what_is_not_finite_is_within_no_bound(value, where, scale):
    maps = {"found": torch.rand(1, 5, 5), "expected": torch.rand(1, 5, 5)}
    for name in maps if where == "both" else [where]:
        maps[name][0, 2, 3] = value
    found = difference(**maps, scale=scale)
    assert not found.largest <= 1e30
    assert not found.rms <= 1e30


def test_another_shape_is_never_broadcast():
    one = torch.rand(1, 5, 5)
    assert difference(one.expand(3, -1, -1), one) == Difference(math.inf, math.inf)
    assert difference(one[..., :4], one).largest == math.inf


def test_the_worst_is_nan_wherever_it_stands():
    assert worst([0.1, 0.3, 0.2]) == 0.3
    assert worst(iter([0.1, math.inf])) == math.inf
    assert worst([]) == 0
    for values in ([math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, math.inf]):
        assert math.isnan(worst(values))


def test_every_dtype_has_bounds_that_grow_with_its_rounding():
    order = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    assert tuple(BOUNDS) == order
    bounds = [BOUNDS[dtype] for dtype in order]
    assert bounds == sorted(bounds)
    assert all(0 < rms < largest < 0.1 for largest, rms in bounds)
