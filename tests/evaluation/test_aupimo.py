"""AUPIMO against a published implementation, brute force and cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from efficientad.data.datasets import Region
from efficientad.evaluation.aupimo import kept_keys
from efficientad.evaluation.metrics import PixelMetrics

BINNED = 1e-4  # what the histograms may cost, the project's bound
KEPT = 1 / 4096  # and what is kept of an image, of its recall
LOW, HIGH = 1e-5, 1e-4
# anomalib 2.7.0, metrics.pimo.functional.aupimo_scores(..., num_thresholds=1_000_000), of `case()`
PUBLISHED = (0.011333917760487255, 0.13238373608659693, 0.2738018462135932, 0.808979246979295)


def smooth(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return ndimage.gaussian_filter(rng.standard_normal(size), 2)


def case() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ten good images, 500,000 pixels, and four with a defect that is better and better seen."""
    rng = np.random.default_rng(7)
    maps = [smooth(rng, (200, 250)) for _ in range(14)]
    masks = [np.zeros((200, 250), dtype=bool) for _ in maps]
    for i in range(4):
        masks[10 + i][20 + 30 * i : 40 + 40 * i, 30 + 40 * i : 55 + 40 * i] = True
        maps[10 + i] += (0.25 + 0.15 * i) * masks[10 + i]
    return [values.astype(np.float32) for values in maps], masks


def uneven() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Good images of three sizes, coarse values with ties, defects of more pixels than are kept."""
    rng = np.random.default_rng(8)
    sizes = [(300, 300), (100, 700), (500, 400), (400, 400), (200, 200)]
    maps = [np.round(smooth(rng, size), 4).astype(np.float32) for size in sizes]
    masks = [np.zeros(size, dtype=bool) for size in sizes]
    masks[3][:, 100:] = masks[4][5:9, 5:9] = True
    maps[3][masks[3]] += np.float32(0.6)
    maps[4][masks[4]] += np.float32(0.7)
    return maps, masks


CASES = {"even": case, "uneven": uneven}


def accumulate(maps, masks, order=None) -> PixelMetrics:
    pixels = PixelMetrics()
    for i in order if order is not None else range(len(maps)):
        pixels.update(maps[i], masks[i])
    return pixels


def brute(maps, masks) -> list[float]:
    """The area from sums over all pixels at every value that there is, segment by segment."""
    good = [np.sort(m.ravel()) for m, mask in zip(maps, masks, strict=True) if not mask.any()]
    thresholds = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    share = [1 - np.searchsorted(values, thresholds) / values.size for values in good]
    rate = np.mean(share, axis=0)
    near = (rate > 0) & (np.arange(rate.size) <= np.searchsorted(rate, HIGH))
    areas = []
    for values, mask in zip(maps, masks, strict=True):
        if not mask.any():
            continue
        inside = np.sort(values[mask])
        recall = 1 - np.searchsorted(inside, thresholds[near]) / inside.size
        area = 0.0
        x = np.log(rate[near])
        for x0, x1, y0, y1 in zip(x, x[1:], recall, recall[1:], strict=False):
            start, end = max(x0, np.log(LOW)), min(x1, np.log(HIGH))
            if start < end:
                middle = y0 + (y1 - y0) * ((start + end) / 2 - x0) / (x1 - x0)
                area += (end - start) * middle
        areas.append(area / np.log(HIGH / LOW))
    return areas


def test_the_figures_of_a_published_implementation() -> None:
    result = accumulate(*case()).compute()
    assert result.aupimo == pytest.approx(PUBLISHED, abs=BINNED)
    assert result.mean_aupimo == pytest.approx(np.mean(PUBLISHED), abs=BINNED)


@pytest.mark.parametrize("name", CASES)
def test_brute_force(name: str) -> None:
    maps, masks = CASES[name]()
    expected = brute(maps, masks)
    assert 0 < min(expected) < max(expected) < 1
    assert accumulate(maps, masks).compute().aupimo == pytest.approx(expected, abs=BINNED + KEPT)


def test_what_is_kept_is_bounded_and_in_even_steps() -> None:
    values = np.random.default_rng(0).permutation(100_000).astype(np.float32)
    keys = kept_keys(values)
    assert keys.size == 4096
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert kept_keys(values[:4096]).size == 4096
    assert kept_keys(values[:7]).size == 7


def test_order_and_parts_change_nothing() -> None:
    maps, masks = case()
    whole = accumulate(maps, masks).compute()
    turned = accumulate(maps, masks, range(13, -1, -1)).compute()
    assert turned.aupimo == whole.aupimo[::-1]
    assert turned.mean_aupimo == whole.mean_aupimo
    first, second = accumulate(maps, masks, range(3, 12)), accumulate(maps, masks, (0, 1, 2))
    first.merge(second)
    first.merge(accumulate(maps, masks, (12, 13)))
    assert first.compute() == whole


@pytest.mark.parametrize(("shift", "area"), [(5, 1.0), (-5, 0.0)])
def test_defects_above_and_below_everything_good(shift: float, area: float) -> None:
    maps, masks = case()
    maps[10:] = [values + np.float32(shift) for values in maps[10:]]
    found = accumulate(maps, masks).compute().aupimo
    assert found == pytest.approx((area,) * 4, abs=1e-12)
    assert max(found) <= 1


def test_where_it_is_undefined() -> None:
    maps, masks = case()
    no_good = accumulate(maps, masks, range(10, 14)).compute()
    assert (no_good.aupimo, no_good.mean_aupimo) == (None, None)
    no_defect = accumulate(maps, masks, range(10)).compute()
    assert (no_defect.aupimo, no_defect.mean_aupimo) == ((), None)
    few = accumulate(maps, masks, (0, 10)).compute()  # 50,000 pixels: 2e-5 is one of them
    assert few.aupimo is None
    maps[:10] = [np.minimum(values, np.float32(0.2)) for values in maps[:10]]
    assert accumulate(maps, masks).compute().aupimo is None  # too many share the highest value
    assert PixelMetrics().compute().aupimo is None


def test_images_with_regions_do_not_count() -> None:
    maps, masks = case()
    pixels = PixelMetrics()
    pixels.update(maps[0], regions=())
    pixels.update(maps[10], regions=[Region(masks[10], 5)])
    assert pixels.found == []
    assert pixels.compute().aupimo is None
