"""Colour profiles (ICC) of pictures: what they ask for, and their conversion to sRGB.

- A profile that changes no level by more than 2 is sRGB: the numbers stay as they are.
- Another one that fits the picture (RGB for colours and palettes, grey for grey) is applied:
  relative colorimetric, LittleCMS, on the 8-bit levels. Wider samples are brought to them first.
- One that fits not, is damaged, or that a Pillow without LittleCMS cannot read is not applied.
- CMYK becomes sRGB by its profile, perceptual, and Lab by its definition.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from efficientad.data.samples import strips

_Convert = Callable[[Any], Any]  # a Pillow image in the profile's space -> one in sRGB
_GREY = ("1", "L", "LA", "La", "I", "F")
_AS_SRGB = 2  # levels: profiles that are meant to be sRGB differ by so much in their curves


class UnfitProfileError(ValueError):
    """A profile that cannot be applied to its picture."""


def profile_use(image: Any) -> str | None:
    """What becomes of a Pillow image's profile: "converted", "unfit", or None: nothing to do."""
    if "icc_profile" not in image.info or image.mode == "LAB":
        return None
    try:
        if image.mode == "CMYK":
            cmyk_to_srgb(image)
            return None
        return None if _converter(image) is None else "converted"
    except UnfitProfileError:
        return "unfit"


def apply_profile(levels: np.ndarray, image: Any) -> None:
    """Convert uint8 (H, W, 3) that was read of a Pillow image to sRGB in place, if need be."""
    if image.mode in ("CMYK", "LAB"):  # already converted
        return
    try:
        convert = _converter(image)
    except UnfitProfileError:
        return
    if convert is None:
        return
    from PIL import Image

    for rows in strips(*levels.shape):
        strip = levels[rows, :, 0] if _is_grey(image) else levels[rows]
        levels[rows] = np.asarray(convert(Image.fromarray(np.ascontiguousarray(strip))))


def cmyk_to_srgb(image: Any) -> _Convert:
    """The conversion of a CMYK image by its profile; UnfitProfileError if it has no usable one."""
    return _transform(image.info.get("icc_profile") or b"", "CMYK")


def lab_to_srgb() -> _Convert:
    """The conversion of Lab images; ValueError where Pillow has no LittleCMS."""
    try:
        from PIL import ImageCms

        return ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        ).apply
    except ImportError as error:
        raise ValueError(f"Lab needs a Pillow with LittleCMS ({error})") from error


def _is_grey(image: Any) -> bool:
    return image.mode in _GREY or image.mode.startswith("I;16")


def _converter(image: Any) -> _Convert | None:
    """What turns levels of a grey or colour image to sRGB; None: they are, or nothing says not."""
    if "icc_profile" not in image.info:
        return None
    profile = image.info["icc_profile"] or b""  # None: Pillow could not unpack it
    if not _is_grey(image):
        return _converting(profile, "RGB")
    try:
        return _converting(profile, "L")
    except UnfitProfileError:  # grey pictures that carry the profile of the colour ones beside them
        if _converting(profile, "RGB") is None:
            return None
        raise


@functools.lru_cache(maxsize=32)
def _converting(profile: bytes, mode: str) -> _Convert | None:
    """The transform of a profile; None if it is sRGB."""
    from PIL import Image

    transform = _transform(profile, mode)
    at = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    probe = at[None] if mode == "L" else np.stack(np.meshgrid(at, at, at), -1).reshape(1, -1, 3)
    found = np.asarray(transform(Image.fromarray(probe)))
    asked = probe[..., None] if mode == "L" else probe
    return None if np.abs(found.astype(int) - asked).max() <= _AS_SRGB else transform


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> _Convert:
    try:
        from PIL import ImageCms

        colorimetric = ImageCms.Intent.RELATIVE_COLORIMETRIC
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL if mode == "CMYK" else colorimetric,
        ).apply
    except Exception as error:  # PyCMSError and others, or no LittleCMS
        raise UnfitProfileError(f"the profile cannot be used ({error})") from error
