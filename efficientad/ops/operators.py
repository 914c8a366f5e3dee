"""The torch.library operators.

`torch.ops.efficientad.*`, each with a fake that gives shapes and dtypes alone, so that
torch.compile, torch.export and CUDA graphs see one node. Nothing is checked here: call them through
`efficientad.ops.fused`.
"""

from __future__ import annotations

import contextlib
import importlib
import re
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
# Parts of an operation, which have no operator of their own.
PARTS = {"student_distance": "pair_distance", "autoencoder_distance": "autoencoder_distance"}


def kernel(operation: str) -> Callable:
    """The Triton implementation of an operation or of a part of one."""
    from efficientad import kernels

    module = importlib.import_module(f"{kernels.__name__}.{(KERNEL_FILES | PARTS)[operation]}")
    return getattr(module, operation)


# ---- fakes: shapes and dtypes alone ----------------------------------------------------------


def _conv_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    kernel_size = weight.shape[1]
    rows, cols = ((n + 2 * padding - kernel_size) // stride + 1 for n in x.shape[1:3])
    return rows, cols


def _pooled(x, weight, padding, pool_padding, out_dtype) -> list[Tensor]:
    out = []
    for x_i, w_i in zip(x, weight, strict=True):
        rows, cols = ((n + 2 * pool_padding) // 2 for n in _conv_size(x_i, w_i, 1, padding))
        out.append(x_i.new_empty((x_i.shape[0], rows, cols, w_i.shape[0]), dtype=out_dtype))
    return out


def _pack(image, mean, std, channels_last, border, dtype, backend):
    height, width = image.shape[1:3] if channels_last else image.shape[2:]
    shape = (image.shape[0], height + 2 * border, width + 2 * border, 4)
    return image.new_empty(shape, dtype=dtype)


def _first(x, weight, bias, pool_padding, pool_scale, out_dtype, backend):
    return _pooled([x] * len(weight), weight, 0, pool_padding, out_dtype)


def _conv(x, weight, bias, padding, relu, scale, out_dtype, backend):
    out = []
    for x_i, w_i in zip(x, weight, strict=True):
        shape = (x_i.shape[0], *_conv_size(x_i, w_i, 1, padding), w_i.shape[0])
        out.append(x_i.new_empty(shape, dtype=out_dtype))
    return out


def _conv_pool(x, weight, bias, padding, pool_padding, pool_scale, scale, out_dtype, backend):
    return _pooled(x, weight, padding, pool_padding, out_dtype)


def _pair(teacher, student, autoencoder, w_teacher, w_student, w_autoencoder, bias, scale, backend):
    parts = kernel_parts(teacher, w_teacher) if backend == "triton" else 1
    shape = (parts, teacher.shape[0], *_conv_size(teacher, w_teacher, 1, 0))
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


def _strided(x, weight, bias, stride, padding, relu, backend):
    return x.new_empty((x.shape[0], *_conv_size(x, weight, stride, padding), weight.shape[0]))


def _resize(x, weight, bias, size, padding, rows, cols, backend):
    height, width = (n + 2 * padding - weight.shape[1] + 1 for n in size)
    return x.new_empty((x.shape[0], height, width, weight.shape[0]))


def _bottleneck(x, weight_encoder, bias_encoder, weight, bias, backend):
    return x.new_empty((x.shape[0], 4, 4, weight.shape[0]))


def _map(map_st, map_ae, affine, size, padding, map_dtype, backend):
    n = map_st.shape[-3]
    return map_st.new_empty((n, *size), dtype=map_dtype), map_st.new_empty((n,))


# ---- the operators ---------------------------------------------------------------------------

# Operation -> its schema, without the backend, which all take, and its fake. An empty list of
# scales stands for None.
_SCHEMAS: dict[str, tuple[str, Callable]] = {
    "pack": (
        "(Tensor image, Tensor mean, Tensor std, bool channels_last, SymInt border, "
        "ScalarType dtype) -> Tensor",
        _pack,
    ),
    "first_conv_relu_pool": (
        "(Tensor x, Tensor[] weight, Tensor[] bias, SymInt pool_padding, float pool_scale, "
        "ScalarType out_dtype) -> Tensor[]",
        _first,
    ),
    "conv_relu": (
        "(Tensor[] x, Tensor[] weight, Tensor[] bias, SymInt padding, bool relu, Tensor[] scale, "
        "ScalarType out_dtype) -> Tensor[]",
        _conv,
    ),
    "conv_relu_pool": (
        "(Tensor[] x, Tensor[] weight, Tensor[] bias, SymInt padding, SymInt pool_padding, "
        "float pool_scale, Tensor[] scale, ScalarType out_dtype) -> Tensor[]",
        _conv_pool,
    ),
    "pair_distance": (
        "(Tensor teacher, Tensor student, Tensor autoencoder, Tensor weight_teacher, "
        "Tensor weight_student, Tensor weight_autoencoder, Tensor bias, Tensor? scale) "
        "-> (Tensor, Tensor)",
        _pair,
    ),
    "strided_conv_relu": (
        "(Tensor x, Tensor weight, Tensor bias, SymInt stride, SymInt padding, bool relu) "
        "-> Tensor",
        _strided,
    ),
    "resize_conv_relu": (
        "(Tensor x, Tensor weight, Tensor bias, SymInt[] size, SymInt padding, Tensor? rows, "
        "Tensor? cols) -> Tensor",
        _resize,
    ),
    "bottleneck": (
        "(Tensor x, Tensor weight_encoder, Tensor bias_encoder, Tensor weight, Tensor bias) "
        "-> Tensor",
        _bottleneck,
    ),
    "anomaly_map": (
        "(Tensor map_st, Tensor map_ae, Tensor affine, SymInt[] size, SymInt padding, "
        "ScalarType map_dtype) -> (Tensor, Tensor)",
        _map,
    ),
}


def _registered(operation: str, schema: str, fake: Callable) -> torch.library.CustomOpDef:
    """efficientad::<operation>, which calls the implementation that its `backend` names."""
    head, _, result = schema.partition(")")
    names = re.findall(r"(\w+)(?:,|$)", head)

    def run(*given):
        *values, backend = given
        arguments = dict(zip(names, values, strict=True))
        if "scale" in arguments:
            arguments["scale"] = None if arguments["scale"] == [] else arguments["scale"]
        if "size" in arguments:
            arguments["size"] = tuple(arguments["size"])
        if backend == "torch":
            return getattr(reference, operation)(**arguments)
        first = values[0] if isinstance(values[0], Tensor) else values[0][0]
        device = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with device:
            return kernel(operation)(**arguments)

    schema = f"{head}, str backend){result}"
    operator = torch.library.custom_op(
        f"efficientad::{operation}", run, mutates_args=(), schema=schema
    )
    operator.register_fake(fake)
    return operator


OPERATORS = {name: _registered(name, *parts) for name, parts in _SCHEMAS.items()}
