"""The rest of `pair_distance`, where its first part did not wait for the autoencoder.

The student's second half comes as products in float32; the autoencoder's last convolution is added
to it in the accumulator, squared and summed, so that none of its 384 channels is written.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from .common import needs_fence, target_of
from .grouped import (
    Tile,
    accumulate_conv,
    check_aligned,
    check_rows,
    divisor,
    filters,
    from_table,
    output_pixel,
    sum_of_squares,
    uses_tma,
)
from .launching import launch

# 147 programs for one image, and the decoder's last layer has 9 steps.
_LAST = Tile(64, 128, 128, warps=4, stages=4)
TILES = {
    80: ((None, replace(_LAST, stages=3)),),
    86: ((None, replace(_LAST, stages=3)),),
    89: ((None, replace(_LAST, stages=3)),),
    90: ((None, _LAST),),
    100: ((None, replace(_LAST, bn=64)),),  # as many parts as `student_distance` gives
    120: ((None, replace(_LAST, stages=3)),),
}


@triton.jit(do_not_specialize=["height", "width", "n_pixels"])
def _autoencoder_distance_kernel(
    x_ptr,  # (N, height, width, CA)
    w,  # (C, 9 * CA), a descriptor if USE_TMA
    student_ptr,  # (n_pixels, C) float32
    bias_ptr,  # (C,) float32
    scale_ptr,  # (C,) float32, read if SCALED
    ae_ptr,  # (C // BN, n_pixels) float32
    height, width,
    n_pixels,  # N * height * width
    C: tl.constexpr,
    CA: tl.constexpr,
    SCALED: tl.constexpr,
    USE_TMA: tl.constexpr,
    FENCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = C // BN
    channel_slice = tl.program_id(0) % SLICES
    first = channel_slice * BN
    m = (tl.program_id(0) // SLICES) * BM + tl.arange(0, BM)
    image, y, x, _ = output_pixel(m, height, width, False)  # [BM] each
    image = tl.where(m < n_pixels, image, 0)  # the last tile's spare rows read image 0
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc, _ = accumulate_conv(
        acc, acc, x_ptr, image, y, x, height, width,
        w, None, first, 9, CA, 3, 1, True, USE_TMA, FENCE, BN, BK,
    )  # fmt: skip
    n = first + tl.arange(0, BN)
    place = m.to(tl.int64)[:, None] * C + n[None, :]
    acc += tl.load(student_ptr + place, mask=(m < n_pixels)[:, None], other=0.0)
    partial = sum_of_squares(acc, bias_ptr, scale_ptr, first, SCALED, BN)
    offset = channel_slice.to(tl.int64) * n_pixels + m
    tl.store(ae_ptr + offset, partial * (1.0 / C), mask=m < n_pixels)


def constants(
    tile: Tile, target: int, channels: int, channels_autoencoder: int, *, scaled: bool = False
) -> dict:
    """The constexpr arguments of `autoencoder_distance`'s kernel.

    Raises:
        ValueError: channel counts that are no multiples of 16.
    """
    bk = divisor(tile.bk_bytes // 2, channels_autoencoder)
    bn = divisor(tile.bn, channels)
    if min(bk, bn) < 16:
        raise ValueError(
            f"weight_autoencoder has {channels} filters of {channels_autoencoder} channels; they "
            "must be multiples of 16"
        )
    return {
        "C": channels,
        "CA": channels_autoencoder,
        "SCALED": scaled,
        "USE_TMA": uses_tma(target),
        "FENCE": needs_fence(target),
        "BM": tile.bm,
        "BN": bn,
        "BK": bk,
    }


def autoencoder_distance(
    autoencoder,
    second,
    weight_autoencoder,
    bias,
    *,
    scale=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
):
    """The rest of `pair_distance`, once the autoencoder is done.

    Args:
        autoencoder, weight_autoencoder, bias, scale, target: as there.
        second: (N, h, w, C) float32, from `student_distance`.
        out: the result, if it is allocated.
        tile: instead of the table's.

    Returns:
        map_ae: (P, N, h, w) float32, partial maps that sum to the map; P = C / bn.

    Raises:
        ValueError: tensors that are not aligned, channel counts that are no multiples of 16.
    """
    n, height, width, ca = autoencoder.shape
    c = len(weight_autoencoder)
    pixels = n * height * width
    target = target_of(autoencoder) if target is None else target
    tile = tile or from_table(TILES, target, pixels)
    check_aligned(autoencoder=autoencoder, weight_autoencoder=weight_autoencoder)
    check_rows(pixels)
    values = constants(tile, target, c, ca, scaled=scale is not None)
    bn = values["BN"]
    if out is None:
        out = second.new_empty((c // bn, n, height, width))
    if pixels == 0:
        return out
    w = filters(weight_autoencoder, c, 9 * ca, bn, values["BK"], values["USE_TMA"])
    bias = bias[c:]
    launch(
        _autoencoder_distance_kernel, triton.cdiv(pixels, tile.bm) * (c // bn),
        autoencoder, w, second, bias, bias if scale is None else scale[c:], out,
        height, width, pixels, **values,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
