"""How far maps lie from those that they are to equal, and how far they may.

Every way to compute a detector's maps (kernels, folded weights, exported files, the fast path in
another project) is compared here with the one that defines them, on one scale and by one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from efficientad.model.map_rule import MAP_AT_QB
from efficientad.utils.devices import FP8

# Largest and RMS difference of maps from float32's, as parts of the maps' scale.
BOUNDS = {
    torch.float32: (1e-4, 2e-5),
    torch.float16: (1e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
    # From fp8's own definition. Hopper adds fp8 products with some 14 bits, which rounds part of
    # the activations to another neighbour: simulated as errors of 0.4 % in every sum of all PDN
    # layers from the second on, the maps moved by 1.8e-2 and by 2.3e-3 RMS.
    FP8: (5e-2, 1e-2),
}


class Difference(NamedTuple):
    """Largest and RMS difference; NaN where a value is NaN: write `not d.largest <= bound`."""

    largest: float
    rms: float


def scale_of(maps: Tensor) -> float:
    """max(0.1, largest |map|), of which differences of these maps and their scores are parts."""
    return max(MAP_AT_QB, float(maps.abs().max()))


def difference(found: Tensor, expected: Tensor, scale: float | None = None) -> Difference:
    """Largest and RMS difference of two tensors of one shape and device, as parts of `scale`.

    scale: None is `scale_of(expected)`. Computed in float32. Infinite for different shapes: what
    would be broadcast does not agree.
    """
    if found.shape != expected.shape:
        return Difference(math.inf, math.inf)
    parts = (found.float() - expected.float()) / (scale_of(expected) if scale is None else scale)
    return Difference(float(parts.abs().max()), float(parts.square().mean().sqrt()))


def worst(differences: Iterable[float]) -> float:
    """The largest of some differences, 0 of none; NaN if one is, which `max` may pass over."""
    values = list(differences)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
