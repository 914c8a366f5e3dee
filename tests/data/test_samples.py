"""What the numbers of a file mean: ranges, types, alpha, pages, colour spaces, very large ones."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers_images import encoded, tiff
from PIL import Image, ImageCms

from efficientad.data.decoding import ImageError, read_image
from efficientad.data.remarks import picture_notes
from efficientad.data.samples import levels_of

RNG = np.random.default_rng(3)
LEVELS = RNG.integers(0, 256, (9, 11), dtype=np.uint8)
LEVELS[0, :2] = 0, 255
COLOURS = RNG.integers(0, 256, (9, 11, 3), dtype=np.uint8)
TWELVE = np.round(LEVELS * (4095 / 255)).astype(np.uint16)
TWELVE_COLOURS = np.round(COLOURS * (4095 / 255)).astype(np.uint16)


def colour_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB or RGBA, which Pillow does not write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


def pgm(pixels: np.ndarray, maximum: int) -> bytes:
    height, width = pixels.shape
    return b"P5 %d %d %d\n" % (width, height, maximum) + pixels.astype(">u2").tobytes()


ALPHA = np.full((9, 11, 1), 700, np.uint16)
GREY_CASES = {
    "array": TWELVE,
    "array, big endian": TWELVE.astype(">u2"),
    "PNG": encoded(Image.fromarray(TWELVE)),
    "TIFF": tiff(TWELVE),
    "PGM of 16 bits": pgm(TWELVE, 65535),
    "PGM of 12 bits": pgm(TWELVE, 4095),
    "int16 TIFF": tiff(TWELVE.astype(np.int16)),
    "int32 TIFF": tiff(TWELVE.astype(np.int32)),
    "uint32 TIFF": tiff(TWELVE.astype(np.uint32)),
    "float32 TIFF": tiff(TWELVE.astype(np.float32)),
    "float64 array": TWELVE.astype(np.float64),
    "float16 array": np.round(LEVELS * (4095 / 255)).astype(np.float16),
    "int64 array": TWELVE.astype(np.int64),
    "float32 array": TWELVE.astype(np.float32),
    "mode I": Image.fromarray(TWELVE.astype(np.int32)),
    "mode F": Image.fromarray(TWELVE.astype(np.float32)),
}


@pytest.mark.parametrize("kind", GREY_CASES)
def test_a_value_range_gives_the_levels_back(kind: str) -> None:
    found = read_image(GREY_CASES[kind], (0, 4095))
    np.testing.assert_array_equal(found, np.repeat(LEVELS[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "source",
    [
        TWELVE_COLOURS,
        tiff(TWELVE_COLOURS, photometric="rgb"),
        tiff(TWELVE_COLOURS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        colour_png(TWELVE_COLOURS),
        colour_png(np.dstack([TWELVE_COLOURS, ALPHA])),
    ],
)
def test_a_value_range_of_colours(source: object) -> None:
    np.testing.assert_array_equal(read_image(source, (0, 4095)), COLOURS)


def test_what_lies_outside_of_a_range_is_clipped_and_8_bits_stay() -> None:
    values = np.array([[-5.0, 0.0, 0.25, 0.5, 1.0, 7.0]], np.float32)
    assert read_image(values, (0, 1))[0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]
    offset = np.array([[900, 1000, 1100, 1300]], np.uint16)
    assert read_image(offset, (1000, 1200))[0, :, 1].tolist() == [0, 0, 128, 255]
    np.testing.assert_array_equal(read_image(COLOURS, (0, 4095)), COLOURS)
    assert read_image(pgm(TWELVE, 4095))[0, :2, 0].tolist() == [0, 255]  # the file says its range


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (tiff(LEVELS.astype(np.int8)), "int8, and 8-bit integers"),
        (tiff(TWELVE.astype(np.int16)), "int16, and 16-bit integers"),
        (tiff(TWELVE.astype(np.int32)), "int32, and 32-bit integers"),
        (tiff(TWELVE.astype(np.uint32)), "uint32, and 32-bit integers"),
        (tiff(TWELVE.astype(np.float32)), "float32, and floating point numbers"),
        (TWELVE.astype(np.float64), "float64, and floating point numbers"),
        (TWELVE.astype(np.int64), "int64, and 64-bit integers"),
        (Image.fromarray(TWELVE.astype(np.float32)), "float32, and floating point numbers"),
    ],
)
def test_types_without_a_range_are_refused_by_name(source: object, named: str) -> None:
    with pytest.raises(ImageError, match=rf"pixels are {named}.*\(--max-value"):
        read_image(source)


def test_types_that_are_no_numbers_are_refused_with_a_range_too() -> None:
    for kind in ("complex64", "float64", "float16"):
        with pytest.raises(ImageError, match=f"TIFF samples of {kind} are not read"):
            read_image(tiff(TWELVE.astype(kind)), (0, 4095))
    with pytest.raises(ImageError, match="pixels are bool"):
        read_image(TWELVE > 9, (0, 1))
    with pytest.raises(ImageError, match="NaN or infinite"):
        read_image(np.array([[np.nan, 1.0]]), (0, 1))


def test_strips_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [read_image(source) for source in (encoded(Image.fromarray(COLOURS)), TWELVE_COLOURS)]
    monkeypatch.setattr("efficientad.data.samples._STRIP", 70)  # two rows of colours
    parts = [read_image(source) for source in (encoded(Image.fromarray(COLOURS)), TWELVE_COLOURS)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(levels_of(LEVELS[..., None])[..., 2], LEVELS)


def test_lab_and_cmyk() -> None:
    smooth = np.full((8, 8, 3), (200, 80, 40), np.uint8)
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(Image.fromarray(smooth), to_lab)
    for source in (lab, encoded(lab, "TIFF")):
        assert np.abs(read_image(source).astype(int) - smooth).max() <= 3
    cmyk = Image.fromarray(smooth).convert("CMYK")
    np.testing.assert_array_equal(read_image(cmyk), np.asarray(cmyk.convert("RGB")))


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_what_is_said_of_kinds_with_more_than_one_reading(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOURS)
    half = np.full((9, 11, 1), 255, np.uint8)
    opaque = Image.fromarray(np.dstack([COLOURS, half]))
    half[4] = 100
    clear = Image.fromarray(np.dstack([COLOURS, half]))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    paths = [
        saved(tmp_path / "plain.png", picture),
        saved(tmp_path / "opaque.png", opaque),
        saved(tmp_path / "clear.png", clear),
        saved(tmp_path / "srgb.png", picture, icc_profile=srgb),
        saved(tmp_path / "profile.png", picture, icc_profile=lab),
        saved(tmp_path / "cmyk.tif", picture.convert("CMYK")),
        saved(tmp_path / "pages.tif", picture, save_all=True, append_images=[picture]),
        tmp_path / "missing.png",
    ]
    notes = picture_notes(paths)
    assert [note.rpartition(": ")[2] for note in notes] == [
        "clear.png.",
        "pages.tif.",
        "cmyk.tif.",
        "profile.png.",
    ]
    assert picture_notes(paths[:2] + paths[3:4]) == []


@pytest.mark.parametrize(("bits", "said"), [(10, 1023), (12, 4095), (14, 16383), (15, None)])
def test_pictures_that_use_a_small_part_of_their_range(tmp_path: Path, bits: int, said) -> None:
    paths = []
    for number in range(3):
        pixels = RNG.integers(0, 1 << bits, (20, 20)).astype(np.uint16)
        pixels[0, :2] = 0, (1 << bits) - 1
        paths.append(saved(tmp_path / f"{number}.png", Image.fromarray(pixels)))
    notes = picture_notes(paths)
    assert len(notes) == (said is not None)
    if said:
        assert f"lie in 0 to {said}, a small part of 0 to 65535" in notes[0]
        assert f"--max-value {said} " in notes[0]
        assert picture_notes(paths, (0, said)) == []
    paths.append(saved(tmp_path / "full.png", Image.fromarray(np.full((9, 9), 65535, np.uint16))))
    assert picture_notes(paths) == []


def test_dark_8_bit_pictures_are_noted(tmp_path: Path) -> None:
    (note,) = picture_notes([saved(tmp_path / "a.png", Image.fromarray(LEVELS // 16))])
    assert "keep about 15. They are dark" in note
    assert picture_notes([saved(tmp_path / "b.png", Image.fromarray(200 + LEVELS // 16))]) == []


def test_the_limit_of_pixels_can_be_set_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (20_000, 9_000)))  # beyond Pillow's own limit
    assert read_image(data).shape == (9_000, 20_000, 3)
    monkeypatch.setenv("EFFICIENTAD_MAX_MEGAPIXELS", "150")
    rule = "20000x9000 pixels, 180 megapixels, and the limit is 150; .*EFFICIENTAD_MAX_MEGAPIXELS"
    with pytest.raises(ImageError, match=rule):
        read_image(data)
    monkeypatch.setenv("EFFICIENTAD_MAX_MEGAPIXELS", "many")
    with pytest.raises(ImageError, match="EFFICIENTAD_MAX_MEGAPIXELS is 'many'"):
        read_image(data)


def test_a_large_picture_takes_few_bytes_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python allocates, and 4 bytes a pixel where Pillow holds the picture besides."""
    monkeypatch.setattr("efficientad.data.samples._STRIP", 1 << 14)
    for data, pillow in (
        (encoded(Image.new("RGB", (3000, 2000)), "BMP"), 4),
        (encoded(Image.new("RGBA", (3000, 2000))), 4),
        (tiff(np.zeros((2000, 3000), np.uint16)), 0),
        (tiff(np.zeros((2000, 3000, 3), np.uint16), photometric="rgb"), 0),
    ):
        read_image(data)  # imports and tables
        tracemalloc.start()
        pixels = read_image(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 3 * 6e6 == pixels.nbytes < peak
        assert peak / 6e6 + pillow < 12
