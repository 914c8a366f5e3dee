"""Floor 1, imports torch only: argument checks whose messages name the argument, value and rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def check_map_size(map_size: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `map_size` is one of the choices."""
    if map_size not in choices:
        raise ValueError(f"map_size is {map_size!r}; it must be {' or '.join(map(repr, choices))}")
