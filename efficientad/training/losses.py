"""The losses of one training step, batched, their terms and the learning rate.

The student sees three pictures in a step (image, augmented image, photo), and each needs one half
of its last layer. So its inner layers run once, on a batch of all three, and the last layer runs
with the filters that count. Every term is computed in at least float32.
Source: arXiv 2303.14535, section 3 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN, TEACHER_CHANNELS, feature_size
from efficientad.model.region import of_cells
from efficientad.ops import differentiable_conv

TERMS = ("hard", "penalty", "autoencoder", "student_autoencoder")
FIRST, SECOND = slice(0, TEACHER_CHANNELS), slice(TEACHER_CHANNELS, None)
HARD_QUANTILE = 0.999
# `torch.quantile` finds its rank in the values' own precision. So does `hard_threshold`, up to the
# size at which torch.quantile refuses; beyond it, where float32 cannot count, in float64.
_TORCH_QUANTILE_LIMIT = 2**24


def hard_threshold(values: Tensor, quantile: float) -> Tensor:
    """The quantile, with linear interpolation, of each row of values (N, M): (N, 1).

    The same bits as torch.quantile, for any M, by selecting the largest values in place of sorting
    all of them. NaN counts as the largest value here.

    Raises:
        ValueError: quantile outside [0, 1].
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it must be in [0, 1]")
    last = values.shape[1] - 1
    dtype = values.dtype if last < _TORCH_QUANTILE_LIMIT else torch.float64
    rank = (torch.tensor(quantile, dtype=dtype) * last).item()
    below = min(math.floor(rank), last)
    top = torch.topk(values, last + 1 - below, dim=1).values  # descending
    lower, upper = top[:, -1:], top[:, -1 - (math.ceil(rank) > below and below < last) :][:, :1]
    return torch.lerp(lower, upper, rank - below)


def squared_difference(target: Tensor, output: Tensor) -> Tensor:
    """D of Algorithm 1, (target - output)^2 per element, in at least float32."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return (target.to(wide) - output.to(wide)).square()


def hard_loss(distances: Tensor, quantile: float = HARD_QUANTILE) -> Tensor:
    """Mean of the distances that reach their image's quantile; then the mean over the images.

    Args:
        distances: (N, C, h, w), the squared differences of teacher and student.
        quantile: 0.999 in the paper: 1,205 of 384 x 56 x 56 elements. 0: the mean of all (the
            paper's ablation, Table 5).
    """
    if quantile == 0:
        return distances.mean()
    # Which order the elements come in does not matter; this one copies no channels-last tensor.
    rows = distances.permute(0, 2, 3, 1).flatten(1)
    easy = rows < hard_threshold(rows.detach(), quantile)  # not >=: NaN must reach the loss
    chosen = rows.masked_fill(easy, 0)
    return (chosen.sum(1) / (~easy).sum(1)).mean()


def penalty_loss(student_on_photo: Tensor) -> Tensor:
    """Mean of S(P)^2 over (N, 384, h, w), the student's first half on a photo (section 3.1)."""
    wide = torch.promote_types(student_on_photo.dtype, torch.float32)
    return student_on_photo.to(wide).square().mean()


def mean_difference(target: Tensor, output: Tensor) -> Tensor:
    """L_AE (teacher, autoencoder) or L_STAE (autoencoder, student's second half); (N, C, h, w)."""
    return squared_difference(target, output).mean()


def mean_of_differences(targets: Iterable[Tensor], output: Tensor) -> Tensor:
    """`mean_difference` of images that come one by one; only `output` gets a gradient.

    On a CPU each image is taken through to its gradient while it is in the cache: the tensors of
    all of them in between are so large that every one would be new memory from the system.

    Args:
        targets: (1, C, h, w) each, without gradients. output: (N, C, h, w), of as many.
    """
    if output.device.type != "cpu":
        return mean_difference(torch.cat(list(targets)), output)
    return _MeanOfDifferences.apply(output, targets)


class _MeanOfDifferences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, targets: Iterable[Tensor]) -> Tensor:
        gradient, means = torch.empty_like(output), []
        for one, place, target in zip(output.split(1), gradient.split(1), targets, strict=True):
            difference = one.to(torch.promote_types(one.dtype, torch.float32)) - target
            means.append(difference.square().mean())
            place.copy_(difference.mul_(2 / output.numel()))
        ctx.save_for_backward(gradient)
        return torch.stack(means).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def learning_rate(step: int, steps: int, base: float) -> float:
    """Of step 0 .. steps - 1: `base`, and a tenth of it after 95 % of the steps (66,500)."""
    return base if step < steps * 95 // 100 else base / 10


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


def trunk(pdn: PDN, x: Tensor) -> Tensor:
    """All layers of a PDN but the last: normalised image (N, 3, H, W) -> (N, C, h', w')."""
    x = needed_pixels(pdn, x)
    own = differentiable_conv.serves(x)
    if own:
        x = x.permute(0, 2, 3, 1)
    for conv, row in pdn.layers()[:-1]:
        x = _convolve(conv, x, slice(None), own, row.relu)
        if row.pool:
            x = x.permute(0, 3, 1, 2) if own else x
            x = F.avg_pool2d(x, 2, 2, padding=int(pdn.padding))
            x = x.permute(0, 2, 3, 1) if own else x
    return x.permute(0, 3, 1, 2) if own else x


def head(pdn: PDN, x: Tensor, channels: slice = slice(None)) -> Tensor:
    """Those channels of a PDN's output: (N, C, h', w') of `trunk` -> (N, len(channels), h, w)."""
    if not differentiable_conv.serves(x):
        return _convolve(pdn.last, x, channels, False, False)
    return _convolve(pdn.last, x.permute(0, 2, 3, 1), channels, True, False).permute(0, 3, 1, 2)


def _convolve(conv: torch.nn.Conv2d, x: Tensor, rows: slice, own: bool, relu: bool) -> Tensor:
    """own: by `differentiable_conv`, with x (N, H, W, C), else by torch, with (N, C, H, W)."""
    assert conv.bias is not None
    weight, bias, padding = conv.weight[rows], conv.bias[rows], int(conv.padding[0])
    if own:
        if padding:
            x = F.pad(x, (0, 0, padding, padding, padding, padding))
        return differentiable_conv.convolve(x, weight, bias, relu=relu)
    x = F.conv2d(x, weight, bias, padding=padding)
    return F.relu(x, inplace=True) if relu else x


@torch.no_grad()
def teacher_features(detector: EfficientAD, image: Tensor) -> Tensor:
    """The teacher's features (N, 384, h, w), not yet normalised, of RGB (N, 3, H, W) in 0..1."""
    return head(detector.teacher, trunk(detector.teacher, detector.normalize(image)))


def standardized(detector: EfficientAD, features: Tensor) -> Tensor:
    """Teacher features with mean 0 and standard deviation 1 per channel, in at least float32."""
    return (features - detector.teacher_mean) / detector.teacher_std


def step_losses(
    detector: EfficientAD, inputs: StepInputs, hard_quantile: float, cells: Tensor | None = None
) -> Tensor:
    """The four terms of `TERMS`, (4,), differentiable; the training minimises their sum.

    The teacher's channel statistics must be set, and the autoencoder in training mode.
    cells: `region.index_of` those of the good images that count; None: all. Of photos all count.
    """
    image, augmented, photo, features = inputs
    n = len(image)
    if features is None:
        features = teacher_features(detector, image)
    target = of_cells(standardized(detector, features), cells)
    target_augmented = standardized(detector, teacher_features(detector, augmented))
    target_augmented = of_cells(target_augmented, cells)
    # The photo stands beside the image: both need the first half of the last layer.
    pictures = [image, augmented] if photo is None else [image, photo, augmented]
    x = detector.normalize(torch.cat(pictures))
    inner = trunk(detector.student, x)
    student_st = head(detector.student, inner[:-n], FIRST)
    student_ae = head(detector.student, inner[-n:], SECOND)
    # torch's own convolutions on a CPU find the filters' gradients faster channels first.
    own = differentiable_conv.serves(x)
    autoencoder = detector.autoencoder(x[-n:].contiguous() if own else x[-n:])
    autoencoder, student_ae = of_cells(autoencoder, cells), of_cells(student_ae, cells)
    distances = squared_difference(target, of_cells(student_st[:n], cells))
    return torch.stack(
        [
            hard_loss(distances, hard_quantile),
            distances.new_zeros(()) if photo is None else penalty_loss(student_st[n:]),
            mean_difference(target_augmented, autoencoder),
            mean_difference(autoencoder, student_ae),
        ]
    )
