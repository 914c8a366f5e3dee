"""Which pixels of a frame are inspected, drawn as a picture or as polygons.

A picture (PNG or any other that masks are read from): white is inspected, black is not; a pixel
counts from half of the picture's highest level on.

A JSON file: `width` and `height` of the frame in pixels, and `inspect` and `ignore`, one or both,
each a list of polygons, each of these a list of [x, y]. Inspected is what lies in one of `inspect`
(without it the whole frame) and in none of `ignore`. The frame's top left corner is [0, 0], its
bottom right [width, height]; a pixel counts by its centre.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientad.data.decoding import ImageError, image_size
from efficientad.data.masks import same_aspect, white_pixels
from efficientad.data.opening import check_pixels
from efficientad.utils.checks import check_integer, check_path

_KEYS = ("width", "height", "inspect", "ignore")


def read_region(path: str | os.PathLike) -> np.ndarray:
    """The inspected pixels that a file names, bool (H, W) at the size that it was drawn at.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that cannot be read, polygons that break a rule, nothing inspected.
    """
    check_path("region", path, "a picture or a JSON file of polygons")
    path = Path(path)
    if path.suffix.lower() == ".json":
        region = _read_polygons(path)
    else:
        region = white_pixels(path)
    if not region.any():
        raise ValueError(f"region {path} inspects no pixel; white is inspected, black is not")
    return region


def check_frames(region: np.ndarray, pictures: Sequence[Path], input_size: tuple[int, int]) -> None:
    """ValueError unless a region has the aspect of the first of these pictures that can be read, or
    the size of the network's input, to which they are resized."""
    if region.shape == tuple(input_size):
        return
    for path in pictures:
        try:
            size = image_size(path)
        except (ImageError, OSError):
            continue
        if not same_aspect(region.shape, size):
            raise ValueError(
                f"the region is {region.shape[1]}x{region.shape[0]} pixels and {path} is "
                f"{size[1]}x{size[0]}; a region is drawn on a frame and has its aspect"
            )
        return


def _read_polygons(path: Path) -> np.ndarray:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"region {path} is no text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"region {path} is no JSON: {error}") from error
    try:
        return polygon_region(document)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"region {path}: {error}") from error


def polygon_region(document: Any) -> np.ndarray:
    """The inspected pixels of a region's JSON document, bool (height, width).

    Raises:
        ValueError: a key that is missing or unknown, or a polygon that breaks a rule.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it is a {type(document).__name__}; it must be an object")
    unknown = [key for key in document if key not in _KEYS]
    if unknown:
        raise ValueError(f"it has {unknown[0]!r}; its keys are {', '.join(_KEYS)}")
    width, height = (check_integer(key, document.get(key), 1) for key in ("width", "height"))
    check_pixels(width, height)
    polygons = {key: document[key] for key in ("inspect", "ignore") if key in document}
    if not polygons:
        raise ValueError(
            "it has neither 'inspect' nor 'ignore'; give one list of polygons at least"
        )
    drawn = {name: _union(name, value, width, height) for name, value in polygons.items()}
    everything = np.ones((height, width), dtype=bool)
    return drawn.get("inspect", everything) & ~drawn.get("ignore", ~everything)


def _union(name: str, polygons: Any, width: int, height: int) -> np.ndarray:
    if not isinstance(polygons, list):
        raise ValueError(f"{name} is {polygons!r:.40}; it must be a list of polygons")
    region = np.zeros((height, width), dtype=bool)
    for number, polygon in enumerate(polygons):
        region |= _filled(_corners(f"{name}[{number}]", polygon, width, height), width, height)
    return region


def _corners(name: str, polygon: Any, width: int, height: int) -> np.ndarray:
    """The corners of a polygon, float64 (n, 2)."""
    if not isinstance(polygon, list) or len(polygon) < 3:
        raise ValueError(f"{name} is {polygon!r:.40}; it must be a list of three [x, y] at least")
    for point in polygon:
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_plain, point)):
            raise ValueError(f"{name} has a corner {point!r:.40}; it must be [x, y], two numbers")
        if not (0 <= point[0] <= width and 0 <= point[1] <= height):
            raise ValueError(f"{name} has a corner {point}; it must lie in {width}x{height} pixels")
    return np.array(polygon, dtype=np.float64)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _filled(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """The pixels whose centres lie in a polygon, by the even-odd rule: bool (height, width)."""
    crossed = np.zeros((height, width + 1), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        first, end = sorted((int(np.ceil(y0 - 0.5)), int(np.ceil(y1 - 0.5))))
        rows = np.arange(first, end)  # whose centres the edge passes
        if rows.size:
            x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            crossed[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.intp)] ^= True
    return np.logical_xor.accumulate(crossed[:, :width], axis=1)
