"""The pictures of every training step.

What a step sees is a function of (seed, step, item): sources may be asked from several threads, in
any order, and again after a resume. Source: arXiv 2303.14535, Algorithm 1.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from efficientad.data.decoding import ImageError, read_image
from efficientad.data.image_files import find_images
from efficientad.data.images import resize_image
from efficientad.model.calibration import Progress
from efficientad.model.good_images import GoodImagesSeen
from efficientad.model.known_pictures import known_pictures, picture_digest
from efficientad.utils.checks import ValueRange
from efficientad.utils.prefetch import ahead
from efficientad.utils.sampling import random_numbers, shuffled

IMAGE_CACHE_BYTES = 2 * 2**30  # of decoded, resized training images, kept in memory
OPERATIONS = ("brightness", "contrast", "saturation")
FACTORS = (0.8, 1.2)
GRAY_PROBABILITY = 0.3
_LUMA = np.array([0.2989, 0.587, 0.114], dtype=np.float32)  # as torchvision weighs float images


class Pictures(NamedTuple):
    """Of one step: which training images, and (N, H, W, 3) pixels.

    image, photo: uint8 (photo: None without a penalty set). augmented: float32 in 0..1.
    """

    indices: list[int]
    image: Tensor
    augmented: Tensor
    photo: Tensor | None


def blend(image: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    """factor * image + (1 - factor) * other, kept in 0..1."""
    mixed = np.float32(factor) * image + np.float32(1 - factor) * other
    return np.clip(mixed, 0, 1, out=mixed)


def jitter(image: np.ndarray, operation: str, factor: float) -> np.ndarray:
    """One operation of torchvision's ColorJitter, as it is defined for float images.

    Args:
        image: (H, W, 3) RGB float32 in 0..1.
        operation: "brightness" blends with black, "contrast" with the mean of the grey image,
            "saturation" with the grey image.
        factor: 1 changes nothing.

    Raises:
        ValueError: an unknown operation.
    """
    if operation == "brightness":
        return blend(image, 0.0, factor)
    if operation == "saturation":
        return blend(image, (image @ _LUMA)[..., None], factor)
    if operation == "contrast":
        return blend(image, (image @ _LUMA).mean(dtype=np.float32), factor)
    raise ValueError(f"operation is {operation!r}; it must be one of {', '.join(OPERATIONS)}")


def augmented(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image of the autoencoder's branch: one random operation with a factor of U(0.8, 1.2).

    uint8 (H, W, 3) -> float32 (H, W, 3) in 0..1, not rounded to levels again.
    """
    operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
    return jitter(image.astype(np.float32) / 255, operation, float(rng.uniform(*FACTORS)))


def gray(image: np.ndarray) -> np.ndarray:
    """Luma of uint8 (H, W, 3) in all three channels, as Pillow and torchvision compute it."""
    from PIL import Image

    return np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle (height, width) of an image (H, W, 3) that is at least as large."""
    top = round((image.shape[0] - size[0]) / 2)
    left = round((image.shape[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def penalty_photo(photo: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """P of Algorithm 1: to twice the size (512x512), grey with probability 0.3, middle quarter.

    photo: uint8 (H, W, 3) of any size. size: (height, width) of the training images; the paper's
    256x256, and other sizes by the same rule. Returns contiguous uint8 (height, width, 3).
    """
    doubled = resize_image(photo, (2 * size[0], 2 * size[1]))
    part = center_crop(doubled, size)  # grey after the crop: the same pixels, a quarter of the work
    return gray(part) if rng.random() < GRAY_PROBABILITY else np.ascontiguousarray(part)


class TrainingImages:
    """Training images, decoded and resized on first use and kept within a budget of bytes.

    Args:
        paths: image files. image_size: (height, width) in pixels.
        budget: bytes of pixels to keep; what does not fit is decoded again each time.
        value_range: of samples above 8 bits, see `data.samples`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: tuple[int, int],
        budget: int = IMAGE_CACHE_BYTES,
        value_range: ValueRange | None = None,
    ) -> None:
        self.paths = list(paths)
        self.value_range = value_range
        self.image_size = image_size
        self.failed: list[tuple[str, str]] = []
        self._room = budget // (3 * image_size[0] * image_size[1])
        self._kept: dict[Path, np.ndarray] = {}
        self._digests: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3). ImageError where the file cannot be read."""
        path = self.paths[index]
        found = self._kept.get(path)
        if found is None:
            found = resize_image(read_image(path, self.value_range), self.image_size)
            if path not in self._digests:
                self._digests[path] = picture_digest(found)
            if len(self._kept) < self._room:
                self._kept[path] = found
        return found

    def read_all(
        self, what: str, workers: int = 2, progress: Progress | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index, pixels) of every image that can be read; the others are left out at the end.

        what: is done with them, for `progress`.

        Raises:
            ValueError: at the end; no image can be read, or too many are of one colour.
        """

        def load(index: int) -> np.ndarray | ImageError:
            try:
                return self[index]
            except ImageError as error:
                return error

        bad, seen = [], GoodImagesSeen("training")
        for i, found in enumerate(ahead(load, range(len(self)), workers=workers, depth=4)):
            if isinstance(found, ImageError):
                bad.append((i, found))
            else:
                seen.add_pixels(found, self.paths[i])
                yield i, found
            if progress is not None:
                progress(what, i + 1, len(self))
        self.drop_unreadable(bad)
        seen.check("they are trained on all the same", alike=False)

    def drop_unreadable(self, unreadable: Iterable[tuple[int, ImageError]]) -> None:
        """Leave images out; ValueError if none is left."""
        bad = dict(unreadable)
        self.failed += [(str(self.paths[i]), bad[i].reason) for i in sorted(bad)]
        left = [path for i, path in enumerate(self.paths) if i not in bad]
        if not left:
            raise ValueError(
                f"none of the {len(self.paths)} training images can be read; the first: "
                f"{self.failed[0][0]}: {self.failed[0][1]}"
            )
        self.paths = left

    def known(self) -> dict[str, Any]:
        """The record of the images that were read, see `known_pictures`."""
        return known_pictures(self._digests[path] for path in self.paths if path in self._digests)

    def digest(self) -> str:
        """Of names and number: whether a resumed training still has the same images."""
        text = "\n".join("/".join(path.parts[-2:]) for path in self.paths)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Photos:
    """Photos for the pretraining penalty; an unreadable one is passed over for the next.

    Args:
        folder: photos of any kind in one folder or several, with subfolders. image_size: of the
            training images; see `penalty_photo`.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no image in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike | Iterable[str | os.PathLike],
        image_size: tuple[int, int],
        seed: int,
    ) -> None:
        self.paths = find_images(folder)
        self.image_size = image_size
        self.seed = seed
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(path, reason) of the photos that could not be read so far."""
        with self._lock:
            return [(str(self.paths[i]), reason) for i, reason in sorted(self._bad.items())]

    def picture(self, step: int, item: int, position: int) -> np.ndarray:
        """P of a step: uint8 (height, width, 3). ValueError when no photo can be read."""
        start = shuffled(self.seed, "photos", len(self.paths), position)
        for offset in range(len(self.paths)):
            index = (start + offset) % len(self.paths)
            if index in self._bad:
                continue
            try:
                photo = read_image(self.paths[index])
            except ImageError as error:
                with self._lock:
                    self._bad[index] = error.reason
                continue
            rng = random_numbers(self.seed, "photo", step, item)
            return penalty_photo(photo, self.image_size, rng)
        path, reason = self.failed[0]
        raise ValueError(
            f"none of the {len(self.paths)} photos of the penalty set can be read; the first: "
            f"{path}: {reason}"
        )


Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class PictureSource:
    """Calling it with a step gives that step's `Pictures`; safe to call from threads.

    augment: makes the augmented image, float32 (H, W, 3) in 0..1, of a training image.
    """

    def __init__(
        self,
        images: TrainingImages,
        photos: Photos | None,
        *,
        seed: int,
        batch_size: int,
        augment: Augment = augmented,
        pinned: bool = False,
    ) -> None:
        self.images, self.photos, self._augment = images, photos, augment
        self.seed, self.batch_size, self.pinned = seed, batch_size, pinned

    def __call__(self, step: int) -> Pictures:
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        indices = [shuffled(self.seed, "images", len(self.images), p) for p in positions]
        pixels = [self.images[i] for i in indices]
        changed = [
            self._augment(image, random_numbers(self.seed, "augmentation", step, item))
            for item, image in enumerate(pixels)
        ]
        photos = None
        if self.photos is not None:
            photos = self._stack(
                [self.photos.picture(step, item, p) for item, p in enumerate(positions)]
            )
        return Pictures(indices, self._stack(pixels), self._stack(changed), photos)

    def _stack(self, pictures: list[np.ndarray]) -> Tensor:
        stacked = torch.from_numpy(np.stack(pictures))
        return stacked.pin_memory() if self.pinned else stacked


def to_rgb(pixels: Tensor, device: torch.device) -> Tensor:
    """(N, H, W, 3) uint8, or float32 in 0..1 -> (N, 3, H, W) float32 in 0..1 on the device.

    Channels last in memory. The values are those of `images.to_tensor`.
    """
    pixels = pixels.to(device, non_blocking=True)
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32).div_(255)
    return pixels.permute(0, 3, 1, 2)
