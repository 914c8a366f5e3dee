"""What several test files build: images with structure, detectors calibrated on their own maps."""

from __future__ import annotations

import types
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad import EfficientAD, operators
from efficientad.folding import fold
from efficientad.forward import Plan, forward


def images(n: int, height: int = 256, width: int = 256, seed: int = 0) -> Tensor:
    """(n, 3, height, width) in 0..1: smooth random fields with some noise, different per image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 9, 11, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.rand(n, 3, height, width, generator=generator)
    return (0.85 * smooth + 0.15 * noise).clamp(0, 1)


@torch.no_grad()
def detector(size: str = "S", seed: int = 0, calibrated: bool = True, **options) -> EfficientAD:
    """Random weights with outputs of a trained detector's size; calibrated on `images(2)`."""
    torch.manual_seed(seed)
    model = EfficientAD(size, **options)
    x = model.normalize(images(1, *model.image_size, seed=seed + 99))
    last = getattr(model.student, "conv4" if size == "S" else "conv6")
    for net, conv in (
        (model.student, last),
        (model.autoencoder, model.autoencoder.decoder.deconv8),
    ):
        out = net(x)
        mean = out.mean(dim=(0, 2, 3))
        factor = 0.3 / (out - mean[:, None, None]).std()
        conv.weight.data *= factor
        conv.bias.data = (conv.bias.data - mean) * factor
    if calibrated:
        calibrate_on_own_maps(model, images(2, *model.image_size, seed=seed + 100))
    return model


@torch.no_grad()
def calibrate_on_own_maps(model: EfficientAD, image: Tensor) -> None:
    features = model.teacher(model.normalize(image)).double()
    mean = features.mean(dim=(0, 2, 3))
    std = features.std(dim=(0, 2, 3), correction=0)
    model.set_statistics(mean, std)
    maps = model.distance_maps(image)
    levels = torch.tensor([0.9, 0.995])
    model.set_quantiles(*[q for m in maps for q in torch.quantile(m.float(), levels).tolist()])


@torch.no_grad()
def compose(
    model: EfficientAD, image: Tensor, operations, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(anomaly map, score) of `model` through the folded weights and the fused operations.

    operations: `efficientad.reference`, or anything with its functions. dtype: of activations and
    filters; None is the image's.
    """
    dtype = dtype or image.dtype
    weights = fold(model, dtype, image.device)
    size = tuple(image.shape[-2:])
    plan = Plan(model.size, model.padding, size, model.map_padding, image.device)
    mean, std = weights.image_mean, weights.image_std
    options = {"channels_last": False, "border": plan.border, "dtype": dtype}
    packed = operations.pack(image, mean, std, **options)
    maps = forward(plan, weights, packed, operations)
    return operations.anomaly_map(*maps, weights.affine, size, padding=plan.map_padding)


def interpreted_in_few_programs() -> types.SimpleNamespace:
    """The kernels with tiles of thousands of pixels: twenty times faster to interpret."""
    from efficientad.kernels.grouped import Tile

    tiles = {
        "first_conv_relu_pool": Tile(4096, 256, 128, warps=8, stages=1),
        "conv_relu": Tile(4096, 256, 256, warps=8, stages=3),
        "conv_relu_pool": Tile(4096, 256, 256, warps=8, stages=3),
        "pair_distance": Tile(4096, 128, 256, warps=8, stages=3),
        "strided_conv_relu": Tile(4096, 64, 256, warps=4, stages=1),
        "resize_conv_relu": Tile(4096, 64, 128, warps=4, stages=1),
    }
    calls = {}
    for name in operators.KERNEL_FILES:
        tile = {"tile": tiles[name]} if name in tiles else {}
        calls[name] = partial(operators.kernel(name), **tile)
    return types.SimpleNamespace(**calls)


def frames(n: int, height: int = 256, width: int = 256, seed: int = 0) -> np.ndarray:
    """`images` as camera frames: uint8 (n, height, width, 3)."""
    pixels = (images(n, height, width, seed) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
