"""In which precision a training runs, and how repeatably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from efficientad.utils.devices import cpu_multiplies_bfloat16


def choose_dtype(dtype: str, device: torch.device) -> str:
    """ "auto": bfloat16 where the arithmetic units take it, not where it is only emulated."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = cpu_multiplies_bfloat16()
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
