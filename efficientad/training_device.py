"""Floor 1, imports torch only: where a training runs, in which precision, how repeatably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def choose_device(device: str | torch.device) -> torch.device:
    """The device of "auto", "cpu", "cuda:1" ...; ValueError for others and where it is missing."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; it must be auto, cpu or cuda[:N]") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r} and torch sees no CUDA device; use cpu or auto")
    return found


def choose_dtype(dtype: str, device: torch.device) -> str:
    """ "auto": bfloat16 where the arithmetic units take it, not where it is only emulated."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bfloat16" if native else "float32"


@contextmanager
def determinism(wanted: bool, device: torch.device) -> Iterator[None]:
    """On a GPU: cuDNN's search for the fastest algorithm, or if `wanted` nothing that varies."""
    if device.type != "cuda":
        yield
        return
    benchmark = torch.backends.cudnn.benchmark
    strict = torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(strict)
