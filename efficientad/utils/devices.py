"""Device, dtype and batch sizes that a user's words mean."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from efficientad.ops import compiled_conv as native_conv
from efficientad.utils.checks import check_integer

FP8 = torch.float8_e4m3fn
FP8_MIN_CAPABILITY = (8, 9)
DEFAULT_BUCKETS = {"cuda": (1, 4, 16), "cpu": (1,)}
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


def choose_dtype(dtype: str | torch.dtype, device: torch.device, backend: str) -> torch.dtype:
    """The computing dtype on `device`; see `predictor.FastPredictor`.

    Raises:
        ValueError: an unknown dtype, float16 or float8_e4m3fn on a CPU outside Triton's
            interpreter, float8_e4m3fn below sm_89 or without the kernels.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if cpu_is_fastest_in_bfloat16() else torch.float32
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ValueError(f"dtype is {dtype!r}; it must be 'auto' or one of {', '.join(DTYPES)}")
    if chosen == torch.float16 and device.type == "cpu" and backend != "triton":
        raise ValueError(
            "dtype is float16 and the device a CPU, which has no fast float16 convolution (14 s an "
            "image were measured); use 'auto', 'bfloat16' or 'float32'"
        )
    if chosen == FP8:
        _check_fp8(device, backend)
    return chosen


def _check_fp8(device: torch.device, backend: str) -> None:
    """Raise ValueError where nothing computes in fp8."""
    if backend == "auto" and os.environ.get("EFFICIENTAD_BACKEND") == "torch":
        backend = "torch"
    if backend not in ("auto", "triton"):
        raise ValueError(
            f"backend is {backend!r} and dtype float8_e4m3fn, in which only the kernels compute; "
            "use backend 'auto' or 'triton', or another dtype"
        )
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return
        have = "the device a CPU"
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability >= FP8_MIN_CAPABILITY:
            return
        have = f"{device} is sm_{capability[0]}{capability[1]}"
    raise ValueError(
        f"dtype is float8_e4m3fn and {have}; fp8 needs a CUDA device from sm_89 on: use 'auto'"
    )


def choose_buckets(batch_sizes: Sequence[int] | None, device: torch.device) -> tuple[int, ...]:
    """The batch sizes of a predictor, ascending; None is the device's default.

    Raises:
        ValueError: no size, one below 1, or anything but integers.
    """
    if batch_sizes is None:
        return DEFAULT_BUCKETS["cuda" if device.type == "cuda" else "cpu"]
    try:
        sizes = tuple(sorted({check_integer("batch_sizes", b, 1) for b in batch_sizes}))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes:
        raise ValueError(
            f"batch_sizes is {batch_sizes!r}; it must be a sequence of integers of at least 1, "
            "such as (1, 4)"
        )
    return sizes


def unsafe_compiler(device: torch.device) -> str | None:
    """Why the installed Triton must not compile the kernels for this device, or None.

    Before 3.7.1 it leaves out a barrier of sm_100's matrix unit: results are wrong now and then
    (pytorch issue 181248, triton issue 9871).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 10:
        return None
    import triton

    numbers = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])
    if numbers >= (3, 7, 1):
        return None
    return f"Triton {triton.__version__} compiles wrong code for sm_100; install 3.7.1 or newer"


class _Precision:
    """What torch's process-wide setting was before the first of those who changed it."""

    lock = threading.Lock()
    users = 0
    before = ""


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 convolutions on CUDA with all their digits: cuDNN rounds operands to TF32 (10 bits of
    mantissa) by default, which is further from float32 than the bounds of this package allow.

    The setting is the process's. It is put back when the last thread leaves.
    """
    conv = torch.backends.cudnn.conv
    with _Precision.lock:
        if not _Precision.users:
            _Precision.before = conv.fp32_precision
            conv.fp32_precision = "ieee"
        _Precision.users += 1
    try:
        yield
    finally:
        with _Precision.lock:
            _Precision.users -= 1
            if not _Precision.users:
                conv.fp32_precision = _Precision.before


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16, AMX, or ARM's BF16)."""
    if torch.backends.cpu.get_cpu_capability() in ("SVE256", "SVE128"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _has("_is_avx512_bf16_supported") or _has("_is_amx_tile_supported")


def cpu_is_fastest_in_bfloat16() -> bool:
    """Whether the folded network takes less time in bfloat16 than in float32.

    AVX512-BF16 alone doubles the speed of a multiplication, and the compiled convolutions do with
    a quarter to a fifth of them in float32: on a Zen 4 float32 was measured at 0.55 of the time of
    bfloat16, and it is the more accurate. AMX multiplies many times as fast (not measured here).
    """
    only_avx512 = _has("_is_avx512_bf16_supported") and not _has("_is_amx_tile_supported")
    return cpu_multiplies_bfloat16() and not (only_avx512 and native_conv.available())


def _has(probe: str) -> bool:
    return bool(getattr(torch.cpu, probe, lambda: False)())
