"""Dropout as `torch.nn.functional.dropout`, drawn in less time on a CPU.

There torch draws a number for each element in one thread, which takes longer than the convolution
before it. Here a draw of 64 bits serves four elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DRAWS = 2**16  # values of the 16 bits that decide about an element


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """x with a share `rate` of its elements 0, and the others divided by 1 - rate.

    On a CPU the share is that of a multiple of 2^-16, at most 2^-17 from `rate`; which elements is
    drawn from torch's default generator, in the order in which they lie in memory.

    Args:
        x: floating point. rate: in [0, 1). training: without it, x is returned as it is.
    """
    if not training or rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate, training)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()] >= round(rate * _DRAWS) - _DRAWS // 2
    factors = kept.to(x.dtype).mul_(1 / (1 - rate))
    dense = torch.empty_like(x)  # for its strides: in the order of x, without gaps
    return x * factors.as_strided(dense.size(), dense.stride())
