"""Encoded pictures that several test files read."""

from __future__ import annotations

import io
import struct

import numpy as np
import tifffile
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


# Columns: XYZ of red, green and blue, relative to D50.
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def icc_profile(gamma: float, primaries: np.ndarray | None = None) -> bytes:
    """A version 2 profile of RGB with these primaries, of grey without, and one gamma."""
    curve = b"curv" + struct.pack(">IIH2x", 0, 1, round(gamma * 256))
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249))}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
            tags |= {name + b"XYZ": _xyz(column), name + b"TRC": curve}
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    header = struct.pack(">I4xI", at + len(body), 0x02400000) + b"mntr"
    header += (b"GRAY" if primaries is None else b"RGB ") + b"XYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + _xyz((0.9642, 1.0, 0.8249))[8:]
    return header.ljust(128, b"\0") + table + body


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def as_srgb(levels: np.ndarray, gamma: float, primaries: np.ndarray | None = None) -> np.ndarray:
    """The levels (H, W, 3) that such a profile means, as sRGB levels in float64."""
    linear = (levels / 255) ** gamma
    if primaries is not None:
        linear = linear @ primaries.T @ np.linalg.inv(SRGB).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
