"""The frame path, checked.

Camera frames to network inputs, and maps back to frames. The work is done by `efficientad._native`
(csrc/), on the CPU or on the CUDA device where the data lies; without it by torch and numpy, which
are the definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.ops.frame_native import (
    color_table,
    keep,
    module,
    native_available,
    native_info,
    place,
    set_threads,
    taps,
    use_native,
)
from efficientad.results import overlay as colors

__all__ = [
    "native_available",
    "native_info",
    "overlay",
    "resize_pack",
    "set_threads",
    "upsample_map",
]

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


def _frame(frame: np.ndarray | Tensor, grey: bool) -> tuple[Any, int, int, torch.device]:
    """(frame with contiguous pixels, address, row pitch in bytes, device)."""
    if isinstance(frame, Tensor):
        uint8, device, strides = frame.dtype == torch.uint8, frame.device, frame.stride()
    else:
        frame = np.asarray(frame)
        uint8, device, strides = frame.dtype == np.uint8, torch.device("cpu"), frame.strides
    shape = tuple(frame.shape)
    shaped = (len(shape) == 3 and shape[2] == 3) or (grey and len(shape) == 2)
    if not uint8 or not shaped or not all(1 <= side <= MAX_SIDE for side in shape[:2]):
        also = " or (H, W)" if grey else ""
        raise ValueError(
            f"frame is {frame.dtype} {shape}; it must be uint8 (H, W, 3){also}, sides 1..{MAX_SIDE}"
        )
    pixel = 3 if len(shape) == 3 else 1
    inner = (pixel, 1) if pixel == 3 else (1,)
    if tuple(strides[1:]) != inner or strides[0] < pixel * shape[1]:
        array = isinstance(frame, np.ndarray)
        frame = np.ascontiguousarray(frame) if array else frame.contiguous()
    if isinstance(frame, Tensor):
        return (
            frame,
            frame.data_ptr(),
            pixel * shape[1] if shape[0] == 1 else frame.stride(0),
            device,
        )
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
    frame, address, pitch, device = _frame(frame, grey=True)
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
    if not use_native(backend, device):
        result = _resize_pack_torch(frame, (height, width), mean, std, border, channels, dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    rows, _rows_table = taps(frame.shape[0], height, True, device)
    columns, _columns_table = taps(frame.shape[1], width, True, device)
    layers = 3 if frame.ndim == 3 else 1
    module().resize_pack(
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


def upsample_map(
    anomaly_map: np.ndarray | Tensor,
    size: tuple[int, int],
    *,
    padding: int = 0,
    frame: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Resize a map to the size of its source: bilinear, F.interpolate with align_corners=False.

    Args:
        anomaly_map: float32 (h, w) or (N, h, w), array or tensor.
        size: (height, width) of the result.
        padding, frame: cells of the value `frame` put on every side before the resize.
        out: where the result goes, contiguous; None allocates it.
        backend: as in `resize_pack`.

    Returns:
        float32 (height, width) or (N, height, width), on the map's device. NaN spreads to every
        pixel that its cell reaches.

    Raises:
        ValueError: an argument that is not as above.
    """
    maps = _as_tensor(anomaly_map)
    if maps.dtype != torch.float32 or maps.dim() not in (2, 3) or 0 in maps.shape[-2:]:
        raise ValueError(
            f"anomaly_map is {maps.dtype} {tuple(maps.shape)}; it must be float32 (h, w) or "
            "(N, h, w), not empty"
        )
    height, width = _check_size("size", size)
    if not 0 <= padding <= MAX_SIDE or max(maps.shape[-2:]) + 2 * padding > MAX_SIDE:
        raise ValueError(
            f"padding is {padding}; it must be 0 or more, and the padded map at most {MAX_SIDE}"
        )
    count = len(maps) if maps.dim() == 3 else 1
    if count > 65535:  # of a CUDA grid
        raise ValueError(f"anomaly_map holds {count} maps; at most 65535")
    shape, device = (*maps.shape[:-2], height, width), maps.device
    if out is not None:
        _check_out(out, shape, torch.float32, device)
    resized = any(n + 2 * padding != m for n, m in zip(maps.shape[-2:], size, strict=True))
    if not use_native(backend, device) or not resized:  # torch copies what has the size already
        if not count:
            return torch.empty(shape, device=device) if out is None else out
        x = F.pad(maps.reshape(1, count, *maps.shape[-2:]), (padding,) * 4, value=frame)
        result = F.interpolate(x, size=(height, width), mode="bilinear").reshape(shape)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(shape, device=device)
    if count:
        maps = maps.contiguous()
        h, w = maps.shape[-2:]
        rows, _rows_table = taps(h + 2 * padding, height, False, device)
        columns, _columns_table = taps(w + 2 * padding, width, False, device)
        module().upsample(
            maps.data_ptr(), count, h, w, padding, frame, rows, columns, out.data_ptr(),
            *place(device),
        )  # fmt: skip
    return out


def overlay(
    frame: np.ndarray | Tensor,
    anomaly_map: np.ndarray | Tensor,
    scale: tuple[float, float],
    *,
    strength: float = 0.8,
    backend: str | None = None,
) -> np.ndarray | Tensor:
    """Blend a map's colours over its frame, as `results.overlay.overlay` without the outline.

    Args:
        frame: uint8 (H, W, 3), RGB, array or tensor.
        anomaly_map: float32 (H, W), the frame's size (see `upsample_map`), on the frame's device.
        scale: (low, high) ends of the colours, from `results.overlay.map_scale`. Pixels up to
            low stay as they are; NaN is shown in a colour of its own, at full strength.
        strength: opacity at the high end, 0..1.
        backend: as in `resize_pack`.

    Returns:
        uint8 (H, W, 3), new; a tensor if the frame is one.

    Raises:
        ValueError: an argument that is not as above.
    """
    frame, address, pitch, device = _frame(frame, grey=False)
    maps = _as_tensor(anomaly_map)
    if maps.dtype != torch.float32 or maps.shape != frame.shape[:2] or maps.device != device:
        raise ValueError(
            f"anomaly_map is {maps.dtype} {tuple(maps.shape)} on {maps.device}; it must be float32 "
            f"{tuple(frame.shape[:2])} on {device}, as the frame"
        )
    low, high = (float(end) for end in scale)
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"scale is {scale}; it must be finite (low, high) with low < high")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be in 0..1")
    as_tensor = isinstance(frame, Tensor)
    if not use_native(backend, device):
        blend = _overlay_numpy(
            _as_tensor(frame).cpu().numpy(), maps.cpu().numpy(), low, high, strength
        )
        return torch.from_numpy(blend).to(device) if as_tensor else blend
    maps, (table,) = maps.contiguous(), keep(color_table(device), device)
    out = torch.empty(tuple(frame.shape), dtype=torch.uint8, device=device)
    module().overlay(
        address, pitch, *frame.shape[:2], maps.data_ptr(), table.data_ptr(), low, high - low,
        strength, out.data_ptr(), *place(device),
    )  # fmt: skip
    return out if as_tensor else out.numpy()


def _overlay_numpy(frame, values, low, high, strength) -> np.ndarray:
    at = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    alpha = np.float32(strength) * np.sqrt(np.where(np.isnan(at), 1, at))[..., None]
    base = frame.astype(np.float32)
    colored = colors.colorize(values, (low, high))
    return np.rint(base + (colored - base) * alpha).astype(np.uint8)
