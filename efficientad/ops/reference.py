"""Each fused operation in plain torch, the definition of correct.

Layouts are the kernels': activations are NHWC, filters are (Cout, K, K, Cin), biases and scales are
float32. Each operation computes in float32 (float64 for float64 inputs) from its inputs as they are
stored and rounds once, to the dtype of the result, when it returns; maps stay in float32.

Operations that the fast path runs for teacher and student in one launch take one entry per network:
`x`, `weight`, `bias` and `scale` are sequences, and so is the result. Networks may differ in
output channels.

float8_e4m3fn inputs come with `scale`, a factor per output channel on the accumulated products
(weight scale times activation scale). The scale of an fp8 result is folded into `scale` and `bias`,
which ReLU and pooling allow because they are homogeneous.

NaN is never dropped: an infinity that an fp8 result cannot hold becomes NaN, and a map value that
is not finite makes the image's score NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # largest finite float8_e4m3fn


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.itemsize > 1 else x.float()


def _conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """NHWC convolution with a (Cout, K, K, Cin) filter, in at least float32; NCHW result."""
    x = _wide(x).permute(0, 3, 1, 2)
    return F.conv2d(x, weight.to(x.dtype).permute(0, 3, 1, 2), None, stride, padding)


def _scale_bias(y: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    """Accumulated products (N, C, h, w) times scale (C,) plus bias (C,)."""
    if scale is not None:
        y = y * scale.to(y.dtype)[:, None, None]
    return y + bias.to(y.dtype)[:, None, None]


def _result(y: Tensor, dtype: torch.dtype) -> Tensor:
    """NCHW in float32 -> NHWC in `dtype`; fp8 saturates what is finite, infinity becomes NaN."""
    if dtype == torch.float8_e4m3fn:
        y = torch.where(y.isinf(), torch.nan, y.clamp(-FP8_MAX, FP8_MAX))
    return y.permute(0, 2, 3, 1).contiguous().to(dtype)


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
        mean, std: (3,) float32, of the image scaled to 0..1.
        border: rows and columns of exact zeros put on every side (the padded PDN's first padding).
        dtype: of the result; the arithmetic is float32: ((x / 255) - mean) / std.

    Returns:
        (N, H + 2 border, W + 2 border, 4); the fourth channel is 0.
    """
    x = _wide(image) / 255 if image.dtype == torch.uint8 else _wide(image)
    x = x if channels_last else x.permute(0, 2, 3, 1)
    x = (x - mean.to(x.dtype)) / std.to(x.dtype)
    return F.pad(x, (0, 1, border, border, border, border)).to(dtype)


def first_conv_relu_pool(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """PDN layer 1 of every network from one packed image: 4x4 convolution, ReLU, 2x2 average pool.

    Args:
        x: (N, H, W, 4), from `pack`, which has already put the convolution's padding around it.
        weight: per network (Cout, 4, 4, 4); the last input channel meets zeros.
        bias: per network (Cout,).
        pool_padding, pool_scale, out_dtype: as in `conv_relu_pool`.

    Returns:
        Per network (N, h, w, Cout), h = (H - 3 + 2 pool_padding) // 2.
    """
    return conv_relu_pool(
        [x] * len(weight),
        weight,
        bias,
        pool_padding=pool_padding,
        pool_scale=pool_scale,
        out_dtype=out_dtype,
    )


def conv_relu(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    padding: int = 0,
    relu: bool = True,
    scale: Sequence[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Stride-1 convolution and ReLU, grouped over networks.

    Args:
        x: per network (N, H, W, Cin).
        weight: per network (Cout, K, K, Cin), K = 1, 3 or 4.
        bias: per network (Cout,).
        padding: zeros on every side of the input.
        relu: False leaves the result as it is.
        scale: per network (Cout,), for fp8 inputs.
        out_dtype: of the result; None is the dtype of x.

    Returns:
        Per network (N, H - K + 1 + 2 padding, W - K + 1 + 2 padding, Cout).
    """
    out = []
    for i, (x_i, weight_i, bias_i) in enumerate(zip(x, weight, bias, strict=True)):
        y = _conv(x_i, weight_i, padding=padding)
        y = _scale_bias(y, None if scale is None else scale[i], bias_i)
        out.append(_result(F.relu(y) if relu else y, out_dtype or x_i.dtype))
    return out


def conv_relu_pool(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    padding: int = 0,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
    scale: Sequence[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Stride-1 convolution, ReLU and 2x2 average pool (stride 2, floor), grouped over networks.

    Args:
        x: per network (N, H, W, Cin).
        weight: per network (Cout, K, K, Cin).
        bias: per network (Cout,).
        padding: zeros on every side of the convolution's input.
        pool_padding: zeros on every side of the pool's input; they count in the divisor.
        pool_scale: factor on the sum over the 2x2 window: 0.25 is the average, 1 is for weights and
            biases that already hold the quarter.
        scale: per network (Cout,), for fp8 inputs.
        out_dtype: of the result; None is the dtype of x.

    Returns:
        Per network (N, h, w, Cout), h = (H - K + 1 + 2 padding + 2 pool_padding) // 2.
    """
    out = []
    for i, (x_i, weight_i, bias_i) in enumerate(zip(x, weight, bias, strict=True)):
        y = _conv(x_i, weight_i, padding=padding)
        y = F.relu(_scale_bias(y, None if scale is None else scale[i], bias_i))
        y = F.avg_pool2d(y, 2, 2, padding=pool_padding, divisor_override=1) * pool_scale
        out.append(_result(y, out_dtype or x_i.dtype))
    return out


def pair_distance(
    teacher: Tensor,
    student: Tensor,
    autoencoder: Tensor,
    weight_teacher: Tensor,
    weight_student: Tensor,
    weight_autoencoder: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both distance maps straight from the inputs of the three networks' last convolutions.

    The student's filters come with their sign flipped and the teacher's with its channel statistics
    folded in, so that each difference is one accumulation (paper, Algorithm 2, lines 2 to 6):
    st = mean_c (conv(teacher) + conv(student) + bias)^2 with the student's first C filters and
    ae = mean_c (conv(autoencoder) + conv(student) + bias)^2 with its last C filters.

    Args:
        teacher: (N, H, W, Ct); student: (N, H, W, Cs), inputs of the PDNs' last layer.
        autoencoder: (N, H - K + 1, W - K + 1, Ca), input of the decoder's last 3x3 convolution.
        weight_teacher: (C, K, K, Ct).
        weight_student: (2 C, K, K, Cs), negated.
        weight_autoencoder: (C, 3, 3, Ca), applied with padding 1.
        bias: (2 C,), teacher's (autoencoder's) minus student's.
        scale: (2 C,) factor on the accumulated products, for fp8 inputs; both operands of a sum are
            quantised so that one factor serves them.

    Returns:
        map_st, map_ae: each (P, N, H - K + 1, W - K + 1) float32, partial maps whose sum over P is
        the map. P is 1 here and the number of channel slices in a kernel.
    """
    own = torch.cat(
        [_conv(teacher, weight_teacher), _conv(autoencoder, weight_autoencoder, 1, 1)], 1
    )
    difference = _scale_bias(own + _conv(student, weight_student), scale, bias)
    st, ae = difference.square().chunk(2, dim=1)
    return st.mean(1)[None], ae.mean(1)[None]


def student_distance(
    teacher: Tensor,
    student: Tensor,
    weight_teacher: Tensor,
    weight_student: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of `pair_distance` that does not need the autoencoder.

    Args: as there.

    Returns:
        map_st: (P, N, H - K + 1, W - K + 1) float32, partial maps as there.
        second: (N, H - K + 1, W - K + 1, C) float32, the student's last C filters' products as they
            are, for `autoencoder_distance`.
    """
    c = len(weight_teacher)
    own, second = _conv(student, weight_student).split(c, dim=1)
    scale = None if scale is None else scale[:c]
    difference = _scale_bias(own + _conv(teacher, weight_teacher), scale, bias[:c])
    return difference.square().mean(1)[None], second.permute(0, 2, 3, 1).contiguous()


def autoencoder_distance(
    autoencoder: Tensor,
    second: Tensor,
    weight_autoencoder: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """The rest of `pair_distance`: its map_ae.

    Args:
        autoencoder, weight_autoencoder, bias, scale: as there.
        second: (N, h, w, C) float32, of `student_distance`.

    Returns:
        (P, N, h, w) float32, partial maps as there.
    """
    c = len(weight_autoencoder)
    own = _conv(autoencoder, weight_autoencoder, 1, 1) + second.permute(0, 3, 1, 2)
    difference = _scale_bias(own, None if scale is None else scale[c:], bias[c:])
    return difference.square().mean(1)[None]


def strided_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 2, padding: int = 1, relu: bool = True
) -> Tensor:
    """Encoder layer: convolution with a stride, then ReLU.

    Args:
        x: (N, H, W, Cin); weight: (Cout, K, K, Cin); bias: (Cout,).

    Returns:
        (N, (H + 2 padding - K) // stride + 1, (W + 2 padding - K) // stride + 1, Cout).
    """
    y = _scale_bias(_conv(x, weight, stride, padding), None, bias)
    return _result(F.relu(y) if relu else y, x.dtype)


def resize_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    *,
    padding: int = 2,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Tensor:
    """Decoder layer: bilinear resize (align_corners=False, no antialias), convolution, ReLU.

    Args:
        x: (N, H, W, Cin); weight: (Cout, K, K, Cin); bias: (Cout,).
        size: rows and columns that the resize gives; the resized values are rounded to x's dtype.
        padding: zeros on every side of the resized image.
        rows, cols: int32, the rows and columns of the result that are needed (see `resize_reads`);
            None is all. The others are 0 here and unspecified in a kernel.

    Returns:
        (N, size[0] + 2 padding - K + 1, size[1] + 2 padding - K + 1, Cout).
    """
    up = F.interpolate(_wide(x).permute(0, 3, 1, 2), size=size, mode="bilinear")
    y = _conv(up.permute(0, 2, 3, 1).to(x.dtype), weight, padding=padding)
    y = _result(F.relu(_scale_bias(y, None, bias)), x.dtype)
    for dim, needed in ((1, rows), (2, cols)):
        if needed is not None:
            keep = torch.zeros(y.shape[dim], dtype=torch.bool, device=y.device)
            keep[needed.long()] = True
            y = y * keep.view(-1, *[1] * (3 - dim))
    return y


def bottleneck(
    x: Tensor, weight_encoder: Tensor, bias_encoder: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The 1x1 bottleneck at one go: 8x8 convolution without ReLU, then the first decoder layer.

    Resizing one cell to 3x3 repeats it, so the decoder layer sees a constant image.

    Args:
        x: (N, 8, 8, Cin); weight_encoder: (C, 8, 8, Cin); bias_encoder: (C,).
        weight: (Cout, 4, 4, C), applied with padding 2 to the 3x3 image; bias: (Cout,).

    Returns:
        (N, 4, 4, Cout).
    """
    latent = strided_conv_relu(x, weight_encoder, bias_encoder, stride=1, padding=0, relu=False)
    return resize_conv_relu(latent, weight, bias, (3, 3))


def resize_reads(length: int, size: int) -> list[int]:
    """The positions of an axis of `length` that a bilinear resize to `size` reads, ascending."""
    reads: set[int] = set()
    for i in range(size):
        source = max((i + 0.5) * length / size - 0.5, 0.0)
        reads.update((int(source), min(int(source) + 1, length - 1)))
    return sorted(reads)


def anomaly_map(
    map_st: Tensor,
    map_ae: Tensor,
    affine: Tensor,
    size: tuple[int, int],
    *,
    padding: int,
    map_dtype: torch.dtype | None = None,
    region: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise, combine, pad and upsample the distance maps; take the maximum (Algorithm 2, 7-11).

    Bilinear weights sum to 1, so the resize commutes with the affine normalisation and one pass
    serves every published border rule: combine at feature resolution, pad with a constant, resize.

    Args:
        map_st, map_ae: (P, N, h, w), partial maps that sum to the map; (N, h, w) is P = 1.
        affine: (4,) a_st, a_ae, offset, frame: the combined map is a_st st + a_ae ae + offset, and
            `frame` is the value of the padded cells.
        size: rows and columns of the result.
        padding: cells put on every side before the resize.
        map_dtype: of the map, float32 or float16; None is that of the distance maps. The score is
            not rounded to it.
        region: what counts, bool: of the result (*size) and of the distance maps' cells (h, w).
            Outside the map is `offset`, which no distance falls below; None is everywhere.

    Returns:
        (anomaly_map (N, *size), score (N,)), in at least float32; the score is the maximum after
        the resize.
        A combined value that is not finite is NaN in the map, and the image's score is NaN.
    """
    st, ae = _wide(map_st), _wide(map_ae)
    if st.dim() == 4:
        st, ae = st.sum(0), ae.sum(0)
    a_st, a_ae, offset, frame = affine.to(st.dtype).unbind()
    combined = a_st * st + a_ae * ae + (offset - frame)
    combined = torch.where(combined.isfinite(), combined, torch.nan)
    padded = F.pad(combined[:, None], (padding,) * 4)
    up = F.interpolate(padded, size=size, mode="bilinear")[:, 0].add_(frame)  # in place: large
    broken, counted = combined.isnan(), up
    if region is not None:
        broken, counted = broken & region[1], up.masked_fill(~region[0], -torch.inf)
        up = torch.where(region[0], up, offset)
    score = counted.amax(dim=(-2, -1))
    # A downscale may skip cells; a value that is not finite counts wherever it is.
    score = torch.where(broken.any(-1).any(-1), torch.nan, score)
    return up.to(map_dtype or up.dtype), score


def distance_map(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of the squared difference, (N, C, h, w) twice -> (N, h, w), at least float32.

    Accumulating in half would overflow: a difference of 300 has the square 90,000 > 65,504.
    """
    return (_wide(a) - _wide(b)).square().mean(dim=1)
