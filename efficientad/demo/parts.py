"""A small inspection data set, drawn by rule.

The part is a brushed-metal plate with four drilled holes, a printed label and a row of five
coloured fuses. It has logical rules: the fuses stand in a fixed order, there are exactly five of
them, and every corner has its hole. Good parts differ in position, rotation, light and texture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from efficientad.demo.shapes import (
    CANVAS,
    FUSE_COLORS,
    FUSE_COLUMNS,
    FUSE_ROW,
    FUSE_SIZE,
    HOLE_RADIUS,
    HOLES,
    LABEL,
    PLATE,
    SUPERSAMPLE,
    Box,
    bench,
    box_around,
    draw_hole,
    draw_label,
    fuse_image,
    metal,
    scaled,
    to_image,
)

STRUCTURAL = ("scratch", "stain", "missing_hole")
LOGICAL = ("wrong_order", "missing_part", "extra_part")
DEFECTS = STRUCTURAL + LOGICAL

SPARE_PLACES = ((72, 126), (248, 126), (64, 158), (256, 158))


class _Scene:
    """A part being drawn: the supersampled picture, its defect's mask, and its random stream."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.part = metal(rng)
        self.mask = Image.new("L", self.part.size)
        self.holes = list(HOLES)
        self.fuses = list(zip(FUSE_COLUMNS, [FUSE_ROW] * 5, FUSE_COLORS, strict=True))

    def jitter(self, spread: float) -> float:
        return float(self.rng.uniform(-spread, spread))

    def mark(self, box: Box) -> None:
        ImageDraw.Draw(self.mask).rectangle(box, fill=255)

    def draw_furniture(self) -> None:
        for hole in self.holes:
            draw_hole(ImageDraw.Draw(self.part), *hole)
        label_x, label_y = (LABEL[0] + LABEL[2]) / 2, (LABEL[1] + LABEL[3]) / 2
        draw_label(self.part, label_x + self.jitter(0.8), label_y + self.jitter(0.8))
        shadow = Image.new("L", self.part.size)
        placed = [(x + self.jitter(0.7), y + self.jitter(0.7), color) for x, y, color in self.fuses]
        half = FUSE_SIZE[0] / 2, FUSE_SIZE[1] / 2
        for x, y, _ in placed:
            ImageDraw.Draw(shadow).rectangle(box_around(x + 1.5, y + 2, *half), fill=110)
        self.part.paste((20, 22, 26), mask=shadow.filter(ImageFilter.BoxBlur(3)))
        for x, y, color in placed:
            fuse = fuse_image(color)
            corner = round((x - half[0]) * SUPERSAMPLE), round((y - half[1]) * SUPERSAMPLE)
            self.part.paste(fuse, corner, fuse)


# ---- defects: `_BEFORE` changes what is drawn, `_AFTER` draws over it; each marks its mask ------


def _missing_hole(scene: _Scene) -> None:
    x, y = scene.holes.pop(int(scene.rng.integers(len(scene.holes))))
    ImageDraw.Draw(scene.mask).ellipse(box_around(x, y, HOLE_RADIUS + 3, HOLE_RADIUS + 3), fill=255)


def _wrong_order(scene: _Scene) -> None:
    a, b = sorted(int(i) for i in scene.rng.choice(len(scene.fuses), 2, replace=False))
    (xa, ya, color_a), (xb, yb, color_b) = scene.fuses[a], scene.fuses[b]
    scene.fuses[a], scene.fuses[b] = (xa, ya, color_b), (xb, yb, color_a)
    for x, y in ((xa, ya), (xb, yb)):
        scene.mark(box_around(x, y, FUSE_SIZE[0] / 2 + 1, FUSE_SIZE[1] / 2 + 1))


def _missing_part(scene: _Scene) -> None:
    x, y, _ = scene.fuses.pop(int(scene.rng.integers(len(scene.fuses))))
    scene.mark(box_around(x, y, FUSE_SIZE[0] / 2 + 1, FUSE_SIZE[1] / 2 + 1))


def _extra_part(scene: _Scene) -> None:
    x, y = SPARE_PLACES[int(scene.rng.integers(len(SPARE_PLACES)))]
    color = FUSE_COLORS[int(scene.rng.integers(len(FUSE_COLORS)))]
    scene.fuses.append((x, y, color))
    scene.mark(box_around(x, y, FUSE_SIZE[0] / 2 + 1, FUSE_SIZE[1] / 2 + 1))


def _scratch(scene: _Scene) -> None:
    """A thin bent line across bare metal: dark, with a bright burr beside it."""
    rng = scene.rng
    x, y = rng.uniform(90, 230), rng.choice([rng.uniform(145, 163), rng.uniform(232, 252)])
    angle = rng.uniform(-0.6, 0.6) + rng.choice([0, math.pi])
    step = rng.uniform(34, 62) / 8
    points = [(x, y)]
    for _ in range(8):
        angle += rng.normal(0, 0.1)
        x = float(np.clip(x + step * math.cos(angle), PLATE[0] + 8, PLATE[2] - 8))
        y = float(np.clip(y + step * math.sin(angle), PLATE[1] + 8, PLATE[3] - 8))
        points.append((x, y))
    draw = ImageDraw.Draw(scene.part)
    path = [scaled(px, py) for px, py in points]
    burr = [scaled(px + 0.3, py + 1.1) for px, py in points]
    draw.line(burr, fill=(226, 229, 233), width=3, joint="curve")
    draw.line(path, fill=(72, 74, 80), width=int(rng.integers(3, 6)), joint="curve")
    ImageDraw.Draw(scene.mask).line(path, fill=255, width=5 * SUPERSAMPLE, joint="curve")


def _stain(scene: _Scene) -> None:
    """A translucent brownish puddle with a darker rim and an uneven outline."""
    rng = scene.rng
    x, y = rng.uniform(70, 250), rng.choice([rng.uniform(146, 164), rng.uniform(224, 246)])
    turns = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = np.full(60, rng.uniform(10, 17))
    for k in (2, 3, 5):
        radius *= 1 + rng.uniform(0.03, 0.14) * np.cos(k * turns + rng.uniform(0, 6.3))
    outline = [
        scaled(x + 1.3 * r * math.cos(t), y + 0.85 * r * math.sin(t))
        for r, t in zip(radius, turns, strict=True)
    ]
    blot = Image.new("L", scene.part.size)
    ImageDraw.Draw(blot).polygon(outline, fill=255)
    inner = blot.filter(ImageFilter.BoxBlur(5))
    rim = ImageChops.subtract(blot, inner)
    strength = float(rng.uniform(0.4, 0.62))
    scene.part.paste((104, 78, 46), mask=inner.point(lambda v: int(v * strength)))
    scene.part.paste((70, 50, 28), mask=rim.point(lambda v: int(v * 0.8)))
    scene.mask.paste(255, mask=blot)


_BEFORE: dict[str, Callable[[_Scene], None]] = {
    "missing_hole": _missing_hole,
    "wrong_order": _wrong_order,
    "missing_part": _missing_part,
    "extra_part": _extra_part,
}
_AFTER: dict[str, Callable[[_Scene], None]] = {"scratch": _scratch, "stain": _stain}


def draw_part(
    rng: np.random.Generator, defect: str | None = None, size: tuple[int, int] = (CANVAS, CANVAS)
) -> tuple[Image.Image, Image.Image]:
    """Draw one part.

    Args:
        rng: every random choice comes from it.
        defect: one of `DEFECTS`, or None for a good part.
        size: (height, width) in pixels.

    Returns:
        (picture RGB, mask L with 255 on the defect and 0 elsewhere), both of `size`.

    Raises:
        ValueError: an unknown defect.
    """
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"defect is {defect!r}; it must be None or one of {', '.join(DEFECTS)}")
    scene = _Scene(rng)
    if defect in _BEFORE:
        _BEFORE[defect](scene)
    scene.draw_furniture()
    if defect in _AFTER:
        _AFTER[defect](scene)
    return _photograph(scene, size)


def _photograph(scene: _Scene, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Cut the plate out, lay it on the mat a little askew, light it, expose it with noise."""
    rng = scene.rng
    plate = Image.new("L", scene.part.size)
    ImageDraw.Draw(plate).rounded_rectangle(scaled(*PLATE), 14 * SUPERSAMPLE, 255)
    edge = ImageChops.subtract(plate, plate.filter(ImageFilter.BoxBlur(3)))
    lit = ImageChops.subtract(plate, ImageChops.offset(plate, 3, 3))
    scene.part.paste((92, 95, 100), mask=edge)
    scene.part.paste((226, 229, 233), mask=lit)

    angle = scene.jitter(1.0)
    shift = scaled(scene.jitter(1.8), scene.jitter(1.8))

    def lay(image: Image.Image) -> Image.Image:
        # Pillow shifts by fractions of a pixel, too; its annotation knows whole ones only.
        return image.rotate(angle, Image.Resampling.BILINEAR, translate=shift)  # type: ignore[arg-type]

    picture, outline = bench(rng), lay(plate)
    shadow = ImageChops.offset(outline, 8, 11).filter(ImageFilter.BoxBlur(9))
    picture.paste((14, 15, 18), mask=shadow.point(lambda v: int(v * 0.75)))
    picture.paste(lay(scene.part), mask=outline)
    picture = picture.resize((size[1], size[0]), Image.Resampling.BOX)
    mask = scene.mask
    if mask.getbbox():
        mask = ImageChops.darker(lay(mask), outline)
    mask = mask.resize(picture.size, Image.Resampling.BOX).point(lambda v: 255 * (v >= 128))

    y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, size[1], dtype=np.float32)[None]
    light = 1 + scene.jitter(0.035) + scene.jitter(0.03) * x + (scene.jitter(0.03) - 0.02) * y
    light = light - 0.05 * (x * x + y * y)
    noise = rng.standard_normal((*size, 3), dtype=np.float32) * 1.3
    exposed = np.asarray(picture, np.float32) * light[..., None] + noise
    return to_image(exposed), mask


def write_dataset(
    root: str | Path,
    *,
    train: int = 150,
    good: int = 12,
    per_defect: int = 6,
    size: tuple[int, int] = (CANVAS, CANVAS),
    seed: int = 0,
) -> Path:
    """Write the data set in MVTec AD's layout: train/good, test/<defect>, ground_truth/<defect>.

    Every picture has its own random stream from (seed, folder, number): it does not change when the
    other counts do. Existing files of the same names are replaced, others are left alone.

    Args:
        root: folder to write into; made if it is missing.
        train, good: pictures in train/good and in test/good.
        per_defect: pictures of each of `DEFECTS` in test/<defect>.
        size: (height, width) of the RGB PNGs, in pixels, each at least 32.
        seed: of all pictures, >= 0.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: a negative count or seed, or a size below 32.
    """
    for name, value in (("train", train), ("good", good), ("per_defect", per_defect)):
        if value < 0:
            raise ValueError(f"{name} is {value}; a number of pictures must be >= 0")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be >= 0")
    if min(size) < 32:
        raise ValueError(f"size is {size}; height and width must be at least 32 pixels")
    root = Path(root)
    folders: list[tuple[str, str | None, int]] = [
        ("train/good", None, train),
        ("test/good", None, good),
        *((f"test/{defect}", defect, per_defect) for defect in DEFECTS),
    ]
    jobs = []
    for stream, (folder, defect, count) in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        if defect:
            (root / "ground_truth" / defect).mkdir(parents=True, exist_ok=True)
        jobs += [(folder, defect, stream, i) for i in range(count)]

    def draw(job: tuple[str, str | None, int, int]) -> None:
        folder, defect, stream, i = job
        picture, mask = draw_part(np.random.default_rng([seed, stream, i]), defect, size)
        picture.save(root / folder / f"{i:03d}.png", compress_level=2)
        if defect:
            mask.save(root / "ground_truth" / defect / f"{i:03d}_mask.png")

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(draw, jobs))
    return root
