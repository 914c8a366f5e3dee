"""Argument checks whose messages name the argument, value and rule."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from numbers import Real
from pathlib import Path
from typing import SupportsIndex, TypeGuard

ValueRange = tuple[float, float]  # (low, high) of an image's samples, see `data.samples`


def check_integer(name: str, value: object, least: int | None = None) -> int:
    """`value` as an int; ValueError unless it is an integer, of at least `least` if that is set."""
    number = None
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # a NumPy array has the method, too
            number = operator.index(value)
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


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite real number, not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_value_range(value: object) -> ValueRange | None:
    """(low, high) as floats, or None; ValueError unless they are finite and low < high."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value)):
        low, high = map(float, value)
        if low < high:
            return low, high
    raise ValueError(f"value_range is {value!r}; it must be None or a pair of numbers, low < high")


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
