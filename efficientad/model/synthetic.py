"""Images with structure, and detectors with random weights.

What benchmarks and tests run on where a trained detector does not matter: the work and the size of
the numbers are those of a trained one, the scores mean nothing. Everything follows from `seed`,
but for the golden image, on which files and kernels test themselves: there is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.model.detector import QUANTILE_LEVELS, EfficientAD


def images(n: int, height: int = 256, width: int = 256, seed: int = 0) -> Tensor:
    """(n, 3, height, width) in 0..1: smooth random fields with some noise, different per image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 9, 11, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.rand(n, 3, height, width, generator=generator)
    return (0.85 * smooth + 0.15 * noise).clamp(0, 1)


def frames(n: int, height: int = 256, width: int = 256, seed: int = 0) -> np.ndarray:
    """`images` as camera frames: uint8 (n, height, width, 3)."""
    pixels = (images(n, height, width, seed) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def golden_image() -> Tensor:
    """The image (1, 3, 256, 256) of the self-tests: integer arithmetic, no random numbers.

    Model files hold values that were computed on it; it never changes.
    """
    row = torch.arange(256).view(1, 256, 1)
    column = torch.arange(256).view(1, 1, 256)
    channel = torch.arange(3).view(3, 1, 1)
    blocks = (row // 32 + column // 16 + channel) % 5
    value = (row * 3 + column * 5 + row * column // 64 + channel * 41 + blocks * 29) % 256
    return value[None].float() / 255


@torch.no_grad()
def random_detector(
    size: str = "S", seed: int = 0, calibrated: bool = True, **options: Any
) -> EfficientAD:
    """Random weights with outputs of a trained detector's size; calibrated on `images(2)`.

    options: as `EfficientAD` takes them. Sets torch's global seed.
    """
    torch.manual_seed(seed)
    model = EfficientAD(size, **options)
    x = model.normalize(images(1, *model.image_size, seed=seed + 99))
    for net, conv in (
        (model.student, model.student.last),
        (model.autoencoder, model.autoencoder.decoder.deconv8),
    ):
        out = net(x)
        mean = out.mean(dim=(0, 2, 3))
        factor = 0.3 / (out - mean[:, None, None]).std()
        conv.weight.data *= factor
        assert conv.bias is not None
        conv.bias.data = (conv.bias.data - mean) * factor
    if calibrated:
        calibrate_on_own_maps(model, images(2, *model.image_size, seed=seed + 100))
    return model


@torch.no_grad()
def calibrate_on_own_maps(model: EfficientAD, image: Tensor) -> None:
    """Statistics and quantiles of `image` (N, 3, H, W), RGB in 0..1, with all cells equal."""
    features = model.teacher(model.normalize(image)).double()
    mean = features.mean(dim=(0, 2, 3))
    std = features.std(dim=(0, 2, 3), correction=0)
    model.set_statistics(mean, std)
    maps = model.distance_maps(image)
    levels = torch.tensor(QUANTILE_LEVELS)
    model.set_quantiles(*[q for m in maps for q in torch.quantile(m.float(), levels).tolist()])
