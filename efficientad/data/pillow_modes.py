"""Images as Pillow holds them to levels, in strips: a whole second copy would be gigabytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from efficientad.data.profiles import UnfitProfileError, cmyk_to_srgb, lab_to_srgb
from efficientad.data.samples import check_samples, strip_levels, strips
from efficientad.utils.checks import ValueRange

_Take = Callable[[Any], np.ndarray]  # a strip as Pillow has it -> its samples


def pillow_levels(image: Any, value_range: ValueRange | None) -> np.ndarray:
    """uint8 (H, W, 3) of a Pillow image of any mode, as stored; ValueError for what is not read.

    The rules of `decoding.read_image`; its orientation is not applied.
    """
    maximum = _maximum(image)
    image.load()
    take, declared = _taking(image, maximum, value_range)
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width}x{height} pixels")
    out = np.empty((height, width, 3), np.uint8)
    for rows in strips(height, width, 3):
        strip = image.crop((0, rows.start, width, rows.stop))
        strip.info.pop("transparency", None)
        part = take(strip)
        check_samples(part.dtype, value_range)
        levels = strip_levels(part, value_range, declared)
        out[rows] = levels[..., None] if levels.ndim == 2 else levels[..., :3]
    return out


def _maximum(image: Any) -> int:
    """The largest value that the header of a PGM names, to which Pillow has scaled 65535."""
    if getattr(image, "format", None) == "PPM" and image.mode == "I" and image.tile:
        args = image.tile[0][3]
        if isinstance(args, tuple) and isinstance(args[-1], int):
            return args[-1]
    return 65535


def _taking(image: Any, maximum: int, value_range: ValueRange | None) -> tuple[_Take, int]:
    """What turns a strip of this mode into samples, and the largest value of 16-bit ones."""
    mode = image.mode
    if mode in ("L", "RGB", "F") or mode.startswith("I;16"):
        return np.asarray, 65535
    if mode == "I":
        low, high = image.getextrema()
        if 0 <= low and high <= 65535:  # 16 bits, as some versions of Pillow hold them
            if maximum == 65535 or value_range is None:
                return lambda strip: np.asarray(strip).astype(np.uint16), 65535
            return lambda strip: _back(strip, maximum), maximum
        return np.asarray, 65535
    if mode in ("1", "LA"):
        return lambda strip: np.asarray(strip.convert("L")), 65535
    if mode in ("La", "RGBa"):
        return lambda strip: np.asarray(
            strip.convert("LA" if mode == "La" else "RGBA").convert("RGB")
        ), 65535
    if mode in ("LAB", "CMYK"):
        convert = _converting(image)
        return lambda strip: np.asarray(convert(strip)), 65535
    return lambda strip: np.asarray(strip.convert("RGB")), 65535


def _back(strip: Any, maximum: int) -> np.ndarray:
    """The numbers of a PGM before Pillow scaled them to 65535."""
    return ((np.asarray(strip).astype(np.int64) * maximum + 32767) // 65535).astype(np.uint16)


def _converting(image: Any) -> Callable[[Any], Any]:
    """What turns strips of a Lab or CMYK image to RGB; without a usable profile as Pillow does."""
    if image.mode == "LAB":
        return lab_to_srgb()
    try:
        return cmyk_to_srgb(image)
    except UnfitProfileError:
        return lambda strip: strip.convert("RGB")
