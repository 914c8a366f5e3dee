"""Mutated picture files: read as uint8 (H, W, 3), or refused by ImageError."""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzz_common import Finding, Outcome, attempt, mutated, numbers_of
from helpers_images import ADOBE_RGB, encoded, icc_profile, tiff
from PIL import Image

from efficientad.data.decoding import ImageError, image_shape, read_image
from efficientad.data.masks import read_levels
from efficientad.data.remarks import picture_notes

SIZE = (37, 29)


def seeds() -> dict[str, bytes]:
    """A small drawn picture in every format, mode and compression that matters."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 6, y * 8, (x * y) % 256], -1).astype(np.uint8)
    colour = Image.fromarray(pixels)
    grey, alpha = colour.convert("L"), colour.convert("RGBA")
    alpha.putalpha(grey)
    deep = np.asarray(grey).astype(np.uint16) * 257
    deep_colour = pixels.astype(np.uint16) * 257
    profile = icc_profile(2.2, ADOBE_RGB)
    exif = Image.Exif()
    exif[274] = 6
    palette = colour.quantize(17)
    pages = {"save_all": True, "append_images": [colour.transpose(Image.Transpose.ROTATE_180)]}
    found = {
        "JPEG": encoded(colour, "JPEG", exif=exif, icc_profile=profile),
        "JPEG progressive": encoded(colour, "JPEG", progressive=True),
        "JPEG grey": encoded(grey, "JPEG"),
        "JPEG CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "PNG": encoded(colour, exif=exif, icc_profile=profile),
        "PNG grey": encoded(grey, icc_profile=icc_profile(1.8)),
        "PNG alpha": encoded(alpha),
        "PNG palette": encoded(palette, transparency=3),
        "PNG 1 bit": encoded(grey.convert("1")),
        "PNG 16 bits": encoded(Image.fromarray(deep)),
        "PNG animated": encoded(colour, **pages),
        "TIFF": encoded(colour, "TIFF"),
        "TIFF LZW": encoded(colour, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(colour, "TIFF", compression="jpeg"),
        "TIFF packbits": encoded(grey, "TIFF", compression="packbits"),
        "TIFF fax": encoded(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF palette": encoded(palette, "TIFF"),
        "TIFF Lab": encoded(Image.new("LAB", SIZE, (120, 90, 40)), "TIFF"),
        "TIFF CMYK": encoded(colour.convert("CMYK"), "TIFF"),
        "TIFF pages": encoded(colour, "TIFF", **pages),
        "TIFF 16 bits": tiff(deep),
        "TIFF 16 bits, big": tiff(deep, byteorder=">"),
        "TIFF 16 bits, colour": tiff(deep_colour, photometric="rgb", iccprofile=profile),
        "TIFF planes": tiff(
            deep_colour.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        "TIFF tiles": tiff(np.tile(deep, (2, 2)), tile=(16, 16), compression="zlib"),
        "TIFF float": tiff(deep.astype(np.float32)),
        "TIFF int32": tiff(deep.astype(np.int32), compression="zlib", predictor=True),
        "BigTIFF": tiff(deep, bigtiff=True),
        "BMP": encoded(colour, "BMP"),
        "BMP palette": encoded(palette, "BMP"),
        "BMP 1 bit": encoded(grey.convert("1"), "BMP"),
        "DIB": encoded(colour, "DIB"),
        "WebP": encoded(colour, "WEBP", exif=exif),
        "WebP lossless": encoded(alpha, "WEBP", lossless=True),
        "WebP animated": encoded(colour, "WEBP", **pages),
        "GIF": encoded(palette, "GIF"),
        "GIF animated": encoded(palette, "GIF", **pages),
        "PPM": encoded(colour, "PPM"),
        "PGM 12 bits": b"P5 %d %d 4095\n" % SIZE + (deep // 16).astype(">u2").tobytes(),
        "PGM text": b"P2 3 2 255\n0 1 2\n3 4 255\n",
        "JPEG 2000": encoded(colour, "JPEG2000"),
    }
    try:
        found["AVIF"] = encoded(colour, "AVIF")
    except (KeyError, OSError):  # a Pillow without it
        pass
    return found


def change(data: bytes, rng: random.Random) -> bytes:
    """A mutation that knows the format, or one that does not."""
    own: Callable[[bytes, random.Random], bytes] = {
        b"\x89P": _png,
        b"\xff\xd8": _jpeg,
        b"II": _tiff,
        b"MM": _tiff,
    }.get(data[:2], mutated)
    try:
        return own(data, rng) if rng.random() < 0.5 else mutated(data, rng)
    except (struct.error, IndexError, ValueError):
        return mutated(data, rng)


_WAYS = ("double", "swap", "leave out")


def _rearrange(parts: list, i: int, way: str, rng: random.Random) -> None:
    """Part `i` of a file once more at any place, swapped with another one, or left out."""
    if way == "double":
        parts.insert(rng.randrange(len(parts)), parts[i])
    elif way == "swap":
        j = rng.randrange(len(parts))
        parts[i], parts[j] = parts[j], parts[i]
    else:
        del parts[i]


def _png(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed, doubled, swapped or left out, with checksums that fit."""
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    what, i = rng.randrange(5), rng.randrange(len(chunks))
    kind, content = chunks[i]
    if what <= 1:
        if kind == b"IDAT" and rng.random() < 0.7:
            content = zlib.compress(mutated(zlib.decompress(content), rng))
        else:
            content = mutated(content, rng) if content else content
        chunks[i] = kind, content
    else:
        _rearrange(chunks, i, _WAYS[what - 2], rng)
    out = data[:8]
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content
        out += struct.pack(">I", zlib.crc32(kind + content))
    return out


def _jpeg(data: bytes, rng: random.Random) -> bytes:
    """Segments changed, doubled, swapped or left out, with lengths that fit."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        segments.append((data[at : at + 2], data[at + 4 : at + 2 + length]))
        at += 2 + length
    what, i = rng.randrange(4), rng.randrange(len(segments))
    if what == 0:
        segments[i] = segments[i][0], mutated(segments[i][1], rng)
    else:
        _rearrange(segments, i, _WAYS[what - 1], rng)
    marked = (m + struct.pack(">H", min(len(s) + 2, 65535)) + s for m, s in segments)
    return data[:2] + b"".join(marked) + data[at:]


def _tiff(data: bytes, rng: random.Random) -> bytes:
    """Entries of the first directory with another tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] != 42:
        return mutated(data, rng)
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        entry = directory + 2 + 12 * rng.randrange(count)
        field, width = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "H"), (8, "H"), (8, "I")))
        value = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 12, 32, 64, 4096, 32773, 0x7FFF, 0xFFFF))
        value += rng.choice((0, 0, 0, 1 << 16, 0x7FFF0000)) if width == "I" else 0
        struct.pack_into(order + width, out, entry + field, value)
    return bytes(out)


def check(data: bytes, path: Path, number: int) -> str:
    """Read it in every way that the package does; ImageError where it cannot be read."""
    if number % 4 == 0:
        path.write_bytes(data)
        notes = picture_notes([path])
        if not all(note.endswith(".") for note in notes):
            raise Finding(f"notes {notes}")
    value_range = (0, 4095) if number % 3 == 0 else None
    pixels = read_image(data, value_range)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise Finding(f"read as {pixels.dtype} {pixels.shape}")
    if not pixels.flags.c_contiguous:
        raise Finding("not contiguous")
    shape = image_shape(data)
    if shape.size != pixels.shape[:2]:
        raise Finding(f"the header says {shape}, the pixels are {pixels.shape}")
    if number % 4 == 0:
        levels, _, _ = read_levels(path, shape)
        if levels.shape != shape.size:
            raise Finding(f"as a mask {levels.shape}, as a picture {shape}")
    return "read"


def input_of(number: int, seed: int, found: dict[str, bytes]) -> tuple[str, bytes]:
    """(name, bytes) of the input of this number."""
    rng = numbers_of("picture", seed, number)
    kind = rng.choice(sorted(found))
    return f"picture {number} ({kind})", change(found[kind], rng)


def run(count: int, seed: int, folder: Path, first: int = 0) -> Outcome:
    """Try so many pictures."""
    began, outcome, found = time.monotonic(), Outcome(), seeds()
    path = folder / "picture"
    for number in range(first, first + count):
        name, data = input_of(number, seed, found)
        attempt(outcome, name, (ImageError,), lambda data=data, n=number: check(data, path, n))
    outcome.seconds = time.monotonic() - began
    return outcome
