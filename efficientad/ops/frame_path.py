"""The frame path: camera frames to network inputs.

The work is done by `efficientad._native` (csrc/), on the CPU or on the CUDA device where the frame
lies; without it by torch, which is the definition. The compiled code allocates nothing and caches
nothing: the tables of where an output cell reads are kept here, on the host and on each device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.ops import native

MAX_SIDE = 32768  # pixels; a CUDA grid has at most 65535 rows
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/frame.h


def _check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or not all(1 <= int(side) <= MAX_SIDE for side in size):
        raise ValueError(f"{name} is {tuple(size)}; it must be (height, width), 1..{MAX_SIDE}")
    return int(size[0]), int(size[1])


def _three(name: str, values: Sequence[float] | Tensor, lowest: float) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":  # reading it would wait for the device
            raise ValueError(f"{name} is on {values.device}; it must be 3 numbers on the host")
        values = values.tolist()
    numbers = tuple(float(np.float32(value)) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(n) and n > lowest for n in numbers):
        rule = "3 finite numbers" + (" above 0" if lowest == 0 else "")
        raise ValueError(f"{name} is {list(values)}; it must be {rule}")
    return numbers


def _frame(frame: np.ndarray | Tensor) -> tuple[Any, int, int, torch.device]:
    """(frame with contiguous pixels, address, row pitch in bytes, device)."""
    if isinstance(frame, Tensor):
        uint8, device, strides = frame.dtype == torch.uint8, frame.device, frame.stride()
    else:
        frame = np.asarray(frame)
        uint8, device, strides = frame.dtype == np.uint8, torch.device("cpu"), frame.strides
    shape = tuple(frame.shape)
    shaped = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if not uint8 or not shaped or not all(1 <= side <= MAX_SIDE for side in shape[:2]):
        raise ValueError(
            f"frame is {frame.dtype} {shape}; it must be uint8 (H, W, 3) or (H, W), sides "
            f"1..{MAX_SIDE}"
        )
    pixel = 3 if len(shape) == 3 else 1
    inner = (pixel, 1) if pixel == 3 else (1,)
    if tuple(strides[1:]) != inner or strides[0] < pixel * shape[1]:
        if isinstance(frame, Tensor):
            frame = frame.contiguous()
        else:
            frame = np.ascontiguousarray(frame)
    if isinstance(frame, Tensor):
        pitch = pixel * shape[1] if shape[0] == 1 else frame.stride(0)
        return frame, frame.data_ptr(), pitch, device
    address = frame.__array_interface__["data"][0]
    return frame, address, frame.strides[0], device


def _as_tensor(frame: np.ndarray | Tensor) -> Tensor:
    return frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame))


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    if out.device != device or out.dtype != dtype or tuple(out.shape) != shape:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be {dtype} {shape} "
            f"on {device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; it must be contiguous")


def resize_pack(
    frame: np.ndarray | Tensor,
    size: tuple[int, int],
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    border: int = 0,
    channels: int = 4,
    dtype: torch.dtype = torch.float16,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Resize a frame, normalise it and pack it as RGBX, in one step.

    The resize is bilinear with antialiasing and rounded as Pillow's, which the reference uses: in
    few places a level of 255 differs by one. A frame that has the size already gives the bits of
    `reference.pack`.

    On a CUDA device the kernel runs on the current stream. The first call with new sizes copies two
    small tables to the device: make it before a CUDA graph is captured.

    Args:
        frame: uint8 (H, W, 3), RGB, or (H, W), grey; an array, or a tensor on the CPU or a CUDA
            device. Rows may be any distance apart; other layouts are copied.
        size: (height, width) of the result without its border.
        mean, std: 3 numbers each, of levels scaled to 0..1: ((x / 255) - mean) / std.
        border: rows and columns of exact zeros on every side.
        channels: 4, the fourth is 0, or 3.
        dtype: float16, bfloat16 or float32, of the result.
        out: where the result goes, contiguous, e.g. one image of a batch; None allocates it.
        backend: None takes the compiled path if it is there; "native" insists; "torch" is the
            definition.

    Returns:
        (height + 2 border, width + 2 border, channels), on the frame's device.

    Raises:
        ValueError: an argument that is not as above, or "native" where it is not built.
    """
    frame, address, pitch, device = _frame(frame)
    height, width = _check_size("size", size)
    mean, std = _three("mean", mean, -math.inf), _three("std", std, 0)
    if not 0 <= border <= 1024:
        raise ValueError(f"border is {border}; it must be in 0..1024")
    if channels not in (3, 4):
        raise ValueError(f"channels is {channels}; it must be 3 or 4")
    if dtype not in KINDS:
        raise ValueError(f"dtype is {dtype}; it must be float16, bfloat16 or float32")
    shape = (height + 2 * border, width + 2 * border, channels)
    if out is not None:
        _check_out(out, shape, dtype, device)
    if not _use_native(backend, device):
        result = _resize_pack_torch(frame, (height, width), mean, std, border, channels, dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    rows, _rows_table = taps(frame.shape[0], height, device)
    columns, _columns_table = taps(frame.shape[1], width, device)
    layers = 3 if frame.ndim == 3 else 1
    native.module().resize_pack(
        address, pitch, frame.shape[0], frame.shape[1], layers, rows, columns, mean, std,
        out.data_ptr(), border, channels, KINDS[dtype], *place(device),
    )  # fmt: skip
    return out


def _resize_pack_torch(frame, size, mean, std, border, channels, dtype) -> Tensor:
    x = _as_tensor(frame).float()
    x = x.permute(2, 0, 1)[None] if x.dim() == 3 else x.expand(1, 3, *x.shape)
    for sides in ((x.shape[2], size[1]), size):  # as Pillow: rows, then columns, each rounded
        if tuple(x.shape[2:]) != sides:
            x = F.interpolate(x, size=sides, mode="bilinear", antialias=True).add_(0.5).floor_()
    # Filled on the device: a copy from the host would wait for it.
    mean, std = (torch.stack([x.new_full((), v) for v in three]) for three in (mean, std))
    x = (x[0].permute(1, 2, 0) / 255 - mean) / std
    return F.pad(x, (0, channels - 3, border, border, border, border)).to(dtype)


# ---- the compiled path and its tables --------------------------------------------------------


def _use_native(backend: str | None, device: torch.device) -> bool:
    """Whether the compiled path is taken; ValueError where it is asked for and cannot be."""
    if backend not in (None, "native", "torch"):
        raise ValueError(f"backend is {backend!r}; it must be None, 'native' or 'torch'")
    missing = None
    if not native.available():
        reason = native.info()["reason"]
        missing = f"efficientad._native is not there ({reason}); {native.FIX}"
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
    compiled = native.info()["cuda"]
    if not compiled:
        return f"the data is on {device}; efficientad._native has no CUDA, {native.FIX} and nvcc"
    major, minor = torch.cuda.get_device_capability(device)
    same = any(n // 10 == major and n % 10 <= minor for n in compiled)
    if not same and 10 * major + minor < compiled[-1]:  # the last one's PTX serves later devices
        names = ", ".join(f"sm_{n}" for n in compiled)
        return f"{device} is sm_{major}{minor}; efficientad._native is compiled for {names}"
    (one, _table), pixel = taps(1, 1, device), torch.zeros(1, dtype=torch.uint8, device=device)
    out, ones = torch.empty(4, device=device), (1.0, 1.0, 1.0)
    frame, packed = (pixel.data_ptr(), 1, 1, 1, 1), (out.data_ptr(), 0, 4, KINDS[out.dtype])
    try:
        native.module().resize_pack(*frame, one, one, ones, ones, *packed, *place(device))
    except RuntimeError as error:  # a driver older than the toolkit that compiled it
        return f"efficientad._native does not run on {device}: {error}"
    return ""


@lru_cache(maxsize=64)
def _host_table(source: int, target: int) -> tuple[Tensor, Tensor]:
    width = native.module().taps_width(source, target, True)
    spans = torch.empty(target, 2, dtype=torch.int32)
    weights = torch.empty(target, width)
    native.module().fill_taps(source, target, True, spans.data_ptr(), weights.data_ptr())
    return spans, weights


@lru_cache(maxsize=64)
def _device_table(source: int, target: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(part.to(device) for part in _host_table(source, target))


_captured: dict[int, Any] = {}  # tables that a CUDA graph reads, kept as long as the process


def _keep(table: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The table, which stays until the current stream's work or graph has read it: another stream
    may have made it, and another thread's new sizes may drop it meanwhile."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _captured[id(table)] = table
        else:
            for part in table:
                part.record_stream(torch.cuda.current_stream(device))
    return table


def taps(source: int, target: int, device: torch.device) -> tuple:
    """((spans, weights, width, size) as `_native` takes a side of a resize, the tensors of it)."""
    table: tuple[Tensor, ...]
    if device.type == "cpu":
        table = _host_table(source, target)
    else:
        table = _keep(_device_table(source, target, device), device)
    spans, weights = table
    # The tensors go along, so that another thread's new sizes cannot free them under the work.
    return (spans.data_ptr(), weights.data_ptr(), weights.shape[1], target), table


def place(device: torch.device) -> tuple[int, int]:
    """(CUDA device or -1, its current stream) for `_native`."""
    if device.type == "cpu":
        return -1, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
