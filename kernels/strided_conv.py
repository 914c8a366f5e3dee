"""The encoder's convolutions, strided and zero-padded, with ReLU.

An implicit matrix product: a row is an output pixel, a column an output channel, K runs over the
filter's taps and the input channels. These layers run beside the PDNs' on the same multiprocessors,
so tiles are small: at most 32 KiB of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import needs_fence, proxy_fence, relu, target_of, wait_for_last
from .grouped import Tile, check_rows, divisor, from_table
from .launching import launch

# A tile has to fit beside a PDN's 192 KiB and 157 registers a thread: 32 KiB of shared memory and
# about 100 registers. Limits are output pixels; a batch of one has 16384 of them in the first
# layer, 4096, 1024, 256 and 64 in the next, and 81 of 8x8 taps in the last at 512x512.
#
# Few pixels: K is long (1024, 4096) and the loop a chain of memory latencies, so a step takes 128
# values of K, and few rows spread what little there is.
_DEEP = Tile(16, 32, 256, warps=4, stages=3)
# One image in the second layer still gives 128 programs.
_SMALL = Tile(32, 32, 128, warps=4, stages=4)
# From about two programs per multiprocessor on, the most products per loaded byte. 32 values of K,
# one tap of the layers with 32 channels: 64 would take 136 registers there on sm_80 to 89, and
# leave shared memory for one prefetched step on sm_90 and 100, not three.
_LARGE = Tile(64, 64, 64, warps=4, stages=4)
TILES = {
    80: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 108 multiprocessors
    86: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 84
    89: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 128
    90: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 132
    100: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 148
    120: ((2048, _DEEP), (16384, _SMALL), (None, _LARGE)),  # 170
}


# Sizes are not specialised: one binary serves every image, and it is the one that the census shows.
@triton.jit(
    do_not_specialize=[
        "x_image", "x_row", "height", "width", "out_height", "out_width", "n_pixels",
    ],
    do_not_specialize_on_alignment=["x_ptr"],
)  # fmt: skip
def _strided_conv_kernel(
    x_ptr, x_image: tl.int64, x_row: tl.int64,  # (N, height, width, CIN), elements per image, row
    w_ptr,  # (COUT, K * K * CIN)
    bias_ptr,  # (COUT,) float32
    y_ptr,  # (N, out_height, out_width, COUT)
    height, width,
    out_height, out_width,
    n_pixels,  # N * out_height * out_width
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    RELU: tl.constexpr,
    FENCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    TILES_N: tl.constexpr = COUT // BN
    # The vector width that x's strides and first element allow in every view that the launcher
    # lets through (an interior view of RGBX pixels is aligned to a pixel, 8 bytes, no more).
    VECTOR: tl.constexpr = CIN if CIN < 8 else 8
    pid = tl.program_id(0)
    pid_m = pid // TILES_N
    n = (pid % TILES_N) * BN + tl.arange(0, BN)
    m = pid_m * BM + tl.arange(0, BM)
    x = m % out_width
    y = (m // out_width) % out_height
    image = m // (out_width * out_height)
    left = x * STRIDE - PAD  # [BM]
    top = tl.where(m < n_pixels, y * STRIDE - PAD, -K)  # spare rows lie above the image: zeros
    x_row = tl.multiple_of(x_row, VECTOR)
    start = image.to(tl.int64) * tl.multiple_of(x_image, VECTOR) + top * x_row + left * CIN  # [BM]

    k = tl.arange(0, BK)
    w_ptrs = w_ptr + n[:, None] * (K * K * CIN) + k[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in tl.range(0, K * K * CIN // BK):
        if CIN < BK:  # several taps a step
            tap = (step * BK + k) // CIN  # [BK]
            dy = (tap // K)[None, :]
            dx = (tap % K)[None, :]
            c = (k % CIN)[None, :]
        else:
            tap = step // (CIN // BK)
            dy = tap // K
            dx = tap % K
            c = (step % (CIN // BK)) * BK + k[None, :]
        row = top[:, None] + dy
        column = left[:, None] + dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        a_ptrs = x_ptr + (start[:, None] + dy * x_row + (dx * CIN + c))  # [BM, BK]
        a_ptrs = tl.multiple_of(a_ptrs, (2 * VECTOR, 2 * VECTOR))
        a = tl.load(a_ptrs, mask=inside, other=0.0)
        b = tl.load(w_ptrs + step * BK)  # [BN, BK]
        if FENCE:
            proxy_fence(step)
        acc = tl.dot(a, b.T, acc)

    acc += tl.load(bias_ptr + n)[None, :]
    if RELU:
        acc = relu(acc)
    tl.store(
        y_ptr + m.to(tl.int64)[:, None] * COUT + n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m < n_pixels)[:, None],
    )


def constants(
    tile: Tile,
    target: int,
    cin: int,
    cout: int,
    kernel: int,
    *,
    stride: int,
    padding: int,
    relu: bool,
) -> dict:
    """The kernel's constexpr arguments.

    Raises:
        ValueError: channel counts that no tile divides.
    """
    limit = tile.bk_bytes // 2
    if cin < 16:  # a few channels: several taps a step, such as all 16 of an RGBX image
        limit = max(limit, 64)
    bk = divisor(limit, kernel * kernel * cin)
    if cin & (cin - 1) and cin % bk:  # a step holds whole taps or a part of one
        bk = divisor(bk, cin)
    if cin % 4 or bk < 16:
        raise ValueError(f"x has {cin} channels; they must be 4, 8 or a multiple of 16")
    bn = divisor(tile.bn, cout)
    if bn < 16:
        raise ValueError(f"weight has {cout} output channels; they must be a multiple of 16")
    return {
        "CIN": cin,
        "COUT": cout,
        "K": kernel,
        "STRIDE": stride,
        "PAD": padding,
        "RELU": relu,
        "FENCE": needs_fence(target),
        "BM": tile.bm,
        "BN": bn,
        "BK": bk,
    }


def _launch(x, weight, bias, out, size, *, stride, padding, relu, target, tile) -> None:
    """Compute the first `size` (rows, columns) of every image's result into `out`."""
    n, height, width, cin = x.shape
    pixels = n * size[0] * size[1]
    check_rows(pixels)
    target = target or target_of(x)
    tile = tile or from_table(TILES, target, pixels)
    values = constants(
        tile,
        target,
        cin,
        weight.shape[0],
        weight.shape[1],
        stride=stride,
        padding=padding,
        relu=relu,
    )
    if pixels == 0:
        return
    launch(
        _strided_conv_kernel, triton.cdiv(pixels, tile.bm) * (values["COUT"] // values["BN"]),
        x, x.stride(0), x.stride(1), weight, bias, out, height, width, *size, pixels, **values,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _check_view(x) -> None:
    """Raise ValueError unless every pixel of the view starts where a vector load may."""
    channels = x.shape[3]
    if x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != channels):
        raise ValueError(f"x has strides {x.stride()}; its pixels and channels must be contiguous")
    vector = min(channels, 8)  # elements of a load
    strides = [x.stride(dim) for dim in (0, 1) if x.shape[dim] > 1]
    start = x.data_ptr() // x.dtype.itemsize
    if any(value % vector for value in (start, *strides)):
        raise ValueError(
            f"x starts at element {start} of the address space and has strides {x.stride()}; "
            f"images, rows and the start must be multiples of {vector} elements: pass a clone"
        )


def strided_conv_relu(
    x,
    weight,
    bias,
    *,
    stride: int = 2,
    padding: int = 1,
    relu: bool = True,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
):
    """Encoder layer: convolution with a stride, then ReLU.

    Args:
        x: (N, H, W, Cin), Cin 4, 8 or a multiple of 16; a view whose pixels are contiguous in a
            row, such as the packed image without its border.
        weight: (Cout, K, K, Cin), Cout a multiple of 16; bias: (Cout,) float32.
        relu: False leaves the result as it is.
        out: the result, if it is allocated; every element is written.
        target: compute capability such as 90; None is that of x's device.
        tile: instead of the table's row.

    Returns:
        (N, (H + 2 padding - K) // stride + 1, (W + 2 padding - K) // stride + 1, Cout).

    Raises:
        ValueError: other channel counts, or an x whose pixels are not aligned.
    """
    _check_view(x)
    cout, kernel = weight.shape[:2]
    size = tuple((length + 2 * padding - kernel) // stride + 1 for length in x.shape[1:3])
    if out is None:
        out = x.new_empty((x.shape[0], *size, cout))
    _launch(x, weight, bias, out, size, stride=stride, padding=padding, relu=relu,
            target=target, tile=tile)  # fmt: skip
    return out
