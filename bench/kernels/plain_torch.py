"""Each fused operation as the plain torch expression that a user would write.

In the dtype of the inputs, NCHW in memory or channels_last, rounding at every step. Baselines of
the kernel benchmark; what is correct is defined in `efficientad.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(image: Tensor, mean: Tensor, std: Tensor, *, border: int, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) bytes -> normalised."""
    x = (image.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return F.pad(x, (border,) * 4).to(dtype)


def conv_relu_pool(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], *,
    padding: int, pool_padding: int,
) -> list[Tensor]:  # fmt: skip
    out = []
    for x_i, w_i, b_i in zip(x, weight, bias, strict=True):
        y = F.relu(F.conv2d(x_i, w_i, b_i, padding=padding))
        out.append(F.avg_pool2d(y, 2, 2, padding=pool_padding))
    return out


def conv_relu(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], *,
    padding: int, relu: bool,
) -> list[Tensor]:  # fmt: skip
    out = [F.conv2d(*layer, padding=padding) for layer in zip(x, weight, bias, strict=True)]
    return [F.relu(y) for y in out] if relu else out


def pair_distance(
    teacher: Tensor, student: Tensor, autoencoder: Tensor,
    w_teacher: Tensor, w_student: Tensor, w_autoencoder: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c = len(w_teacher)
    t = F.conv2d(teacher, w_teacher, bias[:c])
    a = F.conv2d(autoencoder, w_autoencoder, bias[c:], padding=1)
    s = F.conv2d(student, w_student)
    return (t + s[:, :c]).square().mean(1), (a + s[:, c:]).square().mean(1)


def strided_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int, relu: bool
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    return F.relu(y) if relu else y


def resize_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, size: tuple[int, int], padding: int
) -> Tensor:
    up = F.interpolate(x, size=size, mode="bilinear")
    return F.relu(F.conv2d(up, weight, bias, padding=padding))


def bottleneck(
    x: Tensor, w_encoder: Tensor, b_encoder: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    latent = F.conv2d(x, w_encoder, b_encoder)
    return resize_conv_relu(latent, weight, bias, size=(3, 3), padding=2)


def anomaly_map(
    map_st: Tensor, map_ae: Tensor, affine: Tensor, *, size: tuple[int, int], padding: int
) -> tuple[Tensor, Tensor]:
    combined = affine[0] * map_st + affine[1] * map_ae + affine[2]
    padded = F.pad(combined[:, None] - affine[3], (padding,) * 4)
    up = F.interpolate(padded, size=size, mode="bilinear")[:, 0] + affine[3]
    return up, up.amax(dim=(-2, -1))


def expression(case: Any, channels_last: bool) -> tuple[Callable, tuple, dict[str, Any]]:
    """(function, tensors, options) of a `case.Case`, tensors in the asked layout.

    Raises:
        ValueError: an fp8 case, for which torch has no convolution.
    """
    if case.dtype.itemsize == 1:
        raise ValueError(f"{case.operation} is in {case.dtype}; torch has no such convolution")
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def nchw(value: Any) -> Any:
        """NHWC activations and filters, biases in their dtype; sequences of them."""
        if isinstance(value, (list, tuple)):
            return [nchw(part) for part in value]
        if value.dim() == 4:
            return value.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return value.to(case.dtype)

    arguments, options = case.arguments, dict(case.options)
    options.pop("scale", None)
    if case.operation == "pack":
        image, mean, std = arguments
        options.pop("channels_last")
        return pack, (nchw(image), mean, std), options
    if case.operation == "first_conv_relu_pool":
        x, weight, bias = arguments
        x, weight = x[..., :3], [w[..., :3] for w in weight]
        pools = {"padding": 0, "pool_padding": options["pool_padding"]}
        inputs = ([nchw(x)] * len(weight), nchw(weight), nchw(bias))
        return conv_relu_pool, inputs, pools
    if case.operation == "anomaly_map":
        st, ae, affine, size = arguments
        inputs = tuple(m.sum(0) if m.dim() == 4 else m for m in (st, ae))
        return anomaly_map, (*inputs, affine), {**options, "size": size}
    if case.operation == "resize_conv_relu":
        *tensors, size = arguments
        tensors = tuple(nchw(t) for t in tensors)
        return resize_conv_relu, tensors, {"size": size, "padding": options["padding"]}
    if case.operation == "strided_conv_relu" and arguments[0].shape[3] == 4:
        x, weight, bias = arguments
        tensors = (nchw(x[..., :3]), nchw(weight[..., :3]), nchw(bias))
        return strided_conv_relu, tensors, options
    if case.operation == "conv_relu":
        options.setdefault("relu", True)
    return globals()[case.operation], tuple(nchw(t) for t in arguments), options
