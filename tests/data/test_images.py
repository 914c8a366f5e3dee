"""Decoding of every kind of image, and batches decoded ahead."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_images import encoded, tiff
from PIL import Image, ImageOps

from efficientad.data.decoding import (
    EncodedImage,
    ImageError,
    MissingImage,
    image_size,
    read_image,
)
from efficientad.data.images import load_batches, resize_image, to_tensor

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 9), dtype=np.uint16)
DEEP[0, :4] = (0, 128, 129, 65535)
DEEP_COLOUR = RNG.integers(0, 65536, (7, 9, 3), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (7, 9), dtype=np.uint8)


def deep_png(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


def to8(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels / 257).astype(np.uint8)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    data = encoded(Image.fromarray(COLOUR))
    path.write_bytes(data)
    sources = [path, str(path), data, bytearray(data), io.BytesIO(data), Image.fromarray(COLOUR)]
    sources += [COLOUR, torch.from_numpy(COLOUR), COLOUR[::-1][::-1], np.asfortranarray(COLOUR)]
    for source in sources:
        result = read_image(source)
        assert (result.dtype, result.shape) == (np.uint8, (7, 9, 3))
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, COLOUR)
        if not isinstance(source, io.BytesIO):
            assert image_size(source) == (7, 9)
    assert read_image(COLOUR) is COLOUR


def test_a_file_object_stays_open() -> None:
    stream = io.BytesIO(encoded(Image.fromarray(COLOUR)))
    for _ in range(2):
        np.testing.assert_array_equal(read_image(stream), COLOUR)
    picture = Image.fromarray(COLOUR)
    read_image(picture)
    np.testing.assert_array_equal(np.asarray(picture), COLOUR)


GREY = COLOUR[..., 0]
PALETTE = Image.fromarray(COLOUR).quantize(7)
CASES = {
    "grey": (encoded(Image.fromarray(GREY)), GREY[..., None]),
    "1 bit": (encoded(Image.fromarray(GREY > 99)), 255 * (GREY > 99)[..., None]),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with alpha": (
        encoded(PALETTE, transparency=bytes(range(7))),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "RGBA": (encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]))), COLOUR),
    "LA": (encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), GREY[..., None]),
    "16-bit grey PNG": (encoded(Image.fromarray(DEEP)), to8(DEEP)[..., None]),
    "16-bit grey TIFF": (tiff(DEEP), to8(DEEP)[..., None]),
    "16-bit grey TIFF, big endian": (tiff(DEEP, byteorder=">"), to8(DEEP)[..., None]),
    "16-bit grey PPM": (encoded(Image.fromarray(DEEP), "PPM"), to8(DEEP)[..., None]),
    "16-bit white is zero": (
        tiff(DEEP, photometric="miniswhite"),
        255 - to8(DEEP)[..., None],
    ),
    "16-bit colour TIFF": (tiff(DEEP_COLOUR, photometric="rgb"), to8(DEEP_COLOUR)),
    "16-bit colour TIFF, compressed": (
        tiff(DEEP_COLOUR, photometric="rgb", compression="zlib"),
        to8(DEEP_COLOUR),
    ),
    "16-bit colour TIFF, planes": (
        tiff(DEEP_COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        to8(DEEP_COLOUR),
    ),
    "16-bit colour PNG, high bytes": (deep_png(DEEP_COLOUR), DEEP_COLOUR >> 8),
    "CMYK": (
        encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
        np.asarray(Image.fromarray(COLOUR).convert("CMYK").convert("RGB")),
    ),
    "GIF": (encoded(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "BMP": (encoded(Image.fromarray(COLOUR), "BMP"), COLOUR),
    "WebP": (encoded(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
}


@pytest.mark.parametrize("kind", CASES)
def test_kinds_of_pixels(kind: str) -> None:
    data, expected = CASES[kind]
    result = read_image(data)
    assert (result.dtype, result.shape) == (np.uint8, (7, 9, 3))
    np.testing.assert_array_equal(result, np.broadcast_to(expected, (7, 9, 3)))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = read_image(ramp)[..., 0]
    np.testing.assert_array_equal(result, np.round(ramp * (255 / 65535)))
    assert (np.abs(result.astype(int) - (ramp >> 8)) <= 1).all()  # what 16-bit colour PNG may lose


def opened_once(data: bytes, value_range: tuple[float, float] | None = None) -> EncodedImage:
    """Checks that a file that is opened once gives what `read_image` gives."""
    image = EncodedImage(data)
    expected = read_image(data, value_range)
    assert image.size == expected.shape[:2]
    np.testing.assert_array_equal(image.pixels(value_range), expected)
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "deep TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_as_a_viewer_shows_it(kind: str, orientation: int) -> None:
    if kind == "deep TIFF":
        data = tiff(DEEP, extratags=[(274, "H", 1, orientation, True)])
        upright = Image.fromarray(to8(DEEP))
        exif = upright.getexif()
        exif[274] = orientation
        expected = np.asarray(ImageOps.exif_transpose(upright))
        expected = np.repeat(expected[..., None], 3, axis=2)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        data = encoded(Image.fromarray(COLOUR), kind, exif=exif)
        with Image.open(io.BytesIO(data)) as picture:
            expected = np.asarray(ImageOps.exif_transpose(picture))
    result = read_image(data)
    np.testing.assert_array_equal(result, expected)
    assert image_size(data) == result.shape[:2] == ((7, 9) if orientation < 5 else (9, 7))
    opened_once(data)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"not an image", "not an image file"),
        (b"", "not an image file"),
        (encoded(Image.fromarray(COLOUR))[:60], "."),
        (encoded(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "JPEG")[:400], "(?i)truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file"),
        (tiff(GREY.astype(np.float32)), "floating point"),
        (tiff(DEEP.astype(np.int32) * 9), "32-bit"),
        (tiff(np.dstack([COLOUR, COLOUR]), photometric="rgb", planarconfig="contig"), "6 channels"),
        (GREY.astype(np.float32), "uint8 or uint16"),
        (COLOUR.transpose(2, 0, 1), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (GREY > 9, "uint8 or uint16"),
    ],
)
def test_unreadable_images_say_why(source: object, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(source)
    assert caught.value.reason in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(ImageError, match=r"broken\.png") as caught:
        read_image(broken)
    assert caught.value.name == str(broken)
    with pytest.raises(ImageError):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("cannot be one")
    with pytest.raises(
        ImageError, match=r"text\.png: not an image file that is read: it is a text$"
    ):
        read_image(tmp_path / "text.png")
    for read in (read_image, image_size):
        with pytest.raises(
            MissingImage, match=r"cannot read .*missing\.png: no such file$"
        ) as gone:
            read(tmp_path / "missing.png")
        assert isinstance(gone.value, ImageError)
        assert isinstance(gone.value, FileNotFoundError)
    with pytest.raises(TypeError, match="int"):
        read_image(3)


def test_resize() -> None:
    assert resize_image(COLOUR, (7, 9)) is COLOUR
    big = np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))
    small = resize_image(big, (7, 9))
    assert small.shape == (7, 9, 3)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    # Antialiased: each output pixel averages many stripes; plain bilinear would give 0 or 200.
    assert np.abs(resize_image(stripes, (8, 8)).astype(int) - 100).max() <= 4
    assert resize_image(COLOUR, (3, 14)).shape == (3, 14, 3)
    with pytest.raises(ValueError, match="uint8"):
        resize_image(COLOUR.astype(np.float32), (7, 9))


def test_to_tensor() -> None:
    tensor = to_tensor([COLOUR, 255 - COLOUR])
    assert (tensor.shape, tensor.dtype) == ((2, 3, 7, 9), torch.float32)
    assert tensor.is_contiguous()
    expected = torch.from_numpy(COLOUR).permute(2, 0, 1).float() / 255
    assert torch.equal(tensor[0], expected)


def pictures(n: int) -> list[np.ndarray]:
    return [np.full((5 + i % 3, 6, 3), i, np.uint8) for i in range(n)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 1), (7, 3), (8, 4), (3, 8)])
def test_batches_keep_order(n: int, batch_size: int, workers: int) -> None:
    sources = pictures(n)
    batches = list(load_batches(iter(sources), (8, 10), batch_size=batch_size, workers=workers))
    assert [len(batch.indices) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [i for batch in batches for i in batch.indices] == list(range(n))
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 3, 8, 10)
        for i, image, size, source in zip(
            batch.indices, batch.images, batch.source_sizes, batch.sources, strict=True
        ):
            assert torch.equal(image, torch.full((3, 8, 10), i / 255))
            assert size == (5 + i % 3, 6)
            assert source is sources[i]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_not_fatal(tmp_path: Path, workers: int) -> None:
    sources: list[object] = list(pictures(6))
    sources[2] = b"broken"
    sources[5] = tmp_path / "missing.png"
    failed = []
    batches = list(
        load_batches(
            sources,
            (8, 8),
            batch_size=2,
            workers=workers,
            on_error=lambda index, source, error: failed.append((index, source, error)),
        )
    )
    assert [batch.indices for batch in batches] == [[0, 1], [3, 4]]
    assert [(index, source) for index, source, _ in failed] == [(2, b"broken"), (5, sources[5])]
    assert "missing.png" in str(failed[1][2])
    stream = load_batches(sources, (8, 8), batch_size=2, workers=workers)
    assert next(stream).indices == [0, 1]
    with pytest.raises(ImageError) as kept:
        next(stream)
    assert kept.tb
    assert not decoders()


def decoders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("efficientad-ahead")]


def test_reads_ahead_a_little_and_stops_when_closed() -> None:
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield COLOUR

    stream = load_batches(endless(), (7, 9), batch_size=4, workers=2)
    for _ in range(50):
        next(stream)
    assert 200 <= taken <= 200 + 4 + 2 * 2
    assert decoders()
    stream.close()
    assert not decoders()


def test_batches_refuse() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        load_batches([], (8, 8), batch_size=0)
    with pytest.raises(TypeError):
        list(load_batches([3], (8, 8)))
    assert not decoders()


def edited(data: bytes, tag: int, field: int, value: int) -> bytes:
    """A little-endian TIFF with another tag, count or value (field 0, 4, 8) in one entry."""
    out = bytearray(data)
    (directory,) = struct.unpack_from("<I", data, 4)
    for entry in range(directory + 2, directory + 2 + 12 * data[directory], 12):
        if struct.unpack_from("<H", data, entry) == (tag,):
            struct.pack_into("<I" if field else "<H", out, entry + field, value)
    assert bytes(out) != data
    return bytes(out)


LARGER = np.tile(DEEP, (5, 4))
STRIPS, TILES = tiff(LARGER, rowsperstrip=16), tiff(LARGER, tile=(16, 16), compression="zlib")


@pytest.mark.parametrize(
    "source",
    [
        edited(STRIPS, 273, 4, 1),  # one offset for all
        edited(STRIPS, 279, 0, 60000),  # no byte counts
        edited(STRIPS, 257, 8, LARGER.shape[0] + 40),  # more rows than there are
        edited(TILES, 324, 4, 1),
        edited(TILES, 256, 8, LARGER.shape[1] + 40),
        edited(tiff(LARGER.astype(np.uint8)), 257, 8, LARGER.shape[0] + 40),
        edited(tiff(LARGER.astype(np.uint8), rowsperstrip=16), 273, 4, 1),
        edited(tiff(LARGER), 279, 8, 0),
        edited(tiff(LARGER, compression="zlib"), 257, 8, LARGER.shape[0] + 40),
    ],
)
def test_a_tiff_without_all_of_its_pixels_is_refused(source):
    """tifffile fills what is missing with zeros."""
    with pytest.raises(ImageError):
        read_image(source)


@pytest.mark.parametrize("chunk", ["eXIf", "iTXt"])
def test_a_png_that_is_turned_by_a_chunk_behind_its_pixels(chunk):
    """As the format allows; the header alone would say the size of the pixels as they lie."""
    exif = Image.Exif()
    exif[274] = 6
    plain = encoded(Image.fromarray(COLOUR))
    if chunk == "eXIf":
        content = exif.tobytes()[6:]
    else:
        content = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    kind = chunk.encode()
    extra = struct.pack(">I", len(content)) + kind + content
    extra += struct.pack(">I", zlib.crc32(kind + content))
    data = plain[:-12] + extra + plain[-12:]
    assert read_image(data).shape[:2] == image_size(data) == COLOUR.shape[1::-1]
    opened_once(data)
    assert image_size(plain) == COLOUR.shape[:2]


def test_a_file_that_is_opened_once_says_what_it_is_and_gives_its_samples():
    assert opened_once(encoded(Image.fromarray(COLOUR), "JPEG")).format == "JPEG"
    assert opened_once(tiff(DEEP), (0, 4000)).format == "TIFF"
    assert opened_once(encoded(Image.fromarray(DEEP)), (0, 4000)).format == "PNG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_that_is_opened_once_fails_as_it_does_otherwise(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), kind)[:-2000]
    image = EncodedImage(data)
    assert image.size == (64, 64)
    with pytest.raises(ImageError) as expected:
        read_image(data)
    with pytest.raises(ImageError) as found:
        image.pixels()
    assert str(found.value) == str(expected.value)
    with pytest.raises(ImageError, match="an image of 7 bytes"):
        EncodedImage(b"nothing")
