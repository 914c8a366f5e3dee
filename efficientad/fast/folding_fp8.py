"""Folded weights with layers in float8_e4m3fn.

An fp8 layer reads activations stored as value / s, one s per network, and filters stored as w / t,
one t per output channel. Its `scale` is s t / s', where s' is the step of the activations that it
writes (1 for float16). ReLU and average pool are homogeneous, so s' is divided out of bias and
scale, and of the first layer's float16 filters.

All steps are powers of two: scaling is exact, and what fp8 costs is its rounding alone. e4m3 keeps
three bits of mantissa over fifteen binades, so where the values lie in them hardly matters; but a
value above the top saturates. So there is room above what good images show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad.fast.folding import FoldedWeights, consecutive, fold
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN_LAYERS
from efficientad.ops.reference import FP8_MAX
from efficientad.utils.devices import FP8

LAYERS = ("second", "inner", "all")
MARGIN = 4.0  # times the largest activation of good images that an fp8 activation holds, or more
_HALF_LIMIT = 2.0**15  # of float16 filters that hold a step; the type ends at 65504


def last_fp8_layer(size: str, layers: str) -> int:
    """Number of the last PDN layer in fp8; the first is layer 2.

    "second": layer 2 alone, two fifths (S) or half (M) of all multiplications. "inner": up to the
    last but one. "all": with the last, where fp8 costs most: its results are subtracted.

    Raises:
        ValueError: an unknown name.
    """
    if layers not in LAYERS:
        raise ValueError(f"fp8_layers is {layers!r}; it must be {' or '.join(map(repr, LAYERS))}")
    count = len(PDN_LAYERS[size])
    return {"second": 2, "inner": count - 1, "all": count}[layers]


@torch.no_grad()
def fold_fp8(
    detector: EfficientAD,
    largest: Sequence[Tensor],
    layers: str,
    device: torch.device | str | None = None,
) -> FoldedWeights:
    """`folding.fold` with layers in fp8; the other layers are float16.

    Args:
        detector: calibrated; its weights are read, not changed.
        largest: per PDN layer but the last, (2,): the largest activation that comes out of the
            teacher's and of the student's layer, pooled, on good images.
        layers: see `last_fp8_layer`.
        device: of the result; None is the detector's.

    Raises:
        UncalibratedError: statistics or quantiles are not set.
        ValueError: unknown layers, or an activation that is not finite.
    """
    last = last_fp8_layer(detector.size, layers)
    exact = fold(detector, torch.float64, device)
    single, half = torch.float32, torch.float16
    trunk, trunk_scales = [], []
    read = [1.0, 1.0]  # steps of the activations that a layer reads, and of those that it writes
    for i, (weights, biases) in enumerate(exact.trunk, start=1):
        write = activation_steps(largest[i - 1], i) if i < last else [1.0, 1.0]
        scales = None
        if 2 <= i <= last:
            steps = [_steps(w, FP8_MAX) for w in weights]
            filters = [w / _per_filter(t) for w, t in zip(weights, steps, strict=True)]
            rows = zip(read, steps, write, strict=True)
            scales = consecutive([r * t / s for r, t, s in rows], single)
        else:
            if i == 1:
                least = [float(_steps(w[None], _HALF_LIMIT)) for w in weights]
                write = [max(pair) for pair in zip(write, least, strict=True)]
            filters = [w / s for w, s in zip(weights, write, strict=True)]
        filters = consecutive(filters, half if scales is None else FP8)
        biases = [b / s for b, s in zip(biases, write, strict=True)]
        trunk.append((filters, consecutive(biases, single)))
        trunk_scales.append(scales)
        read = write
    teacher, student, autoencoder, bias = exact.last
    scale = None
    if last == len(PDN_LAYERS[detector.size]):
        teacher, student, autoencoder, scale = _quantized_last(*exact.last[:3], read)
    else:
        teacher, student = teacher.to(half), student.to(half)
    return FoldedWeights(
        image_mean=exact.image_mean.to(single),
        image_std=exact.image_std.to(single),
        trunk=trunk,
        encoder=[(weight.to(half), b.to(single)) for weight, b in exact.encoder],
        decoder=[(weight.to(half), b.to(single)) for weight, b in exact.decoder],
        last=(teacher, student, autoencoder.to(half), bias.to(single)),
        affine=exact.affine.to(single),
        trunk_scales=trunk_scales,
        last_scale=scale,
    )


def activation_steps(largest: Tensor, layer: int) -> list[float]:
    """Per network the step s of the activations that a layer writes in fp8.

    Raises:
        ValueError: a largest activation that is not finite.
    """
    if not torch.isfinite(largest).all():
        raise ValueError(
            f"the largest activations of PDN layer {layer} are {largest.tolist()}; they must be "
            "finite"
        )
    return _power_of_two(MARGIN * largest.double() / FP8_MAX).tolist()


def _quantized_last(
    teacher: Tensor, student: Tensor, autoencoder: Tensor, read: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters of `reference.pair_distance` and its scale, one for both operands of a sum.

    The autoencoder's are float16, of float16 activations.
    """
    c = len(teacher)
    teacher, student = teacher * read[0], student * read[1]
    steps = _steps(student, FP8_MAX)
    other = torch.cat([_steps(teacher, FP8_MAX), _steps(autoencoder, _HALF_LIMIT)])
    steps = torch.maximum(steps, other)
    st, both = _per_filter(steps[:c]), _per_filter(steps)
    quantized = (teacher / st).to(FP8), (student / both).to(FP8)
    return (*quantized, autoencoder / both[c:], steps.float())


def _steps(filters: Tensor, limit: float) -> Tensor:
    """Per filter (C,): the step by which its weights are divided to be at most `limit`."""
    return _power_of_two(filters.flatten(1).abs().amax(1) / limit)


def _per_filter(steps: Tensor) -> Tensor:
    return steps[:, None, None, None]


def _power_of_two(values: Tensor) -> Tensor:
    """The smallest powers of two that are at least `values`; 1 for 0."""
    fraction, _ = torch.frexp(values)  # in [0.5, 1); the quotient is a power of two, exactly
    powers = torch.where(fraction == 0.5, values, values / fraction)
    return torch.where(values > 0, powers, 1.0)
