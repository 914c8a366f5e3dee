"""Stride-1 convolution + ReLU (+ 2x2 average pool) of both networks.

An implicit matrix product: a row is an output pixel, a column an output channel, K runs over the
filter's taps and the input channels. See `grouped` for how one launch serves two networks.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from .common import needs_fence, relu, rounds_twice, target_of, wait_for_last
from .grouped import (
    Tile,
    accumulate_conv,
    check_aligned,
    check_consecutive,
    check_fp8,
    check_rows,
    distance,
    divisor,
    filters,
    from_table,
    output_pixel,
    stored,
    sum_window,
    uses_tma,
)
from .launching import launch

SMALL = 8 * 61 * 61  # stored pixels: eight images of 256x256

# Shared memory: 163 KiB on sm_80, 99 KiB on sm_86, 89 and 120, 227 KiB on sm_90 and 100. Eight
# warps throughout, so that the gather's addresses and copies are spread over twice four's threads.
_MMA_SYNC = Tile(128, 128, 128, warps=8, stages=3)  # 64 KiB; 256 channels would not fit 99 KiB
_WIDE_SYNC = Tile(128, 256, 64, warps=8, stages=4)  # 72 KiB; 128 bytes of K a step can spill
_TMA = Tile(128, 128, 128, warps=8, stages=4)  # 128 KiB
_WIDE_TMA = Tile(128, 256, 128, warps=8, stages=4)  # 192 KiB
PLAIN_TILES = {
    # 128x256 moves a quarter less per product, once there are programs enough for every SM. A batch
    # of one gives PDN-S's third layer 112 programs of 128x128 (sm_90 has 132 SMs), 56 of 128x256.
    80: ((SMALL, _MMA_SYNC), (None, _WIDE_SYNC)),
    86: ((None, _MMA_SYNC),),
    89: ((None, _MMA_SYNC),),
    90: ((SMALL, _TMA), (None, _WIDE_TMA)),
    100: ((None, _TMA),),  # 128x256 spills in fp8, 256x128 in every dtype
    120: ((None, _MMA_SYNC),),
}
POOL_TILES = {
    # Four times the pixels of a plain layer: 234 programs of 128x256 at a batch of one, so the
    # tile that moves least serves every batch.
    80: ((None, _WIDE_SYNC),),
    86: ((None, _MMA_SYNC),),
    89: ((None, _MMA_SYNC),),
    90: ((None, _WIDE_TMA),),
    100: ((None, _TMA),),  # 128x256 spills in fp8
    120: ((None, _MMA_SYNC),),
}


# Sizes are not specialised: one binary serves every image, and it is the one that the census shows.
@triton.jit(
    do_not_specialize=[
        "height", "width", "conv_height", "conv_width", "out_height", "out_width", "n_pixels",
    ]
)  # fmt: skip
def _conv_kernel(
    x_ptr, x_delta: tl.int64,  # (N, height, width, CIN) per network, the second x_delta further on
    w,  # (COUT0 + COUT1, K * K * CIN), a descriptor if USE_TMA
    bias_ptr,  # (COUT0 + COUT1,) float32
    scale_ptr,  # (COUT0 + COUT1,) float32, read if SCALED
    y_ptr, y_delta: tl.int64,  # (N, out_height, out_width, COUT0 or COUT1) per network
    height, width,
    conv_height, conv_width,  # of the convolution's own output
    out_height, out_width,
    n_pixels,  # N * out_height * out_width
    CIN: tl.constexpr,
    COUT0: tl.constexpr,
    COUT1: tl.constexpr,  # 0 for one network
    K: tl.constexpr,
    PAD: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    POOL_PAD: tl.constexpr,
    POOL_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    USE_TMA: tl.constexpr,
    FENCE: tl.constexpr,
    TO_E4M3: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    # Programs that share activations are neighbours, so that these stay in the L2 cache.
    TILES_N: tl.constexpr = (COUT0 + COUT1) // BN
    pid = tl.program_id(0)
    pid_m = pid // TILES_N
    first = (pid % TILES_N) * BN
    network = (first >= COUT0).to(tl.int64)

    m = pid_m * BM + tl.arange(0, BM)
    image, y, x, pixel = output_pixel(m, out_height, out_width, POOL)  # [BM] each
    image = tl.where(pixel < n_pixels, image, 0)  # the last tile's spare rows read image 0
    if POOL_PAD > 0:
        y -= POOL_PAD
        x -= POOL_PAD
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc, _ = accumulate_conv(
        acc, acc,
        x_ptr + network * x_delta,
        image, y, x,
        height, width,
        w, None, first, K * K,
        CIN, K, PAD, PAD + POOL_PAD > 0, USE_TMA, FENCE, BN, BK,
    )  # fmt: skip

    n = first + tl.arange(0, BN)
    if SCALED:
        acc *= tl.load(scale_ptr + n)[None, :]
    acc += tl.load(bias_ptr + n)[None, :]
    if RELU:
        acc = relu(acc)
    if POOL:
        if POOL_PAD > 0:  # what sticks out of the convolution's output is zero, not relu(bias)
            inside = (y >= 0) & (y < conv_height) & (x >= 0) & (x < conv_width)
            acc = tl.where(inside[:, None], acc, 0.0)
        acc = sum_window(acc, BM, BN) * POOL_SCALE  # [BM // 4, BN]
        pixel = pid_m * (BM // 4) + tl.arange(0, BM // 4)
    cout = tl.where(network == 0, COUT0, COUT1)
    offset = pixel.to(tl.int64)[:, None] * cout + (n - network * COUT0)[None, :]
    tl.store(
        y_ptr + network * y_delta + offset,
        stored(acc, y_ptr.dtype.element_ty, TO_E4M3),
        mask=(pixel < n_pixels)[:, None],
    )


def choose_tile(target: int, pixels: int, couts: tuple[int, ...], pool: bool) -> Tile:
    """The tile for `pixels` stored pixels and the networks' channel counts."""
    tile = from_table(POOL_TILES if pool else PLAIN_TILES, target, pixels)
    bn = divisor(tile.bn, *couts)
    if bn * 2 == tile.bn == 256:  # such as 384 and 768 channels: as much traffic the other way
        return replace(tile, bm=2 * tile.bm, bn=bn)
    return replace(tile, bn=bn)


def constants(
    tile: Tile,
    target: int,
    itemsize: int,
    cin: int,
    couts: tuple[int, ...],
    kernel: int,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    pool_scale: float = 1.0,
    scaled: bool = False,
) -> dict:
    """The kernel's constexpr arguments; `itemsize` is that of the activations, in bytes.

    Raises:
        ValueError: channel counts that no tile divides.
    """
    bk = divisor(tile.bk_bytes // itemsize, cin)
    if bk * itemsize < 32:
        raise ValueError(f"x has {cin} channels; they must be a multiple of {32 // itemsize}")
    bn = divisor(tile.bn, *couts)
    if bn < 16:
        raise ValueError(f"weight has {couts} output channels; they must be multiples of 16")
    return {
        "CIN": cin,
        "COUT0": couts[0],
        "COUT1": sum(couts[1:]),
        "K": kernel,
        "PAD": padding,
        "RELU": relu,
        "POOL": pool,
        "POOL_PAD": pool_padding,
        "POOL_SCALE": pool_scale,
        "SCALED": scaled,
        "USE_TMA": uses_tma(target),
        "FENCE": needs_fence(target),
        "TO_E4M3": rounds_twice(target),
        "BM": tile.bm,
        "BN": bn,
        "BK": bk,
    }


def _launch(
    x, weight, bias, scale, out, conv_size, out_size, *, target, tile, padding, relu,
    pool=False, pool_padding=0, pool_scale=1.0,
):  # fmt: skip
    """Runs the kernel over `out_size` pixels an image; the caller vouches for every extent."""
    n, height, width, cin = x[0].shape
    pixels = n * out_size[0] * out_size[1]
    couts = tuple(len(w) for w in weight)
    target = target_of(x[0]) if target is None else target
    for i, x_i in enumerate(x):
        check_fp8(f"x[{i}]", x_i, target)
        check_aligned(**{f"x[{i}]": x_i})
    check_aligned(**{"weight[0]": weight[0]})
    check_consecutive("weight", weight)
    check_consecutive("bias", bias)
    check_consecutive("scale", scale or ())
    check_rows(pixels * (4 if pool else 1))
    tile = tile or choose_tile(target, pixels, couts, pool)
    kernel = weight[0].shape[1]
    values = constants(
        tile, target, x[0].dtype.itemsize, cin, couts, kernel,
        padding=padding, relu=relu, pool=pool, pool_padding=pool_padding, pool_scale=pool_scale,
        scaled=scale is not None,
    )  # fmt: skip
    if pixels == 0:
        return
    bn = values["BN"]
    w = filters(weight[0], sum(couts), kernel * kernel * cin, bn, values["BK"], values["USE_TMA"])
    programs = triton.cdiv(pixels * (4 if pool else 1), tile.bm) * (sum(couts) // bn)
    launch(
        _conv_kernel, programs,
        x[0], distance(x),
        w,
        bias[0],
        bias[0] if scale is None else scale[0],
        out[0], distance(out),
        height, width, *conv_size, *out_size, pixels,
        **values,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def _sizes(x, weight, padding: int) -> tuple[int, int]:
    """Rows and columns of the convolution's output."""
    _, height, width, _ = x[0].shape
    kernel = weight[0].shape[1]
    return height - kernel + 1 + 2 * padding, width - kernel + 1 + 2 * padding


def _allocate(x, weight, size: tuple[int, int], dtype) -> list:
    return [
        x_i.new_empty((len(x_i), *size, len(w)), dtype=dtype or x_i.dtype)
        for x_i, w in zip(x, weight, strict=True)
    ]


def conv_relu(
    x,
    weight,
    bias,
    *,
    padding: int = 0,
    relu: bool = True,
    scale=None,
    out_dtype=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> list:
    """Stride-1 convolution and ReLU, grouped over networks.

    Args:
        x: per network (N, H, W, Cin), contiguous, from a 16-byte boundary.
        weight: per network (Cout, K, K, Cin), consecutive views of one buffer.
        bias: per network (Cout,) float32, consecutive likewise.
        padding: zeros on every side of the input.
        relu: False leaves the result as it is.
        scale: per network (Cout,) float32, consecutive likewise, for fp8 inputs.
        out_dtype: of the result; None is the dtype of x.
        out: per network, where the result goes; None allocates it.
        target: compute capability to take the tile and the code path of; None is the device's.
        tile: instead of the table's, for tests.

    Returns:
        Per network (N, H - K + 1 + 2 padding, W - K + 1 + 2 padding, Cout).

    Raises:
        ValueError: tensors that are not aligned or not consecutive, more than two networks, fp8
            below sm_89, channel counts that are no multiples of 16 (Cin in fp8: 32).
    """
    size = _sizes(x, weight, padding)
    out = _allocate(x, weight, size, out_dtype) if out is None else list(out)
    _launch(x, weight, bias, scale, out, size, size, target=target, tile=tile, padding=padding,
            relu=relu)  # fmt: skip
    return out


def conv_relu_pool(
    x,
    weight,
    bias,
    *,
    padding: int = 0,
    pool_padding: int = 0,
    pool_scale: float = 0.25,
    scale=None,
    out_dtype=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> list:
    """Stride-1 convolution, ReLU and 2x2 average pool (stride 2, floor), grouped over networks.

    Args:
        x, weight, bias, padding, scale, out_dtype, out, target, tile: as in `conv_relu`.
        pool_padding: zeros on every side of the pool's input, 0 or 1; they count in the divisor.
        pool_scale: factor on the sum over the 2x2 window: 0.25 is the average, 1 is for weights and
            biases that already hold the quarter.

    Returns:
        Per network (N, h, w, Cout), h = (H - K + 1 + 2 padding + 2 pool_padding) // 2.

    Raises:
        ValueError: as in `conv_relu`.
    """
    conv_size = _sizes(x, weight, padding)
    size = tuple((length + 2 * pool_padding) // 2 for length in conv_size)
    out = _allocate(x, weight, size, out_dtype) if out is None else list(out)
    _launch(x, weight, bias, scale, out, conv_size, size, target=target, tile=tile, padding=padding,
            relu=True, pool_padding=pool_padding, pool_scale=pool_scale, pool=True)  # fmt: skip
    return out
