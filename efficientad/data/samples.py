"""Sample values of any type to levels 0..255, by a stated rule or not at all.

- 8 bits unsigned are levels as they are.
- 16 bits unsigned: the full range 0..65535, or that of the bits or of the largest value that the
  file names (12-bit TIFF, PGM with a maximum), is scaled to 0..255 and rounded. With a value range
  that range is scaled instead, and what lies outside is clipped to its ends.
- Other integers and floating point numbers have no agreed range: with a value range they are scaled
  as above, without one they are refused by name. NaN is refused always.
- Truth values and complex numbers are refused.

A value range is a pair (low, high) in the numbers of the file, as `EfficientAD.value_range` keeps
it: a camera of 12 bits that writes 0..4095 into files of 16 bits needs (0, 4095).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from efficientad.utils.checks import ValueRange

_STRIP = 1 << 22  # samples that are scaled at a time


def levels_of(
    pixels: np.ndarray, value_range: ValueRange | None = None, declared: int = 65535
) -> np.ndarray:
    """uint8 (H, W, 3) of pixels (H, W) or (H, W, 1, 3 or 4), by the rules of this module.

    The fourth channel is dropped. declared: the largest value of 16-bit samples that the file
    names. uint8 (H, W, 3) comes back as it is, if it is contiguous. Raises ValueError.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"shape must be (H, W), (H, W, 1 or 3 or 4), got {pixels.shape}")
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    check_samples(pixels.dtype, value_range)
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in strips(*pixels.shape):
        out[rows] = strip_levels(pixels[rows][..., :3], value_range, declared)
    return out


def check_samples(dtype: np.dtype, value_range: ValueRange | None) -> None:
    """Raise ValueError for a type that is not read, or not without a value range."""
    if dtype.kind not in "uif":
        raise ValueError(f"pixels are {dtype}; they must be numbers: uint8 or uint16, or others")
    if value_range is None and not (dtype.kind == "u" and dtype.itemsize <= 2):
        bits = 8 * dtype.itemsize
        kind = "floating point numbers" if dtype.kind == "f" else f"{bits}-bit integers"
        raise ValueError(
            f"pixels are {dtype}, and {kind} have no agreed range; only uint8 or uint16 are read "
            "without one: give it with value_range (--max-value, --value-range)"
        )


def strips(height: int, width: int, channels: int = 1) -> Iterator[slice]:
    """Slices of rows that are few enough to work on."""
    step = max(1, _STRIP // max(1, width * channels))
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def strip_levels(part: np.ndarray, value_range: ValueRange | None, declared: int) -> np.ndarray:
    """Levels uint8 of samples of a type that `check_samples` has let through."""
    if part.dtype == np.uint8:
        return part
    low, high = (0, declared) if value_range is None else value_range
    if part.dtype.kind == "u" and part.dtype.itemsize == 2:
        return _table(low, high)[part]
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        raise ValueError("pixels have a NaN or infinite value")
    return _scaled(part, low, high)


@functools.lru_cache(maxsize=8)
def _table(low: float, high: float) -> np.ndarray:
    return _scaled(np.arange(65536), low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (np.clip(values.astype(np.float64), low, high) - low) * 255 / (high - low)
    return np.floor(scaled + 0.5).astype(np.uint8)
