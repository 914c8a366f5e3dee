"""Floor 1, imports torch only: every fused operation of the fast path in plain torch, the definition of correct.

Layouts are the kernels': activations are NHWC, filters are (Cout, K, K, Cin), biases and statistics
are float32. Each operation computes in float32 (float64 for float64 inputs) from its inputs as they
are stored and rounds once, to the dtype of the activations, when it returns; maps stay in float32.

Operations that the fast path runs for teacher and student in one launch take one entry per network:
`x`, `weight` and `bias` are sequences, and so is the result. Networks may differ in channel counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0
) -> Tensor:
    """NHWC convolution with a (Cout, K, K, Cin) filter, in at least float32; NCHW result."""
    x = _wide(x).permute(0, 3, 1, 2)
    weight = weight.to(x.dtype).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


def _nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().to(dtype)


def pack(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    channels_last: bool,
    border: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Normalise an image batch and pack it as RGBX, the input of every network.

    Args:
        image: (N, H, W, 3) if `channels_last`, else (N, 3, H, W); uint8 in 0..255 or float in 0..1.
        mean, std: (3,), of the image scaled to 0..1.
        border: rows and columns of exact zeros put on every side (the padded PDN's first padding).
        dtype: of the result; the arithmetic is float32.

    Returns:
        (N, H + 2 border, W + 2 border, 4); the fourth channel is 0.
    """
    x = _wide(image) / 255 if image.dtype == torch.uint8 else _wide(image)
    x = x if channels_last else x.permute(0, 2, 3, 1)
    x = (x - mean.to(x.dtype)) / std.to(x.dtype)
    return F.pad(x, (0, 1, border, border, border, border)).to(dtype)


def first_conv_relu_pool(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], *, pool_padding: int = 0
) -> list[Tensor]:
    """PDN layer 1 of every network from one packed image: 4x4 convolution, ReLU, 2x2 average pool.

    Args:
        x: (N, H, W, 4), from `pack`, which has already put the convolution's padding around it.
        weight: per network (Cout, 4, 4, 4); the last input channel meets zeros.
        bias: per network (Cout,).
        pool_padding: 0, or 1 in the padded PDN (zeros count in the divisor, which is always 4).

    Returns:
        Per network (N, h, w, Cout), h = (H - 3 + 2 pool_padding) // 2.
    """
    n = len(weight)
    return conv_relu_pool([x] * n, weight, bias, pool_padding=pool_padding)


def conv_relu(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    padding: int = 0,
    relu: bool = True,
) -> list[Tensor]:
    """Stride-1 convolution and ReLU, grouped over networks.

    Args:
        x: per network (N, H, W, Cin).
        weight: per network (Cout, K, K, Cin), K = 1, 3 or 4.
        bias: per network (Cout,).
        padding: zeros on every side of the input.

    Returns:
        Per network (N, H - K + 1 + 2 padding, W - K + 1 + 2 padding, Cout).
    """
    out = []
    for x_g, weight_g, bias_g in zip(x, weight, bias, strict=True):
        y = _conv(x_g, weight_g, bias_g, padding=padding)
        out.append(_nhwc(F.relu(y) if relu else y, x_g.dtype))
    return out


def conv_relu_pool(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    padding: int = 0,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
) -> list[Tensor]:
    """Stride-1 convolution, ReLU and 2x2 average pool (stride 2, floor), grouped over networks.

    Args:
        x: per network (N, H, W, Cin).
        weight: per network (Cout, K, K, Cin).
        bias: per network (Cout,).
        padding: zeros on every side of the convolution's input.
        pool_padding: zeros on every side of the pool's input; they count in the divisor.
        pool_scale: factor on the sum over the 2x2 window: 0.25 is the average, 1 is for weights and
            biases that already hold the quarter (exact, because ReLU is homogeneous).

    Returns:
        Per network (N, h, w, Cout), h = (H - K + 1 + 2 padding + 2 pool_padding) // 2.
    """
    out = []
    for x_g, weight_g, bias_g in zip(x, weight, bias, strict=True):
        y = F.relu(_conv(x_g, weight_g, bias_g, padding=padding))
        y = F.avg_pool2d(y, 2, 2, padding=pool_padding, divisor_override=1) * pool_scale
        out.append(_nhwc(y, x_g.dtype))
    return out


def pair_distance(
    teacher: Tensor,
    student: Tensor,
    autoencoder: Tensor,
    weight_teacher: Tensor,
    weight_student_st: Tensor,
    weight_student_ae: Tensor,
    weight_autoencoder: Tensor,
    bias_st: Tensor,
    bias_ae: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both distance maps straight from the inputs of the three networks' last convolutions.

    The student's filters come with their sign flipped and the teacher's with its channel statistics
    folded in, so that each difference is one accumulation:
    st = mean_c (conv(teacher) + conv(student) + bias_st)^2 and
    ae = mean_c (conv(autoencoder) + conv(student) + bias_ae)^2 (paper, Algorithm 2, lines 2 to 6).

    Args:
        teacher: (N, H, W, Ct); student: (N, H, W, Cs), inputs of the PDNs' last layer.
        autoencoder: (N, H - K + 1, W - K + 1, Ca), input of the decoder's last 3x3 convolution.
        weight_teacher: (C, K, K, Ct); weight_student_st, weight_student_ae: (C, K, K, Cs), negated.
        weight_autoencoder: (C, 3, 3, Ca), applied with padding 1.
        bias_st, bias_ae: (C,), the difference of the two biases.

    Returns:
        map_st, map_ae: each (P, N, H - K + 1, W - K + 1) float32, partial maps whose sum over P is
        the map. P is 1 here and the number of channel slices in a kernel.
    """
    st = _conv(teacher, weight_teacher, bias_st) + _conv(student, weight_student_st, None)
    ae = _conv(autoencoder, weight_autoencoder, bias_ae, padding=1)
    ae = ae + _conv(student, weight_student_ae, None)
    return st.square().mean(1)[None], ae.square().mean(1)[None]


def strided_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 2, padding: int = 1, relu: bool = True
) -> Tensor:
    """Encoder layer: convolution with a stride, then ReLU.

    Args:
        x: (N, H, W, Cin); weight: (Cout, K, K, Cin); bias: (Cout,).

    Returns:
        (N, (H + 2 padding - K) // stride + 1, (W + 2 padding - K) // stride + 1, Cout).
    """
    y = _conv(x, weight, bias, stride, padding)
    return _nhwc(F.relu(y) if relu else y, x.dtype)


def resize_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    *,
    padding: int = 2,
    relu: bool = True,
) -> Tensor:
    """Decoder layer: bilinear resize (align_corners=False, no antialias), convolution, ReLU.

    Args:
        x: (N, H, W, Cin); weight: (Cout, K, K, Cin); bias: (Cout,).
        size: rows and columns that the resize gives.

    Returns:
        (N, size[0] + 2 padding - K + 1, size[1] + 2 padding - K + 1, Cout).
    """
    up = F.interpolate(_wide(x).permute(0, 3, 1, 2), size=size, mode="bilinear")
    y = _conv(up.permute(0, 2, 3, 1), weight, bias, padding=padding)
    return _nhwc(F.relu(y) if relu else y, x.dtype)


def anomaly_map(
    map_st: Tensor,
    map_ae: Tensor,
    affine: Tensor,
    size: tuple[int, int],
    *,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """Normalise, combine, pad and upsample the two distance maps; take the maximum (Algorithm 2, 7 to 11).

    Bilinear weights sum to 1, so the resize commutes with the affine normalisation and one pass
    serves every published border rule: combine at feature resolution, pad with a constant, resize.

    Args:
        map_st, map_ae: (P, N, h, w), partial maps that sum to the map; (N, h, w) is P = 1.
        affine: (4,) a_st, a_ae, offset, frame: the combined map is a_st st + a_ae ae + offset, and
            `frame` is the value of the padded cells.
        size: rows and columns of the result.
        padding: cells put on every side before the resize.

    Returns:
        (anomaly_map (N, *size), score (N,)): the score is the maximum after the upsampling. A NaN in
        an image's maps gives that image a NaN score.
    """
    st = _wide(map_st)
    ae = _wide(map_ae)
    if st.dim() == 4:
        st, ae = st.sum(0), ae.sum(0)
    a_st, a_ae, offset, frame = affine.to(st.dtype).unbind()
    combined = a_st * st + a_ae * ae + (offset - frame)
    padded = F.pad(combined[:, None], (padding,) * 4)
    up = F.interpolate(padded, size=size, mode="bilinear")[:, 0] + frame
    return up, up.amax(dim=(-2, -1))


def distance_map(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of the squared difference, (N, C, h, w) twice -> (N, h, w), in at least float32.

    Accumulating in half would overflow: a difference of 300 has the square 90,000 > 65,504.
    """
    return (_wide(a) - _wide(b)).square().mean(dim=1)
