"""Dtype, batch sizes and kernel bundle of a predictor: what its arguments mean on a device."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence

import torch

from efficientad.ops import compiled_conv
from efficientad.ops.kernel_bundle import BundleError
from efficientad.ops.kernel_launch import BundleLaunch, open_bundle
from efficientad.utils.checks import check_integer
from efficientad.utils.devices import DTYPES, FP8, cpu_has, cpu_multiplies_bfloat16

BUNDLE = "EFFICIENTAD_BUNDLE"  # environment variable: the bundle of predictors that name none
FP8_MIN_CAPABILITY = (8, 9)
DEFAULT_BUCKETS = {"cuda": (1, 4, 16), "cpu": (1,)}


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device is fastest, whatever it does to the scores."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_is_fastest_in_bfloat16() else torch.float32


def choose_dtype(
    dtype: str | torch.dtype,
    device: torch.device,
    backend: str,
    doubt: Callable[[torch.dtype], str | None] = lambda dtype: None,
) -> torch.dtype:
    """The computing dtype on `device`; see `predictor.FastPredictor`.

    doubt: why a dtype's scores cannot stand in for float32's, or None; "auto" is float32 then.

    Raises:
        ValueError: an unknown dtype, float16 or float8_e4m3fn on a CPU outside Triton's
            interpreter, float8_e4m3fn below sm_89 or without the kernels.
    """
    if dtype == "auto":
        fastest = fastest_dtype(device)
        return fastest if backend == "triton" or doubt(fastest) is None else torch.float32
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


def choose_bundle(
    bundle: str | os.PathLike | None, device: torch.device
) -> tuple[BundleLaunch | None, str | None]:
    """The kernel bundle of a predictor, or None to compile; and why one that is named is not used.

    Args:
        bundle: a file; None is the one that EFFICIENTAD_BUNDLE names, if it does.

    One that is damaged or made for something else is refused with a warning.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = bundle or os.environ.get(BUNDLE)
    if not path:
        return None, None
    if not os.path.isfile(path):
        source = "bundle" if bundle else BUNDLE
        raise FileNotFoundError(f"{source} is {os.fspath(path)!r}; there is no such file")
    if device.type != "cuda":
        return None, f"{path}: not used, since the device is {device}"
    major, minor = torch.cuda.get_device_capability(device)
    try:
        return open_bundle(path, 10 * major + minor), None
    except BundleError as error:
        warnings.warn(f"{error}. The kernels are compiled here", stacklevel=3)
        return None, f"not used: {error}"


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


def cpu_is_fastest_in_bfloat16() -> bool:
    """Whether the folded network takes less time in bfloat16 than in float32.

    AVX512-BF16 alone doubles the speed of a multiplication, and the compiled convolutions do with
    a quarter to a fifth of them in float32: on a Zen 4 float32 was measured at 0.55 of the time of
    bfloat16, and it is the more accurate. With AMX bfloat16 takes less
    (bench/results/predictor_cpu.json).
    """
    only_avx512 = cpu_has("_is_avx512_bf16_supported") and not cpu_has("_is_amx_tile_supported")
    return cpu_multiplies_bfloat16() and not (only_avx512 and compiled_conv.available())
