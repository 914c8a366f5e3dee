"""Large TIFF files of which the part is read that is asked for."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from efficientad.data.decoding import naming_errors, orientation_of
from efficientad.data.opening import opened
from efficientad.data.profiles import apply_profile
from efficientad.data.samples import strip_levels, strips
from efficientad.utils.checks import ValueRange

LEAST_PIXELS = 16_000_000  # smaller pictures are decoded as a whole
_MOST_OF_A_SEGMENT = 1 << 25  # bytes of a strip or tile, decoded; larger ones give no small parts
_KEPT = 1 << 27  # bytes of decoded strips or tiles that are kept at least
_AHEAD = 512  # rows at full width that are kept besides: a row of tiles comes from the same strips
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # as tifffile numbers them: none, LZW, Deflate...


class TiffParts:
    """The pixels of a file, uint8 (H, W, 3), as `decoding.read_image` gives them.

    An index is rows, or rows and columns, as slices with steps above 0; a part is read when it is
    asked for. `np.asarray` reads all. No file stays open. It is for one thread.

    Attributes:
        name: of the file. shape, ndim, size, dtype: as an array's.

    Raises:
        ImageError: a part that cannot be read.
    """

    ndim, dtype = 3, np.dtype(np.uint8)

    def __init__(self, path: str, page: Any, image: Any, value_range: ValueRange | None) -> None:
        self.name, self._page, self._image, self._range = path, page, image, value_range
        self.shape = page.shaped[2], page.shaped[3], 3
        self.size = math.prod(self.shape)
        self._decode: Callable[..., Any] = page.decode
        self._tile = page.chunks[:2]
        self._across = page.chunked[1]
        self._start = page.dataoffsets[0] if page.is_contiguous else None  # and not compressed
        self._segments: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0
        row = self.shape[1] * page.samplesperpixel * page.dtype.itemsize
        self._most = max(_KEPT, row * (self._tile[0] + _AHEAD))

    def __getitem__(self, index: Any) -> np.ndarray:
        places = index if isinstance(index, tuple) else (index, slice(None))
        if len(places) != 2 or not all(isinstance(place, slice) for place in places):
            raise TypeError(f"index is {index!r}; it must be one or two slices")
        rows, columns = (
            range(length)[place] for place, length in zip(places, self.shape[:2], strict=True)
        )
        if rows.step < 1 or columns.step < 1:
            raise ValueError(f"index is {index!r}; steps must be above 0")
        out = np.empty((len(rows), len(columns), 3), np.uint8)
        if not out.size:
            return out
        with naming_errors(self.name), open(self.name, "rb") as file:
            left, right = columns.start, columns[-1] + 1
            for part in strips(len(rows), right - left, 3 * rows.step):
                some = rows[part]
                band = self._band(file, some.start, some[-1] + 1, left, right)
                out[part] = self._levels(band[:: rows.step, :: columns.step])
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def _levels(self, samples: np.ndarray) -> np.ndarray:
        levels = strip_levels(samples, self._range, 65535)
        found = np.empty((*levels.shape[:2], 3), np.uint8)
        found[:] = levels
        apply_profile(found, self._image)
        return found

    def _band(self, file: Any, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Samples of these rows and columns as the file has them, (h, w, 1 or 3)."""
        if self._start is not None:
            return self._rows(file, self._start, top, bottom, left, right)
        high, wide = self._tile
        samples, dtype = self._page.samplesperpixel, self._page.dtype
        out = np.empty((bottom - top, right - left, samples), dtype)
        for down in range(top // high, (bottom - 1) // high + 1):
            for along in range(left // wide, (right - 1) // wide + 1):
                segment = self._segment(file, down * self._across + along)
                y, x = down * high, along * wide
                rows = slice(max(top, y), min(bottom, y + segment.shape[0]))
                columns = slice(max(left, x), min(right, x + segment.shape[1]))
                there = _moved(rows, -top), _moved(columns, -left)
                out[there] = segment[_moved(rows, -y), _moved(columns, -x)]
        return out

    def _rows(
        self, file: Any, start: int, top: int, bottom: int, left: int, right: int
    ) -> np.ndarray:
        """As `_band`, of a file that has all rows one after another from byte `start` on."""
        page = self._page
        samples, dtype = page.samplesperpixel, np.dtype(page.parent.byteorder + page.dtype.char)
        pixel = samples * dtype.itemsize
        out = np.empty((bottom - top, right - left, samples), dtype)
        for row in range(top, bottom):
            file.seek(start + (row * self.shape[1] + left) * pixel)
            if file.readinto(out[row - top].data) != (right - left) * pixel:
                raise ValueError("the file ends before its pixels")
        return out.astype(page.dtype, copy=False)

    def _segment(self, file: Any, index: int) -> np.ndarray:
        """A decoded strip or tile (h, w, 1 or 3), by its number."""
        found = self._segments.pop(index, None)
        if found is None:
            file.seek(self._page.dataoffsets[index])
            data = file.read(self._page.databytecounts[index])
            decoded, _, shape = self._decode(data, index)
            if decoded is None or decoded.shape[:3] != shape[:3]:
                raise ValueError(f"strip or tile {index} lacks some of its pixels")
            found = decoded[0]
            self._bytes += found.nbytes
            while self._segments and self._bytes > self._most:
                self._bytes -= self._segments.popitem(last=False)[1].nbytes
        self._segments[index] = found
        return found


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def tiff_parts(source: Any, value_range: ValueRange | None = None) -> TiffParts | None:
    """The parts of a large TIFF file; None for everything that is to be decoded as a whole.

    Read by parts are files of at least `LEAST_PIXELS` whose samples are grey or RGB, unsigned, of 8
    or 16 bits, interleaved, upright, without alpha, not compressed or without loss by a method that
    tifffile knows, in strips or tiles of which none is missing. Whatever is wrong with a file is
    left to `decoding.read_image` to say.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fspath(source)
    try:
        with opened(path) as (image, stream):
            width, height = image.size
            if image.format != "TIFF" or width * height < LEAST_PIXELS or orientation_of(image) > 1:
                return None
            import tifffile

            stream.seek(0)
            with tifffile.TiffFile(stream) as file:
                page = file.pages[0]
                if not _fits(page, height, width, os.fstat(stream.fileno()).st_size):
                    return None
                parts = TiffParts(path, page, image, value_range)
        parts[:1, :1]
    except Exception:  # damaged files raise nearly everything; reading them whole says what it is
        return None
    return parts


def _fits(page: Any, height: int, width: int, size: int) -> bool:
    """Whether a page is as `tiff_parts` wants it. size: bytes of the file."""
    samples = page.samplesperpixel
    grey, rgb = int(page.photometric) == 1, int(page.photometric) == 2
    whole = (
        ((grey and samples == 1) or (rgb and samples == 3))
        and page.shaped == (1, 1, height, width, samples)
        and int(page.planarconfig) == 1
        and int(page.sampleformat) == 1
        and page.bitspersample in (8, 16)
        and page.dtype is not None
        and int(page.fillorder) == 1
        and int(page.compression) in _LOSSLESS
    )
    if not whole:
        return False
    spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(spans) != math.prod(page.chunked) or page.tags.get("TileDepth") is not None:
        return False
    if not all(0 < offset and 0 < count <= size - offset for offset, count in spans):
        return False
    segment = math.prod(page.chunks) * page.dtype.itemsize
    return bool(page.is_contiguous) or segment <= _MOST_OF_A_SEGMENT
