"""Checks of the operations' tensors; every message names the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad.utils.devices import FP8


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise ValueError unless the tensor has the shape (None: any length), a dtype, the device.

    `contiguous` asks for the layout in which the shape is written.
    """
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, where x is")
    if dtypes is not None and tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {allowed}")
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({wanted})")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; it must be contiguous in the layout of its "
            "shape (call .contiguous())"
        )


def check_networks(**tensors: Sequence[Tensor]) -> int:
    """Raise ValueError unless every sequence has one entry per network; returns their number."""
    counts = {name: len(value) for name, value in tensors.items()}
    if len(set(counts.values())) != 1 or not 1 <= next(iter(counts.values())) <= 2:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"entries per argument are {found}; each needs one per network, 1 or 2")
    return next(iter(counts.values()))


def wide(x: Tensor) -> tuple[torch.dtype]:
    """The dtype of biases, scales and maps beside activations x."""
    return (torch.float64 if x.dtype == torch.float64 else torch.float32,)


def check_choice(name: str, value: int, choices: Sequence[int]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value}; it must be {' or '.join(map(str, choices))}")


def check_conv(
    names: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sides: Sequence[int],
    rows: int | None = None,
) -> None:
    """Filter (rows, K, K, Cin) and bias of a convolution on NHWC x; K is one of `sides`."""
    shape = (rows, None, None, x.shape[3])
    check_tensor(f"weight{names}", weight, shape, dtypes=(x.dtype,), device=x.device)
    height, width = weight.shape[1:3]
    if height != width or height not in sides:
        raise ValueError(
            f"weight{names} has {height}x{width} filters; they must be square with a side of "
            f"{' or '.join(map(str, sides))}"
        )
    check_tensor(f"bias{names}", bias, (len(weight),), dtypes=wide(x), device=x.device)


def check_room(name: str, x: Tensor, side: int, padding: int) -> None:
    """Raise ValueError unless filters of `side` fit into NHWC x with its padding."""
    if padding < 0:
        raise ValueError(f"padding is {padding}; it must be >= 0")
    if min(x.shape[1:3]) + 2 * padding < side:
        raise ValueError(
            f"{name} has {x.shape[1]}x{x.shape[2]} pixels and padding {padding}; filters of "
            f"{side}x{side} need at least their own size"
        )


def check_scale(name: str, x: Tensor, scale: object | None) -> None:
    """Raise ValueError unless there is a scale for fp8 activations x, and for them only."""
    if (x.dtype == FP8) != (scale is not None):
        raise ValueError(
            f"{name} has dtype {x.dtype} and scale is {'not ' if scale is None else ''}given; it "
            "goes with float8_e4m3fn and only with that"
        )
