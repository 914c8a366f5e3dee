"""The PDNs' first layer, both networks from one packed image.

4x4 convolution + ReLU + 2x2 average pool. A filter row meets four neighbouring RGBX pixels, 16
consecutive values, so the whole filter is one product with K = 4 x 16 = 64 and no loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import relu, rounds_twice, target_of
from .grouped import (
    Tile,
    check_aligned,
    check_consecutive,
    check_rows,
    distance,
    divisor,
    from_table,
    output_pixel,
    stored,
    sum_window,
)
from .launching import launch

# K is 64 in every tile: one step, so nothing to pipeline. The kernel waits for its pixels and its
# stores, and what counts is how many programs an SM holds: two of 128x128 where they need at most
# 128 registers (wgmma, tcgen05); mma.sync keeps fragments too and needs up to 138, so there three
# of 64x128 are held.
_TWO = Tile(128, 128, 128, warps=8, stages=1)
_THREE = Tile(64, 128, 128, warps=8, stages=1)
# All 256 channels at once read the pixels once. For few images only: chosen on measurements whose
# raw file was lost; the next GPU run decides.
_WIDE = Tile(128, 256, 128, warps=8, stages=1)
SMALL = 8 * 126 * 126  # stored pixels: eight images of 256x256
TILES = {
    80: ((None, _THREE),),
    86: ((None, _THREE),),
    89: ((None, _THREE),),
    90: ((SMALL, _WIDE), (None, _TWO)),
    100: ((None, _TWO),),
    120: ((None, _THREE),),
}


# Sizes are not specialised: one binary serves every image, and it is the one that the census shows.
@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "n_pixels"])
def _first_conv_kernel(
    x_ptr,  # (N, height, width, 4)
    w_ptr,  # (2 or 1 networks * COUT, 64)
    bias_ptr,  # (networks * COUT,) float32
    y_ptr, y_delta: tl.int64,  # (N, out_height, out_width, COUT) per network
    height, width,
    out_height, out_width,
    n_pixels,  # N * out_height * out_width
    NETWORKS: tl.constexpr,
    COUT: tl.constexpr,
    POOL_PAD: tl.constexpr,
    POOL_SCALE: tl.constexpr,
    TO_E4M3: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = NETWORKS * COUT // BN
    pid = tl.program_id(0)
    pid_m = pid // TILES_N
    n = (pid % TILES_N) * BN + tl.arange(0, BN)
    m = pid_m * BM + tl.arange(0, BM)
    image, y, x, pixel = output_pixel(m, out_height, out_width, True)  # [BM] each
    image = tl.where(pixel < n_pixels, image, 0)  # the last tile's spare rows read image 0
    k = tl.arange(0, 64)
    dy = k // 16
    if POOL_PAD > 0:
        y -= POOL_PAD
        x -= POOL_PAD
        inside = (y >= 0) & (y < height - 3) & (x >= 0) & (x < width - 3)
    start = ((image.to(tl.int64) * height + y) * width + x) * 4  # [BM]
    a_ptrs = x_ptr + start[:, None] + (dy * width * 4 + k % 16)[None, :]
    if POOL_PAD > 0:
        a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)  # [BM, 64]
    else:
        a = tl.load(a_ptrs)
    b = tl.load(w_ptr + n[:, None] * 64 + k[None, :])  # [BN, 64]
    acc = tl.dot(a, b.T)
    acc = relu(acc + tl.load(bias_ptr + n)[None, :])
    if POOL_PAD > 0:  # what sticks out of the convolution's output is zero, not relu(bias)
        acc = tl.where(inside[:, None], acc, 0.0)
    acc = sum_window(acc, BM, BN) * POOL_SCALE  # [BM // 4, BN]
    pixel = pid_m * (BM // 4) + tl.arange(0, BM // 4)
    place = n + (n // COUT) * (y_delta - COUT)  # [BN] int64, into the network's own tensor
    tl.store(
        y_ptr + pixel.to(tl.int64)[:, None] * COUT + place[None, :],
        stored(acc, y_ptr.dtype.element_ty, TO_E4M3),
        mask=(pixel < n_pixels)[:, None],
    )


def constants(
    tile: Tile,
    target: int,
    couts: tuple[int, ...],
    *,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
) -> dict:
    """The kernel's constexpr arguments.

    Raises:
        ValueError: networks of different width, or a width that no tile divides.
    """
    if len(set(couts)) > 1:
        raise ValueError(f"weight has {couts} output channels; the networks' must be equal")
    bn = divisor(tile.bn, sum(couts))
    if bn < 16 or couts[0] % 16:
        raise ValueError(f"weight has {couts} output channels; they must be multiples of 16")
    return {
        "NETWORKS": len(couts),
        "COUT": couts[0],
        "POOL_PAD": pool_padding,
        "POOL_SCALE": pool_scale,
        "TO_E4M3": rounds_twice(target),
        "BM": tile.bm,
        "BN": bn,
    }


def _launch(x, weight, bias, out, out_size, *, target, tile, pool_padding, pool_scale) -> None:
    """Runs the kernel over `out_size` pixels an image; the caller vouches for every extent."""
    n, height, width, _ = x.shape
    pixels = n * out_size[0] * out_size[1]
    couts = tuple(len(w) for w in weight)
    check_aligned(x=x, **{"weight[0]": weight[0]})
    check_consecutive("weight", weight)
    check_consecutive("bias", bias)
    check_rows(4 * pixels)
    target = target_of(x) if target is None else target
    tile = tile or from_table(TILES, target, pixels)
    values = constants(tile, target, couts, pool_padding=pool_padding, pool_scale=pool_scale)
    if pixels == 0:
        return
    programs = triton.cdiv(4 * pixels, tile.bm) * (sum(couts) // values["BN"])
    launch(
        _first_conv_kernel, programs,
        x,
        weight[0],
        bias[0],
        out[0], distance(out),
        height, width, *out_size, pixels,
        **values,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def first_conv_relu_pool(
    x,
    weight,
    bias,
    *,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
    out_dtype=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> list:
    """PDN layer 1 of every network from one packed image: 4x4 convolution, ReLU, 2x2 average pool.

    Args:
        x: (N, H, W, 4), from `pack`, which has already put the convolution's padding around it.
        weight: per network (Cout, 4, 4, 4), consecutive views of one (networks * Cout, 64) buffer;
            the last input channel meets zeros. Both networks have the same width.
        bias: per network (Cout,) float32, consecutive likewise.
        pool_padding, pool_scale, out_dtype, out, target, tile: as in `conv.conv_relu_pool`.

    Returns:
        Per network (N, h, w, Cout), h = (H - 3 + 2 pool_padding) // 2.

    Raises:
        ValueError: tensors that are not aligned or not consecutive, more than two networks,
            networks of different width or of one that is no multiple of 16.
    """
    n, height, width, _ = x.shape
    size = ((height - 3 + 2 * pool_padding) // 2, (width - 3 + 2 * pool_padding) // 2)
    if out is None:
        out = [x.new_empty((n, *size, len(w)), dtype=out_dtype or x.dtype) for w in weight]
    _launch(x, weight, bias, out, size, target=target, tile=tile, pool_padding=pool_padding,
            pool_scale=pool_scale)  # fmt: skip
    return list(out)
