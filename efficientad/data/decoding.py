"""The decoding of images and masks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from efficientad.data.opening import opened, unknown
from efficientad.data.pillow_modes import pillow_levels
from efficientad.data.profiles import apply_profile
from efficientad.data.samples import levels_of
from efficientad.utils.checks import ValueRange
from efficientad.utils.memory import give_back_freed

_ORIENTATION = 274  # EXIF and TIFF tag
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 262, 277, 284, 339  # TIFF tags
_LARGE = 50_000_000  # levels of a picture from which on memory is looked after


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


def read_image(source: Any, value_range: ValueRange | None = None) -> np.ndarray:
    """RGB pixels of an image, uint8 (H, W, 3).

    source: a path, encoded bytes, a binary file object, a PIL image, or an array (H, W) or
    (H, W, 1, 3 or 4) of numbers (or a tensor of that kind on the CPU); a contiguous uint8 (H, W, 3)
    array is returned as it is, not copied. value_range: (low, high) of samples that are wider than
    8 bits, see `efficientad.data.samples`, which says how every type of sample is read.

    - Grey is repeated to three channels. Palettes are looked up.
    - Colour PNG of 16 bits gives its high bytes where there is no value range: up to one level off.
    - Alpha is dropped: the colours are those stored in the file, not composed on any background.
    - Colour profiles are applied: the result is sRGB, by the rules of `efficientad.data.profiles`.
      CMYK without a profile is converted as Pillow does, and so are YCbCr and HSV.
    - An EXIF or TIFF orientation is applied, as viewers do.
    - Of several frames or pages the first is read.

    `data.remarks` says which of a list of files are of such kinds. Memory: less than 12 bytes a
    pixel at once, 3 afterwards.

    Raises ImageError for everything that cannot be decoded: damaged or unknown files, more
    megapixels than the environment variable EFFICIENTAD_MAX_MEGAPIXELS allows (300), pixels for
    which there is no memory, samples without an agreed range; its subclass MissingImage, which is a
    FileNotFoundError too, for a path that does not exist.
    """
    try:
        return _looked_after(_read(source, value_range))
    except MemoryError as error:
        raise ImageError(source_name(source), "there is no memory for its pixels") from error


def _looked_after(pixels: np.ndarray) -> np.ndarray:
    if pixels.size > _LARGE:
        give_back_freed()
    return pixels


def _read(source: Any, value_range: ValueRange | None) -> np.ndarray:
    name = source_name(source)
    if not _is_encoded(source):
        if hasattr(source, "detach"):  # numpy refuses a tensor that requires a gradient
            source = source.detach()
        with naming_errors(name):
            return levels_of(np.asarray(source), value_range)
    with naming_errors(name, source), opened(source) as (image, stream):
        return _pixels(image, stream, value_range)


def _pixels(image: Any, stream: Any, value_range: ValueRange | None) -> np.ndarray:
    deep = _deep_tiff(image, stream)
    if deep is None:
        deep = _deep_png(image, stream) if value_range is not None else None
    if deep is not None:
        levels = levels_of(deep.pixels, value_range, deep.maximum)
        del deep
    else:
        levels = pillow_levels(image, value_range)
    apply_profile(levels, image)
    return oriented(levels, orientation_of(image))


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
    with naming_errors(source_name(source), source), opened(source) as (image, stream):
        return _shape(image, stream)


def _shape(image: Any, stream: Any) -> Shape:
    width, height = image.size
    # Pillow already turns the size of a TIFF, and would decode a whole PNG to look for EXIF.
    known = image.format != "PNG" or "exif" in image.info or _exif_behind_pixels(stream)
    orientation = orientation_of(image) if known else 1
    turned = orientation >= 5 and image.format != "TIFF"
    return Shape((width, height) if turned else (height, width), orientation)


class EncodedImage:
    """A picture file in memory, opened once: what its header says, then its pixels.

    Attributes:
        format: as Pillow names it ("JPEG"). size: (height, width) as it is shown.

    Raises:
        ImageError: as `read_image`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        with naming_errors(source_name(data), data), opened(data) as (image, stream):
            self._image, self._stream = image, stream
            self.format = str(image.format)
            self.size = _shape(image, stream).size

    def pixels(self, value_range: ValueRange | None = None) -> np.ndarray:
        """RGB pixels, uint8 (H, W, 3): as `read_image`, with its errors. To be called once."""
        with naming_errors(source_name(self._data), self._data):
            return _looked_after(_pixels(self._image, self._stream, value_range))


def _exif_behind_pixels(png: Any) -> bool:
    """Whether a PNG file has EXIF or XMP in a chunk that Pillow reads after the pixels only."""
    if png is None:
        return False
    png.seek(8)
    while len(head := png.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        word = png.read(min(length, 24)) if kind in (b"iTXt", b"zTXt", b"tEXt") else b""
        if kind == b"eXIf" or word.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
            return True
        png.seek(length - len(word) + 4, os.SEEK_CUR)
    return False


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
        raise ImageError(name, unknown(source)) from error
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise ImageError(name, f"{error}" or type(error).__name__) from error


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


class Deep(NamedTuple):
    """Samples (H, W) or (H, W, C) as the file has them, and the largest value that it names."""

    pixels: np.ndarray
    maximum: int


def _deep_tiff(image: Any, stream: Any) -> Deep | None:
    """A TIFF of samples that are not unsigned or of more than 8 bits, None for any other image.

    Pillow keeps only the high bytes of colours, mixes up separate planes, takes signed samples for
    unsigned and ignores white-is-zero. It is still asked where tifffile cannot decompress (LZW
    without its codec package) and none of these matters.
    """
    if image.format != "TIFF" or stream is None:
        return None
    tags = image.tag_v2
    bits, samples = tags.get(_BITS, (1,))[0], tags.get(_SAMPLES, 1)
    space = tags.get(_PHOTOMETRIC, 1)
    if samples > 4:
        raise ValueError(f"{samples} channels; up to 4 are known")
    unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] in (1, 4)  # 4: not said
    if bits <= 8 and unsigned:
        _check_strips(image)
        return None
    if space not in (0, 1, 2):  # neither grey nor RGB
        if bits == 16 and unsigned and image.mode in ("CMYK", "LAB"):
            return None
        raise ValueError(f"samples of {bits} bits in the colour space of number {space}")
    import tifffile

    stream.seek(0)
    try:
        with tifffile.TiffFile(stream) as file:
            page = file.pages[0]
            pixels, axes = _tiff_pixels(page), page.axes
    except _Incomplete:
        raise
    except Exception:
        plain = tags.get(_PLANES, 1) == 1 and space != 0
        if bits == 16 and unsigned and plain:
            _check_strips(image)
            return None
        raise
    if axes == "SYX":
        pixels = np.moveaxis(pixels, 0, 2)
    if samples == 2:
        pixels = pixels[..., :1]
    maximum = (1 << min(bits, 16)) - 1
    if space == 0 and unsigned and bits <= 16:
        pixels = maximum - pixels
    return Deep(pixels, maximum)


def _check_strips(image: Any) -> None:
    """Raise ValueError for a TIFF that lacks strips or tiles: Pillow leaves zeros there."""
    planes = image.tag_v2.get(_SAMPLES, 1) if image.tag_v2.get(_PLANES, 1) == 2 else 1
    places = [tile[1] for tile in image.tile]
    held = sum((right - left) * (bottom - top) for left, top, right, bottom in places)
    width, height = image.size
    whole = all(tile[0] == "libtiff" for tile in image.tile)  # it looks for itself
    if not whole and held < width * height * planes:
        raise ValueError(f"some of its strips or tiles are missing: it has {width}x{height} pixels")


class _Incomplete(ValueError):
    """A TIFF lacks some of its pixels."""


def _tiff_pixels(page: Any) -> np.ndarray:
    """The pixels of a page as `page.asarray()`, which fills what is missing with zeros."""
    missing = number = math.prod(page.chunked)
    plain = page.compression == 1 and len(page.dataoffsets) == len(page.databytecounts) == number
    if plain and all(page.dataoffsets) and sum(page.databytecounts) >= page.nbytes:
        return page.asarray()  # nothing is missing, and it is read at once
    out = np.empty(page.shaped, page.dtype)  # planes, depth, rows, columns, samples
    for segment, (plane, *at, _), shape in page.segments():
        if segment is None or segment.shape[:3] != shape[:3]:
            break
        inside = [min(n, whole - k) for n, whole, k in zip(shape, out.shape[1:4], at, strict=False)]
        target = (plane, *(slice(k, k + n) for k, n in zip(at, inside, strict=True)))
        out[target] = segment[tuple(map(slice, inside))]
        missing -= 1
    if missing:
        raise _Incomplete(f"{missing} of its {number} strips or tiles are missing")
    return out.reshape(page.shape)


def _deep_png(image: Any, stream: Any) -> Deep | None:
    """A colour PNG of 16 bits, of which Pillow gives the high bytes or, asked so, the low ones."""
    if image.format != "PNG" or stream is None or not image.tile:
        return None
    codec, extents, offset, raw = image.tile[0]
    if raw not in ("RGB;16B", "RGBA;16B"):
        return None
    high = np.asarray(image).astype(np.uint16)
    with opened(stream) as (again, _):
        again.tile = [(codec, extents, offset, raw.replace("16B", "16L"))]
        return Deep(high << 8 | np.asarray(again), 65535)


def sample_extrema(source: Any) -> tuple[float, float, int] | None:
    """(smallest, largest sample as the file has them, largest value of their type).

    None where the samples are of no whole type. For looking at what numbers a file holds; errors as
    `read_image`.
    """
    found = _extrema(source)
    give_back_freed()
    return found


def _extrema(source: Any) -> tuple[float, float, int] | None:
    with naming_errors(source_name(source), source), opened(source) as (image, stream):
        deep = _deep_tiff(image, stream) or _deep_png(image, stream)
        if deep is not None:
            pixels, limit = deep
            if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
                return None
            return float(pixels.min()), float(pixels.max()), limit
        if image.mode == "F":
            return None
        found = np.array(image.getextrema(), np.float64)  # by Pillow: no copy of the pixels
        wide = image.mode == "I" or image.mode.startswith("I;16")
        return float(found.min()), float(found.max()), 65535 if wide else 255
