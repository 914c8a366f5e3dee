"""Floor 1, imports torch: the device and the computing dtype that "auto" and names stand for."""

from __future__ import annotations

import torch

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
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


def choose_dtype(dtype: str | torch.dtype, device: torch.device, backend: str) -> torch.dtype:
    """The computing dtype on `device`; see `predictor.FastPredictor`.

    Raises:
        ValueError: an unknown dtype, or float16 on a CPU outside Triton's interpreter.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"dtype is {dtype!r}; it must be 'auto' or one of {', '.join(DTYPES)}")
    if chosen == torch.float16 and device.type == "cpu" and backend != "triton":
        raise ValueError(
            "dtype is float16 and the device a CPU, which has no fast float16 convolution (14 s an "
            "image were measured); use 'auto', 'bfloat16' or 'float32'"
        )
    return chosen


def cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16, AMX, or ARM's BF16)."""
    if torch.backends.cpu.get_cpu_capability() in ("SVE256", "SVE128"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
