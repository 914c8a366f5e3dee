"""Image and pixel metrics.

Every curve is a pair of histograms over the scores; pixel curves are built image by image in
bounded memory (`PixelMetrics`) and depend neither on the order of the images nor on chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from efficientad.data.datasets import Region
from efficientad.evaluation.aupimo import GOOD_IMAGE, aupimo, kept_keys
from efficientad.evaluation.histogram import MAX_BINS, FloatHistogram

PRO_LIMITS = (0.3, 0.05)  # false positive rates to which AU-PRO is integrated
SPRO_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)  # those of the MVTec LOCO AD evaluation code
_REGION = 1 << 32  # weight of one region: whole numbers, so that sums do not depend on their order


@dataclass(frozen=True)
class ImageMetrics:
    """Ranking of images; the four figures are None unless there are images of both kinds.

    With score > f1_threshold as the rule for anomalous images F1 is f1_max, the largest there is.
    The threshold lies in the middle of the gap between the scores it parts; of several equally
    good ones it is the highest.
    """

    au_roc: float | None
    average_precision: float | None
    f1_max: float | None
    f1_threshold: float | None
    normal: int
    anomalous: int


@dataclass(frozen=True)
class PixelResult:
    """Pixel figures of a set of maps. What is undefined is None (see `PixelMetrics.compute`).

    au_pro: area under the PRO (or saturated PRO) curve per false positive rate limit, divided by
    the limit. With value > f1_threshold as the rule for pixels F1 is f1_max. dropped_bits: trailing
    bits of the float32 values that the histogram did not resolve; 0: all figures are exact.
    aupimo: AUPIMO of every image with a mask, in the order they came (see `evaluation.aupimo`).
    """

    au_roc: float | None
    average_precision: float | None
    f1_max: float | None
    f1_threshold: float | None
    au_pro: dict[float, float | None]
    normal_pixels: int
    anomalous_pixels: int
    regions: int
    dropped_bits: int
    aupimo: tuple[float, ...] | None

    @property
    def mean_aupimo(self) -> float | None:
        """The mean over the images; None where there is none, or AUPIMO is undefined."""
        return math.fsum(self.aupimo) / len(self.aupimo) if self.aupimo else None


def image_metrics(labels: Sequence[int] | np.ndarray, scores: Sequence[float]) -> ImageMetrics:
    """AU-ROC, average precision and the best F1 of image scores, exact, ties handled.

    labels: (N,) 0 or False for normal, 1 or True for anomalous. scores: (N,) floats, higher is more
    anomalous. Average precision is the step-wise sum of scikit-learn, sum (R_n - R_(n-1)) P_n over
    distinct scores. ValueError for shapes that differ, other labels and NaN scores.
    """
    truth, numbers = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != numbers.shape:
        raise ValueError(
            f"labels and scores must be 1-D and of equal length, got {truth.shape}, {numbers.shape}"
        )
    if truth.size and not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous)")
    if np.isnan(numbers).any():
        raise ValueError(f"scores must not be NaN, got {int(np.isnan(numbers).sum())} of them")
    values, inverse = np.unique(numbers, return_inverse=True)
    anomalous = truth.astype(bool)
    positives = np.bincount(inverse[anomalous], minlength=values.size)[::-1]
    negatives = np.bincount(inverse[~anomalous], minlength=values.size)[::-1]
    au_roc, average_precision, f1_max, best = _ranking(negatives, positives)
    return ImageMetrics(
        au_roc,
        average_precision,
        f1_max,
        f1_threshold=None if best is None else _gap_middle(values[::-1], best),
        normal=int((~anomalous).sum()),
        anomalous=int(anomalous.sum()),
    )


def _gap_middle(descending: np.ndarray, i: int) -> float:
    """A threshold below descending[i] but not below the next score, for score > threshold."""
    if i + 1 == descending.size:
        return float(np.nextafter(descending[i], -np.inf))
    upper, lower = descending[i], descending[i + 1]
    middle = lower + (upper - lower) / 2
    return float(middle) if lower <= middle < upper else float(lower)


def _ranking(
    negatives: np.ndarray, positives: np.ndarray
) -> tuple[float, float, float, int] | tuple[None, None, None, None]:
    """AU-ROC, average precision, F1-max and its index, from counts per descending score."""
    false, true = np.cumsum(negatives), np.cumsum(positives)
    if not false.size or false[-1] == 0 or true[-1] == 0:
        return None, None, None, None
    hits = positives / true[-1]
    misses = negatives / false[-1]
    au_roc = float(np.sum(misses * (true / true[-1] - 0.5 * hits)))
    average_precision = float(np.sum(hits * true / (true + false)))
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    return au_roc, average_precision, float(f1[best]), best


def partial_area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Trapezoidal area under y(x) for x in 0..limit, divided by the limit.

    x ascends from 0 to at least `limit`; y is interpolated linearly at the limit, as the MVTec AD
    and MVTec LOCO AD evaluation codes do.
    """
    inside = int(np.searchsorted(x, limit, side="right"))
    x_in, y_in = x[:inside], y[:inside]
    if inside < x.size and x_in[-1] < limit:
        slope = (y[inside] - y_in[-1]) / (x[inside] - x_in[-1])
        y_limit = y_in[-1] + slope * (limit - x_in[-1])
        x_in, y_in = np.append(x_in, limit), np.append(y_in, y_limit)
    return float(np.sum(0.5 * (y_in[1:] + y_in[:-1]) * np.diff(x_in)) / limit)


class PixelMetrics:
    """Pixel AU-ROC, average precision, F1, AU-PRO and AUPIMO of many maps, one map at a time.

    Histograms over the float32 bits of the map values count normal pixels, anomalous pixels, the
    growth of the region overlap and the pixels of good images, each image with the same weight, all
    in whole numbers: the same maps give the same figures in every order. See `FloatHistogram` for
    the resolution. Memory: 32 bytes a bin, 64 MB by default, and 16 kB an anomalous image.
    """

    def __init__(self, max_bins: int = MAX_BINS) -> None:
        self.histogram = FloatHistogram(4, max_bins)
        self.found: list[np.ndarray] = []  # what AUPIMO keeps of each image with a mask
        self.regions = 0
        self.images = 0

    def update(
        self,
        anomaly_map: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        regions: Sequence[Region] | None = None,
    ) -> None:
        """Add one image.

        anomaly_map: float32 (H, W), higher is more anomalous. mask: (H, W) bool, or numbers of
        which nonzero is anomalous; its 8-connected components are the regions of PRO. regions:
        given instead of a mask, they are the regions of saturated PRO, may overlap, and their union
        is the mask; for AUPIMO they do not count. Neither: all pixels are normal. ValueError for
        other shapes or dtypes and for NaN.
        """
        anomaly_map = np.asarray(anomaly_map)
        if anomaly_map.ndim != 2:
            raise ValueError(f"anomaly_map must be (H, W), got shape {anomaly_map.shape}")
        if mask is not None and regions is not None:
            raise ValueError("give a mask or regions, not both")
        anomalous = np.zeros(anomaly_map.shape, dtype=bool)
        masks = [mask] if mask is not None else [region.mask for region in regions or ()]
        for part in masks:
            if np.shape(part) != anomaly_map.shape:
                raise ValueError(
                    f"mask and anomaly_map must have one shape, got {np.shape(part)} and "
                    f"{anomaly_map.shape}"
                )
            anomalous |= np.asarray(part) != 0
        for part, area in regions or ():
            if area < 1 or not np.any(part):
                raise ValueError(
                    f"a region needs pixels and a saturation area of at least 1, got "
                    f"{np.count_nonzero(part)} pixels and {area}"
                )
        places = self.histogram.places(anomaly_map)
        normal, hit, overlap, good = self.histogram.counts
        np.add.at(normal, places[~anomalous], 1)
        np.add.at(hit, places[anomalous], 1)
        if regions is not None:
            for part, area in regions:
                self._add_region(overlap, places[np.asarray(part) != 0], area)
        elif anomalous.any():
            self._add_components(overlap, places, anomalous)
            self.found.append(kept_keys(anomaly_map[anomalous]))
        else:
            np.add.at(good, places.ravel(), GOOD_IMAGE // max(places.size, 1))
        self.images += 1

    def merge(self, other: PixelMetrics) -> None:
        """Add all that another accumulator has seen; its max_bins may differ."""
        self.histogram.merge(other.histogram)
        self.found += other.found
        self.regions += other.regions
        self.images += other.images

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """False positive rates and mean (saturated) region overlap, from (0, 0) to (1, 1).

        ValueError when there is no region or no normal pixel.
        """
        (normal, _, overlap, _), _ = self.histogram.descending()
        if self.regions == 0 or normal.sum() == 0:
            raise ValueError("a PRO curve needs at least one region and one normal pixel")
        return _pro_curve(normal, overlap, self.regions)

    def compute(self, limits: Sequence[float] = PRO_LIMITS) -> PixelResult:
        """All figures so far; more images may be added afterwards.

        limits: false positive rates in (0, 1] for AU-PRO. The ranking figures are None unless there
        are normal and anomalous pixels, AU-PRO also where there is no region; AUPIMO where the good
        images show no false positive rate of 1e-5.
        """
        for limit in limits:
            if not 0 < limit <= 1:
                raise ValueError(f"limits must lie in (0, 1], got {limit}")
        (normal, hit, overlap, good), values = self.histogram.descending()
        au_pro: dict[float, float | None] = dict.fromkeys(limits)
        if self.regions and normal.any():
            x, y = _pro_curve(normal, overlap, self.regions)
            au_pro = {limit: partial_area(x, y, limit) for limit in limits}
        au_roc, average_precision, f1_max, best = _ranking(normal, hit)
        edge = None if best is None else float(np.nextafter(values[best], np.float32(-np.inf)))
        return PixelResult(
            au_roc,
            average_precision,
            f1_max,
            edge,
            au_pro=au_pro,
            normal_pixels=int(normal.sum()),
            anomalous_pixels=int(hit.sum()),
            regions=self.regions,
            dropped_bits=self.histogram.dropped_bits,
            aupimo=aupimo(good, values, self.histogram.dropped_bits, self.found),
        )

    def _add_components(self, overlap: np.ndarray, places: np.ndarray, mask: np.ndarray) -> None:
        from scipy import ndimage

        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        for i, box in enumerate(ndimage.find_objects(labels)):
            pixels = places[box][labels[box] == i + 1]
            self._add_region(overlap, pixels, pixels.size)

    def _add_region(self, overlap: np.ndarray, places: np.ndarray, saturation_area: int) -> None:
        """Spread the weight of one region over the bins of its pixels, from the highest score down.

        The overlap of a region is min(pixels found / saturation area, 1).
        """
        used, counts = np.unique(places, return_counts=True)
        order = np.argsort(self.histogram.rank(used))[::-1]
        area = min(saturation_area, places.size)
        found = np.minimum(np.cumsum(counts[order]), area)
        overlap[used[order]] += np.diff(found * _REGION // area, prepend=0)
        self.regions += 1


def _pro_curve(
    normal: np.ndarray, overlap: np.ndarray, regions: int
) -> tuple[np.ndarray, np.ndarray]:
    x = np.append(0, np.cumsum(normal)) / normal.sum()
    return x, np.append(0, np.cumsum(overlap)) / (regions * _REGION)


def saturated_pro(
    groups: Mapping[str, PixelMetrics], limits: Sequence[float] = SPRO_LIMITS
) -> dict[str, dict[float, float | None]]:
    """AU-sPRO as the MVTec LOCO AD evaluation code reports it.

    groups: one accumulator per folder of test images ("good", "logical_anomalies", ...), updated
    with `regions`. Each anomalous group is evaluated together with the good images; "mean" is the
    mean over the groups, and None where a group has None. Returns group -> limit -> area.
    """
    result: dict[str, dict[float, float | None]] = {}
    for name, group in groups.items():
        if name != "good":
            both = PixelMetrics(group.histogram.max_bins)
            both.merge(group)
            if "good" in groups:
                both.merge(groups["good"])
            result[name] = both.compute(limits).au_pro
    mean: dict[float, float | None] = {}
    for limit in limits:
        areas = [result[name][limit] for name in result]
        known = [area for area in areas if area is not None]
        mean[limit] = float(np.mean(known)) if known and len(known) == len(areas) else None
    return result | {"mean": mean}
