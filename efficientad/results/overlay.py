"""Anomaly maps as pictures on one fixed scale.

The scale hangs on the detector's threshold alone, never on the image at hand: the same colour means
the same anomaly in every picture of a data set, and a good part looks calm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from efficientad.data.samples import strips
from efficientad.data.tiff_parts import TiffParts
from efficientad.model.map_rule import MAP_AT_QB
from efficientad.model.region import resized

_TEMPORARY = 16  # numbers a pixel that blending holds for a moment
NAN_COLOR = (0, 230, 150)  # not in the colour map
REGION_COLOR = (70, 180, 255)  # of the inspected region's outline, neither
STOPS = (  # position on the scale, RGB; lightness rises evenly from dark blue to pale yellow
    (0.00, (24, 20, 92)),
    (0.17, (84, 22, 134)),
    (0.33, (148, 30, 128)),
    (0.50, (208, 48, 88)),  # the threshold
    (0.67, (242, 98, 44)),
    (0.83, (252, 168, 42)),
    (1.00, (255, 246, 158)),
)


def map_scale(threshold: float | None) -> tuple[float, float]:
    """Ends (low, high) of the colour scale, in units of the anomaly map; its middle: the threshold.

    low, where colour starts, is 0 (q_a of the good images: nine tenths of their cells lie below,
    and so does the frame of a map) and high, where it saturates, twice the threshold. For a
    threshold of 0 or less it is threshold - 0.1 to threshold + 0.1. Without a (finite) threshold
    the middle is 0.1, q_b of the good images.
    """
    middle = MAP_AT_QB if threshold is None or not math.isfinite(threshold) else float(threshold)
    half = middle if middle > 0 else MAP_AT_QB
    return middle - half, middle + half


@functools.lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """The colour map, (256, 3) uint8."""
    positions, colors = zip(*STOPS, strict=True)
    at = np.linspace(0, 1, 256)
    channels = [np.interp(at, positions, channel) for channel in np.array(colors).T]
    return np.rint(np.stack(channels, 1)).astype(np.uint8)


def check_image(image: Any) -> Any:
    """The image as an array, or the parts of one; ValueError unless it is uint8 (H, W, 3)."""
    if not isinstance(image, TiffParts):
        image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    return image


def _check_map(anomaly_map: np.ndarray) -> np.ndarray:
    values = np.asarray(anomaly_map, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"anomaly_map has shape {values.shape}; it must be (h, w), not empty")
    return values


def _positions(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Place on the scale, float32 in 0..1; NaN stays NaN, infinities go to the ends."""
    low, high = scale
    if not low < high:
        raise ValueError(f"scale is {scale}; it must be (low, high) with low < high")
    return np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)


def colorize(anomaly_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Anomaly map (H, W) -> uint8 (H, W, 3), opaque; `scale` from `map_scale`.

    Values beyond the scale take its end colours; NaN is `NAN_COLOR`.
    """
    place = _positions(_check_map(anomaly_map), scale)
    unknown = np.isnan(place)
    colors = _table()[np.rint(np.where(unknown, 0, place) * 255).astype(np.uint8)]
    colors[unknown] = NAN_COLOR
    return colors


def _taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = (np.arange(target, dtype=np.float64) + 0.5) * (size / target) - 0.5
    at = np.clip(at, 0, size - 1)
    first = np.floor(at).astype(np.intp)
    return first, np.minimum(first + 1, size - 1), (at - first).astype(np.float32)


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Map (h, w) -> float32 of `size` (height, width), bilinear with cell centres at + 1/2.

    A cell without weight is not read, so one NaN spoils only its neighbours.
    """
    values = _check_map(anomaly_map)
    for axis in (0, 1):
        if values.shape[axis] == size[axis]:
            continue
        first, second, part = _taps(values.shape[axis], size[axis])
        part = part[:, None] if axis == 0 else part[None]
        a, b = values.take(first, axis), values.take(second, axis)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            values = np.where(part > 0, a + (b - a) * part, a)
    return values


def shrink_map(values: np.ndarray, limit: int) -> np.ndarray:
    """Shrink a map to at most about 2 `limit` cells a side by block maxima: small peaks stay."""
    block = max(1, min(max(values.shape) // limit, *values.shape))
    if block == 1:
        return values
    for _ in range(2):  # rows, then columns; strided maxima, far faster than reducing short axes
        whole = len(values) // block * block
        shrunk = functools.reduce(np.maximum, (values[i:whole:block] for i in range(block)))
        if whole < len(values):
            shrunk = np.concatenate([shrunk, values[whole:].max(0, keepdims=True)])
        values = shrunk.T
    return np.ascontiguousarray(values)


def _grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask and every pixel within `steps` rows and columns of it."""
    for axis in (0, 1):
        whole = (slice(None),) * axis
        ahead, behind = (*whole, slice(1, None)), (*whole, slice(None, -1))
        for _ in range(steps):
            grown = mask.copy()
            grown[ahead] |= mask[behind]
            grown[behind] |= mask[ahead]
            mask = grown
    return mask


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    *,
    strength: float = 0.8,
    contour: bool = True,
    region: Tensor | None = None,
) -> np.ndarray:
    """Blend the map's colours over the image and outline what lies above the threshold.

    Opacity is 0 up to the low end of the scale (those pixels stay as they are), grows with the
    square root of the place on the scale and ends at `strength`. The outline is a white line with
    a dark one outside, to be seen on any ground; it needs a finite threshold. A blue line runs
    around the inspected region, inside it.

    Args:
        image: uint8 (H, W, 3), RGB.
        anomaly_map: (h, w) in the detector's unit; resized, bilinear, to the image.
        threshold: of the detector, or None.
        strength: opacity at the high end, 0..1.
        region: what is inspected, bool of any size, resized to the image; None is everything.

    Returns:
        uint8 (H, W, 3), a new array.

    Raises:
        ValueError: wrong shape or dtype, or strength outside 0..1.
    """
    image = check_image(image)
    out = np.empty(image.shape, np.uint8)
    for rows, part in overlay_strips(
        image, anomaly_map, threshold, strength=strength, contour=contour, region=region
    ):
        out[rows] = part
    return out


def overlay_strips(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    *,
    strength: float = 0.8,
    contour: bool = True,
    region: Tensor | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """`overlay` as (rows, their pixels) from top to bottom: little memory for a large picture."""
    image = check_image(image)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be in 0..1")
    height, width = image.shape[:2]
    scale = map_scale(threshold)
    values = resize_map(anomaly_map, (height, width))
    inspected = None if region is None else resized(region, (height, width)).numpy()
    parts = list(strips(height, width, _TEMPORARY))
    line = max(1, round(min(height, width) / 400))

    def above(rows: slice) -> np.ndarray:
        marked = values[rows] > threshold
        return marked if inspected is None else marked & inspected[rows]

    if contour and threshold is not None and math.isfinite(threshold):
        contour = any(above(rows).any() for rows in parts)
        contour = contour and not all(above(rows).all() for rows in parts)
    else:
        contour = False
    for rows in parts:
        part = _blended(image[rows], values[rows], scale, strength)
        top = max(0, rows.start - line)
        around, here = slice(top, rows.stop + line), slice(rows.start - top, rows.stop - top)
        if inspected is not None:
            inside = inspected[around]
            part[inside[here] & _grown(~inside, line)[here]] = REGION_COLOR
        if contour:
            near = above(around)
            part[_grown(near, line)[here] & ~near[here]] = (20, 20, 24)
            part[near[here] & _grown(~near, line)[here]] = 255
        yield rows, part


def _blended(
    image: np.ndarray, values: np.ndarray, scale: tuple[float, float], strength: float
) -> np.ndarray:
    place = _positions(values, scale)
    alpha = np.float32(strength) * np.sqrt(np.where(np.isnan(place), 1, place))[..., None]
    out = image + (colorize(values, scale) - image.astype(np.float32)) * alpha
    return np.rint(out).astype(np.uint8)


def colorbar(length: int = 256, thickness: int = 14) -> np.ndarray:
    """The scale from low to high, left to right: uint8 (thickness, length, 3)."""
    if length < 2 or thickness < 1:
        raise ValueError(f"length is {length} and thickness {thickness}; at least 2 and 1")
    row = colorize(np.linspace(0, 1, length, dtype=np.float32)[None], (0.0, 1.0))
    return np.repeat(row, thickness, axis=0)
