"""The materials and pieces of the demonstration's part."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 320  # the part is designed in pixels of a 320 x 320 picture
SUPERSAMPLE = 2  # and drawn this much larger, then averaged down
PLATE = (34, 58, 286, 262)
HOLES = ((58, 82), (262, 82), (58, 238), (262, 238))
HOLE_RADIUS = 11
LABEL = (102, 76, 218, 134)
FUSE_ROW = 196
FUSE_COLUMNS = (92, 126, 160, 194, 228)
FUSE_SIZE = (25, 46)
FUSE_COLORS = ((196, 44, 40), (232, 176, 30), (52, 142, 66), (38, 84, 176), (226, 226, 220))

Box = tuple[float, float, float, float]


def scaled(*values: float) -> tuple[float, ...]:
    return tuple(v * SUPERSAMPLE for v in values)


def box_around(x: float, y: float, half_width: float, half_height: float) -> Box:
    left, top = scaled(x - half_width, y - half_height)
    right, bottom = scaled(x + half_width, y + half_height)
    return left, top, right, bottom


def _streaks(rng: np.random.Generator, size: int, length: int) -> np.ndarray:
    """Streaks along x, (size, size) float32 of mean 0 and spread 1: fine noise drawn out."""
    noise = rng.standard_normal((size, max(2, size // length + 1))).astype(np.float32)
    image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    drawn = np.asarray(image)
    return (drawn - drawn.mean()) / (drawn.std() + 1e-6)


def _blobs(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size), float32 with about `cells` bumps along an axis."""
    noise = rng.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


def to_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(array + 0.5, 0, 255).astype(np.uint8))


def _tinted(value: np.ndarray, tint: tuple[float, float, float]) -> Image.Image:
    grey = to_image(value)
    return Image.merge("RGB", [grey.point(lambda v, t=t: min(255, round(v * t))) for t in tint])


def metal(rng: np.random.Generator) -> Image.Image:
    """Brushed metal over the whole supersampled canvas."""
    size = CANVAS * SUPERSAMPLE
    y = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    sheen = 10 * np.exp(-((y - 0.35 + 0.1 * rng.standard_normal()) ** 2) / 0.12)
    value = 158 + sheen + 4.0 * _streaks(rng, size, 90) + 2.5 * _streaks(rng, size, 14)
    return _tinted(value, (0.985, 1.0, 1.03))


def bench(rng: np.random.Generator) -> Image.Image:
    """The dark, softly mottled mat under the part."""
    value = 46 + 2.0 * _blobs(rng, CANVAS, 9) + 2.5 * _blobs(rng, CANVAS, CANVAS // 2)
    mat = _tinted(value, (0.92, 1.0, 1.1))
    return mat.resize((CANVAS * SUPERSAMPLE,) * 2, Image.Resampling.BILINEAR)


def draw_hole(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    r = HOLE_RADIUS
    draw.ellipse(box_around(x, y, r + 2.5, r + 2.5), fill=(126, 129, 134))
    draw.ellipse(box_around(x + 0.7, y + 0.7, r + 1.6, r + 1.6), fill=(208, 212, 217))
    draw.ellipse(box_around(x, y, r, r), fill=(26, 28, 32))
    draw.ellipse(box_around(x + 1.4, y + 1.6, r - 2.2, r - 2.2), fill=(38, 41, 46))


def draw_label(part: Image.Image, x: float, y: float) -> None:
    """Paper with a coloured band, two printed lines and a bar code, always the same print."""
    draw = ImageDraw.Draw(part)
    width, height = LABEL[2] - LABEL[0], LABEL[3] - LABEL[1]
    x0, y0 = x - width / 2, y - height / 2
    shade = scaled(x0 + 1.2, y0 + 1.6, x0 + width + 1.2, y0 + height + 1.6)
    draw.rounded_rectangle(shade, 5, (112, 115, 120))
    draw.rounded_rectangle(scaled(x0, y0, x0 + width, y0 + height), 5, (226, 225, 219))
    draw.rectangle(scaled(x0, y0 + 5, x0 + width, y0 + 17), fill=(62, 112, 150))
    for top, words in ((23, (24, 15, 30)), (32, (34, 22))):
        at = x0 + 8
        for word in words:
            draw.rectangle(scaled(at, y0 + top, at + word, y0 + top + 4), fill=(120, 120, 124))
            at += word + 5
    at = x0 + 8
    bars, gaps = (3, 5, 3, 7, 3, 3, 5, 3, 7, 5, 3), (4, 6, 4, 4, 6, 4, 6, 4, 6, 4, 0)
    for bar, gap in zip(bars, gaps, strict=True):
        draw.rectangle(scaled(at, y0 + 41, at + bar, y0 + height - 5), fill=(84, 84, 90))
        at += bar + gap


def fuse_image(color: tuple[int, int, int]) -> Image.Image:
    """One fuse (RGBA, supersampled): two tin caps and a shaded, coloured body with a light edge."""
    width, height = (int(v) for v in scaled(*FUSE_SIZE))
    t = np.linspace(-1, 1, width, dtype=np.float32)
    shade = 1.05 - 0.42 * t**2 + 0.34 * np.exp(-((t + 0.42) ** 2) / 0.03)
    body = np.clip(shade[None, :, None] * np.array(color, np.float32), 0, 255)
    pixels = np.repeat(body, height, axis=0)
    cap = height // 6
    tin = np.clip(shade[None, :, None] * np.array([172, 174, 176], np.float32), 0, 255)
    pixels[:cap] = pixels[-cap:] = tin
    pixels[cap : cap + 2] = pixels[-cap - 2 : -cap] = 0.55 * tin
    fuse = to_image(pixels).convert("RGBA")
    mask = Image.new("L", fuse.size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width - 1, height - 1), 7, 255)
    fuse.putalpha(mask)
    return fuse
