"""The tiles that ship beside other ones.

    python -m bench.gpu --only sweeps

It settles what docs/kernels.md leaves to a GPU: whether the L2 cache's bandwidth limits the large
convolutions (the same convolution in tiles that read more or less per product), whether the rows of
the tile tables are right, and whether fusions pay: the bottleneck's against two other kernels
(`unfused`), and the decoder's resize inside the convolution against one of its own (tiles that are
`apart`, whose time is that of both launches). Every variant is compared with the float32 definition
before it is timed; one that does not compile is a row that says so. Variants of a layer are timed
in turn.

Rows are of kind "sweep": as "kernel", with `tile`, `warps`, `stages`, `shipped` (it is the table's
choice), `ratio` (the time over the shipped tile's) and `l2_tb_s`, the rate at which all programs
together fetch operands. In Triton's interpreter variants are checked and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.kernels.case import Case
from bench.kernels.cases import Layer
from bench.kernels.ceilings import Ceilings
from bench.kernels.device_times import device_times
from bench.kernels.measure import Measure, alive, fault, first_line, launches, place, rates
from bench.kernels.roofline import Group
from bench.record import Row
from bench.shapes import BOTH
from efficientad.benchmark.call_times import significant
from efficientad.kernels import (
    anomaly_map,
    bottleneck,
    conv,
    first_conv,
    grouped,
    pair_distance,
    resize_conv,
    strided_conv,
)
from efficientad.kernels.common import target_of
from efficientad.kernels.grouped import Tile
from efficientad.kernels.resize_conv import Apart
from efficientad.ops import operators

K = 128  # bytes of K a step
PDN = (
    Tile(64, 128, K, warps=4, stages=4),
    Tile(64, 256, K, warps=4, stages=4),
    Tile(128, 128, K, warps=4, stages=3),  # two programs on a multiprocessor of sm_90
    Tile(128, 128, K, warps=8, stages=4),
    Tile(128, 256, K, warps=8, stages=3),
    Tile(128, 256, K, warps=8, stages=4),
    Tile(256, 128, K, warps=8, stages=3),
    Tile(256, 128, K, warps=8, stages=4),
)
PAIR = (
    Tile(64, 128, K, warps=4, stages=4),
    Tile(128, 128, K, warps=4, stages=3),
    Tile(128, 128, K, warps=8, stages=4),
    Tile(128, 128, K, warps=8, stages=4, bn_tail=64),
    Tile(64, 256, K, warps=8, stages=3, bn_tail=128),
    Tile(128, 256, K, warps=8, stages=3, bn_tail=128),
)
FIRST = (
    Tile(64, 128, K, warps=4, stages=1),
    Tile(64, 256, K, warps=8, stages=1),
    Tile(128, 128, K, warps=8, stages=1),
    Tile(128, 256, K, warps=8, stages=1),
    Tile(256, 128, K, warps=8, stages=1),
)
RESIZE = (
    Tile(16, 64, K, warps=4, stages=1),
    Tile(16, 64, K, warps=4, stages=2),
    Tile(16, 64, K, warps=4, stages=3),
    Tile(32, 64, K, warps=4, stages=1),
    Tile(32, 64, K, warps=4, stages=2),
    Tile(32, 64, K, warps=4, stages=3),
    Tile(64, 64, K, warps=4, stages=1),
    Tile(64, 64, 64, warps=4, stages=1),
    Tile(128, 64, 64, warps=8, stages=1),
    Tile(128, 64, K, warps=8, stages=1),
    Apart(32, 64, K, warps=4, stages=4),
    Apart(64, 64, K, warps=4, stages=3),
    Apart(64, 64, K, warps=4, stages=4),
    Apart(128, 64, K, warps=8, stages=4),
    Apart(256, 64, K, warps=8, stages=4),
)
STRIDED = (
    Tile(16, 32, 256, warps=4, stages=3),
    Tile(32, 32, K, warps=4, stages=4),
    Tile(64, 32, K, warps=4, stages=3),
    Tile(64, 64, 64, warps=4, stages=4),
    Tile(128, 64, 64, warps=8, stages=4),
)
BOTTLENECK = (
    Tile(16, 64, K, warps=4, stages=3),
    Tile(16, 64, 64, warps=4, stages=3),
    Tile(32, 64, K, warps=4, stages=3),
)
MAP = tuple(Tile(pixels, 1, 0, warps=4, stages=1) for pixels in (256, 512, 1024, 2048))
# (size, layer), batches and tiles, in order of value.
PLAN: tuple[tuple[str, str, tuple[int, ...], tuple[Tile, ...]], ...] = (
    ("S", "conv2", (32, 1, 8), PDN),
    ("S", "pair", (32, 1, 8, 16), PAIR),
    ("S", "conv3", (32, 1, 8), PDN),
    ("M", "conv2", (32, 1), PDN),
    ("M", "conv5", (32, 1), PDN),
    ("S", "conv1", (32, 1), FIRST),
    (BOTH, "d6", (1, 32), RESIZE),
    (BOTH, "d5", (1, 32), RESIZE),
    (BOTH, "d4", (1, 32), RESIZE),
    (BOTH, "d7", (1, 32), RESIZE),
    (BOTH, "d3", (1,), RESIZE),
    (BOTH, "d2", (1,), RESIZE),
    (BOTH, "bottleneck", (1, 32), BOTTLENECK),
    ("M", "conv4", (32,), PDN),
    ("M", "pair", (32, 1), PAIR),
    ("M", "conv1", (32,), FIRST),
    (BOTH, "e1", (32, 1), STRIDED),
    (BOTH, "e2", (32, 1), STRIDED),
    (BOTH, "map", (1, 32), MAP),
)
UNFUSED = "unfused"
TABLES = {
    "first_conv_relu_pool": first_conv.TILES,
    "strided_conv_relu": strided_conv.TILES,
    "resize_conv_relu": resize_conv.TILES,
    "bottleneck": bottleneck.TILES,
    "anomaly_map": anomaly_map.TILES,
}


def shipped_tile(case: Case, results: list[Tensor]) -> Tile:
    """The tile that the kernel takes for this launch, whose results have these shapes."""
    x = case.arguments[0]
    target = target_of(x[0] if isinstance(x, list) else x)
    stored = results[0].shape
    if case.operation == "pair_distance":  # (parts, N, rows, columns)
        pixels = stored[1] * stored[2] * stored[3]
        return pair_distance.choose_tile(target, pixels, len(case.arguments[3]))
    pixels = stored[0] * stored[1] * stored[2]
    if case.operation in ("conv_relu", "conv_relu_pool"):
        couts = tuple(len(w) for w in case.arguments[1])
        return conv.choose_tile(target, pixels, couts, case.operation == "conv_relu_pool")
    if case.operation == "bottleneck":
        pixels = case.batch
    if case.needed is not None:
        pixels = case.batch * len(case.needed[0]) * len(case.needed[1])
    return effective(case, grouped.from_table(TABLES[case.operation], target, pixels))


def effective(case: Case, tile: Tile) -> Tile:
    """The tile with as many channels as the layer's widths let it have."""
    if case.operation in ("pair_distance", "anomaly_map"):
        return tile
    weight = case.arguments[1]
    couts = [len(w) for w in weight] if isinstance(weight, list) else [len(weight)]
    if case.operation == "first_conv_relu_pool":
        couts = [sum(couts)]
    return replace(tile, bn=grouped.divisor(tile.bn, *couts))


def l2_bytes(case: Case, tile: Tile, results: list[Tensor]) -> int | None:
    """Operand bytes that all programs of a large convolution fetch; None: another operation."""
    if case.operation == "pair_distance":
        _, n, rows, cols = results[0].shape
        teacher, student, decoder = (w[0].numel() for w in case.arguments[3:6])
        bn = tile.bn + tile.bn_tail
        programs = -(-n * rows * cols // tile.bm) * (len(case.arguments[3]) // bn)
        depths = (teacher + student, student + decoder)
        return sum(Group(programs, tile.bm, bn, k).bytes for k in depths)
    if case.operation in ("conv_relu", "conv_relu_pool"):
        pixels = results[0][..., 0].numel() * (4 if case.operation == "conv_relu_pool" else 1)
        weight = case.arguments[1]
        programs = -(-pixels // tile.bm) * (sum(map(len, weight)) // tile.bn)
        return Group(programs, tile.bm, tile.bn, weight[0][0].numel()).bytes
    return None


def unfused(case: Case) -> tuple[Callable[[], object], list[Tensor]] | None:
    """(two kernels in place of one, their results); None: there is no such pair."""
    if case.operation == "bottleneck":
        x, w_encoder, b_encoder, weight, bias = case.arguments
        encode = operators.kernel("strided_conv_relu")
        decode = operators.kernel("resize_conv_relu")

        def call() -> Tensor:
            latent = encode(x, w_encoder, b_encoder, stride=1, padding=0, relu=False)
            return decode(latent, weight, bias, (3, 3))

        return call, [call()]
    return None


@torch.inference_mode()
def measure(
    case: Case, device: str, tiles: Sequence[Tile], ceilings: Ceilings, *, seconds: float = 0.1
) -> list[Row]:
    """A row per tile, the shipped one among them, and one for the unfused pair if there is one."""
    timed = torch.device(device).type == "cuda"
    want = case.definition()
    _, results = case.launch()
    shipped = shipped_tile(case, results)
    variants = list(dict.fromkeys([shipped, *(effective(case, tile) for tile in tiles)]))
    rows: dict[Tile | str, Row] = {}
    calls, nbytes = {}, 0
    for variant in [*variants, UNFUSED]:
        row = place(case, "triton", device) | _tile(variant)
        row |= {"kind": "sweep", "shipped": variant == shipped}
        try:
            if variant == UNFUSED:
                found = unfused(case)
                if found is None:
                    continue
                call, got = found
            else:
                call, got = case.launch(variant)
                call()
            errors, row["no_time"] = fault(case, got, want, "triton")
            row |= errors
        except Exception as error:  # a tile that does not compile or does not fit is an answer
            row["no_time"] = first_line(error)
            alive(device)
        rows[variant] = row
        if row["no_time"] is None:
            calls[variant], nbytes = call, case.nbytes(got)
            if variant != UNFUSED:
                row["l2_mbytes"] = _mega(l2_bytes(case, variant, got))
    del want
    if not timed:
        for row in rows.values():
            row["note"] = "Triton's interpreter: checked, not timed"
        return list(rows.values())
    timings = device_times(calls, device, seconds=seconds * len(calls)) if calls else {}
    for variant, timing in timings.items():
        row = rows[variant]
        row |= timing.row() | rates(case, nbytes, timing.us, ceilings)
        if row.get("l2_mbytes"):
            row["l2_tb_s"] = significant(row["l2_mbytes"] / timing.us)
        if shipped in timings:
            row["ratio"] = significant(timing.us / timings[shipped].us)
    return list(rows.values())


def _mega(value: int | None) -> float | None:
    return None if value is None else round(value / 1e6, 3)


def _tile(variant: Tile | str) -> Row:
    if isinstance(variant, str):
        return {"tile": variant, "warps": None, "stages": None}
    columns = variant.bn + variant.bn_tail
    tile = f"{variant.bm}x{columns}x{variant.bk_bytes}B"
    if isinstance(variant, Apart):
        tile = f"apart {tile}"
    return {"tile": tile, "warps": variant.warps, "stages": variant.stages}


def measurements(
    device: str,
    ceilings: Callable[[], Ceilings],
    *,
    plan: Sequence[tuple[str, str, tuple[int, ...], tuple[Tile, ...]]] = PLAN,
    small: bool = False,
    seconds: float = 0.1,
) -> Iterator[tuple[str, Measure]]:
    """(key, what measures it), the first batch of every layer before the second of any.

    seconds: of timing per tile.
    """
    for turn in range(max(len(batches) for _, _, batches, _ in plan)):
        for size, name, batches, tiles in plan:
            if turn >= len(batches):
                continue
            batch = batches[turn]

            layer = _layer(device, size, name, batch, small)

            def run(layer=layer, batch=batch, tiles=tiles) -> list[Row]:
                case = layer.case(device, batch, torch.float16)
                return measure(case, device, tiles, ceilings(), seconds=seconds)

            yield f"sweep/{layer.operation}/{size}/{name}/b{batch}/float16", run


def _layer(device: str, size: str, name: str, batch: int, small: bool) -> Layer:
    sizes = ("S",) if size == BOTH else (size,)
    return next(x for x in launches(device, batch, sizes, small) if x.name == name)
