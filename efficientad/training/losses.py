"""The loss terms of the training and its learning rate.

Source: arXiv 2303.14535, section 3 and Algorithm 1. Every term is computed in at least float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def learning_rate(step: int, steps: int, base: float) -> float:
    """Of step 0 .. steps - 1: `base`, and a tenth of it after 95 % of the steps (66,500)."""
    return base if step < steps * 95 // 100 else base / 10
