"""Both distance maps from the inputs of the three last convolutions.

No tensor with 384 or 768 channels is ever written: a program accumulates the student's (negated)
convolution and the teacher's or the autoencoder's into one tile, squares it and sums it over its
channels. The channel slices are partial maps, so the sum is deterministic and needs no atomics.

Where the autoencoder is what one waits for, `student_distance` does all that does not need it (the
teacher's map and the student's second half, kept in float32), and `autoencoder_distance.py` the
rest.
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
    check_fp8,
    check_rows,
    divisor,
    filters,
    from_table,
    output_pixel,
    sum_of_squares,
    uses_tma,
)
from .launching import launch

SMALL = 16 * 56 * 56 - 1  # pixels of a map: fewer than sixteen images of 256x256

# A batch of one has 150 programs of 128x128 for 132 SMs. They take over half of an SM's shared
# memory, so that one runs at a time: two long ones side by side would undo the order of the launch.
_TMA = Tile(128, 128, 128, warps=8, stages=4)
_MMA_SYNC = Tile(128, 128, 128, warps=8, stages=3)  # 64 KiB, of 99 on sm_86, 89 and 120
TILES = {
    80: ((None, _MMA_SYNC),),
    86: ((None, _MMA_SYNC),),
    89: ((None, _MMA_SYNC),),
    # All 384 channels at once read each activation once, not three times, but a batch of one would
    # have 50 programs.
    90: ((SMALL, _TMA), (None, Tile(128, 256, 128, warps=8, stages=3, bn_tail=128))),
    100: ((None, _TMA),),
    120: ((None, _MMA_SYNC),),
}
# `student_distance` spills there with more channels; `autoencoder_distance` has as many.
_APART = {100: Tile(128, 64, 128, warps=4, stages=4)}


# Sizes are not specialised: one binary serves every image, and it is the one that the census shows.
@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "n_pixels", "tiles_per_kind",
    ]
)  # fmt: skip
def _pair_distance_kernel(
    teacher_ptr,  # (N, height, width, CT)
    student_ptr,  # (N, height, width, CS)
    autoencoder_ptr,  # (N, out_height, out_width, CA)
    w_teacher,  # (C, K * K * CT); the filters are descriptors if USE_TMA, else pointers
    w_student,  # (2 C, K * K * CS)
    w_autoencoder,  # (C, 9 * CA)
    t_tail, s_tail, a_tail,  # the same in boxes of BN_TAIL rows, or None
    bias_ptr,  # (2 C,) float32
    scale_ptr,  # (2 C,) float32, read if SCALED
    st_ptr, ae_ptr,  # (C // (BN + BN_TAIL), n_pixels) float32 each; if SPLIT ae is (n_pixels, C)
    height, width,
    out_height, out_width,
    n_pixels,  # N * out_height * out_width
    tiles_per_kind,
    C: tl.constexpr,
    CT: tl.constexpr,
    CS: tl.constexpr,
    CA: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,  # the student's second half is stored as it is, without the autoencoder
    USE_TMA: tl.constexpr,
    FENCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_TAIL: tl.constexpr,  # further channels in a second accumulator, or 0
    BK: tl.constexpr,
    BK_AE: tl.constexpr,
):  # fmt: skip
    # The kind with the longer K goes first: the short tiles then fill the gaps at the end.
    ST_FIRST: tl.constexpr = SPLIT or K * K * CT >= 9 * CA
    SLICES: tl.constexpr = C // (BN + BN_TAIL)
    pid = tl.program_id(0)
    second = pid >= tiles_per_kind
    tile = tl.where(second, pid - tiles_per_kind, pid)
    is_ae = second if ST_FIRST else pid < tiles_per_kind
    channel_slice = tile % SLICES
    pid_m = tile // SLICES
    first = channel_slice * (BN + BN_TAIL)  # of the kind's C channels
    student_first = first + is_ae.to(tl.int32) * C

    m = pid_m * BM + tl.arange(0, BM)
    image, y, x, _ = output_pixel(m, out_height, out_width, False)  # [BM] each
    image = tl.where(m < n_pixels, image, 0)  # the last tile's spare rows read image 0
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    tail = acc
    if BN_TAIL > 0:
        tail = tl.zeros((BM, BN_TAIL), dtype=tl.float32)
    # Three loops in a row, one of which does nothing, and no branch: the loops then share their
    # shared memory, while those of two branches would be given their own beside it.
    acc, tail = accumulate_conv(
        acc, tail, student_ptr, image, y, x, height, width,
        w_student, s_tail, student_first, K * K, CS, K, 0, False, USE_TMA, FENCE, BN, BK,
    )  # fmt: skip
    acc, tail = accumulate_conv(
        acc, tail, teacher_ptr, image, y, x, height, width,
        w_teacher, t_tail, first, tl.where(is_ae, 0, K * K), CT, K, 0, False,
        USE_TMA, FENCE, BN, BK,
    )  # fmt: skip
    if SPLIT:
        if is_ae:
            n = first + tl.arange(0, BN)
            place = m.to(tl.int64)[:, None] * C + n[None, :]
            tl.store(ae_ptr + place, acc, mask=(m < n_pixels)[:, None])
        else:
            partial = sum_of_squares(acc, bias_ptr, scale_ptr, student_first, SCALED, BN)
            offset = channel_slice.to(tl.int64) * n_pixels + m
            tl.store(st_ptr + offset, partial * (1.0 / C), mask=m < n_pixels)
    else:
        acc, tail = accumulate_conv(
            acc, tail, autoencoder_ptr, image, y, x, out_height, out_width,
            w_autoencoder, a_tail, first, tl.where(is_ae, 9, 0), CA, 3, 1, True,
            USE_TMA, FENCE, BN, BK_AE,
        )  # fmt: skip

        partial = tl.zeros((BM,), dtype=tl.float32)
        if BN_TAIL > 0:  # first, so that its registers are free when the other's factors are loaded
            partial += sum_of_squares(
                tail, bias_ptr, scale_ptr, student_first + BN, SCALED, BN_TAIL
            )
        partial += sum_of_squares(acc, bias_ptr, scale_ptr, student_first, SCALED, BN)
        offset = channel_slice.to(tl.int64) * n_pixels + m
        if is_ae:
            tl.store(ae_ptr + offset, partial * (1.0 / C), mask=m < n_pixels)
        else:
            tl.store(st_ptr + offset, partial * (1.0 / C), mask=m < n_pixels)


def choose_tile(target: int, pixels: int, channels: int, *, split: bool = False) -> Tile:
    """The tile for `pixels` pixels of a map (N * OH * OW) and C = `channels`.

    split: for `student_distance`, which takes the one for few pixels.

    Raises:
        ValueError: C is no multiple of 16.
    """
    tile = from_table(TILES, target, 0 if split else pixels)
    if split:
        tile = _APART.get(target, tile)
    if tile.bn_tail and channels % (tile.bn + tile.bn_tail):
        tile = from_table(TILES, target, 0)
    if channels % 16:
        raise ValueError(f"weight_teacher has {channels} channels; they must be a multiple of 16")
    return tile if tile.bn_tail else replace(tile, bn=divisor(tile.bn, channels))


def constants(
    tile: Tile,
    target: int,
    itemsize: int,
    itemsize_ae: int,
    channels: tuple[int, int, int, int],
    kernel: int,
    *,
    scaled: bool = False,
    split: bool = False,
) -> dict:
    """The kernel's constexpr arguments; `channels` are C, Ct, Cs and Ca, item sizes bytes.

    Raises:
        ValueError: channel counts that no step divides.
    """
    c, ct, cs, ca = channels
    bk = divisor(tile.bk_bytes // itemsize, ct, cs)
    bk_ae = divisor(tile.bk_bytes // itemsize_ae, ca)
    if min(bk * itemsize, bk_ae * itemsize_ae) < 32:
        raise ValueError(
            f"teacher, student and autoencoder have {ct}, {cs} and {ca} channels; they must be "
            "multiples of 16 (fp8: 32)"
        )
    return {
        "C": c,
        "CT": ct,
        "CS": cs,
        "CA": ca,
        "K": kernel,
        "SCALED": scaled,
        "SPLIT": split,
        "USE_TMA": uses_tma(target),
        "FENCE": needs_fence(target),
        "BM": tile.bm,
        "BN": tile.bn,
        "BN_TAIL": tile.bn_tail,
        "BK": bk,
        "BK_AE": bk_ae,
    }


def _launch(
    teacher, student, autoencoder, weights, bias, scale, out, out_size, target: int, tile: Tile,
    split: bool = False,
) -> None:  # fmt: skip
    """Runs the kernel over `out_size` cells an image; the caller vouches for every extent.

    `weights` are those of the teacher, the student and the autoencoder (not read if `split`).
    """
    n, height, width, ct = teacher.shape
    cs, ca = student.shape[3], autoencoder.shape[3]
    kernel = weights[0].shape[1]
    pixels = n * out_size[0] * out_size[1]
    c = len(weights[0])
    check_fp8("teacher", teacher, target)
    check_aligned(teacher=teacher, student=student, autoencoder=autoencoder)
    check_aligned(
        weight_teacher=weights[0], weight_student=weights[1], weight_autoencoder=weights[2]
    )
    check_rows(pixels)
    values = constants(
        tile, target, teacher.dtype.itemsize, autoencoder.dtype.itemsize, (c, ct, cs, ca), kernel,
        scaled=scale is not None, split=split,
    )  # fmt: skip
    if pixels == 0:
        return

    def boxes(bn: int) -> list:
        shapes = ((c, kernel**2 * ct), (2 * c, kernel**2 * cs), (c, 9 * ca))
        steps = (values["BK"], values["BK"], values["BK_AE"])
        return [
            filters(w, *shape, bn, bk, values["USE_TMA"]) if bn else None
            for w, shape, bk in zip(weights, shapes, steps, strict=True)
        ]

    tiles = triton.cdiv(pixels, tile.bm) * (c // (tile.bn + tile.bn_tail))
    launch(
        _pair_distance_kernel, 2 * tiles,
        teacher,
        student,
        autoencoder,
        *boxes(tile.bn),
        *boxes(tile.bn_tail),
        bias,
        bias if scale is None else scale,
        *out,
        height, width, *out_size, pixels, tiles,
        **values,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def pair_distance(
    teacher,
    student,
    autoencoder,
    weight_teacher,
    weight_student,
    weight_autoencoder,
    bias,
    *,
    scale=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> tuple:
    """Both distance maps straight from the inputs of the three networks' last convolutions.

    st = mean_c (conv(teacher) + conv(student) + bias)^2 with the student's first C filters and
    ae = mean_c (conv(autoencoder) + conv(student) + bias)^2 with its last C filters.

    Args:
        teacher: (N, H, W, Ct); student: (N, H, W, Cs), inputs of the PDNs' last layer.
        autoencoder: (N, H - K + 1, W - K + 1, Ca), input of the decoder's last 3x3 convolution; in
            fp16 or bf16 also when teacher and student are fp8.
        weight_teacher: (C, K, K, Ct).
        weight_student: (2 C, K, K, Cs), negated.
        weight_autoencoder: (C, 3, 3, Ca), applied with padding 1.
        bias: (2 C,) float32, teacher's (autoencoder's) minus student's.
        scale: (2 C,) float32 factor on the accumulated products, for fp8 inputs.
        out: (map_st, map_ae), where the results go; None allocates them. See `choose_tile` for P.
        target: compute capability to take the tile and the code path of; None is the device's.
        tile: instead of the table's, for tests.

    Returns:
        map_st, map_ae: each (P, N, H - K + 1, W - K + 1) float32, partial maps over P slices of the
        channels whose sum over P is the map; P = C / (bn + bn_tail) of the tile.

    Raises:
        ValueError: tensors that are not aligned, fp8 below sm_89, channel counts that are no
            multiples of 16 (fp8: 32).
    """
    n, height, width, _ = teacher.shape
    kernel = weight_teacher.shape[1]
    size = (height - kernel + 1, width - kernel + 1)
    c = len(weight_teacher)
    target = target_of(teacher) if target is None else target
    tile = tile or choose_tile(target, n * size[0] * size[1], c)
    if out is None:
        shape = (c // (tile.bn + tile.bn_tail), n, *size)
        out = (bias.new_empty(shape), bias.new_empty(shape))
    weights = (weight_teacher, weight_student, weight_autoencoder)
    _launch(teacher, student, autoencoder, weights, bias, scale, out, size, target, tile)
    return tuple(out)


def student_distance(
    teacher,
    student,
    weight_teacher,
    weight_student,
    bias,
    *,
    scale=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> tuple:
    """The part of `pair_distance` that does not need the autoencoder.

    Args:
        teacher, student, weight_teacher, weight_student, bias, scale, target: as there.
        out: (map_st, second), where the results go; None allocates them.
        tile: instead of the table's, without `bn_tail`.

    Returns:
        map_st: (P, N, H - K + 1, W - K + 1) float32, partial maps as there.
        second: (N, H - K + 1, W - K + 1, C) float32, the student's last C filters' products as they
            are, for `autoencoder_distance`.

    Raises:
        ValueError: as `pair_distance`.
    """
    n, height, width, _ = teacher.shape
    c, kernel = weight_teacher.shape[:2]
    size = (height - kernel + 1, width - kernel + 1)
    target = target_of(teacher) if target is None else target
    tile = tile or choose_tile(target, 0, c, split=True)
    if out is None:
        out = (
            bias.new_empty((c // tile.bn, n, *size)),
            bias.new_empty((n, *size, c)),
        )
    weights = (weight_teacher, weight_student, weight_teacher)
    _launch(
        teacher, student, teacher, weights, bias, scale, out, size, target, tile, split=True
    )  # fmt: skip
    return tuple(out)
