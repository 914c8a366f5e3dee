"""Devices and dtypes: what a user's words mean, and what a processor can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efficientad.utils.processes import fresh_lock_after_fork

FP8 = torch.float8_e4m3fn
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": FP8,
}


def choose_device(device: str | torch.device) -> torch.device:
    """The device that `device` names; "auto" is a CUDA device if torch sees one, else the CPU.

    Raises:
        ValueError: not a device, or CUDA where torch sees no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = torch.cuda.current_device() if chosen.index is None and count else chosen.index or 0
    if index >= count:
        raise ValueError(
            f"device is {str(device)!r} and torch sees {count} CUDA devices; use 'cpu' or 'auto', "
            "or install a torch build with CUDA"
        )
    return torch.device("cuda", index)


def choose_dtype(dtype: str, device: torch.device) -> str:
    """A dtype's name; "auto" is bfloat16 where the units compute in it, else float32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay a module's 4-d weights out in place: `module.to(memory_format=...)`."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it


class _Precision:
    """What torch's process-wide settings were before the first of those who changed them."""

    lock = threading.Lock()
    users = 0
    allow_tf32: bool | None = None  # the older setting, of convolutions and RNNs; None: unreadable
    named: ClassVar[dict[str, str]] = {}  # the newer ones, one an operation

    @classmethod
    def switch_off(cls) -> None:
        cudnn: Any = torch.backends.cudnn
        cls.named = {name: getattr(cudnn, name).fp32_precision for name in ("conv", "rnn")}
        try:
            cls.allow_tf32 = cudnn.allow_tf32
        except RuntimeError:  # a user has set convolutions and RNNs differently by the newer names
            cls.allow_tf32 = None
            del cls.named["rnn"]
        else:  # both, or the older setting's getter would raise from here on
            cudnn.allow_tf32 = False
        for name in cls.named:
            getattr(cudnn, name).fp32_precision = "ieee"

    @classmethod
    def restore(cls) -> None:
        cudnn: Any = torch.backends.cudnn
        if cls.allow_tf32 is not None:
            cudnn.allow_tf32 = cls.allow_tf32
        for name, before in cls.named.items():
            # Not set if it has the value: it may have it from a setting above, and is to follow it.
            if getattr(cudnn, name).fp32_precision != before:
                getattr(cudnn, name).fp32_precision = before


fresh_lock_after_fork(_Precision)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 convolutions on CUDA with all their digits: cuDNN rounds operands to TF32 (10 bits of
    mantissa) by default, which is further from float32 than the bounds of this package allow.

    The setting is the process's. It is put back when the last thread leaves.
    """
    with _Precision.lock:
        if not _Precision.users:
            _Precision.switch_off()
        _Precision.users += 1
    try:
        yield
    finally:
        with _Precision.lock:
            _Precision.users -= 1
            if not _Precision.users:
                _Precision.restore()


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16, AMX, or ARM's BF16)."""
    if torch.backends.cpu.get_cpu_capability() in ("SVE256", "SVE128"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return cpu_has("_is_avx512_bf16_supported") or cpu_has("_is_amx_tile_supported")


def cpu_convolves_bfloat16() -> bool:
    """Whether torch's convolutions in it are oneDNN's, on this processor; others take seconds."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_has(probe: str) -> bool:
    """Whether torch finds a feature of the processor; probe: a name in `torch.cpu`."""
    return bool(getattr(torch.cpu, probe, lambda: False)())


def keep_wide(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """After a cast of a module: these of its own buffers stay in at least float32, where it lies.

    before: the buffers' names, and their values before the cast.
    """
    for name, old in before.items():
        new = getattr(module, name)
        if torch.finfo(new.dtype).eps > torch.finfo(torch.float32).eps:
            module._buffers[name] = old.to(new.device)
