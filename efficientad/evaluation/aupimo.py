"""AUPIMO: how much of each defective image is found where good images hardly show a pixel.

Bertoldo et al., arXiv:2401.01984. Recall is taken image by image, at thresholds that are shared:
those at which the good images, each counted alike, have a false positive rate of 1e-5 to 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from efficientad.utils.quantiles import float_keys

FPR_BOUNDS = (1e-5, 1e-4)
GOOD_IMAGE = 1 << 40  # weight of one good image: whole numbers, as in `metrics`
_KEPT = 4096  # values of an image; of more the recall is known to half of 1 / _KEPT


def kept_keys(values: np.ndarray) -> np.ndarray:
    """What is kept of the defective pixels of an image: ascending keys (k,), k at most 4,096.

    values: float32 (n,). Up to 4,096 are kept all, of more as many in even steps of their rank.
    """
    keys = np.sort(float_keys(values))
    if keys.size > _KEPT:
        keys = keys[((np.arange(_KEPT) + 0.5) * keys.size / _KEPT).astype(np.intp)]
    return keys


def aupimo(
    good: np.ndarray,
    values: np.ndarray,
    dropped_bits: int,
    images: Sequence[np.ndarray],
    bounds: tuple[float, float] = FPR_BOUNDS,
) -> tuple[float, ...] | None:
    """Of each defective image the area under recall over the log of the false positive rate.

    The rate runs from bounds[0] to bounds[1]; the area is divided by the log of their ratio, so
    that it is the mean recall there, in 0..1.

    good: weight of the pixels of good images per bin, from high to low values; values: the lowest
        float32 of each bin, dropped_bits those that its bins do not resolve (as
        `FloatHistogram.descending` gives them).
    images: `kept_keys` of each.

    None where no threshold has a rate above 0 and up to bounds[0]: there is no good image, or its
    pixels are too few, or too many share the highest values.
    """
    used = good > 0
    rate = np.cumsum(good[used]) / max(good.sum(), 1)
    low, high = bounds
    if not rate.size or rate[0] > low:
        return None
    last = int(np.searchsorted(rate, high)) + 1
    lowest = float_keys(values[used][:last]).astype(np.int64)
    above = lowest + (1 << dropped_bits)
    ends = np.log(rate[:last])
    # From a bin to the next lower one: the recall goes from that above it to that of all in it.
    left, right = np.clip(ends[:-1], *np.log(bounds)), np.clip(ends[1:], *np.log(bounds))
    along = ((left + right) / 2 - ends[:-1]) / np.diff(ends)
    areas = []
    for keys in images:
        before, after = (
            1 - np.searchsorted(keys, edge[1:]) / keys.size for edge in (above, lowest)
        )
        recall = before + (after - before) * along
        areas.append(min(math.fsum((right - left) * recall) / math.log(high / low), 1.0))
    return tuple(areas)
