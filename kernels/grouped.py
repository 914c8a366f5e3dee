"""What the PDN kernels share (tiles, the gather, grouped tensors).

Teacher and student run in one launch. Their filters, biases and scales are consecutive views of one
buffer each, so a tile's first output channel selects the network by itself; activations may lie
anywhere, the second network's at a distance from the first's that is passed as a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import proxy_fence, to_e4m3

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # those with a row in every tile table
FP8_MIN_TARGET = 89
FP8_MAX = tl.constexpr(448.0)  # largest finite float8_e4m3fn
MAX_ROWS = 2**31 - 2**16  # row numbers are int32, element offsets int64


@dataclass(frozen=True)
class Tile:
    """A program's share of a matrix product and how it is run.

    Attributes:
        bm: output pixels.
        bn: output channels.
        bk_bytes: bytes of K that one step multiplies; 128 is the widest shared-memory swizzle, and
            makes 64 values of fp16 or 128 of fp8 the same traffic.
        warps, stages: launch options.
        bn_tail: further output channels in a second accumulator, for `pair_distance` alone.
    """

    bm: int
    bn: int
    bk_bytes: int
    warps: int
    stages: int
    bn_tail: int = 0


def from_table(table: dict, target: int, pixels: int) -> Tile:
    """The tile for a launch over `pixels` stored pixels: the first row whose limit they keep.

    A table's rows are (limit, tile) in ascending order; the limit None has no end. Limits count
    pixels and not images, so that one large image is served like a batch of small ones.
    """
    rows = table[architecture(target)]
    return next(tile for limit, tile in rows if limit is None or pixels <= limit)


def architecture(target: int) -> int:
    """Row of the tile tables that serves compute capability `target` (87 -> 86, 103 -> 100).

    Raises:
        ValueError: older than sm_80, which lacks cp.async and bf16.
    """
    rows = [arch for arch in ARCHITECTURES if arch <= target]
    if not rows:
        raise ValueError(f"target is sm_{target}; the kernels need sm_80 or newer")
    return rows[-1]


def uses_tma(target: int) -> bool:
    """Whether filters come by TMA. sm_120 has it too, but not the shared memory to profit."""
    return architecture(target) in (90, 100)


def divisor(limit: int, *lengths: int) -> int:
    """The largest power of two that is at most `limit` and divides every length."""
    common = math.gcd(*lengths)
    return min(limit, common & -common)


def is_fp8(tensor) -> bool:
    return tensor.dtype.itemsize == 1


def check_fp8(name: str, tensor, target: int) -> None:
    if is_fp8(tensor) and target < FP8_MIN_TARGET:
        raise ValueError(
            f"{name} is {tensor.dtype} and the target is sm_{target}; fp8 needs "
            f"sm_{FP8_MIN_TARGET} or newer: use float16"
        )


def check_aligned(**tensors) -> None:
    """Raise ValueError for a tensor whose first element is not on a 16-byte boundary."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} starts {tensor.data_ptr() % 16} bytes past a 16-byte boundary; 16-byte "
                "loads need it on one: pass a clone"
            )


def check_consecutive(name: str, tensors) -> None:
    """Raise ValueError unless each tensor starts where the one before it ends."""
    for i, (a, b) in enumerate(pairwise(tensors)):
        if b.data_ptr() != a.data_ptr() + a.numel() * a.dtype.itemsize:
            raise ValueError(
                f"{name}[{i + 1}] does not start where {name}[{i}] ends; the networks' tensors "
                "must be consecutive views of one buffer: "
                f"{name} = torch.cat({name}).split([len(t) for t in {name}])"
            )


def check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"the launch has {rows} pixels; at most {MAX_ROWS}: use a smaller batch")


def distance(tensors) -> int:
    """Elements from the first network's tensor to the second's; 0 for one network.

    Raises:
        ValueError: more than two tensors, or a distance that breaks 16-byte accesses.
    """
    if len(tensors) > 2:
        raise ValueError(f"{len(tensors)} networks were given; a launch groups one or two")
    if len(tensors) == 1:
        return 0
    step = tensors[1].data_ptr() - tensors[0].data_ptr()
    if step % 16:
        raise ValueError(
            f"the networks' tensors lie {step} bytes apart; a multiple of 16 is needed"
        )
    return step // tensors[0].dtype.itemsize


def filters(weight, rows: int, cols: int, bn: int, bk: int, use_tma: bool):
    """The (rows, cols) matrix that starts at `weight`, as a kernel takes it."""
    return TensorDescriptor(weight, [rows, cols], [cols, 1], [bn, bk]) if use_tma else weight


@triton.jit
def output_pixel(m, out_height, out_width, POOL: tl.constexpr):
    """Row m of the product -> (image, row and column of the convolution's output, stored pixel).

    With POOL, 16 consecutive m are four pooled pixels times their 2x2 windows: bit 0 is the column
    and bit 3 the row in the window. A tensor core's accumulator keeps rows m and m + 8 in one
    thread and m and m + 1 in neighbouring ones, so the sum costs an addition and a shuffle.
    """
    if POOL:
        pixel = (m // 2) % 4 + (m // 16) * 4
    else:
        pixel = m
    x = pixel % out_width
    y = (pixel // out_width) % out_height
    image = pixel // (out_width * out_height)
    if POOL:
        y = 2 * y + (m // 8) % 2
        x = 2 * x + m % 2
    return image, y, x, pixel


@triton.jit
def sum_window(acc, BM: tl.constexpr, BN: tl.constexpr):
    """Sums over the 2x2 windows of `output_pixel`: [BM, BN] -> [BM // 4, BN]."""
    pairs = tl.sum(tl.reshape(acc, (BM // 16, 2, 8, BN)), axis=1)  # [BM // 16, 8, BN]
    return tl.sum(tl.reshape(pairs, (BM // 4, 2, BN)), axis=1)


@triton.jit
def stored(acc, DTYPE: tl.constexpr, TO_E4M3: tl.constexpr):
    """The result's dtype; fp8 saturates what is finite and makes NaN of infinity.

    TO_E4M3: of `rounds_twice`.
    """
    if DTYPE == tl.float8e4nv:
        acc = tl.where(tl.abs(acc) == float("inf"), float("nan"), acc)
        acc = tl.maximum(acc, -FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        acc = tl.minimum(acc, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        if TO_E4M3:
            return to_e4m3(acc)
    return acc.to(DTYPE)


@triton.jit
def accumulate_conv(
    acc, tail,  # [BM, BN] float32 and, if w_tail is not None, further channels; else unused
    x_ptr,  # (N, height, width, CIN)
    image, y, x,  # [BM] each, position in the convolution's output
    height, width,
    w, w_tail,  # filters (Cout, K * K * CIN), a descriptor if USE_TMA; w_tail: only with USE_TMA
    first_row,  # the tile's first filter; those of `tail` follow the tile's last
    taps,  # K * K, or 0 to add nothing
    CIN: tl.constexpr,
    K: tl.constexpr,
    PAD: tl.constexpr,
    MASKED: tl.constexpr,  # whether a tap can lie outside the image: it reads as zero
    USE_TMA: tl.constexpr,
    FENCE: tl.constexpr,  # of `needs_fence`
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Adds the products of a K x K convolution. Activations are gathered at exactly the pixels that
    are needed (cp.async), so no tile is wasted on row ends, and filters come in 2-D boxes."""
    top = y - PAD
    left = x - PAD
    pixel = (image.to(tl.int64) * height + top) * width + left  # [BM]
    a_ptrs = x_ptr + pixel[:, None] * CIN + tl.arange(0, BK)[None, :]
    if not USE_TMA:
        rows = (first_row + tl.arange(0, BN)).to(tl.int64)
        b_ptrs = w + rows[:, None] * (K * K * CIN) + tl.arange(0, BK)[None, :]
    CHUNKS: tl.constexpr = CIN // BK
    for k in tl.range(0, taps * CHUNKS):
        tap = k // CHUNKS
        dy = tap // K
        dx = tap % K
        shift = (dy * width + dx) * CIN + (k % CHUNKS) * BK
        if MASKED:
            inside = (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
            a = tl.load(a_ptrs + shift, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs + shift)
        if USE_TMA:
            b = w.load([first_row, k * BK])
        else:
            b = tl.load(b_ptrs + k * BK)
        if FENCE:
            proxy_fence(k)
        acc = tl.dot(a, b.T, acc)
        if w_tail is not None:
            tail = tl.dot(a, w_tail.load([first_row + BN, k * BK]).T, tail)
    return acc, tail


@triton.jit
def sum_of_squares(acc, bias_ptr, scale_ptr, first, SCALED: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] accumulated products -> [BM], over the channels from `first` on."""
    n = first + tl.arange(0, BN)
    if SCALED:
        acc *= tl.load(scale_ptr + n)[None, :]
    acc += tl.load(bias_ptr + n)[None, :]
    return tl.sum(acc * acc, axis=1)
