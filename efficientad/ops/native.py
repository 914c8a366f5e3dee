"""`efficientad._native` (csrc/), loaded once: whether it is there, what it runs on, its threads.

It allocates nothing and checks nothing: `frame_path` and `compiled_conv` do, which call it.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from efficientad import _native
except ImportError as error:  # not built, or built for another Python; `info` says which
    _native, _reason = None, str(error)
else:
    _reason = ""

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
