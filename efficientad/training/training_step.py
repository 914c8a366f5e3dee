"""One training step's losses, batched.

The student sees three pictures in a step (image, augmented image, photo), and each needs one half
of its last layer. So its inner layers run once, on a batch of all three, and the last layer runs
with the filters that count. Source: arXiv 2303.14535, Algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN, PDN_LAYERS, TEACHER_CHANNELS, feature_size
from efficientad.ops.differentiable_conv import convolve
from efficientad.training import losses

TERMS = ("hard", "penalty", "autoencoder", "student_autoencoder")
FIRST, SECOND = slice(0, TEACHER_CHANNELS), slice(TEACHER_CHANNELS, None)


class StepInputs(NamedTuple):
    """What a step sees, RGB in 0..1 on the device: (N, 3, H, W) each.

    photo: None without a penalty set. features: the teacher's raw features (N, 384, h, w) of
    `image`, or None to compute them.
    """

    image: Tensor
    augmented: Tensor
    photo: Tensor | None
    features: Tensor | None = None


def needed_pixels(pdn: PDN, x: Tensor) -> Tensor:
    """The part of x (N, C, H, W) that an unpadded PDN's output depends on: 253 of 256 pixels.

    The pooling layers drop odd last rows and columns; without them nothing is computed in vain.
    """
    if pdn.padding:
        return x
    h, w = (4 * feature_size(n) + 29 for n in x.shape[2:])
    return x[:, :, :h, :w]


def trunk(pdn: PDN, x: Tensor, fast: bool = False) -> Tensor:
    """All layers of a PDN but the last: normalised image (N, 3, H, W) -> (N, C, h', w').

    fast: through `fast_conv`, on the CPU in float32 or float64.
    """
    x = needed_pixels(pdn, x)
    if fast:
        x = x.permute(0, 2, 3, 1)
    for i, layer in enumerate(PDN_LAYERS[pdn.size][:-1], start=1):
        x = _convolve(getattr(pdn, f"conv{i}"), x, slice(None), fast, layer.relu)
        if layer.pool:
            x = x.permute(0, 3, 1, 2) if fast else x
            x = F.avg_pool2d(x, 2, 2, padding=int(pdn.padding))
            x = x.permute(0, 2, 3, 1) if fast else x
    return x.permute(0, 3, 1, 2) if fast else x


def head(pdn: PDN, x: Tensor, channels: slice = slice(None), fast: bool = False) -> Tensor:
    """Those channels of a PDN's output: (N, C, h', w') of `trunk` -> (N, len(channels), h, w)."""
    conv = getattr(pdn, f"conv{len(PDN_LAYERS[pdn.size])}")
    if not fast:
        return _convolve(conv, x, channels, False, False)
    return _convolve(conv, x.permute(0, 2, 3, 1), channels, True, False).permute(0, 3, 1, 2)


def _convolve(conv: torch.nn.Conv2d, x: Tensor, rows: slice, fast: bool, relu: bool) -> Tensor:
    weight, bias, padding = conv.weight[rows], conv.bias[rows], conv.padding[0]
    if fast:
        if padding:
            x = F.pad(x, (0, 0, padding, padding, padding, padding))
        return convolve(x, weight, bias, relu=relu)
    x = F.conv2d(x, weight, bias, padding=padding)
    return F.relu(x, inplace=True) if relu else x


@torch.no_grad()
def teacher_features(detector: EfficientAD, image: Tensor, fast: bool = False) -> Tensor:
    """The teacher's features (N, 384, h, w), not yet normalised, of RGB (N, 3, H, W) in 0..1."""
    teacher = detector.teacher
    return head(teacher, trunk(teacher, detector.normalize(image), fast), fast=fast)


def standardized(detector: EfficientAD, features: Tensor) -> Tensor:
    """Teacher features with mean 0 and standard deviation 1 per channel, in at least float32."""
    return (features - detector.teacher_mean) / detector.teacher_std


def step_losses(
    detector: EfficientAD, inputs: StepInputs, hard_quantile: float, fast: bool = False
) -> Tensor:
    """The four terms of `TERMS`, (4,), differentiable; the training minimises their sum.

    The teacher's channel statistics must be set, and the autoencoder in training mode.
    """
    image, augmented, photo, features = inputs
    n = len(image)
    if features is None:
        features = teacher_features(detector, image, fast)
    target = standardized(detector, features)
    target_augmented = standardized(detector, teacher_features(detector, augmented, fast))
    # The photo stands beside the image: both need the first half of the last layer.
    pictures = [image, augmented] if photo is None else [image, photo, augmented]
    x = detector.normalize(torch.cat(pictures))
    inner = trunk(detector.student, x, fast)
    student_st = head(detector.student, inner[:-n], FIRST, fast)
    student_ae = head(detector.student, inner[-n:], SECOND, fast)
    # torch's own convolutions on a CPU find the filters' gradients faster channels first.
    autoencoder = detector.autoencoder(x[-n:].contiguous() if fast else x[-n:])
    distances = losses.squared_difference(target, student_st[:n])
    return torch.stack(
        [
            losses.hard_loss(distances, hard_quantile),
            distances.new_zeros(()) if photo is None else losses.penalty_loss(student_st[n:]),
            losses.mean_difference(target_augmented, autoencoder),
            losses.mean_difference(autoencoder, student_ae),
        ]
    )
