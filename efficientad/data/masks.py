"""What a mask shows: the pixels of a picture that are defective.

The rules, all of them:

- A pixel's level is the largest of its colours. Palettes are looked up: an index says nothing.
- Transparency: where everything visible has one colour (white or black or red on nothing), the
  opacity is the level; otherwise the colours count as they look on black. Opacity that is the same
  everywhere says nothing.
- Levels of a few flat areas are labels: what is not 0 is defective (0 and 255, 0 and 1, several
  kinds of defects as 1, 2, 3). Where levels run from one area to the other (JPEG, smoothed or
  resized edges, soft brushes), a pixel is defective from half of the highest level on. JPEG levels
  below 8 are noise of the compression.
- A mask's own EXIF orientation is applied, as a picture's is. A mask without one that fits only the
  picture as it is stored, not as its EXIF orientation turns it, is turned with it. One that fits
  only after a quarter turn which nothing names is refused. Any other aspect is stretched onto the
  picture.
- Several masks of a picture count together, and must have one size. Of several pages the first
  counts.
- A mask of a defective picture that marks nothing keeps its picture out of the figures of the
  pixels; one that marks more than half of its picture counts as it stands. A mask of a good picture
  is looked at and does not count: the folder or the table says what is good.

What is not said plainly by the file goes with the mask as a remark (`REMARKS`), which `evaluate`
turns into a note that names the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efficientad.data.decoding import (
    ImageError,
    Shape,
    naming_errors,
    orientation_of,
    oriented,
    source_name,
)
from efficientad.data.opening import opened

REMARKS = {  # of which masks; their pictures are listed behind it
    "empty": "Masks that mark nothing though their picture is defective; its pixels do not count",
    "most": "Masks that mark more than half of their picture, which counts; see whether they mark "
    "what is good",
    "good": "Masks that mark something though their picture is good, and counts as good",
    "aspect": "Masks of another aspect than their picture, stretched onto it",
    "turned": "Masks that were turned as the EXIF orientation of their picture says",
    "upright": "Masks without an EXIF orientation for pictures that have one, which count as drawn "
    "on the picture that a viewer shows",
    "grey": "Masks that are grey in most of what they mark, from half of their highest level on",
    "pages": "Masks of several pages, of which the first counts",
}
_NOISE = 8  # levels of a JPEG below which there is nothing but its noise
_MOST_LABELS = 32
_LOSSY = ("JPEG", "MPO")


class Mask(NamedTuple):
    """Of one picture: bool (H, W), upright, and the keys of REMARKS that hold for its files."""

    pixels: np.ndarray
    remarks: frozenset[str]


class Levels(NamedTuple):
    """Of one mask file: integers (H, W) >= 0, upright on its picture, and what was found.

    lossy: the compression does not keep levels. remarks: keys of REMARKS.
    """

    levels: np.ndarray
    lossy: bool
    remarks: frozenset[str]


def read_levels(path: Path, picture: Shape) -> Levels:
    """The levels of a mask file, turned onto its picture by the rules of this module.

    Floating point levels are scaled to 0..255. ImageError for a file that cannot be read and for
    one that is turned against its picture.
    """
    levels, shape, lossy, pages = _read(path)
    turn, remarks = placement(shape, picture, str(path))
    if pages > 1:
        remarks |= {"pages"}
    return Levels(oriented(levels, turn), lossy, remarks)


def white_pixels(path: Path) -> np.ndarray:
    """Where a picture that belongs to no other is white, from half of its highest level on.

    bool (H, W), upright by its own EXIF. ImageError for a file that cannot be read.
    """
    levels, _, lossy, _ = _read(path)
    top = int(levels.max(initial=0))
    if not top or (lossy and top < _NOISE):
        return np.zeros(levels.shape, dtype=bool)
    return 2 * levels.astype(np.int64) >= top


def read_mask(paths: Sequence[Path], picture: Shape) -> Mask:
    """What the mask files of one picture mark, together.

    Raises:
        ImageError: a file that cannot be read, or one that is turned against its picture.
        ValueError: masks of several sizes.
    """
    parts: list[np.ndarray] = []
    remarks: set[str] = set()
    for path in paths:
        read = read_levels(path, picture)
        marked, grey = marked_pixels(read.levels, read.lossy)
        parts.append(marked)
        remarks |= read.remarks | ({"grey"} if grey else set())
    return united(parts, remarks, paths)


def united(parts: Sequence[np.ndarray], remarks: Iterable[str], paths: Sequence[Path]) -> Mask:
    """The mask of a picture from those of its files. ValueError where they differ in size."""
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"the masks {', '.join(path.name for path in paths)} differ in size")
    pixels = np.logical_or.reduce(parts)
    found = set(remarks)
    if not pixels.any():
        found.add("empty")
    elif 2 * np.count_nonzero(pixels) > pixels.size:
        found.add("most")
    return Mask(pixels, frozenset(found))


def placement(mask: Shape, picture: Shape, name: str) -> tuple[int, frozenset[str]]:
    """How a mask that its own EXIF has turned is to be turned onto its picture: (1..8, remarks).

    Raises ImageError for a mask that fits only after a quarter turn that neither file names.
    """
    if same_aspect(mask.size, picture.size):
        unsaid = picture.orientation != 1 and mask.orientation == 1
        return 1, frozenset(("upright",) if unsaid else ())
    if picture.orientation >= 5 and mask.orientation == 1:
        if same_aspect(mask.size, picture.stored):
            return picture.orientation, frozenset(("turned",))
    if same_aspect(mask.size[::-1], picture.size):
        raise ImageError(
            name,
            f"the mask is {_shown(mask.size)} and its picture {_shown(picture.size)}: one of them "
            "is turned by a quarter, and nothing says which way",
        )
    return 1, frozenset(("aspect",))


def marked_pixels(levels: np.ndarray, lossy: bool = False) -> tuple[np.ndarray, bool]:
    """(where levels mark a defect, whether most of that is grey), by the rules of this module.

    levels: integers (H, W) >= 0. lossy: the file's compression does not keep levels.
    """
    top = int(levels.max(initial=0))
    if lossy and top < _NOISE:
        return np.zeros(levels.shape, dtype=bool), False
    if not (lossy or _runs(levels, top)):
        return levels != 0, False
    wide = levels.astype(np.int64)
    marked = 2 * wide >= top
    grey = marked & (4 * wide < 3 * top)
    return marked, bool(2 * np.count_nonzero(grey) > np.count_nonzero(marked))


def _runs(levels: np.ndarray, top: int) -> bool:
    """Whether levels run from one area to another, and are not labels of flat areas."""
    from scipy import ndimage

    values = np.unique(levels)
    values = values[values != 0]
    if len(values) < 2 or top < _NOISE:
        return False
    if len(values) > _MOST_LABELS:
        return True
    places = np.argwhere((levels != 0) & (levels != top))
    (y0, x0), (y1, x1) = places.min(axis=0), places.max(axis=0) + 1
    around = levels[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
    between = (around != 0) & (around != top)
    higher = ndimage.maximum_filter(around, 3, mode="nearest") > around
    lower = ndimage.minimum_filter(around, 3, mode="nearest") < around
    # An edge has a higher and a lower neighbour, noise has no neighbours like itself.
    framed = np.pad(around, 1, mode="edge")
    alike = np.zeros(around.shape, dtype=np.uint8)
    height, width = around.shape
    for dy in range(3):
        for dx in range(3):
            alike += framed[dy : dy + height, dx : dx + width] == around
    steep = between & ((higher & lower) | (alike < 3))  # itself, and at least two more
    return bool(2 * np.count_nonzero(steep) >= np.count_nonzero(between))


def _read(source: Any) -> tuple[np.ndarray, Shape, bool, int]:
    """(levels upright by the file's own EXIF, its shape, whether it is lossy, its pages)."""
    name = source_name(source)
    with naming_errors(name, source), opened(source) as (image, _):
        tag = orientation_of(image) if image.format == "TIFF" else 1
        image.load()  # turns a TIFF, and finds the EXIF at the end of a PNG
        lossy = image.format in _LOSSY
        pages = int(getattr(image, "n_frames", 1))
        orientation = orientation_of(image)
        if image.mode in ("P", "LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
            levels = _over_black(np.asarray(image.convert("RGBA")))
        elif image.mode == "LAB":
            levels = np.asarray(image)[..., 0]
        else:
            plain = image.mode in ("1", "L", "RGB", "I", "F") or image.mode.startswith("I;16")
            levels = np.asarray(image if plain else image.convert("RGB"))
        if levels.ndim == 3:
            levels = levels.max(axis=2)
        if levels.dtype.kind == "f":
            levels = _whole(levels, name)
        if levels.dtype == bool:
            levels = levels.astype(np.uint8)
        if levels.min(initial=0) < 0:
            raise ImageError(name, f"a mask's levels cannot be negative, and {levels.min()} is")
        levels = oriented(levels, orientation)
        return levels, Shape(levels.shape, max(tag, orientation)), lossy, pages


def _over_black(pixels: np.ndarray) -> np.ndarray:
    """Levels of RGBA pixels, uint8."""
    colours, opacity = pixels[..., :3], pixels[..., 3]
    level = colours.max(axis=2)
    if opacity.min(initial=255) == opacity.max(initial=0):
        return level
    visible = colours[opacity != 0]
    if (visible == visible[0]).all():
        return opacity
    return ((level.astype(np.uint32) * opacity + 127) // 255).astype(np.uint8)


def _whole(levels: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(levels).all() or levels.min(initial=0) < 0:
        raise ImageError(name, "a mask's levels must be finite and not negative")
    top = float(levels.max(initial=0))
    scaled = levels * (255 / top) if top else levels
    return np.ceil(scaled).astype(np.int32)  # what is not 0 stays so


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether sizes differ in nothing but scale, to within a pixel or a hundredth."""
    width = a[0] * b[1] / b[0]
    height = a[1] * b[0] / b[1]
    return abs(width - a[1]) <= max(1, 0.01 * a[1]) or abs(height - a[0]) <= max(1, 0.01 * a[0])


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
