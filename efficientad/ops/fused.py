"""The fused operations, one function each.

Each function has the name and the arguments of the definition in `efficientad.ops.reference`, where
they are described. It checks them (ValueError names the argument, its value and the rule), picks a
backend and calls the operator of the same name in `efficientad.ops.operators`.

Backends: "triton" (the kernels) and "torch" (the reference). Automatic is triton on CUDA devices
from sm_80 on and torch elsewhere; EFFICIENTAD_BACKEND or the argument `backend` overrides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad.ops.checks import (
    check_choice,
    check_conv,
    check_networks,
    check_room,
    check_scale,
    check_tensor,
    wide,
)
from efficientad.ops.operators import KERNEL_FILES, OPERATORS
from efficientad.utils.devices import FP8

BACKENDS = ("triton", "torch")
OPERATIONS = tuple(KERNEL_FILES)
MIN_CAPABILITY = (8, 0)
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32, torch.float64)


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The backend for tensors on `device`, "triton" or "torch"; see the module's text.

    Raises:
        ValueError: an unknown backend, or triton where its kernels cannot run.
    """
    source = "EFFICIENTAD_BACKEND" if backend is None else "backend"
    backend = backend or os.environ.get("EFFICIENTAD_BACKEND") or None
    if backend not in (None, *BACKENDS):
        raise ValueError(f"{source} is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    if backend == "torch" or (backend != "triton" and not capable):
        return "torch"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (capable or interpreted):
        raise ValueError(
            f"{source} is 'triton' and the tensors are on {device}; the kernels need a CUDA device "
            "from sm_80 on (or TRITON_INTERPRET=1, set before triton is imported, for tests)"
        )
    return "triton"


def _dtypes(backend: str, *, fp8: bool = False) -> tuple[torch.dtype, ...]:
    """Dtypes of activations: the kernels compute in the halves (and fp8), the reference in all."""
    return (*(_HALVES if backend == "triton" else _FLOATS), *((FP8,) if fp8 else ()))


def _check_group(x, weight, bias, scale, padding: int, backend: str | None) -> str:
    """Check the arguments of a convolution grouped over networks; returns the backend."""
    given = {"x": x, "weight": weight, "bias": bias}
    check_networks(**given, **({} if scale is None else {"scale": scale}))
    first = x[0]
    chosen = choose_backend(first.device, backend)
    check_tensor("x[0]", first, (None,) * 4, dtypes=_dtypes(chosen, fp8=True))
    check_scale("x", first, scale)
    for i, x_i in enumerate(x):
        check_tensor(f"x[{i}]", x_i, first.shape, dtypes=(first.dtype,), device=first.device)
        if weight[i].shape[1:] != weight[0].shape[1:]:
            raise ValueError(
                f"weight[{i}] has shape {tuple(weight[i].shape)}; its kernel and input channels "
                f"must be those of weight[0], {tuple(weight[0].shape[1:])}"
            )
        check_conv(f"[{i}]", x_i, weight[i], bias[i], (1, 3, 4))
        check_room(f"x[{i}]", x_i, weight[i].shape[1], padding)
        if scale is not None:
            check_tensor(
                f"scale[{i}]", scale[i], bias[i].shape, dtypes=wide(x_i), device=x_i.device
            )
    return chosen


def pack(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    channels_last: bool,
    border: int = 0,
    dtype: torch.dtype = torch.float16,
    backend: str | None = None,
) -> Tensor:
    """`reference.pack`; the image may have any strides."""
    chosen = choose_backend(image.device, backend)
    shape = (None, None, None, 3) if channels_last else (None, 3, None, None)
    more = () if chosen == "triton" else (torch.bfloat16, torch.float64)
    dtypes = (torch.uint8, torch.float16, torch.float32, *more)
    check_tensor("image", image, shape, dtypes=dtypes, contiguous=False)
    for name, value in (("mean", mean), ("std", std)):
        check_tensor(name, value, (3,), dtypes=wide(image), device=image.device)
    if dtype not in _dtypes(chosen):
        raise ValueError(f"dtype is {dtype}; on {chosen} it must be one of {_dtypes(chosen)}")
    if border < 0:
        raise ValueError(f"border is {border}; it must be >= 0 pixels")
    return OPERATORS["pack"](image, mean, std, channels_last, border, dtype, chosen)


def first_conv_relu_pool(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`reference.first_conv_relu_pool`."""
    check_networks(weight=weight, bias=bias)
    chosen = choose_backend(x.device, backend)
    check_tensor("x", x, (None, None, None, 4), dtypes=_dtypes(chosen))
    for i in range(len(weight)):
        check_conv(f"[{i}]", x, weight[i], bias[i], (4,))
    check_room("x", x, 4, 0)
    check_choice("pool_padding", pool_padding, (0, 1))
    return OPERATORS["first_conv_relu_pool"](
        x, list(weight), list(bias), pool_padding, pool_scale, out_dtype or x.dtype, chosen
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
    backend: str | None = None,
) -> list[Tensor]:
    """`reference.conv_relu`."""
    chosen = _check_group(x, weight, bias, scale, padding, backend)
    tensors = (list(x), list(weight), list(bias))
    dtype = out_dtype or x[0].dtype
    return OPERATORS["conv_relu"](*tensors, padding, relu, list(scale or ()), dtype, chosen)


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
    backend: str | None = None,
) -> list[Tensor]:
    """`reference.conv_relu_pool`."""
    chosen = _check_group(x, weight, bias, scale, padding, backend)
    check_choice("pool_padding", pool_padding, (0, 1))
    tensors = (list(x), list(weight), list(bias))
    pool = (pool_padding, pool_scale)
    dtype = out_dtype or x[0].dtype
    return OPERATORS["conv_relu_pool"](*tensors, padding, *pool, list(scale or ()), dtype, chosen)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.pair_distance`; the partial maps are as many as the backend's slices."""
    chosen = choose_backend(teacher.device, backend)
    device, dtype = teacher.device, teacher.dtype
    check_tensor("teacher", teacher, (None,) * 4, dtypes=_dtypes(chosen, fp8=True))
    shape = (*teacher.shape[:3], None)
    check_tensor("student", student, shape, dtypes=(dtype,), device=device)
    channels, side = len(weight_teacher), weight_teacher.shape[1]
    both = bias[:channels], bias[channels:]
    check_tensor("bias", bias, (2 * channels,), dtypes=wide(teacher), device=device)
    check_conv("_teacher", teacher, weight_teacher, both[0], (1, 3, 4))
    check_room("teacher", teacher, side, 0)
    check_conv("_student", student, weight_student, bias, (side,), rows=2 * channels)
    out = tuple(n - side + 1 for n in teacher.shape[1:3])
    dtypes = _dtypes(chosen) if dtype == FP8 else (dtype,)
    shape = (teacher.shape[0], *out, None)
    check_tensor("autoencoder", autoencoder, shape, dtypes=dtypes, device=device)
    check_conv("_autoencoder", autoencoder, weight_autoencoder, both[1], (3,), rows=channels)
    check_scale("teacher", teacher, scale)
    if scale is not None:
        check_tensor("scale", scale, (2 * channels,), dtypes=wide(teacher), device=device)
    weights = (weight_teacher, weight_student, weight_autoencoder)
    return OPERATORS["pair_distance"](teacher, student, autoencoder, *weights, bias, scale, chosen)


def strided_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 2,
    padding: int = 1,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`reference.strided_conv_relu`; x may be the interior of a larger packed image."""
    chosen = choose_backend(x.device, backend)
    check_tensor("x", x, (None,) * 4, dtypes=_dtypes(chosen), contiguous=False)
    check_conv("", x, weight, bias, (4, 8))
    check_room("x", x, weight.shape[1], padding)
    check_choice("stride", stride, (1, 2))
    return OPERATORS["strided_conv_relu"](x, weight, bias, stride, padding, relu, chosen)


def resize_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    *,
    padding: int = 2,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`reference.resize_conv_relu`."""
    chosen = choose_backend(x.device, backend)
    check_tensor("x", x, (None,) * 4, dtypes=_dtypes(chosen))
    check_conv("", x, weight, bias, (3, 4))
    side = weight.shape[1]
    if min(size) < 1 or min(size) + 2 * padding < side:
        raise ValueError(
            f"size is {tuple(size)} and padding {padding}; the resized image needs at least one "
            f"cell, and with its padding {side}x{side}"
        )
    for name, table in (("rows", rows), ("cols", cols)):
        if table is not None:
            check_tensor(name, table, (None,), dtypes=(torch.int32,), device=x.device)
    return OPERATORS["resize_conv_relu"](x, weight, bias, list(size), padding, rows, cols, chosen)


def bottleneck(
    x: Tensor,
    weight_encoder: Tensor,
    bias_encoder: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`reference.bottleneck`."""
    chosen = choose_backend(x.device, backend)
    check_tensor("x", x, (None, 8, 8, None), dtypes=_dtypes(chosen))
    check_conv("_encoder", x, weight_encoder, bias_encoder, (8,))
    latent = x.new_empty((0, 1, 1, len(weight_encoder)))
    check_conv("", latent, weight, bias, (4,))
    return OPERATORS["bottleneck"](x, weight_encoder, bias_encoder, weight, bias, chosen)


def anomaly_map(
    map_st: Tensor,
    map_ae: Tensor,
    affine: Tensor,
    size: tuple[int, int],
    *,
    padding: int,
    map_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.anomaly_map`."""
    chosen = choose_backend(map_st.device, backend)
    dims = 4 if map_st.dim() == 4 else 3
    dtypes = (torch.float32,) if chosen == "triton" else (torch.float32, torch.float64)
    check_tensor("map_st", map_st, (None,) * dims, dtypes=dtypes)
    for name, value, shape in (("map_ae", map_ae, map_st.shape), ("affine", affine, (4,))):
        check_tensor(name, value, shape, dtypes=(map_st.dtype,), device=map_st.device)
    if min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; rows and columns must be at least 1")
    if padding < 0:
        raise ValueError(f"padding is {padding}; it must be >= 0 cells")
    map_dtype = map_dtype or map_st.dtype
    if map_dtype not in (map_st.dtype, torch.float16):
        raise ValueError(f"map_dtype is {map_dtype}; it must be {map_st.dtype} or torch.float16")
    return OPERATORS["anomaly_map"](map_st, map_ae, affine, list(size), padding, map_dtype, chosen)
