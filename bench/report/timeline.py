"""Measured timelines of a predictor's CUDA graph as a table, and what each step waited for.

A results file holds them in rows with `trace`: per launch of one replay its start and duration in
microseconds, kernel, stream, grid, registers a thread and bytes of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.record import Row
from bench.report.format import NOTHING, markdown, number

# Kernel -> the layer of its first launch and how the following ones are counted on from there.
LAYERS = {
    "_pack_kernel": ("pack", None),
    "_first_conv_kernel": ("conv", 1),
    "_conv_kernel": ("conv", 2),
    "_strided_conv_kernel": ("e", 1),
    "_encode_kernel": ("e6", None),
    "_decode_kernel": ("d1", None),
    "_resize_conv_kernel": ("d", 2),
    "_pair_distance_kernel": ("pair", None),
    "_autoencoder_distance_kernel": ("autoencoder distance", None),
    "_anomaly_map_kernel": ("map", None),
    "_score_kernel": ("score", None),
}

GAP = 2.0  # us between two launches of a stream; more is a wait for something else


@dataclass(frozen=True)
class Launch:
    """One launch of a replay; start and us in microseconds."""

    layer: str
    stream: int
    start: float
    us: float
    programs: int
    registers: int
    shared: int

    @property
    def end(self) -> float:
        return self.start + self.us


def launches(row: Row) -> list[Launch]:
    """The launches of a row with a trace, by their start, under their layers' names.

    Where a decoder's layer is resized apart, the convolution behind it on its stream is that layer.
    """
    seen: dict[str, int] = {}
    last: dict[int, str] = {}  # stream -> its kernel before
    found = []
    for start, us, kernel, stream, grid, registers, shared in sorted(row["trace"]):
        part = "" if kernel != "_resize_kernel" else " resize"
        decodes = part or (kernel == "_conv_kernel" and last.get(stream) == "_resize_kernel")
        as_kernel = "_resize_conv_kernel" if decodes else kernel
        name, first = LAYERS.get(as_kernel, (kernel, None))
        layer = name if first is None else f"{name}{first + seen.get(as_kernel, 0)}{part}"
        seen[as_kernel] = seen.get(as_kernel, 0) + (not part)
        last[stream] = kernel
        programs = grid[0] * grid[1] * grid[2]
        found.append(Launch(layer, stream, start, us, programs, registers, shared))
    return found


def critical_path(found: list[Launch]) -> list[Launch]:
    """From the first launch to the last, before each the one that it waited for.

    That is the one before it on its stream; or, where this ended long before it started or there is
    none, the one that ended last on another stream.
    """
    path = [max(found, key=lambda launch: launch.end)]
    while True:
        now = path[0]
        own = [x for x in found if x.stream == now.stream and x.start < now.start][-1:]
        if not own or now.start - own[0].end > GAP:
            own += [x for x in found if x.stream != now.stream and x.end <= now.start]
        if not own:
            return path
        path.insert(0, max(own, key=lambda launch: launch.end))


def timeline_table(found: dict[str, Any]) -> str:
    """A table per network of the launches of a replay for one image, as shipped at that commit."""
    parts = []
    for row in found["rows"]:
        if "trace" not in row or row["batch"] != 1 or row["variant"] != "base":
            continue
        all_of_them = launches(row)
        path = critical_path(all_of_them)
        busy = sum(launch.us for launch in path)
        span = path[-1].end - path[0].start
        lines = [
            [launch.layer, "waited for" if launch in path else "", str(launch.stream),
             number(launch.start), number(launch.us), number(launch.programs),
             number(launch.registers), number(launch.shared / 1024)]
            for launch in all_of_them
        ]  # fmt: skip
        head = ["launch", "", "stream", "start us", "us", "programs", "registers", "shared KiB"]
        parts.append(
            f"EfficientAD-{row['size']}, one image: {number(span)} us, of which {len(path)} "
            f"launches that were waited for take {number(busy)} us and the gaps between them "
            f"{number(span - busy)} us.\n\n{markdown(head, lines)}"
        )
    return "\n\n".join(parts) or NOTHING
