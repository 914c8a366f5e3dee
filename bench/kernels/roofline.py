"""Static model of the fast path on one H200: an ESTIMATE from arithmetic, no measurement.

    python -m bench.kernels.roofline [--size S|M] [--batch 1 2 ... 64] [--measured FILE]

Per kernel and batch: programs and waves on 132 multiprocessors, the time that the tensor cores
need (list scheduling, one program at a time on a multiprocessor, longest first) and the time that
the operands need from the L2 cache. Tiles come from the kernels' own tables. What is not in it:
launch gaps, latencies (all there is to small layers), epilogues, HBM, clocks, and the decoder's
interpolation, whose four reads of a value are counted as one. With --measured stands beside it what
a results file's float16 kernels took, with the tiles of its commit.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.shapes import (
    AUTOENCODER,
    D6_NEEDED,
    PDN,
    TEACHER,
    conv_flop,
    network_flop,
    pdn_layers,
)
from efficientad.kernels import conv, first_conv, grouped, pair_distance, resize_conv, strided_conv

SMS = 132
TENSOR_FLOPS = 790e12  # a large bf16 product on this kind of card; bench/results/h200.json: 688e12
L2_BYTES = 7.9e12  # ASSUMPTION, too low: h200.json's conv5 of M, batch 1, implies 9.2e12
TARGET = 90
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Group:
    """Programs of one launch that do the same work: (bm, K) times (K, bn)."""

    programs: int
    bm: int
    bn: int
    k: int

    @property
    def seconds(self) -> float:
        """Of one program, at a multiprocessor's share of the tensor rate."""
        return 2 * self.bm * self.bn * self.k / (TENSOR_FLOPS / SMS)

    @property
    def bytes(self) -> int:
        """That all programs read, two bytes a value; nothing is shared between programs."""
        return self.programs * (self.bm + self.bn) * self.k * 2


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its programs and the operations that the layer needs."""

    name: str
    groups: tuple[Group, ...]
    flop: int

    @property
    def programs(self) -> int:
        return sum(group.programs for group in self.groups)

    @property
    def waves(self) -> float:
        return self.programs / SMS

    @property
    def tensor_us(self) -> float:
        """When the last program ends: each goes to the multiprocessor that is free first."""
        free = [0.0] * SMS
        for group in sorted(self.groups, key=lambda g: -g.seconds):
            for _ in range(group.programs):
                heapq.heapreplace(free, free[0] + group.seconds)
        return max(free) * 1e6

    @property
    def l2_us(self) -> float:
        return sum(group.bytes for group in self.groups) / L2_BYTES * 1e6

    @property
    def larger_us(self) -> float:
        return max(self.tensor_us, self.l2_us)


def floor_us(size: str) -> float:
    """Tensor time per image at the measured rate, nothing lost."""
    return sum(network_flop(size).values()) / TENSOR_FLOPS * 1e6


def _tiles(pixels: int, bm: int, channels: int, bn: int) -> int:
    return -(-pixels // bm) * (channels // bn)


def pdn_launches(size: str, batch: int) -> list[Launch]:
    """The PDNs' launches, teacher and student in each; the last one takes the decoder's last layer
    along."""
    layers = pdn_layers(size)
    launches = []
    for i, (cells, kernel, cin, couts, pool) in enumerate(layers[:-1], start=1):
        pixels = batch * cells**2
        stored = pixels // 4 if pool else pixels
        flop = batch * sum(conv_flop(cells, kernel, *pair) for pair in zip(cin, couts, strict=True))
        channels, k = sum(couts), kernel**2 * cin[0]
        if i == 1:  # four RGBX pixels a filter row
            tile = grouped.from_table(first_conv.TILES, TARGET, stored)
            bn, k = first_conv.constants(tile, TARGET, couts)["BN"], 64
        else:
            tile = conv.choose_tile(TARGET, stored, couts, pool)
            bn = tile.bn
        group = Group(_tiles(pixels, tile.bm, channels, bn), tile.bm, bn, k)
        launches.append(Launch(f"conv{i}", (group,), flop))
    cells, kernel, cin, couts, _ = layers[-1]
    decoder = AUTOENCODER[-1]
    tile = pair_distance.choose_tile(TARGET, batch * cells**2, TEACHER)
    bn = tile.bn + tile.bn_tail
    programs = _tiles(batch * cells**2, tile.bm, TEACHER, bn)
    groups = (
        Group(programs, tile.bm, bn, kernel**2 * sum(cin)),
        Group(programs, tile.bm, bn, kernel**2 * cin[1] + decoder.kernel**2 * decoder.cin),
    )
    flop = sum(conv_flop(cells, kernel, *pair) for pair in zip(cin, couts, strict=True))
    flop += conv_flop(decoder.cells, decoder.kernel, decoder.cin, decoder.cout)
    launches.append(Launch(f"pair+{decoder.name}", groups, batch * flop))
    return launches


def autoencoder_launches(batch: int) -> list[Launch]:
    """The autoencoder's launches but the last layer; they run beside the PDNs' first layers."""
    launches = []
    for layer in AUTOENCODER[:-1]:
        if layer.name in ("e6", "d1"):  # the bottleneck: no tensor time to speak of
            continue
        pixels = batch * (D6_NEEDED if layer.name == "d6" else layer.cells) ** 2
        module = strided_conv if layer.name[0] == "e" else resize_conv
        tile = grouped.from_table(module.TILES, TARGET, pixels)
        if isinstance(tile, resize_conv.Apart):  # then all pixels are computed
            pixels = batch * layer.cells**2
        bn = grouped.divisor(tile.bn, layer.cout)
        k = layer.kernel**2 * (4 if layer.cin == 3 else layer.cin)
        group = Group(_tiles(pixels, tile.bm, layer.cout, bn), tile.bm, bn, k)
        flop = conv_flop(layer.cells, layer.kernel, layer.cin, layer.cout) * batch
        launches.append(Launch(layer.name, (group,), flop))
    return launches


def measured_us(found: dict[str, Any], size: str, batch: int) -> dict[str, float]:
    """Layer -> what its float16 kernel took, of a results file."""
    where = {"kind": "kernel", "size": size, "batch": batch, "dtype": "float16",
             "backend": "triton", "small": False}  # fmt: skip
    rows = [row for row in found["rows"] if where.items() <= row.items()]
    return {row["layer"]: row["us"] for row in rows if row["us"] is not None}


def _line(launch: Launch, measured: dict[str, float]) -> str:
    shapes = ", ".join(f"{g.bm}x{g.bn} K {g.k}" for g in launch.groups)
    us = measured.get(launch.name.partition("+")[0])
    return (
        f"  {launch.name:8} {shapes:32} {launch.programs:7d} {launch.waves:8.2f} "
        f"{launch.flop / 1e9:9.2f} {launch.tensor_us:9.1f} {launch.l2_us:9.1f}"
    ) + ("" if us is None else f" {us:11.1f} {us / launch.larger_us:8.2f}")


def report(size: str, batches: list[int], found: dict[str, Any] | None = None) -> str:
    """The model's table for one PDN size; found: a results file to stand beside it."""
    floor = floor_us(size)
    lines = [
        f"ESTIMATE, not measured: EfficientAD-{size}, 256x256, fp16, one H200 "
        f"({SMS} multiprocessors)",
        f"assumed: {TENSOR_FLOPS / 1e12:.0f} TFLOP/s on the tensor cores, "
        f"{L2_BYTES / 1e12:.1f} TB/s from L2",
        f"floor: {sum(network_flop(size).values()) / 1e9:.1f} GFLOP = {floor:.1f} us per image",
    ]
    head = f"  {'kernel':8} {'tile':32} {'tiles':>7} {'waves':>8} {'GFLOP':>9} {'tensor us':>9} "
    head += f"{'L2 us':>9}"
    if found is not None:
        head += f" {'measured us':>11} {'x larger':>8}"
        lines.append(f"measured: {found['about']['device']}, commit {found['about']['commit']}")
    for batch in batches:
        pdn, autoencoder = pdn_launches(size, batch), autoencoder_launches(batch)
        measured = {} if found is None else measured_us(found, size, batch)
        lines += ["", f"batch {batch}", head, *(_line(launch, measured) for launch in pdn)]
        lines.append("  beside them, the autoencoder:")
        lines += [_line(launch, measured) for launch in autoencoder]
        for name, launches in (("PDNs", pdn), ("all", pdn + autoencoder)):
            tensor = sum(launch.tensor_us for launch in launches)
            larger = sum(launch.larger_us for launch in launches)
            lines.append(
                f"  sum of {name}: tensor {tensor:.1f} us, larger of tensor and L2 "
                f"{larger:.1f} us, {larger / batch:.1f} us an image; floor {floor * batch:.1f} us, "
                f"{floor * batch / larger:.0%} of the rate"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.kernels.roofline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--size", choices=sorted(PDN), default="S")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a results file of a GPU")
    args = parser.parse_args(argv)
    for batch in args.batch:
        if batch < 1:
            parser.error(f"--batch is {batch}; it must be at least 1")
    found = None if args.measured is None else record.read(args.measured)
    print(report(args.size, args.batch, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
