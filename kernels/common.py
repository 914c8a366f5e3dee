"""What several kernels share (NaN-keeping ReLU, target lookup)."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN: a plain `tl.maximum` would turn a NaN into a normal image."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """Comes before any access to memory in kernels that `launching.overlapped` starts early.

    All that earlier kernels of the stream wrote is there afterwards, for each of them waits, too.
    The next kernel may then take its place on the multiprocessors.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def proxy_fence(step):
    """What was copied to shared memory before is seen by the tensor cores after; see `needs_fence`.

    `step` is the loop's int32 variable: it keeps the fence inside the loop. It is not changed.
    """
    tl.inline_asm_elementwise(
        "{ fence.proxy.async.shared::cta; mov.b32 $0, $1; }", "=r,r", [step],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def needs_fence(target: int) -> bool:
    """Whether a product of operands that cp.async fetches needs a `proxy_fence` before it.

    wgmma reads shared memory through another proxy than cp.async writes it. Triton 3.9 puts the
    fence there, 3.6 does not; in between it is put in twice rather than not at all. The interpreter
    has no such thing.
    """
    return target // 10 == 9 and _version() < (3, 9) and not interpreted()


@triton.jit
def to_e4m3(x):
    """x, float32 within e4m3's range or NaN, rounded once; see `rounds_twice`."""
    return tl.inline_asm_elementwise(
        """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r", [x], dtype=tl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


def rounds_twice(target: int) -> bool:
    """Whether Triton makes float8_e4m3fn of float32 by way of float16, which rounds twice.

    sm_89 has an instruction that rounds once. Triton 3.9 uses it there, 3.6 does not.
    """
    return target == 89 and _version() < (3, 9) and not interpreted()


def _version() -> tuple[int, ...]:
    """Triton's, major and minor."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2])


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
