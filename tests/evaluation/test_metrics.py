"""Metrics against scikit-learn, brute force and cases computed by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from efficientad.data.datasets import Region
from efficientad.evaluation.histogram import MAX_BINS, MIN_BINS
from efficientad.evaluation.metrics import (
    PRO_LIMITS,
    SPRO_LIMITS,
    PixelMetrics,
    image_metrics,
    partial_area,
    saturated_pro,
)

BINNED = 1e-4  # what the histograms may cost, the project's bound
KINDS = ("plain", "narrow", "offset", "far zeros", "negative", "tiny", "heavy tail", "equal")


def maps_and_masks(kind: str, n: int = 16, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """n clustered maps (n, size, size) float32; every other image has two defects."""
    rng = np.random.default_rng(len(kind))
    maps, masks = [], []
    for i in range(n):
        values = 4 * ndimage.gaussian_filter(rng.standard_normal((size, size)), size / 64)
        mask = np.zeros((size, size), dtype=bool)
        if i % 2:
            mask[size // 6 : size // 3, size // 5 : size // 3] = True
            mask[size // 2 : size // 2 + 9, 5 : size - 7] = True
            values = values + 0.6 * mask
        maps.append(values)
        masks.append(mask)
    maps = np.stack(maps)
    if kind == "narrow":
        maps = 0.5 + 1e-4 * (maps - maps.min()) / np.ptp(maps)
    elif kind == "offset":
        maps = maps + 100
    elif kind == "far zeros":
        maps = 0.5 + 1e-5 * maps
        maps[:, :8] = 0
    elif kind == "negative":
        maps = maps - 10
    elif kind == "tiny":
        maps = maps * 1e-30
    elif kind == "heavy tail":
        maps = np.exp(8 * maps)
    elif kind == "equal":
        maps = np.full_like(maps, 0.25)
    return maps.astype(np.float32), np.stack(masks)


def accumulate(maps: np.ndarray, masks: np.ndarray, **options) -> PixelMetrics:
    pixels = PixelMetrics(**options)
    for one_map, mask in zip(maps, masks, strict=True):
        pixels.update(one_map, mask if mask.any() else None)
    return pixels


def exact_pro(
    maps: np.ndarray, regions: list[tuple[int, np.ndarray, int]], normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """PRO curve over all distinct thresholds, from sorted values; regions: (image, mask, area)."""
    thresholds = np.unique(maps)[::-1]
    good = np.sort(maps[normal])
    x = 1 - np.searchsorted(good, thresholds, side="left") / good.size
    y = np.zeros(thresholds.size)
    for image, mask, area in regions:
        inside = np.sort(maps[image][mask])
        found = inside.size - np.searchsorted(inside, thresholds, side="left")
        y += np.minimum(found / area, 1) / len(regions)
    return np.append(0, x), np.append(0, y)


def components(masks: np.ndarray) -> list[tuple[int, np.ndarray, int]]:
    found = []
    for image, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        found += [(image, labels == i + 1, int((labels == i + 1).sum())) for i in range(count)]
    return found


def brute_area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area by a sum over segments, cut at the limit one by one."""
    area = 0.0
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


# Image level


@pytest.mark.parametrize("n", [2, 3, 17, 500])
@pytest.mark.parametrize("levels", [2, 7, None])
def test_image_metrics_equal_scikit_learn(n: int, levels: int | None) -> None:
    rng = np.random.default_rng(n)
    labels = np.arange(n) % 3 == 0
    scores = rng.standard_normal(n) + 0.7 * labels
    if levels:
        scores = np.round(scores * levels) / levels - 1
    result = image_metrics(labels, scores)
    assert result.au_roc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = average_precision_score(labels, scores)
    assert result.average_precision == pytest.approx(expected, abs=1e-12)
    by_threshold = {t: f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert result.f1_max == pytest.approx(max(by_threshold.values()), abs=1e-12)
    at_threshold = f1_score(labels, scores > result.f1_threshold)
    assert at_threshold == pytest.approx(result.f1_max, abs=1e-12)
    assert (result.normal, result.anomalous) == ((~labels).sum(), labels.sum())


def test_image_metrics_by_hand() -> None:
    result = image_metrics([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    assert result.au_roc == pytest.approx(0.75)
    assert result.average_precision == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert result.f1_max == pytest.approx(0.8)
    assert result.f1_threshold == pytest.approx(0.225)
    tied = image_metrics([0, 1], [0.5, 0.5])
    assert (tied.au_roc, tied.average_precision) == (0.5, 0.5)
    assert tied.f1_threshold < 0.5
    adjacent = image_metrics([0, 1], [1.0, np.nextafter(1.0, 2)])
    assert (adjacent.f1_max, adjacent.f1_threshold) == (1.0, 1.0)


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_image_metrics_of_one_class_are_none(labels: list[int]) -> None:
    result = image_metrics(labels, [0.5] * len(labels))
    assert result.au_roc is result.average_precision is result.f1_max is result.f1_threshold is None
    assert (result.normal, result.anomalous) == (labels.count(0), labels.count(1))


def test_image_metrics_refuse() -> None:
    with pytest.raises(ValueError, match="NaN"):
        image_metrics([0, 1], [0.1, float("nan")])
    with pytest.raises(ValueError, match="equal length"):
        image_metrics([0, 1], [0.1])
    with pytest.raises(ValueError, match="labels"):
        image_metrics([0, 2], [0.1, 0.2])


# Pixel level


@pytest.mark.parametrize(
    ("kind", "max_bins"),
    [*((kind, MAX_BINS) for kind in KINDS), ("plain", MIN_BINS), ("far zeros", MIN_BINS)],
)
def test_binned_figures_against_exact(kind: str, max_bins: int) -> None:
    maps, masks = maps_and_masks(kind)  # 1,048,576 pixels
    result = accumulate(maps, masks, max_bins=max_bins).compute((*PRO_LIMITS, 1.0))
    labels, scores = masks.ravel(), maps.ravel()
    assert result.au_roc == pytest.approx(roc_auc_score(labels, scores), abs=BINNED)
    x, y = exact_pro(maps, components(masks), ~masks)
    for limit in (*PRO_LIMITS, 1.0):
        assert result.au_pro[limit] == pytest.approx(partial_area(x, y, limit), abs=BINNED)
    expected = average_precision_score(labels, scores)
    assert result.average_precision == pytest.approx(expected, abs=BINNED)
    assert f1_score(labels, scores > result.f1_threshold) == pytest.approx(result.f1_max, abs=1e-9)
    assert (result.normal_pixels, result.anomalous_pixels) == ((~labels).sum(), labels.sum())
    assert result.regions == 16


@pytest.mark.parametrize("kind", ["narrow", "far zeros", "equal"])
def test_few_distinct_values_are_exact(kind: str) -> None:
    maps, masks = maps_and_masks(kind)
    result = accumulate(maps, masks).compute()
    assert result.dropped_bits == 0
    assert result.au_roc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    x, y = exact_pro(maps, components(masks), ~masks)
    for limit, area in result.au_pro.items():
        assert area == pytest.approx(brute_area(x, y, limit), abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_small_maps_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = (rng.integers(-4, 9, (4, 7, 5)) / 4).astype(np.float32)  # many ties
    masks = rng.random((4, 7, 5)) < 0.25
    masks[0] = False
    thresholds = [np.inf, *np.unique(maps)[::-1]]
    x = np.array([(maps[~masks] >= t).mean() for t in thresholds])
    y = [np.mean([(maps[i][m] >= t).mean() for i, m, _ in components(masks)]) for t in thresholds]
    result = accumulate(maps, masks).compute((0.3, 0.05, 0.77, 1.0))
    for limit, area in result.au_pro.items():
        assert area == pytest.approx(brute_area(x, np.array(y), limit), abs=1e-8)


def test_pro_by_hand() -> None:
    # Two regions (the diagonal pair is one) and 8 normal pixels in 3 x 4.
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    scores = np.array([[9, 1, 1, 7], [8, 3, 1, 1], [1, 1, 1, 1]], np.float32)
    pixels = PixelMetrics()
    pixels.update(scores, mask)
    x, y = pixels.curve()
    # 9: half of region 1. 7: half of region 2. 8: a normal pixel. 3: region 1 whole. 1: the rest.
    np.testing.assert_allclose(x, [0, 0, 1 / 8, 1 / 8, 1 / 8, 1])
    np.testing.assert_allclose(y, [0, 0.25, 0.25, 0.5, 0.75, 1])
    result = pixels.compute((0.125, 0.5))
    assert result.regions == 2
    assert result.au_pro[0.125] == pytest.approx(0.25)
    at_half = 0.75 + 0.25 * (0.375 / 0.875)  # interpolated at the limit
    expected = (0.25 * 0.125 + 0.375 * (0.75 + at_half) / 2) / 0.5
    assert result.au_pro[0.5] == pytest.approx(expected, abs=1e-9)


def test_saturated_pro_by_hand() -> None:
    # Region a: 4 pixels, saturates at 2. Region b: 2 pixels, saturates at 2; they overlap in one.
    scores = np.array([[6, 5, 4, 3, 2, 1, 1, 1, 1]], np.float32)
    a, b = np.zeros((2, 1, 9), bool)
    a[0, [0, 2, 3, 4]] = True
    b[0, [4, 5]] = True
    pixels = PixelMetrics()
    pixels.update(scores, regions=[Region(a, 2), Region(b, 2)])
    x, y = pixels.curve()
    np.testing.assert_allclose(x, np.array([0, 0, 1, 1, 1, 1, 4]) / 4)
    np.testing.assert_allclose(y, [0, 0.25, 0.25, 0.5, 0.5, 0.75, 1])
    assert pixels.compute().regions == 2


@pytest.mark.parametrize("limit", SPRO_LIMITS)
def test_saturated_pro_against_exact(limit: float) -> None:
    maps, masks = maps_and_masks("plain", n=6, size=128)
    groups = {
        name: PixelMetrics() for name in ("good", "logical_anomalies", "structural_anomalies")
    }
    chosen: dict[str, list[int]] = {name: [] for name in groups}
    regions: dict[int, list[Region]] = {}
    for i, (one_map, mask) in enumerate(zip(maps, masks, strict=True)):
        name = list(groups)[0 if not mask.any() else 1 + i // 2 % 2]
        own = [part for image, part, _ in components(masks) if image == i]
        regions[i] = [Region(part, int(part.sum() * 0.4)) for part in own]
        groups[name].update(one_map, regions=regions[i])
        chosen[name].append(i)
    result = saturated_pro(groups)
    for name in ("logical_anomalies", "structural_anomalies"):
        rows = chosen["good"] + chosen[name]
        listed = [(k, *region) for k, i in enumerate(rows) for region in regions[i]]
        x, y = exact_pro(maps[rows], listed, ~masks[rows])
        assert result[name][limit] == pytest.approx(brute_area(x, y, limit), abs=BINNED)
    both = [result[name][limit] for name in ("logical_anomalies", "structural_anomalies")]
    assert result["mean"][limit] == pytest.approx(np.mean(both))


def test_area_of_saturation_beyond_the_region_is_the_region() -> None:
    maps, masks = maps_and_masks("plain", n=2, size=64)
    plain, capped = PixelMetrics(), PixelMetrics()
    for image in range(2):
        own = [part for i, part, _ in components(masks) if i == image]
        plain.update(maps[image], masks[image])
        capped.update(maps[image], regions=[Region(part, 10**6) for part in own])
    assert plain.compute() == capped.compute()


def test_order_and_merging_do_not_matter() -> None:
    maps, masks = maps_and_masks("heavy tail", n=8, size=96)
    maps[3] *= -1e-20  # its pages come late in one order and early in the other
    results = []
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 9999):
        results.append(
            accumulate(maps[list(order)], masks[list(order)], max_bins=MIN_BINS).compute()
        )
    halves = [
        accumulate(maps[part], masks[part], max_bins=MIN_BINS) for part in (slice(3), slice(3, 8))
    ]
    halves[0].merge(halves[1])
    assert all(result == results[0] for result in [*results, halves[0].compute()])
    assert results[0].dropped_bits > 0


def test_merging_histograms_of_other_sizes() -> None:
    maps, masks = maps_and_masks("plain", n=4, size=96)
    fine, coarse = (
        accumulate(maps[:2], masks[:2]),
        accumulate(maps[2:], masks[2:], max_bins=MIN_BINS),
    )
    whole = accumulate(maps, masks).compute()
    fine.merge(coarse)
    coarser = fine.compute()
    assert coarser.dropped_bits >= whole.dropped_bits
    assert coarser.au_roc == pytest.approx(whole.au_roc, abs=BINNED)
    assert coarser.au_pro == pytest.approx(whole.au_pro, abs=BINNED)
    empty = PixelMetrics()
    empty.merge(fine)
    assert empty.compute() == coarser


def test_memory_is_bounded_for_values_of_all_of_float32() -> None:
    bits = np.arange(0, 1 << 32, 1 << 12, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.isnan(values), np.float32(0), values).reshape(1024, 1024)
    pixels = PixelMetrics(max_bins=MIN_BINS)
    pixels.update(values, values > 1)
    assert pixels.histogram.counts.nbytes <= 4 * 8 * MIN_BINS
    assert pixels.compute().au_roc > 0.999


def test_pixel_figures_that_are_undefined_are_none() -> None:
    pixels = PixelMetrics()
    empty = pixels.compute()
    assert (empty.au_roc, empty.f1_threshold, empty.au_pro) == (None, None, {0.3: None, 0.05: None})
    pixels.update(np.zeros((4, 5), np.float32))
    good = pixels.compute((0.3,))
    assert (good.au_roc, good.au_pro, good.normal_pixels) == (None, {0.3: None}, 20)
    with pytest.raises(ValueError, match="region"):
        pixels.curve()
    all_bad = PixelMetrics()
    all_bad.update(np.zeros((4, 5), np.float32), np.ones((4, 5), bool))
    assert all_bad.compute((0.3,)).au_pro == {0.3: None}
    assert saturated_pro({"good": pixels, "logical": PixelMetrics()})["mean"][0.3] is None


def test_pixel_metrics_refuse() -> None:
    pixels = PixelMetrics()
    scores = np.zeros((4, 5), np.float32)
    for arguments, message in (
        ((scores, np.zeros((5, 4), bool)), "one shape"),
        ((scores[None],), r"\(H, W\)"),
        ((scores.astype(np.float64),), "float64"),
        ((np.full((4, 5), np.nan, np.float32),), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            pixels.update(*arguments)
    region = Region(np.ones((4, 5), bool), 3)
    with pytest.raises(ValueError, match="not both"):
        pixels.update(scores, np.zeros((4, 5), bool), regions=[region])
    with pytest.raises(ValueError, match="saturation area"):
        pixels.update(scores, regions=[Region(region.mask, 0)])
    with pytest.raises(ValueError, match="needs pixels"):
        pixels.update(scores, regions=[Region(~region.mask, 3)])
    with pytest.raises(ValueError, match="limits"):
        pixels.compute((0.0,))
    with pytest.raises(ValueError, match="max_bins"):
        PixelMetrics(max_bins=1000)
    assert (pixels.images, pixels.regions, pixels.compute().normal_pixels) == (0, 0, 0)
