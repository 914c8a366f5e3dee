"""The autoencoder's 1x1 bottleneck and its first decoder layer.

Encoder layer 6 reads 8x8 cells with as large a filter: one product with K = 64 Cin per image, half
a megabyte of filters for a batch of one. A single program would need 10 us for these alone, at a
multiprocessor's share of the L2 cache. So one kernel splits K over 32 programs, and a second one
adds the parts, in order, and applies the decoder layer to them; nothing depends on timing.

Resizing one cell to 3x3 repeats it, so an output of the decoder layer is the latent vector times
the sum of the taps that meet the 3x3 image: 4 to 9 of 16. The taps stay apart, since their sum
would have to be rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import needs_fence, proxy_fence, relu, target_of, wait_for_last
from .grouped import ARCHITECTURES, Tile, check_rows, divisor, from_table
from .launching import launch

SPLITS = 32  # of K; the same for every batch, so that an image's result does not depend on it
SIDE = tl.constexpr(8)  # rows and columns of x and of the encoder's filter
UP = tl.constexpr(3)  # rows and columns of the resized cell
K = tl.constexpr(4)  # of the decoder's filter
PAD = tl.constexpr(2)
OUT = tl.constexpr(4)  # rows and columns of the result, UP + 2 PAD - K + 1

# 16 images, the smallest product, on every architecture: launches are small at every batch, and
# the filters of both steps come from the L2 cache whatever the tile.
TILES = {arch: ((None, Tile(16, 64, 128, warps=4, stages=3)),) for arch in ARCHITECTURES}


@triton.jit(do_not_specialize=["n_images"])
def _encode_kernel(
    x_ptr,  # (N, SIDE * SIDE * CIN)
    w_ptr,  # (C, SIDE * SIDE * CIN)
    part_ptr,  # (SPLITS, N, C) float32
    n_images,
    CIN: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    FENCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    DEPTH: tl.constexpr = SIDE * SIDE * CIN
    STEPS: tl.constexpr = DEPTH // (SPLITS * BK)
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    n = (tile % (C // BN)) * BN + tl.arange(0, BN)
    image = (tile // (C // BN)) * BM + tl.arange(0, BM)
    real = (image < n_images)[None, :]
    k = split * (STEPS * BK) + tl.arange(0, BK)
    x_ptrs = x_ptr + image.to(tl.int64)[None, :] * DEPTH + k[:, None]  # [BK, BM]
    w_ptrs = w_ptr + n[:, None] * DEPTH + k[None, :]  # [BN, BK]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, STEPS):
        x = tl.load(x_ptrs + step * BK, mask=real, other=0.0)
        w = tl.load(w_ptrs + step * BK)
        if FENCE:
            proxy_fence(step)
        acc = tl.dot(w, x, acc)
    row = split.to(tl.int64) * n_images + image
    tl.store(part_ptr + row[None, :] * C + n[:, None], acc, mask=real)


@triton.jit(do_not_specialize=["part", "n_images"])
def _decode_kernel(
    part_ptr, part: tl.int64,  # (SPLITS, N, C) float32, elements per split
    bias_encoder_ptr,  # (C,) float32
    w_ptr,  # (COUT, K * K * C)
    bias_ptr,  # (COUT,) float32
    y_ptr,  # (N, OUT, OUT, COUT)
    n_images,
    C: tl.constexpr,
    COUT: tl.constexpr,
    SPLITS: tl.constexpr,
    FENCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_last(PDL)
    TILES_N: tl.constexpr = COUT // BN
    pid = tl.program_id(0)
    place = pid % (OUT * OUT)
    y = place // OUT
    x = place % OUT
    n = (pid // (OUT * OUT)) % TILES_N * BN + tl.arange(0, BN)
    image = (pid // (OUT * OUT * TILES_N)) * BM + tl.arange(0, BM)
    real = (image < n_images)[None, :]

    c = tl.arange(0, C)
    parts = part_ptr + image.to(tl.int64)[None, :] * C + c[:, None]  # [C, BM]
    latent = tl.zeros((C, BM), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        latent += tl.load(parts + split * part, mask=real, other=0.0)
    latent += tl.load(bias_encoder_ptr + c)[:, None]
    latent = latent.to(w_ptr.dtype.element_ty)

    # Taps that meet the resized cell: from PAD - y to PAD - y + UP - 1, and so for x.
    dy = tl.maximum(PAD - y, 0)
    dx = tl.maximum(PAD - x, 0)
    rows = tl.minimum(PAD + UP - y, K) - dy
    columns = tl.minimum(PAD + UP - x, K) - dx
    w_ptrs = w_ptr + n[:, None] * (K * K * C) + c[None, :]  # [BN, C]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i in tl.range(0, rows * columns):
        tap = (dy + i // columns) * K + dx + i % columns
        w = tl.load(w_ptrs + tap * C)
        if FENCE:
            proxy_fence(i)
        acc = tl.dot(w, latent, acc)
    acc = relu(acc + tl.load(bias_ptr + n)[:, None])
    pixel = image.to(tl.int64) * (OUT * OUT) + place
    tl.store(y_ptr + pixel[None, :] * COUT + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=real)


def constants(tile: Tile, target: int, cin: int, channels: int, cout: int) -> tuple[dict, dict]:
    """The constexpr arguments of the two kernels.

    Raises:
        ValueError: channel counts that no tile divides.
    """
    bk = divisor(tile.bk_bytes // 2, SIDE.value**2 * cin // SPLITS)
    if bk < 16:
        raise ValueError(f"x has {cin} channels; they must be a multiple of 8")
    if channels < 16 or channels & (channels - 1):
        raise ValueError(
            f"weight_encoder has {channels} output channels; it must be a power of two, 16 or more"
        )
    bn = divisor(tile.bn, cout)
    if bn < 16:
        raise ValueError(f"weight has {cout} output channels; they must be a multiple of 16")
    shared = {"C": channels, "SPLITS": SPLITS, "FENCE": needs_fence(target), "BM": tile.bm}
    return (
        {
            **shared,
            "CIN": cin,
            "BN": min(tile.bn, channels),
            "BK": bk,
        },
        {**shared, "COUT": cout, "BN": bn},
    )


def _launch(x, weight_encoder, bias_encoder, weight, bias, out, images, *, target, tile) -> None:
    """Compute the first `images` images of the result into `out`."""
    cin, channels, cout = x.shape[3], len(weight_encoder), len(weight)
    check_rows(images * OUT.value**2)
    target = target or target_of(x)
    tile = tile or from_table(TILES, target, images)
    encode, decode = constants(tile, target, cin, channels, cout)
    if images == 0:
        return
    parts = bias.new_empty((SPLITS, images, channels))
    tiles = triton.cdiv(images, tile.bm)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    launch(
        _encode_kernel, tiles * (channels // encode["BN"]) * SPLITS,
        x, weight_encoder, parts, images, **encode, **options
    )  # fmt: skip
    launch(
        _decode_kernel, tiles * (cout // decode["BN"]) * OUT.value**2,
        parts, images * channels, bias_encoder, weight, bias, out, images, **decode, **options
    )  # fmt: skip


def bottleneck(
    x,
    weight_encoder,
    bias_encoder,
    weight,
    bias,
    *,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
):
    """The 1x1 bottleneck at one go: 8x8 convolution without ReLU, then the first decoder layer.

    Args:
        x: (N, 8, 8, Cin), contiguous, Cin a multiple of 8.
        weight_encoder: (C, 8, 8, Cin), C a power of two from 16 on; bias_encoder: (C,) float32.
        weight: (Cout, 4, 4, C), applied with padding 2 to the 3x3 image, Cout a multiple of 16;
            bias: (Cout,) float32.
        out: the result, if it is allocated; every element is written.
        target: compute capability such as 90; None is that of x's device.
        tile: instead of the table's row.

    Returns:
        (N, 4, 4, Cout).

    Raises:
        ValueError: other channel counts.
    """
    if out is None:
        out = x.new_empty((x.shape[0], OUT.value, OUT.value, len(weight)))
    _launch(x, weight_encoder, bias_encoder, weight, bias, out, x.shape[0],
            target=target, tile=tile)  # fmt: skip
    return out
