"""Parts of a TIFF file: the same pixels as of the whole, or no parts at all."""

from __future__ import annotations

import importlib.util
import io
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from helpers_images import ADOBE_RGB, icc_profile
from PIL import Image

from efficientad.data import tiff_parts as room
from efficientad.data.decoding import ImageError, read_image
from efficientad.data.tiff_parts import TiffParts, tiff_parts

HEIGHT, WIDTH = 147, 211


@pytest.fixture(autouse=True)
def small_files_are_read_by_parts(monkeypatch):
    monkeypatch.setattr(room, "LEAST_PIXELS", 1)


def pixels(dtype=np.uint8, channels=3, seed=0) -> np.ndarray:
    shape = (HEIGHT, WIDTH, 3) if channels == 3 else (HEIGHT, WIDTH)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def written(path, array, **options):
    options.setdefault("photometric", "rgb" if array.ndim == 3 else "minisblack")
    tifffile.imwrite(path, array, **options)
    return path


def made(path, value_range=None) -> TiffParts:
    parts = tiff_parts(path, value_range)
    assert parts is not None
    return parts


PLACES = [
    np.s_[:, :],
    np.s_[0:1, 0:1],
    np.s_[30:97, 50:180],
    np.s_[140:, 200:],
    np.s_[5:120:7, 3:200:13],
    np.s_[10:20],
    np.s_[40:40, :],
    np.s_[-9:, :-200],
]
LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 16},
    "strips of one row": {"rowsperstrip": 1},
    "tiles": {"tile": (64, 48)},
    "deflate": {"compression": "zlib", "rowsperstrip": 40},
    "deflate in tiles, differences": {"compression": "zlib", "tile": (32, 64), "predictor": True},
    "big-endian": {"byteorder": ">"},
    "big-endian, deflate": {"byteorder": ">", "compression": "zlib", "tile": (16, 16)},
    "BigTIFF": {"bigtiff": True, "tile": (64, 64)},
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_those_of_the_whole(tmp_path, layout, dtype, channels):
    path = written(tmp_path / "a.tif", pixels(dtype, channels), **LAYOUTS[layout])
    whole, parts = read_image(path), made(path)
    assert (parts.shape, parts.size, parts.dtype) == (whole.shape, whole.size, whole.dtype)
    for place in PLACES:
        np.testing.assert_array_equal(parts[place], whole[place], err_msg=str(place))
    np.testing.assert_array_equal(np.asarray(parts), whole)


def test_a_value_range_and_a_colour_profile_are_applied(tmp_path):
    path = written(tmp_path / "a.tif", pixels(np.uint16) // 16, rowsperstrip=20)
    whole = read_image(path, (100, 4000))
    assert whole.max() == 255
    np.testing.assert_array_equal(made(path, (100, 4000))[20:90, 7:77], whole[20:90, 7:77])
    for name, array in (("b", pixels()), ("c", pixels(channels=1))):
        profile = icc_profile(2.2, ADOBE_RGB) if array.ndim == 3 else icc_profile(1.8)
        path = tmp_path / f"{name}.tif"
        Image.fromarray(array).save(path, icc_profile=profile)
        whole, plain = read_image(path), array if array.ndim == 3 else array[..., None]
        assert np.abs(whole.astype(int) - plain).max() > 5  # it says something
        np.testing.assert_array_equal(made(path)[33:99, 100:], whole[33:99, 100:])


NOT_BY_PARTS = {
    "PNG": lambda path: Image.fromarray(pixels()).save(path, "PNG"),
    "alpha": lambda path: Image.fromarray(np.dstack([pixels(), pixels(channels=1)])).save(path),
    "palette": lambda path: Image.fromarray(pixels()).quantize(16).save(path),
    "turned": lambda path: Image.fromarray(pixels()).save(path, tiffinfo={274: 6}),
    "planes": lambda path: written(path, pixels().transpose(2, 0, 1), planarconfig="separate"),
    "white is zero": lambda path: written(path, pixels(channels=1), photometric="miniswhite"),
    "signed": lambda path: written(path, pixels(channels=1).astype(np.int16)),
    "float": lambda path: written(path, pixels(channels=1).astype(np.float32)),
    "JPEG inside": lambda path: Image.fromarray(pixels()).save(path, compression="jpeg"),
    "LZW without its codec": lambda path: Image.fromarray(pixels()).save(
        path, compression="tiff_lzw"
    ),
    "two levels": lambda path: Image.fromarray(pixels(channels=1)).convert("1").save(path),
    "empty": lambda path: path.write_bytes(b""),
    "no file": lambda path: None,
}


@pytest.mark.parametrize("kind", NOT_BY_PARTS)
def test_what_is_read_as_a_whole(tmp_path, kind):
    if kind.startswith("LZW") and importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed, and LZW is read by parts")
    path = tmp_path / "a.tif"
    NOT_BY_PARTS[kind](path)
    assert tiff_parts(path) is None


def test_only_large_files_are_read_by_parts(tmp_path, monkeypatch):
    path = written(tmp_path / "a.tif", pixels())
    monkeypatch.setattr(room, "LEAST_PIXELS", HEIGHT * WIDTH)
    assert tiff_parts(path) is not None
    monkeypatch.setattr(room, "LEAST_PIXELS", HEIGHT * WIDTH + 1)
    assert tiff_parts(path) is None
    assert tiff_parts(io.BytesIO(path.read_bytes())) is None


def test_a_strip_that_holds_nearly_all_is_no_part(tmp_path, monkeypatch):
    path = written(tmp_path / "a.tif", pixels(), compression="zlib", rowsperstrip=HEIGHT)
    monkeypatch.setattr(room, "_MOST_OF_A_SEGMENT", pixels().nbytes - 1)
    assert tiff_parts(path) is None
    assert tiff_parts(written(path, pixels())) is not None  # bytes of the file are parts anyway


@pytest.mark.parametrize("layout", ["one strip", "tiles", "deflate"])
def test_a_file_that_lacks_pixels_is_left_to_the_whole_reading(tmp_path, layout):
    path = written(tmp_path / "a.tif", pixels(), **LAYOUTS[layout])
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    assert tiff_parts(path) is None


@pytest.mark.parametrize("layout", ["one strip", "tiles", "deflate"])
def test_a_part_that_cannot_be_read_any_more_is_an_image_error(tmp_path, layout):
    path = written(tmp_path / "a.tif", pixels(), **LAYOUTS[layout])
    parts = made(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"cannot read .*a\.tif"):
        parts[:]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        parts[100:]


@pytest.mark.parametrize("layout", ["deflate", "deflate in tiles, differences"])
def test_a_strip_that_decodes_to_too_little_is_an_image_error(tmp_path, layout):
    """As of the whole; the memory behind what is there would be anything."""
    path = written(tmp_path / "a.tif", pixels(np.uint16), **LAYOUTS[layout])
    with tifffile.TiffFile(path) as file:
        offset, count = (x[-1] for x in (file.pages[0].dataoffsets, file.pages[0].databytecounts))
    data = bytearray(path.read_bytes())
    short = zlib.compress(zlib.decompress(bytes(data[offset : offset + count]))[:-2400])
    data[offset : offset + count] = short.ljust(count, b"\0")
    path.write_bytes(data)
    with pytest.raises(ImageError):
        read_image(path)
    parts = made(path)
    parts[:10, :10]
    with pytest.raises(ImageError, match=r"cannot read .*a\.tif"):
        parts[-1:, -1:]


def test_wrong_indices_are_refused(tmp_path):
    parts = made(written(tmp_path / "a.tif", pixels()))
    for wrong in (3, (slice(None), 3), (slice(None),) * 3):
        with pytest.raises(TypeError, match="one or two slices"):
            parts[wrong]
    with pytest.raises(ValueError, match="steps must be above 0"):
        parts[::-1]


@pytest.mark.parametrize("layout", ["strips", "tiles"])
def test_memory_is_that_of_the_part_and_of_what_is_kept(tmp_path, monkeypatch, layout):
    """Of compressed files the strips and tiles last used are kept, up to a bound."""
    array = np.zeros((4000, 2000, 3), np.uint8)
    path = written(tmp_path / "a.tif", array, compression="zlib", **LAYOUTS[layout])
    monkeypatch.setattr(room, "_KEPT", 1 << 20)
    monkeypatch.setattr(room, "_AHEAD", 64)
    parts = made(path)
    tracemalloc.start()
    for top in range(0, 4000, 200):
        for left in range(0, 2000, 200):
            parts[top : top + 200, left : left + 200]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000 < array.nbytes / 5


def test_each_strip_is_decoded_once_where_tiles_lie_side_by_side(tmp_path, monkeypatch):
    path = written(tmp_path / "a.tif", pixels(), compression="zlib", rowsperstrip=8)
    parts = made(path)
    decoded = []
    decode = parts._decode
    monkeypatch.setattr(parts, "_decode", lambda data, i: decoded.append(i) or decode(data, i))
    for left in range(0, WIDTH - 64, 48):
        parts[16:80, left : left + 64]
    assert sorted(decoded) == list(range(2, 10))
