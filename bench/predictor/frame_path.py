"""Frame path on the CPU beside Pillow and numpy: camera frame to a 256x256 network input.

    python -m bench.predictor.frame_path [--size 256] [--seconds 2] [--json PATH]

One row per frame size and number of threads. The three run in turn, a block of calls of each, in
one process, on the same frames: Pillow's resize (antialiased bilinear) with numpy's ((x / 255) -
mean) / std in float32; the frame path with the same result, (256, 256, 3) float32; and with what
the kernels read, (256, 256, 4) float16. Medians and the quartiles' distance; `ratio` is Pillow's
median over the frame path's. A row is measured only after its results were compared: `error` is the
greatest difference from Pillow, which rounds, in levels of 255. `gb_s` counts the frame's bytes
once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import record
from efficientad.benchmark.call_times import in_turn
from efficientad.ops import native
from efficientad.ops.frame_path import resize_pack

SIZES = ((480, 640), (1024, 1024), (2048, 2448))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT = 1.01  # levels
FEWEST = 5  # calls


def pillow(frame: np.ndarray, size: int) -> np.ndarray:
    resized = Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    return (np.asarray(resized, dtype=np.float32) / 255 - mean) / std


def measure(height: int, width: int, threads: int, size: int, seconds: float) -> record.Row:
    """A row of the table, after its results were compared."""
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    same = torch.empty(size, size, 3)
    half = torch.empty(size, size, 4, dtype=torch.float16)
    native.set_threads(threads)

    def ours() -> torch.Tensor:
        return resize_pack(
            frame, (size, size), MEAN, STD, channels=3, dtype=torch.float32, out=same
        )

    def ours_half() -> torch.Tensor:
        return resize_pack(frame, (size, size), MEAN, STD, out=half)

    error = float((abs(ours().numpy() - pillow(frame, size)) * np.array(STD)).max() * 255)
    halves = (ours_half()[..., :3].float() - ours()).abs().max()
    if error > LIMIT or halves > 2e-3:
        raise SystemExit(f"{height}x{width}: off by {error} levels, float16 by {halves}; no times")
    calls = {"pillow": lambda: pillow(frame, size), "native": ours, "native_half": ours_half}
    count = _calls(calls, seconds)
    row: record.Row = {"height": height, "width": width, "threads": threads}
    row |= {"error": round(error, 3), "calls": count}
    for name, times in in_turn(calls, warmup=1, calls=count).items():
        low, median, high = statistics.quantiles(times.all(), n=4)
        row[f"{name}_ms"], row[f"{name}_spread_ms"] = round(median, 3), round(high - low, 3)
    row["ratio"] = round(row["pillow_ms"] / row["native_ms"], 1)
    row["ratio_half"] = round(row["pillow_ms"] / row["native_half_ms"], 1)
    row["gb_s"] = round(frame.nbytes / row["native_ms"] / 1e6, 1)
    return row


def _calls(functions: dict[str, Callable[[], object]], seconds: float) -> int:
    """How many calls of each take so long together, judged by one."""
    start = time.perf_counter()
    for function in functions.values():
        function()
    return max(FEWEST, int(seconds / (time.perf_counter() - start)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="side of the network's input")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2, help="per row")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    if not native.available():
        raise SystemExit(f"there is nothing to measure: {native.info()['reason']}")
    rows = [
        measure(*frame, threads, options.size, options.seconds)
        for frame in SIZES
        for threads in options.threads
    ]
    native.set_threads(0)
    print(f"{'frame':>11} threads  Pillow+numpy   float32 RGB       float16 RGBX    GB/s  error")
    for row in rows:
        print(
            f"{row['width']:>6}x{row['height']:<4} {row['threads']:>7} {row['pillow_ms']:>10.2f} ms"
            f" {row['native_ms']:>7.2f} ms {row['ratio']:>5.1f}x"
            f" {row['native_half_ms']:>7.2f} ms {row['ratio_half']:>5.1f}x"
            f" {row['gb_s']:>6.1f} {row['error']:>6.2f}"
        )
    if options.json:
        record.write(options.json, record.about() | {"frame_path": native.info()}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
