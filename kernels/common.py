"""What several kernels share (NaN-keeping ReLU, target lookup)."""

from __future__ import annotations

import os

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN: a plain `tl.maximum` would turn a NaN into a normal image."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter (it reads the variable at import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def target_of(tensor) -> int:
    """Compute capability of the tensor's device as an integer, 90 for sm_90.

    Raises:
        ValueError: the tensor is on a CPU and the interpreter is not on.
    """
    if tensor.is_cuda:
        import torch  # the launchers' tensors bring it; nothing else here needs it

        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if interpreted():
        return 90
    raise ValueError(
        f"the tensor is on {tensor.device}; Triton kernels run on CUDA, or on the CPU with "
        "TRITON_INTERPRET=1 set before triton is imported"
    )
