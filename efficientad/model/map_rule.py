"""How distance maps become an anomaly map: border rules, and the affine map of the quantiles.

The border rules are those of the published implementations; see docs/border-rules.md.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from efficientad.model.networks import TEACHER_CHANNELS
from efficientad.utils.checks import check_number

BORDERS = ("nelson", "anomalib", "paper")
QUANTILE_NAMES = ("qa_st", "qb_st", "qa_ae", "qb_ae")
MAP_AT_QB = 0.1  # the map's unit: q_a of the good images is sent to 0 and q_b to 0.1


def check_border(border: str, padding: bool, map_padding: int | None) -> int:
    """Return the map padding in cells after checking the rule; see `EfficientAD`."""
    if border not in BORDERS:
        raise ValueError(f"border is {border!r}; it must be one of {', '.join(map(repr, BORDERS))}")
    if border == "paper":
        if not padding:
            raise ValueError(
                "border is 'paper' and the network is unpadded; the paper's rule pads no map, and "
                "without it 56 cells would be stretched to 256 pixels and the map misaligned. "
                "Use 'nelson' or 'anomalib', or the padded network (padding=True)"
            )
        if map_padding:
            raise ValueError(f"map_padding is {map_padding}; border 'paper' pads no map: use 0")
    if map_padding is None:
        return 0 if padding else 4
    if isinstance(map_padding, bool) or not isinstance(map_padding, int) or map_padding < 0:
        raise ValueError(f"map_padding is {map_padding!r}; it must be an integer >= 0 (cells)")
    return map_padding


def check_quantiles(*values: float) -> list[float]:
    """Quantiles in the order of QUANTILE_NAMES as floats; ValueError for what cannot be some."""
    found = [float(value) for value in values]
    for name, value in zip(QUANTILE_NAMES, found, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; quantiles must be finite")
    for kind, (qa, qb) in (("st", found[:2]), ("ae", found[2:])):
        if qb < qa:
            raise ValueError(f"qb_{kind} is {qb} and qa_{kind} is {qa}; q_b must be >= q_a")
    return found


def check_statistics(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Channel mean and standard deviation, (384,) each; ValueError for what cannot be some.

    A deviation of 0 becomes 1, with a warning.
    """
    for name, value in (("mean", mean), ("std", std)):
        if value.numel() != TEACHER_CHANNELS:
            raise ValueError(f"{name} has {value.numel()} entries; it must have 384")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has a NaN or infinite entry; every channel must be finite")
    if (std < 0).any():
        raise ValueError("std has a negative entry; a standard deviation is >= 0")
    dead = std == 0
    if dead.any():
        warnings.warn(
            f"{int(dead.sum())} of 384 teacher channels are constant (std 0); "
            "their std is taken as 1",
            stacklevel=3,
        )
    return mean.flatten(), torch.where(dead, 1, std).flatten()


def affine_of(
    qa_st: float, qb_st: float, qa_ae: float, qb_ae: float, *, border: str
) -> tuple[float, float, float, float]:
    """(a_st, a_ae, offset, frame) of `reference.anomaly_map`, from finite quantiles.

    Equal quantiles of a map get the smallest useful distance, with a warning.
    """
    slope, offset = [], 0.0
    for kind, qa, qb in (("st", qa_st, qb_st), ("ae", qa_ae, qb_ae)):
        floor = 1e-6 * max(1.0, abs(qa))
        if qb - qa < floor:
            warnings.warn(
                f"q_a and q_b of the {kind} map are both {qa:g}: the validation maps are "
                f"constant. q_b is taken as q_a + {floor:g}",
                stacklevel=4,
            )
            qb = qa + floor
        a = 0.5 * MAP_AT_QB / (qb - qa)
        slope.append(a)
        offset -= a * qa
    frame = offset if border == "anomalib" else 0.0  # a padded cell has distance 0 in both maps
    return slope[0], slope[1], offset, frame


def check_weight(value: object) -> float:
    """The autoencoder's weight as a float; ValueError unless it is above 0 and at most 1."""
    weight = check_number("autoencoder_weight", value, 0, above=True)
    if weight > 1:
        raise ValueError(f"autoencoder_weight is {weight:g}; it must be at most 1")
    return weight
