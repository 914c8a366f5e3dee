"""The decoder's layers, bilinear resize + convolution + ReLU.

An implicit matrix product as in `strided_conv`, but a row of A is computed while it is loaded: four
cells of the small image, weighted in float32 and rounded to x's dtype. The resized image, four
times as large as its source in most layers, is never written; but with a tile that is `Apart` it
is, by a launch of its own, and then convolved as any image is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import conv
from .common import relu, target_of, wait_for_last
from .grouped import Tile, check_rows, divisor, from_table
from .launching import launch


class Apart(Tile):
    """The tile of the convolution after a resize that is a launch of its own."""


# No software pipelining (one stage): what arrives is not an operand but a quarter of one, and two
# stages would hold four images of it, 48 to 96 KiB. Several programs on a multiprocessor hide the
# latency instead, so registers decide. Limits are output pixels; a batch of one has 81, 256, 1089,
# 4096, 12544 (of 16384, those the last resize reads) and 3136 of them at 256x256.
#
# Few pixels: a program's 16 steps are a chain of latencies, and 16 pixels make the shortest step.
_FEW = Tile(16, 64, 128, warps=4, stages=1)
# On sm_90 three stages were measured 10 to 40 % faster (bench/results/h200_timeline.json).
_FEW_90 = Tile(16, 64, 128, warps=4, stages=3)
# One image's sixth layer still gives 392 programs; 64 values of K, as 32 would find every source
# position twice.
_SOME = Tile(32, 64, 128, warps=4, stages=1)
# A program reads 128 KiB of filters whatever its pixels, so few pixels keep the L2 cache busy; at
# 64 values of K their addresses would take up to 180 registers, and one program's 8 warps would be
# alone on a multiprocessor.
_MANY = Tile(128, 64, 64, warps=8, stages=1)
# The resize apart: its convolution overlaps copies with products, which the fused kernel, whose
# operand is computed, cannot; a second launch costs the more the fewer pixels there are. From which
# number on, and the tiles, are chosen on measurements whose raw file was lost; the next GPU run
# decides.
_APART = Apart(64, 64, 128, warps=4, stages=4)
_APART_MANY = Apart(256, 64, 128, warps=8, stages=4)
TILES = {
    80: ((4096, _FEW), (32768, _SOME), (None, _MANY)),
    86: ((4096, _FEW), (32768, _SOME), (None, _MANY)),
    89: ((4096, _FEW), (32768, _SOME), (None, _MANY)),
    90: ((199, _FEW_90), (32767, _APART), (None, _APART_MANY)),
    100: ((4096, _FEW), (32768, _SOME), (None, _MANY)),
    120: ((4096, _FEW), (32768, _SOME), (None, _MANY)),
}
RESIZED = 32  # pixels of a program that resizes
MAX_ELEMENTS = 2**31 - 1  # of one small image, whose offsets are int32


@triton.jit
def _source(i, length, size, scale):
    """Where pixel i of a resized axis comes from: the lower cell, the upper one and its weight.

    torch's arithmetic, max((i + 0.5) scale - 0.5, 0) with scale = length / size in float32, but for
    one thing: where the exact position is a whole number and float32 falls just short of it, torch
    takes the cell below with a weight of almost 1. Here the cell is found in integers, so that
    exactly the cells of `reference.resize_reads` are read; a weight may then be -1e-7.
    """
    position = tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = position.to(tl.int32)
    twice = (2 * i + 1) * length - size  # 2 size times the exact position
    low += (twice >= (low + 1) * (2 * size)).to(tl.int32)
    low -= (twice < low * (2 * size)).to(tl.int32)
    low = tl.maximum(low, 0)
    return low, tl.minimum(low + 1, length - 1), position - low.to(tl.float32)


# Sizes are not specialised: one binary serves every layer, and it is the one that the census shows.
@triton.jit(
    do_not_specialize=[
        "height", "width", "up_height", "up_width", "out_height", "out_width", "n_rows", "n_cols",
        "n_pixels",
    ]
)  # fmt: skip
def _resize_conv_kernel(
    x_ptr,  # (N, height, width, CIN)
    w_ptr,  # (COUT, K * K * CIN)
    bias_ptr,  # (COUT,) float32
    rows_ptr, cols_ptr,  # (n_rows,), (n_cols,) int32, what is computed; None: all
    y_ptr,  # (N, out_height, out_width, COUT)
    height, width,
    up_height, up_width,  # of the resized image
    out_height, out_width,
    n_rows, n_cols,
    n_pixels,  # N * n_rows * n_cols
    scale_y, scale_x,  # height / up_height, width / up_width
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    K: tl.constexpr,
    PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    TILES_N: tl.constexpr = COUT // BN
    CHUNKS: tl.constexpr = CIN // BK
    pid = tl.program_id(0)
    pid_m = pid // TILES_N
    n = (pid % TILES_N) * BN + tl.arange(0, BN)
    m = pid_m * BM + tl.arange(0, BM)
    real = m < n_pixels
    x = m % n_cols
    y = (m // n_cols) % n_rows
    image = (m // (n_cols * n_rows)).to(tl.int64)
    if rows_ptr is not None:
        y = tl.load(rows_ptr + y)
    if cols_ptr is not None:
        x = tl.load(cols_ptr + x)
    pixel = (image * out_height + y) * out_width + x
    top = tl.where(real, y - PAD, -K)  # [BM]; spare rows lie above the image: zeros
    left = x - PAD  # [BM]

    # The product is transposed, channels by pixels. The computed operand is then the right one,
    # which goes to shared memory on every architecture; as the left one tcgen05 would take it to
    # tensor memory through a layout conversion. And wgmma's 64 rows are channels, not pixels.
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + (image * height * width * CIN)[None, :] + k[:, None]  # [BK, BM]
    w_offset = n[:, None] * (K * K * CIN) + k[None, :]  # [BN, BK]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, K * K * CHUNKS):
        tap = step // CHUNKS
        row = top + tap // K
        column = left + tap % K
        inside = (row >= 0) & (row < up_height) & (column >= 0) & (column < up_width)
        inside = inside[None, :]  # [1, BM]
        y0, y1, fy = _source(row, height, up_height, scale_y)
        x0, x1, fx = _source(column, width, up_width, scale_x)
        c = (step % CHUNKS) * BK
        p00 = x_ptrs + ((y0 * width + x0) * CIN + c)[None, :]
        p01 = x_ptrs + ((y0 * width + x1) * CIN + c)[None, :]
        p10 = x_ptrs + ((y1 * width + x0) * CIN + c)[None, :]
        p11 = x_ptrs + ((y1 * width + x1) * CIN + c)[None, :]
        a = tl.load(p00, mask=inside, other=0.0).to(tl.float32) * ((1 - fy) * (1 - fx))[None, :]
        a += tl.load(p01, mask=inside, other=0.0).to(tl.float32) * ((1 - fy) * fx)[None, :]
        a += tl.load(p10, mask=inside, other=0.0).to(tl.float32) * (fy * (1 - fx))[None, :]
        a += tl.load(p11, mask=inside, other=0.0).to(tl.float32) * (fy * fx)[None, :]
        w = tl.load(w_ptr + step * BK + w_offset)
        acc = tl.dot(w, a.to(w.dtype), acc)

    acc = relu(acc + tl.load(bias_ptr + n)[:, None])
    tl.store(
        y_ptr + pixel[None, :] * COUT + n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=real[None, :],
    )


@triton.jit(do_not_specialize=["height", "width", "up_height", "up_width", "n_pixels"])
def _resize_kernel(
    x_ptr,  # (N, height, width, CIN)
    y_ptr,  # (N, up_height, up_width, CIN)
    height, width,
    up_height, up_width,
    n_pixels,  # N * up_height * up_width
    scale_y, scale_x,  # height / up_height, width / up_width
    CIN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,  # channels
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    CHUNKS: tl.constexpr = CIN // BC
    m = (tl.program_id(0) // CHUNKS) * BM + tl.arange(0, BM)
    real = (m < n_pixels)[:, None]
    y0, y1, fy = _source((m // up_width) % up_height, height, up_height, scale_y)
    x0, x1, fx = _source(m % up_width, width, up_width, scale_x)
    image = (m // (up_width * up_height)).to(tl.int64)
    c = (tl.program_id(0) % CHUNKS) * BC + tl.arange(0, BC)[None, :]
    x_ptrs = x_ptr + (image * height * width * CIN)[:, None] + c  # [BM, BC]
    p00 = x_ptrs + ((y0 * width + x0) * CIN)[:, None]
    p01 = x_ptrs + ((y0 * width + x1) * CIN)[:, None]
    p10 = x_ptrs + ((y1 * width + x0) * CIN)[:, None]
    p11 = x_ptrs + ((y1 * width + x1) * CIN)[:, None]
    a = tl.load(p00, mask=real, other=0.0).to(tl.float32) * ((1 - fy) * (1 - fx))[:, None]
    a += tl.load(p01, mask=real, other=0.0).to(tl.float32) * ((1 - fy) * fx)[:, None]
    a += tl.load(p10, mask=real, other=0.0).to(tl.float32) * (fy * (1 - fx))[:, None]
    a += tl.load(p11, mask=real, other=0.0).to(tl.float32) * (fy * fx)[:, None]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * CIN + c
    tl.store(y_ptrs, a.to(y_ptr.dtype.element_ty), mask=real)


def constants(tile: Tile, cin: int, cout: int, kernel: int, *, padding: int) -> dict:
    """The kernel's constexpr arguments.

    Raises:
        ValueError: channel counts that no tile divides.
    """
    bk, bn = divisor(tile.bk_bytes // 2, cin), divisor(tile.bn, cout)
    if bk < 16:
        raise ValueError(f"x has {cin} channels; they must be a multiple of 16")
    if bn < 16:
        raise ValueError(f"weight has {cout} output channels; they must be a multiple of 16")
    return {
        "CIN": cin,
        "COUT": cout,
        "K": kernel,
        "PAD": padding,
        "BM": tile.bm,
        "BN": bn,
        "BK": bk,
    }


def _check_extents(shape, size) -> None:
    height, width, cin = shape[1:]
    if height * width * cin > MAX_ELEMENTS or 4 * max(height, width) * max(size) > MAX_ELEMENTS:
        raise ValueError(
            f"x has {height}x{width} cells of {cin} channels and is resized to {size}; positions "
            "in one image must fit 31 bits: use a smaller image"
        )


def _launch(x, weight, bias, out, size, *, padding, rows, cols, target, tile) -> None:
    n, height, width, cin = x.shape
    cout, kernel = weight.shape[:2]
    out_height, out_width = out.shape[1:3]
    n_rows = out_height if rows is None else len(rows)
    n_cols = out_width if cols is None else len(cols)
    pixels = n * n_rows * n_cols
    check_rows(pixels)
    _check_extents(x.shape, size)
    target = target or target_of(x)
    tile = tile or from_table(TILES, target, pixels)
    values = constants(tile, cin, cout, kernel, padding=padding)
    if pixels == 0:
        return
    if isinstance(tile, Apart):
        _launch_apart(x, weight, bias, out, size, padding, target, tile)
        return
    launch(
        _resize_conv_kernel, triton.cdiv(pixels, tile.bm) * (cout // values["BN"]),
        x, weight, bias, rows, cols, out, height, width, *size, out_height, out_width,
        n_rows, n_cols, pixels, height / size[0], width / size[1], **values,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def resize_constants(cin: int) -> dict:
    """The constexpr arguments of the kernel that resizes alone."""
    return {"CIN": cin, "BM": RESIZED, "BC": divisor(cin, cin)}


def _launch_apart(x, weight, bias, out, size, padding: int, target: int, tile: Apart) -> None:
    n, height, width, cin = x.shape
    up = x.new_empty((n, *size, cin))
    pixels = n * size[0] * size[1]
    check_rows(pixels)
    values = resize_constants(cin)
    launch(
        _resize_kernel, triton.cdiv(pixels, RESIZED) * (cin // values["BC"]),
        x, up, height, width, *size, pixels, height / size[0], width / size[1], **values,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    conv.conv_relu([up], [weight], [bias], padding=padding, out=[out], target=target, tile=tile)


def resize_conv_relu(
    x,
    weight,
    bias,
    size: tuple[int, int],
    *,
    padding: int = 2,
    rows=None,
    cols=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
):
    """Decoder layer: bilinear resize (align_corners=False, no antialias), convolution, ReLU.

    Args:
        x: (N, H, W, Cin), contiguous, Cin a multiple of 16. Only the cells of
            `reference.resize_reads` are read.
        weight: (Cout, K, K, Cin), Cout a multiple of 16; bias: (Cout,) float32.
        size: rows and columns that the resize gives; the resized values are rounded to x's dtype.
        padding: zeros on every side of the resized image.
        rows, cols: int32 on x's device, the rows and columns of the result that are needed; None
            is all. The others may be written or not.
        out: the result, if it is allocated.
        target: compute capability such as 90; None is that of x's device.
        tile: instead of the table's row; an `Apart` resizes in a launch of its own.

    Returns:
        (N, size[0] + 2 padding - K + 1, size[1] + 2 padding - K + 1, Cout).

    Raises:
        ValueError: other channel counts, or an image whose offsets do not fit 31 bits.
    """
    cout, kernel = weight.shape[:2]
    if out is None:
        shape = (length + 2 * padding - kernel + 1 for length in size)
        out = x.new_empty((x.shape[0], *shape, cout))
    _launch(x, weight, bias, out, size, padding=padding, rows=rows, cols=cols,
            target=target, tile=tile)  # fmt: skip
    return out
