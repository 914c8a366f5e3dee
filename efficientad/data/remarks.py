"""What picture files do not say plainly, and how it is read: sentences for people, by file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientad.data.decoding import ImageError, naming_errors, sample_extrema
from efficientad.data.opening import opened
from efficientad.data.profiles import profile_use
from efficientad.utils.checks import ValueRange
from efficientad.utils.files import listed

_LOOKED_AT = 16  # pictures whose pixels are read for a remark
_LISTED = 5
_SHARE = 0.25  # of its type's range; what uses less keeps fewer than 64 of 256 levels
_KINDS = {
    "alpha": "Pictures that are not opaque everywhere; alpha is dropped, colours count as stored",
    "pages": "Pictures of several pages or frames, of which the first is read",
    "cmyk": "CMYK pictures without a colour profile, converted to RGB by rule of thumb",
    "converted": "Pictures with a colour profile that is not sRGB, converted to sRGB by it",
    "unfit": "Pictures with a colour profile that cannot be applied (it is damaged or for pictures "
    "of another kind, or Pillow lacks LittleCMS); numbers count as stored",
}


class ValueRangeWarning(UserWarning):
    """Pictures use a small part of the range of their type, and no value range is set."""


def picture_notes(paths: Sequence[Path], value_range: ValueRange | None = None) -> list[str]:
    """The sentences of `header_notes` and of `range_notes`."""
    return header_notes(paths) + range_notes(paths, value_range)


def header_notes(paths: Sequence[Path]) -> list[str]:
    """Sentences about pictures of which more than one reading is possible, naming the files.

    Headers of all files are looked at, and for alpha the pixels of at most 16. Files that cannot be
    read are passed over: whoever reads them says so.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in _KINDS}
    clear: list[Path] = []
    for path in paths:
        try:
            kinds, has_alpha = _header(path)
        except (ImageError, OSError):
            continue
        for kind in kinds:
            found[kind].append(path)
        if has_alpha:
            clear.append(path)
    for path in _some(clear):
        if _is_clear(path):
            found["alpha"].append(path)
    return [
        f"{_KINDS[kind]}: {listed([path.name for path in names], _LISTED)}."
        for kind, names in found.items()
        if names
    ]


def range_notes(paths: Sequence[Path], value_range: ValueRange | None = None) -> list[str]:
    """A sentence if pictures use a small part of their type's range and no value range is set.

    The pixels of at most 16 are looked at, evenly spread.
    """
    if value_range is not None:
        return []
    low, high, limit, looked = np.inf, 0.0, 0, 0
    for path in _some(paths):
        try:
            read = sample_extrema(path)
        except (ImageError, MemoryError):
            continue
        if read is None or (limit and read[2] != limit):
            return []
        low, high, limit = min(low, read[0]), max(high, read[1]), read[2]
        looked += 1
    if not looked or (high if limit == 255 else high - low) > _SHARE * limit:
        return []
    top = 1
    while top < high:
        top = 2 * top + 1
    use = (
        f"The numbers of all {looked} pictures looked at lie in {low:.0f} to {high:.0f}, a small "
        f"part of 0 to {limit}: of 256 grey levels they keep about "
        f"{max(1, round((high - low) / limit * 255))}."
    )
    if limit == 255:
        return [f"{use} They are dark, or were written wrong."]
    return [
        f"{use} If that is all that the camera gives, say so: --max-value {top} (in Python "
        f"value_range=(0, {top}))."
    ]


def _header(path: Path) -> tuple[list[str], bool]:
    """(kinds of remarks that the header calls for, whether there is an alpha to look at)."""
    with naming_errors(str(path), path), opened(path) as (image, _):
        kinds = []
        if getattr(image, "n_frames", 1) > 1:
            kinds.append("pages")
        use = profile_use(image)
        if use is not None:
            kinds.append(use)
        elif image.mode == "CMYK" and "icc_profile" not in image.info:
            kinds.append("cmyk")
        alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
        return kinds, alpha


def _is_clear(path: Path) -> bool:
    try:
        with naming_errors(str(path), path), opened(path) as (image, _):
            if "A" not in image.getbands():
                image = image.convert("RGBA")
            return bool(image.getchannel("A").getextrema()[0] < 255)
    except (ImageError, MemoryError):
        return False


def _some(paths: Sequence[Any]) -> list[Any]:
    step = max(1, -(-len(paths) // _LOOKED_AT))
    return list(paths[::step])
