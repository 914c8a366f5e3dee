"""The decoding of images and masks."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from efficientad.utils.file_kinds import HEAD, kind_of, kind_of_file

# Raster formats only: Pillow would also start Ghostscript for an EPS file, for instance.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP", "JPEG2000", "DIB")
HEIF_INSTALL = "pip install 'efficientad[heif]' reads it"
_ORIENTATION = 274  # EXIF and TIFF tag
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 262, 277, 284, 339  # TIFF tags


class ImageError(ValueError):
    """An image that cannot be read: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read {name}: {reason}")
        self.name = name
        self.reason = reason


class MissingImage(ImageError, FileNotFoundError):
    """The file of an image does not exist: an unreadable image as any other, and a missing file."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "no such file")


def read_image(source: Any) -> np.ndarray:
    """RGB pixels of an image, uint8 (H, W, 3).

    source: a path, encoded bytes, a binary file object, a PIL image, or an array (H, W) or
    (H, W, 1, 3 or 4) of uint8 or uint16 (or a tensor of that kind on the CPU); a contiguous uint8
    (H, W, 3) array is returned as it is, not copied.

    - Grey is repeated to three channels. Palettes are looked up. - 16 bit: the full range 0..65535
    is scaled linearly to 0..255 and rounded, never clipped. Colour
      PNG of 16 bits is the exception: Pillow gives its high bytes, up to one level beside that.
    - Alpha is dropped: the colours are those stored in the file, not composed on any background.
    - CMYK, YCbCr, HSV and LAB are converted by Pillow, without the colour profile of the file.
    - An EXIF or TIFF orientation is applied, as viewers do.
    - Of several frames or pages the first is read.

    Raises ImageError for everything that cannot be decoded: damaged or unknown files, sizes beyond
    Pillow's decompression-bomb limit, floating point and 32-bit pixels, which have no agreed range;
    its subclass MissingImage, which is a FileNotFoundError too, for a path that does not exist.
    """
    name = source_name(source)
    if not _is_encoded(source):
        if hasattr(source, "detach"):  # numpy refuses a tensor that requires a gradient
            source = source.detach()
        return _as_rgb(np.asarray(source), name, 65535)
    with naming_errors(name, source), opened(source) as (image, stream):
        deep = _read_deep_tiff(image, stream, name)
        if deep is not None:
            return deep
        image.load()
        pixels = _as_rgb(_pillow_pixels(image, name), name, 65535)
        return oriented(pixels, orientation_of(image))


class Shape(NamedTuple):
    """(height, width) of an image as it is shown, and the EXIF orientation 1..8 that turned it."""

    size: tuple[int, int]
    orientation: int

    @property
    def stored(self) -> tuple[int, int]:
        """(height, width) of the pixels in the file."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def image_shape(source: Any) -> Shape:
    """The shape that `read_image` would give, from the header alone. Errors as there."""
    if not _is_encoded(source):
        height, width = np.shape(source)[:2]
        return Shape((height, width), 1)
    with naming_errors(source_name(source), source), opened(source) as (image, _):
        width, height = image.size
        # Pillow already turns the size of a TIFF, and would decode a whole PNG to look for EXIF.
        known = image.format != "PNG" or "exif" in image.info
        orientation = orientation_of(image) if known else 1
        turned = orientation >= 5 and image.format != "TIFF"
        return Shape((width, height) if turned else (height, width), orientation)


def image_size(source: Any) -> tuple[int, int]:
    """(height, width) that `read_image` would give, from the header alone. Errors as there."""
    return image_shape(source).size


def source_name(source: Any) -> str:
    """What to call an image source in a message: its path where it has one."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image of {len(source)} bytes"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "an image")


def _is_encoded(source: Any) -> bool:
    """Whether Pillow is needed: everything but an array or a tensor."""
    from PIL import Image

    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return True
    if hasattr(source, "read"):
        return True
    if hasattr(source, "__array__"):
        return False
    raise TypeError(f"not an image source: {type(source).__name__}")


@contextmanager
def opened(source: Any) -> Iterator[tuple[Any, Any]]:
    """A Pillow image and its file, if there is one; closes only what it opened."""
    from PIL import Image

    if isinstance(source, Image.Image):
        yield source, None
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as stream, Image.open(stream, formats=formats()) as image:
            yield image, stream
    else:
        file = source if hasattr(source, "read") else io.BytesIO(source)
        yield Image.open(file, formats=formats()), file


@contextmanager
def naming_errors(name: str, source: Any = None) -> Iterator[None]:
    """Turn what a decoder raises into an ImageError that names the image and the reason.

    source: what is read; its first bytes say what it is, where it is no image.
    """
    from PIL import UnidentifiedImageError

    try:
        yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise MissingImage(name) from None
    except IsADirectoryError as error:
        raise ImageError(name, "it is a folder, not an image file") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, _unknown(source)) from error
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise ImageError(name, f"{error}" or type(error).__name__) from error


def _unknown(source: Any) -> str:
    """Why Pillow does not know a file."""
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
    return f"not an image file that is read: it is {kind}"


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


def orientation_of(image: Any) -> int:
    """EXIF or TIFF orientation of a Pillow image, 1..8; 1 where there is no sound one."""
    try:
        found = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF beside sound pixels
        return 1
    return found if 1 <= found <= 8 else 1


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, ...) upright; orientation 1..8 as in EXIF, others are ignored."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _pillow_pixels(image: Any, name: str) -> np.ndarray:
    mode = image.mode
    if mode in ("RGB", "L") or mode.startswith("I;16"):
        return np.asarray(image)
    if mode == "I":
        pixels = np.asarray(image)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise ImageError(name, "pixels are 32-bit integers beyond 0..65535")
        return pixels.astype(np.uint16)
    if mode == "F":
        raise ImageError(name, "pixels are floating point numbers, which have no agreed range")
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode in ("P", "PA", "LA", "La", "RGBa", "RGBA", "RGBX"):
        return np.asarray(image.convert("RGBA"))[..., :3]
    return np.asarray(image.convert("RGB"))


def _as_rgb(pixels: np.ndarray, name: str, maximum: int) -> np.ndarray:
    """uint8 (H, W, 3) of uint8 or uint16 pixels; uint16 is scaled from 0..maximum."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ImageError(name, f"shape must be (H, W), (H, W, 1 or 3 or 4), got {pixels.shape}")
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = ((pixels.astype(np.uint32) * 255 + maximum // 2) // maximum).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ImageError(name, f"pixels must be uint8 or uint16, got {pixels.dtype}")
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[..., :3])


def _read_deep_tiff(image: Any, stream: Any, name: str) -> np.ndarray | None:
    """TIFF of 9 to 16 bits, or None for any other image.

    Pillow keeps only the high bytes of the colours, mixes up separate planes and ignores
    white-is-zero. It is still asked where tifffile cannot decompress (LZW without its codec
    package) and none of these matters.
    """
    if image.format != "TIFF" or stream is None:
        return None
    tags = image.tag_v2
    bits, samples = tags.get(_BITS, (1,))[0], tags.get(_SAMPLES, 1)
    if samples > 4:
        raise ImageError(name, f"{samples} channels; up to 4 are known")
    if not 8 < bits <= 16 or tags.get(_SAMPLE_FORMAT, (1,))[0] != 1:  # 1: unsigned integers
        return None
    import tifffile

    stream.seek(0)
    try:
        with tifffile.TiffFile(stream) as file:
            page = file.pages[0]
            pixels, axes = page.asarray(), page.axes
    except Exception:
        if bits == 16 and tags.get(_PLANES, 1) == 1 and tags.get(_PHOTOMETRIC) != 0:
            return None
        raise
    if axes == "SYX":
        pixels = np.moveaxis(pixels, 0, 2)
    if samples == 2:
        pixels = pixels[..., :1]
    if tags.get(_PHOTOMETRIC) == 0:
        pixels = (1 << bits) - 1 - pixels
    return oriented(_as_rgb(pixels, name, (1 << bits) - 1), orientation_of(image))
