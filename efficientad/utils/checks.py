"""Argument checks whose messages name the argument, value and rule."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

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


def check_integer(name: str, value: object, least: int | None = None) -> int:
    """`value` as an int; ValueError unless it is an integer, of at least `least` if that is set."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        rule = "" if least is None else f" >= {least}"
        raise ValueError(f"{name} is {value!r}; it must be an integer{rule}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False: any other text would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")


def check_number(
    name: str, value: object, least: float, below: float = math.inf, *, above: bool = False
) -> float:
    """`value` as a float; ValueError unless least <= value < below (`above`: least < value)."""
    if is_number(value) and least <= value < below and not (above and value == least):
        return float(value)
    if below < math.inf:
        rule = f"in {'(' if above else '['}{least:g}, {below:g})"
    else:
        rule = f"a finite number {'>' if above else '>='} {least:g}"
    raise ValueError(f"{name} is {value!r}; it must be {rule}")


def is_number(value: object) -> bool:
    """Whether it is a finite real number, not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_path(name: str, value: object, what: str) -> None:
    """Raise ValueError unless `value` is a str or a path; `what` it should name."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} is {value!r}; it must be the path of {what}")


def check_writable(name: str, path: str | os.PathLike, *, make_folders: bool = False) -> None:
    """Try whether a file can be written at `path`, hours before it is; leaves nothing there.

    make_folders: whoever writes makes missing folders.

    Raises:
        ValueError: not a path, or a folder. FileNotFoundError: the folder is missing.
        OSError: the folder takes no file.
    """
    check_path(name, path, "a file")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, a folder; it must name a file")
    folder = path.parent
    while make_folders and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; create it first")
    probe = folder / f".{path.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{name} is {str(path)!r}, which cannot be written: {error}") from error
