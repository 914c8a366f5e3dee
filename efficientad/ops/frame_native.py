"""The compiled frame path and its tables.

`efficientad._native` (csrc/) allocates nothing and caches nothing: the tables of where an output
cell reads are kept here, on the host and on each CUDA device.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.results import overlay as colors

try:
    from efficientad import _native
except ImportError as error:  # not built, or built for another Python; `native_info` says which
    _native, _reason = None, str(error)
else:
    _reason = ""

FIX = "build it with a C++ compiler: pip install -c constraints.txt -e ."


def native_available() -> bool:
    """Whether the compiled frame path is there."""
    return _native is not None


def native_info() -> dict[str, Any]:
    """What the frame path runs on.

    available; reason: why not, or ""; level: vector instructions in use ("avx512", "avx2" or
    "portable"; "" without the compiled path); cuda: compute capabilities compiled for, e.g. [80,
    90]; threads: that share the work on the CPU.
    """
    if _native is None:
        info = {"available": False, "reason": _reason, "level": "", "cuda": []}
        return info | {"threads": torch.get_num_threads()}
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


def use_native(backend: str | None, device: torch.device) -> bool:
    if backend not in (None, "native", "torch"):
        raise ValueError(f"backend is {backend!r}; it must be None, 'native' or 'torch'")
    missing = None
    if _native is None:
        missing = f"efficientad._native is not there ({_reason}); {FIX}"
    elif device.type not in ("cpu", "cuda"):
        missing = f"the data is on {device}; efficientad._native runs on cpu and cuda"
    elif device.type == "cuda":
        missing = _cuda_problem(device)
    if backend == "native" and missing:
        raise ValueError(f"backend is 'native', but {missing}")
    return backend != "torch" and not missing


@cache
def _cuda_problem(device: torch.device) -> str:
    """Why the compiled path does not run on a CUDA device, or "". Found out once, by a launch."""
    compiled = native_info()["cuda"]
    if not compiled:
        return f"the data is on {device}; efficientad._native has no CUDA, {FIX} and nvcc"
    major, minor = torch.cuda.get_device_capability(device)
    same = any(n // 10 == major and n % 10 <= minor for n in compiled)
    if not same and 10 * major + minor < compiled[-1]:  # the last one's PTX serves later devices
        names = ", ".join(f"sm_{n}" for n in compiled)
        return f"{device} is sm_{major}{minor}; efficientad._native is compiled for {names}"
    (rows, _table), cell = taps(1, 2, False, device), torch.zeros(1, 1, device=device)
    out = torch.empty(2, 2, device=device)
    arguments = (cell.data_ptr(), 1, 1, 1, 0, 0.0, rows, rows, out.data_ptr())
    try:
        _native.upsample(*arguments, *place(device))
    except RuntimeError as error:  # a driver older than the toolkit that compiled it
        return f"efficientad._native does not run on {device}: {error}"
    return ""


@lru_cache(maxsize=64)
def _host_table(source: int, target: int, antialias: bool) -> tuple[Tensor, Tensor]:
    width = _native.taps_width(source, target, antialias)
    spans = torch.empty(target, 2, dtype=torch.int32)
    weights = torch.empty(target, width)
    _native.fill_taps(source, target, antialias, spans.data_ptr(), weights.data_ptr())
    return spans, weights


@lru_cache(maxsize=64)
def _device_table(source: int, target: int, antialias: bool, device: torch.device):
    return tuple(part.to(device) for part in _host_table(source, target, antialias))


@lru_cache(maxsize=8)
def color_table(device: torch.device) -> tuple[Tensor]:
    table = np.concatenate([colors.colorbar(256, 1)[0], np.array([colors.NAN_COLOR], np.uint8)])
    return (torch.from_numpy(table).to(device),)


_captured: dict[int, Any] = {}  # tables that a CUDA graph reads, kept as long as the process


def keep(table: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The table, which stays until the current stream's work or graph has read it: another stream
    may have made it, and another thread's new sizes may drop it meanwhile."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _captured[id(table)] = table
        else:
            for part in table:
                part.record_stream(torch.cuda.current_stream(device))
    return table


def taps(source: int, target: int, antialias: bool, device: torch.device) -> tuple:
    if device.type == "cpu":
        table = _host_table(source, target, antialias)
    else:
        table = keep(_device_table(source, target, antialias, device), device)
    spans, weights = table
    # The tensors go along, so that another thread's new sizes cannot free them under the work.
    return (spans.data_ptr(), weights.data_ptr(), weights.shape[1], target), table


def place(device: torch.device) -> tuple[int, int]:
    """(CUDA device or -1, its current stream) for `_native`."""
    if device.type == "cpu":
        return -1, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def module() -> Any:
    """`efficientad._native`; call it only where `use_native` said so."""
    return _native
