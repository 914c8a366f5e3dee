"""A detector's weights as the fast path wants them.

Everything is folded in float64 and cast once. Folded exactly, in real arithmetic: the teacher's
channel statistics into its last layer, the pool's quarter into the pooled layers from the second
on, the minus sign of the differences into the student's last layer. The image normalisation is not
folded: it belongs to `pack`, so that the zero padding of the padded network stays exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN_LAYERS

Layer = tuple[Tensor, Tensor]  # weight, bias


@dataclass
class FoldedWeights:
    """Filters (Cout, K, K, Cin) in the computing dtype; biases and scales in at least float32.

    A layer reads the dtype of its own filters and writes that of the next layer's.

    Attributes:
        image_mean, image_std: (3,), for `pack`.
        trunk: per PDN layer but the last: weights and biases, one entry per network (teacher,
            student), consecutive views of one buffer each. The first layer has four input channels.
        encoder: the six encoder layers; the first has four input channels.
        decoder: decoder layers 1 to 7.
        last: weight_teacher, weight_student (negated), weight_autoencoder and bias of
            `reference.pair_distance`.
        affine: (4,), for `reference.anomaly_map`.
        trunk_scales: per PDN layer but the last: the networks' scales like the biases, or None
            where the filters are not fp8. last_scale: that of `reference.pair_distance`, or None.
    """

    image_mean: Tensor
    image_std: Tensor
    trunk: list[tuple[list[Tensor], list[Tensor]]]
    encoder: list[Layer]
    decoder: list[Layer]
    last: tuple[Tensor, Tensor, Tensor, Tensor]
    affine: Tensor
    trunk_scales: list[list[Tensor] | None]
    last_scale: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in a fixed order."""
        yield from (self.image_mean, self.image_std)
        for weights, biases in self.trunk:
            yield from (*weights, *biases)
        for layer in (*self.encoder, *self.decoder):
            yield from layer
        yield from (*self.last, self.affine)
        for scales in self.trunk_scales:
            yield from scales or ()
        if self.last_scale is not None:
            yield self.last_scale

    def copy_(self, other: FoldedWeights) -> None:
        """Take over other weights of the same network, in place: captured graphs stay valid.

        Raises:
            ValueError: weights of another network or padding.
        """
        pairs = list(zip(self.tensors(), other.tensors(), strict=False))
        mine, theirs = ([tuple(t.shape) for t in side] for side in zip(*pairs, strict=True))
        if mine != theirs or len(self.trunk) != len(other.trunk):
            raise ValueError("the weights are of another network size; build a new predictor")
        for own, new in pairs:
            own.copy_(new)


@torch.no_grad()
def fold(
    detector: EfficientAD, dtype: torch.dtype, device: torch.device | str | None = None
) -> FoldedWeights:
    """Fold and pack the weights of a calibrated detector for the fused operations.

    Args:
        detector: its weights are read, not changed.
        dtype: of the filters; biases, statistics and the map's affine are float32 (float64 for
            float64).
        device: of the result; None is the detector's.

    Raises:
        UncalibratedError: statistics or quantiles are not set.
    """
    if not detector.calibrated:
        detector.raise_uncalibrated()
    device = detector.affine.device if device is None else torch.device(device)
    wide = torch.promote_types(dtype, torch.float32)

    def filters(weight: Tensor, channels: int = 0) -> Tensor:
        weight = weight.permute(0, 2, 3, 1)
        weight = F.pad(weight, (0, max(channels - weight.shape[3], 0)))
        return weight.to(device, dtype, copy=True).contiguous()

    def vector(value: Tensor) -> Tensor:
        return value.detach().double().flatten().to(device, wide, copy=True)

    exact = exact_layers(detector)

    def layer(name: str, channels: int = 0) -> Layer:
        weight, bias = exact[name]
        return filters(weight, channels), vector(bias)

    trunk = []
    for i, row in enumerate(PDN_LAYERS[detector.size][:-1], start=1):
        pair = [exact[f"teacher{i}"], exact[f"student{i}"]]
        # The first layer keeps its quarter: `pack` feeds it, and 3 channels leave room to spare.
        quarter = 0.25 if row.pool and i > 1 else 1.0
        weights = [filters(weight * quarter, 4 if i == 1 else 0) for weight, _ in pair]
        trunk.append((consecutive(weights), consecutive([vector(b * quarter) for _, b in pair])))
    teacher, student, autoencoder, bias = exact_last(detector)
    return FoldedWeights(
        image_mean=vector(detector.image_mean),
        image_std=vector(detector.image_std),
        trunk=trunk,
        encoder=[layer(f"enconv{i}", 4 if i == 1 else 0) for i in range(1, 7)],
        decoder=[layer(f"deconv{i}") for i in range(1, 8)],
        last=(filters(teacher), filters(student), filters(autoencoder), vector(bias)),
        affine=vector(detector.affine),
        trunk_scales=[None] * len(trunk),
    )


@torch.no_grad()
def exact_layers(detector: EfficientAD) -> dict[str, Layer]:
    """Every convolution but the last of each network, in float64, OIHW.

    By name: "teacher1", "student1" and on per PDN layer, "enconv1" to 6, "deconv1" to 7.
    """
    convs: dict[str, nn.Conv2d] = {}
    for name, network in (("teacher", detector.teacher), ("student", detector.student)):
        inner = enumerate(network.layers()[:-1], start=1)
        convs |= {f"{name}{i}": conv for i, (conv, _) in inner}
    encoder, decoder = detector.autoencoder.encoder, detector.autoencoder.decoder
    convs |= {f"enconv{i}": getattr(encoder, f"enconv{i}") for i in range(1, 7)}
    convs |= {f"deconv{i}": getattr(decoder, f"deconv{i}") for i in range(1, 8)}
    return {name: (conv.weight.double(), bias_of(conv).double()) for name, conv in convs.items()}


@torch.no_grad()
def exact_last(detector: EfficientAD) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last layer of all three networks as `FoldedWeights.last` has it, in float64, OIHW.

    The teacher's channel statistics are in its weights and in the bias, which is that of the
    differences: teacher and autoencoder less the student's two halves.
    """
    teacher, student = detector.teacher.last, detector.student.last
    autoencoder = detector.autoencoder.decoder.deconv8
    mean, std = (v.double().flatten() for v in (detector.teacher_mean, detector.teacher_std))
    own_bias = torch.cat([(bias_of(teacher).double() - mean) / std, bias_of(autoencoder).double()])
    return (
        teacher.weight.double() / std[:, None, None, None],
        -student.weight.double(),
        autoencoder.weight.double(),
        own_bias - bias_of(student).double(),
    )


def bias_of(conv: nn.Conv2d) -> Tensor:
    """Every convolution of these networks has a bias."""
    assert conv.bias is not None
    return conv.bias


def consecutive(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The same tensors as consecutive views of one buffer, cast to `dtype` if it is given."""
    return list(torch.cat(tensors).to(dtype).split([len(t) for t in tensors]))
