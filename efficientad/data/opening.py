"""Opening image files: which formats are read, how large they may be, what a file else is."""

from __future__ import annotations

import functools
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from efficientad.utils.file_kinds import HEAD, kind_of, kind_of_file

# Raster formats only: Pillow would also start Ghostscript for an EPS file, for instance.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP", "JPEG2000", "DIB")
HEIF_INSTALL = "pip install 'efficientad[heif]' reads it"
LIMIT = "EFFICIENTAD_MAX_MEGAPIXELS"  # environment variable: larger pictures are refused
MAX_MEGAPIXELS = 300.0


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read: Pillow's of FORMATS, and AVIF and HEIF where they can be."""
    return (*FORMATS, *(("AVIF",) if reads("AVIF") else ()), *(("HEIF",) if reads("HEIC") else ()))


@functools.cache
def reads(kind: str) -> bool:
    """Whether "AVIF" (by Pillow itself, if it was built so) or "HEIC" (by pillow-heif) is read."""
    if kind == "AVIF":
        from PIL import features

        return bool(features.check("avif"))
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@contextmanager
def opened(source: Any) -> Iterator[tuple[Any, Any]]:
    """A Pillow image and its file, if there is one; closes only what it opened.

    Raises ValueError for more than the megapixels that EFFICIENTAD_MAX_MEGAPIXELS allows (300).
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        yield source, None
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as stream, _open(stream) as image:
            yield image, stream
    else:
        file = source if hasattr(source, "read") else io.BytesIO(source)
        yield _open(file), file


def _open(file: Any) -> Any:
    """`PIL.Image.open` with our limit of pixels in place of its own, which is the process's."""
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    prefix = file.read(16)
    for kind in formats():
        if kind not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[kind]
        try:
            accepted = accept is None or accept(prefix)
            if not accepted or isinstance(accepted, str):
                continue
            file.seek(0)
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
        check_pixels(*image.size)
        return image
    raise UnidentifiedImageError("no image file")


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for more pixels than the limit."""
    text = os.environ.get(LIMIT, "")
    try:
        limit = float(text) if text else MAX_MEGAPIXELS
    except ValueError:
        raise ValueError(f"{LIMIT} is {text!r}; it must be a number") from None
    if width * height > limit * 1e6:
        raise ValueError(
            f"it has {width}x{height} pixels, {width * height / 1e6:.0f} megapixels, and the limit "
            f"is {limit:g}; set the environment variable {LIMIT} to allow more",
        )


def unknown(source: Any) -> str:
    """Why a file is none that is read: what its first bytes say."""
    if isinstance(source, (str, os.PathLike)):
        kind = kind_of_file(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        kind = kind_of(bytes(source[:HEAD]), len(source))
    else:
        kind = None
    if kind in ("a HEIC image", "an AVIF image") and not reads(kind.split()[1]):
        return f"it is {kind}; {HEIF_INSTALL}"
    if kind is None:
        return "not an image file we know"
    if kind.startswith("a TIFF") and (samples := _tiff_samples(source)):
        return f"TIFF samples of {samples} are not read; float32 and integers are"
    return f"not an image file that is read: it is {kind}"


def _tiff_samples(source: Any) -> str | None:
    """The type of the samples of a TIFF that Pillow does not know."""
    import tifffile

    file = source if isinstance(source, (str, os.PathLike)) else io.BytesIO(source)
    try:
        with tifffile.TiffFile(file) as tiff:
            return str(tiff.pages[0].dtype)
    except Exception:  # damaged, or no TIFF
        return None
