"""What several test files build: images with structure, detectors calibrated on their own maps."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from efficientad import EfficientAD
from efficientad.fast.folding import fold
from efficientad.fast.fused_network import Plan, forward
from efficientad.model.global_term import GlobalTerm, fitted, student_means
from efficientad.model.networks import PDN
from efficientad.model.synthetic import calibrate_on_own_maps, frames, images, random_detector
from efficientad.ops import operators

__all__ = [
    "assert_steps_neither_allocate_nor_wait",
    "calibrate_on_own_maps",
    "compose",
    "detector",
    "detector_with_term",
    "frames",
    "images",
    "interpreted",
    "interpreted_in_few_programs",
]


def detector(
    size: str = "S", seed: int = 0, calibrated: bool = True, **options: object
) -> EfficientAD:
    """`random_detector`: a copy of the one that was made first, as making it takes seconds."""
    key = (PDN.__init__, size, seed, calibrated, tuple(sorted(options.items())))
    model, state = _detector(*key)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def detector_with_term(slope: float = 0.3) -> EfficientAD:
    """`detector` with a global term of some images, whose line begins at their mean distance."""
    model = detector()
    model.set_global_term(copy.deepcopy(_term(PDN.__init__)))
    model.global_term.line[0] = slope
    return model


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def _term(_init: object) -> GlobalTerm:
    model = detector()
    means = student_means(model.student(model.normalize(images(24))))
    term = fitted(means)
    term.set_line(1, float(term.distance(means).mean()))
    return term


@functools.lru_cache(maxsize=8)
def _detector(_init: object, size: str, seed: int, calibrated: bool, options: tuple):
    """The detector, and torch's random state behind it. _init: `light_networks` makes others."""
    return random_detector(size, seed, calibrated, **dict(options)), torch.get_rng_state()


@torch.no_grad()
def compose(
    model: EfficientAD, image: Tensor, operations, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(anomaly map, score) of `model` through the folded weights and the fused operations.

    operations: `efficientad.ops.reference`, or anything with its functions. dtype: of activations
    and filters; None is the image's.
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


def assert_steps_neither_allocate_nor_wait(predictor, frames, steps: int) -> None:
    """On CUDA, after a warm-up with as many results at once as there are frames."""
    kept = [predictor(frame) for frame in frames]
    del kept
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(predictor.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(steps):
            predictor(frames[i % len(frames)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats(predictor.device)
    for name in ("num_device_alloc", "reserved_bytes.all.current"):
        assert after[name] == before[name], name


# Channels, bytes of K, warps and stages of tiles for the interpreter; pixels as needed.
_TILES = {
    "first_conv_relu_pool": (256, 128, 8, 1),
    "conv_relu": (256, 256, 8, 3),
    "conv_relu_pool": (256, 256, 8, 3),
    "pair_distance": (128, 256, 8, 3),
    "student_distance": (128, 256, 8, 3),
    "autoencoder_distance": (128, 256, 8, 3),
    "strided_conv_relu": (64, 256, 4, 1),
    "resize_conv_relu": (64, 128, 4, 1),
}


def interpreted(pixels: Mapping[str, int]) -> types.SimpleNamespace:
    """The kernels; those in `pixels` with so many pixels to a program."""
    from efficientad.kernels.grouped import Tile

    calls = {name: operators.kernel(name) for name in operators.KERNEL_FILES | operators.PARTS}
    for name, count in pixels.items():
        calls[name] = partial(calls[name], tile=Tile(count, *_TILES[name]))
    return types.SimpleNamespace(**calls)


def interpreted_in_few_programs() -> types.SimpleNamespace:
    """The kernels with tiles of thousands of pixels: twenty times faster to interpret."""
    return interpreted(dict.fromkeys(_TILES, 4096))
