"""Images to batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.data.decoding import ImageError, read_image
from efficientad.data.image_files import find_images, left_out
from efficientad.utils.checks import ValueRange
from efficientad.utils.prefetch import ahead

_Loaded = tuple[np.ndarray, tuple[int, int]] | ImageError  # resized pixels, (height, width) before


@dataclass
class Batch:
    """Images of one size with where they came from.

    indices: positions in the sources. images: (N, 3, H, W) float32 in 0..1. source_sizes: (height,
    width) of each image before resizing. sources: what the images were read from.
    """

    indices: list[int]
    images: Tensor
    source_sizes: list[tuple[int, int]]
    sources: list[Any]


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 (H, W, 3) to `size` (height, width), bilinear with antialiasing.

    Pillow's BILINEAR, which the published implementations use through torchvision. An image that
    has the size already is returned as it is.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def to_tensor(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 images (H, W, 3) of one size to float32 (N, 3, H, W) in 0..1 (value / 255)."""
    stacked = torch.from_numpy(np.stack(list(images)))
    return stacked.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)


class LeftOutWarning(UserWarning):
    """Pictures in a folder are of kinds that are not read."""


def as_sources(sources: Any) -> Iterable[Any]:
    """The images that a caller means; a path stands for what `find_images` finds there.

    Pictures in a folder that are of kinds that are not read are counted in a LeftOutWarning.

    Raises:
        ValueError: one image where several belong, no iterable, or a folder without an image.
        FileNotFoundError: a path where nothing is.
    """
    if isinstance(sources, (str, os.PathLike)):
        found = find_images(sources)
        for note in left_out(sources):
            warnings.warn(note, LeftOutWarning, stacklevel=3)
        return found
    rule = "it must be an iterable of images, or a folder: for one image, a list of it"
    if isinstance(sources, (np.ndarray, Tensor)):
        if sources.ndim != 4:
            raise ValueError(f"sources is an array of shape {tuple(sources.shape)}; {rule}")
    elif isinstance(sources, (bytes, bytearray, memoryview)) or not (
        hasattr(sources, "__iter__") or hasattr(sources, "__getitem__")
    ):
        raise ValueError(f"sources is a {type(sources).__name__}; {rule}")
    return sources


def load_batches(
    sources: Iterable[Any],
    image_size: tuple[int, int],
    *,
    batch_size: int = 8,
    workers: int = 2,
    on_error: Callable[[int, Any, ImageError], None] | None = None,
    value_range: ValueRange | None = None,
) -> Iterator[Batch]:
    """Read, resize and batch images, decoding ahead in threads.

    sources: anything `read_image` reads; an iterator is read only a little ahead. image_size:
    (height, width) of the batches. workers: threads; 0 decodes in the caller. The order is that of
    the sources and the result does not depend on `workers`. At most batch_size + 2 workers images
    are held.

    value_range: of samples above 8 bits, as `read_image` takes it.

    An image that cannot be read is skipped after on_error(index, source, error); without on_error
    its ImageError is raised (a missing file counts as unreadable here). Closing the iterator stops
    the threads.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be >= 1 and workers >= 0, got {batch_size}, {workers}")

    def load(numbered: tuple[int, Any]) -> tuple[int, Any, _Loaded]:
        index, source = numbered
        try:
            image = read_image(source, value_range)
        except ImageError as error:
            return index, source, error
        return index, source, (resize_image(image, image_size), image.shape[:2])

    depth = batch_size + 2 * workers
    loaded = ahead(load, enumerate(sources), workers=workers, depth=depth)
    return _batches(loaded, batch_size, on_error)


def _batches(
    loaded: Generator[tuple[int, Any, _Loaded], None, None],
    batch_size: int,
    on_error: Callable[[int, Any, ImageError], None] | None,
) -> Iterator[Batch]:
    rows: list[tuple[int, Any, np.ndarray, tuple[int, int]]] = []
    with closing(loaded):  # at once: the traceback of an error would keep the threads alive
        for index, source, result in loaded:
            if isinstance(result, ImageError):
                if on_error is None:
                    raise result
                on_error(index, source, result)
                continue
            rows.append((index, source, *result))
            if len(rows) == batch_size:
                yield _batch(rows)
                rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[int, Any, np.ndarray, tuple[int, int]]]) -> Batch:
    indices, sources, images, sizes = map(list, zip(*rows, strict=True))
    return Batch(indices, to_tensor(images), sizes, sources)
