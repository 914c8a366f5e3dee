"""`efficientad._native` (csrc/), loaded once: whether it is there, what it runs on, its threads.

It allocates nothing: what calls `_native` does, and checks its arguments, images by `pixels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from efficientad import _native
except ImportError as error:  # not built, or built for another Python; `info` says which
    _native, _reason = None, str(error)
else:
    _reason = ""

Pixels = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, strides and shape of an image
FIX = "build it with a C++ compiler: pip install -c constraints.txt -e ."


def available() -> bool:
    """Whether the compiled module is there."""
    return _native is not None


def info() -> dict[str, Any]:
    """What the frame path runs on.

    available; reason: why not, or ""; level: vector instructions in use ("avx512", "avx2" or
    "portable"; "" without the compiled path); cuda: compute capabilities compiled for, e.g. [80,
    90]; threads: that share the work on the CPU.
    """
    if _native is None:
        facts = {"available": False, "reason": _reason, "level": "", "cuda": []}
        return facts | {"threads": torch.get_num_threads()}
    return {
        "available": True,
        "reason": "",
        "level": _native.level(),
        "cuda": [int(number) for number in _native.cuda_architectures.split()],
        "threads": _native.threads(),
    }


def set_threads(count: int) -> None:
    """Threads that share the CPU's work, the caller included; 0: one per processor, at most 16."""
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 (automatic) or more")
    if _native is not None:
        _native.set_threads(count)


def module() -> Any:
    """`efficientad._native`, or None where it is not built."""
    return _native


def pixels(x: Tensor, name: str, dtype: torch.dtype) -> Pixels:
    """Address, strides and shape of x (N, H, W, C) for `_native`, which checks nothing."""
    if x.dtype != dtype or x.device.type != "cpu":
        rule = f"{str(dtype).removeprefix('torch.')} on the CPU"
        raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be {rule}")
    if x.stride(3) != 1 and x.shape[3] > 1:
        raise ValueError(f"{name} has strides {x.stride()}; its channels must lie side by side")
    return x.data_ptr(), x.stride()[:3], tuple(x.shape)
