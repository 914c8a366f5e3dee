"""The torch.library operators.

`torch.ops.efficientad.*`, each with a fake that gives shapes and dtypes alone, so that
torch.compile, torch.export and CUDA graphs see one node. Nothing is checked here: call them through
`efficientad.ops.fused`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from efficientad.ops import reference

KERNEL_FILES = {
    "pack": "pack",
    "first_conv_relu_pool": "first_conv",
    "conv_relu": "conv",
    "conv_relu_pool": "conv",
    "pair_distance": "pair_distance",
    "strided_conv_relu": "strided_conv",
    "resize_conv_relu": "resize_conv",
    "bottleneck": "bottleneck",
    "anomaly_map": "anomaly_map",
}


def kernel(operation: str) -> Callable:
    """The Triton implementation of an operation."""
    from efficientad import kernels

    module = importlib.import_module(f"{kernels.__name__}.{KERNEL_FILES[operation]}")
    return getattr(module, operation)


def _run(operation: str, backend: str, first: Tensor, *args, **options):
    """Call the implementation that `backend` names, under the device of `first`."""
    if backend == "torch":
        return getattr(reference, operation)(*args, **options)
    device = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with device:
        return kernel(operation)(*args, **options)


def _operator(fake: Callable) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Register a function as efficientad::<its name>, with its fake."""

    def register(function: Callable) -> torch.library.CustomOpDef:
        operator = torch.library.custom_op(
            f"efficientad::{function.__name__}", function, mutates_args=()
        )
        operator.register_fake(fake)
        return operator

    return register


def _conv_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    kernel_size = weight.shape[1]
    rows, cols = ((n + 2 * padding - kernel_size) // stride + 1 for n in x.shape[1:3])
    return rows, cols


def _pack_fake(image, mean, std, channels_last, border, dtype, backend):
    height, width = image.shape[1:3] if channels_last else image.shape[2:]
    shape = (image.shape[0], height + 2 * border, width + 2 * border, 4)
    return image.new_empty(shape, dtype=dtype)


@_operator(_pack_fake)
def pack(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    channels_last: bool,
    border: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    options = {"channels_last": channels_last, "border": border, "dtype": dtype}
    return _run("pack", backend, image, image, mean, std, **options)


def _pooled(x, weight, padding, pool_padding, out_dtype) -> list[Tensor]:
    out = []
    for x_i, w_i in zip(x, weight, strict=True):
        rows, cols = ((n + 2 * pool_padding) // 2 for n in _conv_size(x_i, w_i, 1, padding))
        out.append(x_i.new_empty((x_i.shape[0], rows, cols, w_i.shape[0]), dtype=out_dtype))
    return out


def _first_fake(x, weight, bias, pool_padding, pool_scale, out_dtype, backend):
    return _pooled([x] * len(weight), weight, 0, pool_padding, out_dtype)


@_operator(_first_fake)
def first_conv_relu_pool(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    pool_padding: int,
    pool_scale: float,
    out_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    options = {"pool_padding": pool_padding, "pool_scale": pool_scale, "out_dtype": out_dtype}
    return _run("first_conv_relu_pool", backend, x, x, weight, bias, **options)


def _conv_relu_fake(x, weight, bias, padding, relu, scale, out_dtype, backend):
    return [
        x_i.new_empty(
            (x_i.shape[0], *_conv_size(x_i, w_i, 1, padding), w_i.shape[0]), dtype=out_dtype
        )
        for x_i, w_i in zip(x, weight, strict=True)
    ]


# An empty list of scales stands for None, which the schema language has not for lists of tensors.
@_operator(_conv_relu_fake)
def conv_relu(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    padding: int,
    relu: bool,
    scale: list[Tensor],
    out_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    options = {"padding": padding, "relu": relu, "scale": scale or None, "out_dtype": out_dtype}
    return _run("conv_relu", backend, x[0], x, weight, bias, **options)


def _conv_pool_fake(x, weight, bias, padding, pool_padding, pool_scale, scale, out_dtype, backend):
    return _pooled(x, weight, padding, pool_padding, out_dtype)


@_operator(_conv_pool_fake)
def conv_relu_pool(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    padding: int,
    pool_padding: int,
    pool_scale: float,
    scale: list[Tensor],
    out_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    options = {"pool_padding": pool_padding, "pool_scale": pool_scale, "scale": scale or None}
    return _run(
        "conv_relu_pool", backend, x[0], x, weight, bias, padding=padding, out_dtype=out_dtype,
        **options,
    )  # fmt: skip


def _pair_fake(
    teacher, student, autoencoder, w_teacher, w_student, w_autoencoder, bias, scale, backend
):
    size = _conv_size(teacher, w_teacher, 1, 0)
    parts = 1
    if backend == "triton":
        parts = kernel_parts(teacher, w_teacher)
    shape = (parts, teacher.shape[0], *size)
    return bias.new_empty(shape), bias.new_empty(shape)


def kernel_parts(teacher: Tensor, weight_teacher: Tensor) -> int:
    """Partial maps that the kernel of `pair_distance` gives for these tensors."""
    from efficientad.kernels import common  # fmt: skip
    from efficientad.kernels import pair_distance as module

    rows, cols = _conv_size(teacher, weight_teacher, 1, 0)
    channels = weight_teacher.shape[0]
    pixels = teacher.shape[0] * rows * cols
    tile = module.choose_tile(common.target_of(teacher), pixels, channels)
    return channels // (tile.bn + tile.bn_tail)


@_operator(_pair_fake)
def pair_distance(
    teacher: Tensor,
    student: Tensor,
    autoencoder: Tensor,
    weight_teacher: Tensor,
    weight_student: Tensor,
    weight_autoencoder: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    weights = (weight_teacher, weight_student, weight_autoencoder)
    inputs = (teacher, student, autoencoder)
    return _run("pair_distance", backend, teacher, *inputs, *weights, bias, scale=scale)


def _strided_fake(x, weight, bias, stride, padding, relu, backend):
    return x.new_empty((x.shape[0], *_conv_size(x, weight, stride, padding), weight.shape[0]))


@_operator(_strided_fake)
def strided_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    relu: bool,
    backend: str,
) -> Tensor:
    options = {"stride": stride, "padding": padding, "relu": relu}
    return _run("strided_conv_relu", backend, x, x, weight, bias, **options)


def _resize_fake(x, weight, bias, size, padding, rows, cols, backend):
    height, width = (n + 2 * padding - weight.shape[1] + 1 for n in size)
    return x.new_empty((x.shape[0], height, width, weight.shape[0]))


@_operator(_resize_fake)
def resize_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: list[int],
    padding: int,
    rows: Tensor | None,
    cols: Tensor | None,
    backend: str,
) -> Tensor:
    options = {"padding": padding, "rows": rows, "cols": cols}
    return _run("resize_conv_relu", backend, x, x, weight, bias, tuple(size), **options)


def _bottleneck_fake(x, weight_encoder, bias_encoder, weight, bias, backend):
    return x.new_empty((x.shape[0], 4, 4, weight.shape[0]))


@_operator(_bottleneck_fake)
def bottleneck(
    x: Tensor,
    weight_encoder: Tensor,
    bias_encoder: Tensor,
    weight: Tensor,
    bias: Tensor,
    backend: str,
) -> Tensor:
    return _run("bottleneck", backend, x, x, weight_encoder, bias_encoder, weight, bias)


def _map_fake(map_st, map_ae, affine, size, padding, map_dtype, backend):
    n = map_st.shape[-3]
    return map_st.new_empty((n, *size), dtype=map_dtype), map_st.new_empty((n,))


@_operator(_map_fake)
def anomaly_map(
    map_st: Tensor,
    map_ae: Tensor,
    affine: Tensor,
    size: list[int],
    padding: int,
    map_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    maps = (map_st, map_ae, affine, tuple(size))
    return _run("anomaly_map", backend, map_st, *maps, padding=padding, map_dtype=map_dtype)
