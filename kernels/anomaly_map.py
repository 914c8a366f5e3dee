"""From the distance maps to the anomaly map and its maximum.

Normalising, combining, padding and resizing are one pass over the result's pixels; the two small
maps come from the L1 and L2 caches. The maximum takes two steps, a number per program and then one
per image, since a float atomic would drop NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import target_of
from .grouped import ARCHITECTURES, Tile, from_table
from .launching import launch

REDUCE_BLOCK = 1024  # programs' maxima that one step of the second kernel reads
MAX_PIXELS = 2**30  # of a map; pixel numbers are int32

# Pixels of a program, on every architecture: the loads' latency is all there is to hide. One image
# of 256x256 gives 128 programs of 512; many pixels are better off with eight a thread, which share
# the start of the program.
TILES = {
    arch: (
        (8 * 65536, Tile(512, 1, 0, warps=4, stages=1)),
        (None, Tile(1024, 1, 0, warps=4, stages=1)),
    )
    for arch in ARCHITECTURES
}


@triton.jit
def _combined(
    st_ptr, ae_ptr, part,  # (PARTS, cells), at the image's first cell; elements per part
    cell,
    mask,
    a_st, a_ae, offset,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The normalised and combined map at `cell`; NaN if it is not finite, 0 where `mask` is off."""
    st = tl.zeros(cell.shape, dtype=tl.float32)
    ae = tl.zeros(cell.shape, dtype=tl.float32)
    for p in tl.static_range(PARTS):
        st += tl.load(st_ptr + p * part + cell, mask=mask, other=0.0)
        ae += tl.load(ae_ptr + p * part + cell, mask=mask, other=0.0)
    value = a_st * st + a_ae * ae + offset
    value = tl.where(tl.abs(value) < float("inf"), value, float("nan"))
    return tl.where(mask, value, 0.0)


@triton.jit(do_not_specialize=["part", "height", "width", "out_height", "out_width", "blocks"])
def _anomaly_map_kernel(
    st_ptr, ae_ptr, part: tl.int64,  # (PARTS, N, height, width) float32 each, elements per part
    affine_ptr,  # (4,) float32: a_st, a_ae, offset, frame
    region_ptr,  # (out_height, out_width) uint8, 0 where nothing counts; None: all counts
    cells_ptr,  # (height, width) uint8, the same of the distance maps, or None
    map_ptr,  # (N, out_height, out_width); None: only the maximum is wanted
    maxima_ptr,  # (N, blocks) float32; NaN for a block that met a value that is not finite
    height, width,
    out_height, out_width,
    blocks,  # programs an image
    scale_y, scale_x,  # (height + 2 PAD) / out_height, (width + 2 PAD) / out_width
    PARTS: tl.constexpr,
    PAD: tl.constexpr,
    SCAN: tl.constexpr,  # whether the resize may skip cells, which then are looked at besides
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cells = height * width
    st = st_ptr + image * cells
    ae = ae_ptr + image * cells
    a_st = tl.load(affine_ptr)
    a_ae = tl.load(affine_ptr + 1)
    frame = tl.load(affine_ptr + 3)
    lowest = tl.load(affine_ptr + 2)  # of distances 0
    offset = lowest - frame

    i = block * BLOCK + tl.arange(0, BLOCK)
    real = i < out_height * out_width
    # torch's float32 arithmetic, max((i + 0.5) scale - 0.5, 0), in the padded map
    y = tl.maximum(((i // out_width).to(tl.float32) + 0.5) * scale_y - 0.5, 0.0)
    x = tl.maximum(((i % out_width).to(tl.float32) + 0.5) * scale_x - 0.5, 0.0)
    y0 = y.to(tl.int32)
    x0 = x.to(tl.int32)
    fy = y - y0.to(tl.float32)
    fx = x - x0.to(tl.float32)
    y1 = tl.minimum(y0 + 1, height + 2 * PAD - 1) - PAD
    x1 = tl.minimum(x0 + 1, width + 2 * PAD - 1) - PAD
    y0 -= PAD
    x0 -= PAD
    has_y0 = real & (y0 >= 0) & (y0 < height)
    has_y1 = real & (y1 >= 0) & (y1 < height)
    has_x0 = (x0 >= 0) & (x0 < width)
    has_x1 = (x1 >= 0) & (x1 < width)
    v00 = _combined(st, ae, part, y0 * width + x0, has_y0 & has_x0, a_st, a_ae, offset, PARTS)
    v01 = _combined(st, ae, part, y0 * width + x1, has_y0 & has_x1, a_st, a_ae, offset, PARTS)
    v10 = _combined(st, ae, part, y1 * width + x0, has_y1 & has_x0, a_st, a_ae, offset, PARTS)
    v11 = _combined(st, ae, part, y1 * width + x1, has_y1 & has_x1, a_st, a_ae, offset, PARTS)
    upper = v00 * (1 - fx) + v01 * fx
    lower = v10 * (1 - fx) + v11 * fx
    value = upper * (1 - fy) + lower * fy + frame  # [BLOCK]
    counts = real
    if region_ptr is not None:
        counts = tl.load(region_ptr + i, mask=real, other=0) != 0
        value = tl.where(counts, value, lowest)
    if map_ptr is not None:
        pixel = image * out_height * out_width + i
        tl.store(map_ptr + pixel, value.to(map_ptr.dtype.element_ty), mask=real)

    # tl.max drops NaN, so it goes beside the maximum.
    is_nan = counts & (value != value)
    greatest = tl.max(tl.where(counts & ~is_nan, value, float("-inf")), axis=0)
    if SCAN:
        share = tl.cdiv(cells, blocks)  # of the image's cells, this program's
        for start in tl.range(0, share, BLOCK):
            j = start + tl.arange(0, BLOCK)
            cell = block * share + j
            mask = (j < share) & (cell < cells)
            if region_ptr is not None:
                mask = mask & (tl.load(cells_ptr + cell, mask=mask, other=0) != 0)
            skipped = _combined(st, ae, part, cell, mask, a_st, a_ae, offset, PARTS)
            is_nan = is_nan | (skipped != skipped)
    any_nan = tl.max(is_nan.to(tl.int32), axis=0)
    greatest = tl.where(any_nan > 0, float("nan"), greatest)
    tl.store(maxima_ptr + image * blocks + block, greatest)


@triton.jit(do_not_specialize=["blocks"])
def _score_kernel(
    maxima_ptr,  # (N, blocks) float32
    score_ptr,  # (N,) float32
    blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    greatest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    is_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in tl.range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(maxima_ptr + image * blocks + i, mask=i < blocks, other=float("-inf"))
        is_nan = is_nan | (value != value).to(tl.int32)
        greatest = tl.maximum(greatest, value)
    score = tl.max(greatest, axis=0)
    score = tl.where(tl.max(is_nan, axis=0) > 0, float("nan"), score)
    tl.store(score_ptr + image, score)


def _launch(
    map_st, map_ae, affine, size, map_out, score, *, padding, target, tile, region=(None, None)
) -> None:
    """Run the kernels over `size` (rows, columns) of every image's map; `map_out` may be None.

    region: the two masks, or None twice.
    """
    parts, n, height, width = map_st.shape
    height_padded, width_padded = height + 2 * padding, width + 2 * padding
    pixels = size[0] * size[1]
    tile = tile or from_table(TILES, target or target_of(map_st), n * pixels)
    if max(pixels, height * width) > MAX_PIXELS:
        raise ValueError(f"size is {size} and the maps are {height}x{width}; at most 2**30 pixels")
    if n == 0:
        return
    blocks = triton.cdiv(pixels, tile.bm)
    maxima = score.new_empty((n, blocks))
    launch(
        _anomaly_map_kernel, n * blocks,
        map_st, map_ae, n * height * width, affine, *region, map_out, maxima,
        height, width, *size, blocks,
        height_padded / size[0], width_padded / size[1],
        PARTS=parts, PAD=padding, SCAN=size[0] < height_padded or size[1] < width_padded,
        BLOCK=tile.bm, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    launch(
        _score_kernel, n,
        maxima, score, blocks, BLOCK=REDUCE_BLOCK, num_warps=4, num_stages=1, enable_fp_fusion=True
    )  # fmt: skip


def anomaly_map(
    map_st,
    map_ae,
    affine,
    size: tuple[int, int],
    *,
    padding: int,
    store_map: bool = True,
    map_dtype=None,
    region=None,
    out=None,
    target: int | None = None,
    tile: Tile | None = None,
) -> tuple:
    """Normalise, combine, pad and upsample the distance maps; take the maximum (Algorithm 2, 7-11).

    Args:
        map_st, map_ae: (P, N, h, w) float32, contiguous, partial maps that sum to the map;
            (N, h, w) is P = 1.
        affine: (4,) float32 a_st, a_ae, offset, frame: the combined map is
            a_st st + a_ae ae + offset, and `frame` is the value of the padded cells.
        size: rows and columns of the result.
        padding: cells put on every side before the resize.
        store_map: False computes the score alone; the map in the result is then None.
        map_dtype: of the map, float32 or float16; None is float32. The score is not rounded to it.
        region: what counts, uint8 that is 0 where nothing does, contiguous: of the result (*size)
            and of the distance maps' cells (h, w). Outside the map is `offset`; None: all counts.
        out: (map, score), if they are allocated (the map is None if it is not wanted); every
            element is written.
        target: compute capability such as 90; None is that of the maps' device.
        tile: instead of the table's row; `bm` is the pixels of a program.

    Returns:
        (anomaly_map (N, *size), score (N,) float32): the score is the maximum after the resize.
        A combined value that is not finite is NaN in the map, and the image's score is NaN.

    Raises:
        ValueError: maps of different shapes, or of more than 2**30 pixels; a region of others.
    """
    if map_st.ndim == 3:
        map_st, map_ae = map_st[None], map_ae[None]
    if map_st.shape != map_ae.shape:
        raise ValueError(
            f"map_st has shape {tuple(map_st.shape)} and map_ae {tuple(map_ae.shape)}; they must "
            "be equal, the number of partial maps included"
        )
    wanted = tuple(size), tuple(map_st.shape[2:])
    if region is not None and tuple(tuple(mask.shape) for mask in region) != wanted:
        raise ValueError(
            f"region has shapes {tuple(tuple(mask.shape) for mask in region)}; the map and its "
            f"cells have {wanted}"
        )
    n = map_st.shape[1]
    if out is None:
        shape = (n, *size)
        map_out = map_st.new_empty(shape, dtype=map_dtype) if store_map else None
        score = map_st.new_empty((n,))
    else:
        map_out, score = out
    _launch(map_st, map_ae, affine, size, map_out, score, padding=padding, target=target,
            tile=tile, region=region or (None, None))  # fmt: skip
    return map_out, score
