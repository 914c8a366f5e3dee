"""What happens to images in training.

Source: arXiv 2303.14535, Algorithm 1. Random choices come from the generator that is handed in.
"""

from __future__ import annotations

import numpy as np

from efficientad.data.images import resize_image

OPERATIONS = ("brightness", "contrast", "saturation")
FACTORS = (0.8, 1.2)
GRAY_PROBABILITY = 0.3
_LUMA = np.array([0.2989, 0.587, 0.114], dtype=np.float32)  # as torchvision weighs float images


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
