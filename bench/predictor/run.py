"""From a frame to its map, beside the peers.

    python -m bench.predictor [--device cpu] [--sizes S M] [--batches 1 4] [--json FILE] ...

The protocol is the paper's (appendix E, see `efficientad.benchmark.end_to_end`): host to host, on
CUDA 1000 calls after 1000 to warm up; fewer where a contender would take more than `--seconds` for
all of its calls, and on a CPU. Each row says how many it had.

Our predictor and its peers run in one process on the same weights (random, calibrated on their own
maps) and the same images, in turn, a block of calls of each per round, so that a busy machine slows
all; the ratios are those of the rounds' medians. Each is compared with the plain float32 detector
first, and what is wrong gets no time. Everything follows from fixed seeds; clocks of the device are
read and never set.

`measurements` gives what there is to measure in order of value, each on its own, for whoever has
less time than it takes.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import record
from bench.predictor.measurements import Bench
from bench.predictor.options import FP8, Options, options, wanted
from bench.record import Row
from efficientad.benchmark.contenders import HEAD, line

Measurement = tuple[str, Callable[[], list[Row]]]


def measurements(options: Options) -> Iterator[Measurement]:
    """(key, callable that gives rows), in order of value; call each before the next is taken.

    The first part of a key, up to "/", is its kind: "peer" (ours among the peers), "end_to_end"
    (ours alone), "stage", "frame" or "cold_start". The same options give the same keys.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for kind, name, arguments in plan(options):
            size, side, dtype, *rest = arguments
            shown = dtype if isinstance(dtype, str) else "+".join(dtype)
            key = "/".join([kind, size, str(side), shown, *(f"b{b}" for b in rest[:1])])
            if name == "compile":
                key += "/compile"
            if kind == "peer" and name == "compare":
                arguments = (*arguments, wanted(options, compile=False))
            yield key, functools.partial(getattr(bench, name), *arguments)
        bench.release()


def plan(options: Options) -> Iterator[tuple[str, str, tuple]]:
    """(kind, method of Bench, arguments) of all measurements, in order of value."""
    side, *sides = options.image_sizes
    first, *others = options.dtypes
    together: tuple[str, ...] = (first,)
    if options.device.type == "cpu":  # few, and slow enough for all to be timed in turn
        together, others = options.dtypes, []
    others.sort(key=lambda dtype: dtype != FP8)
    with_peers = [b for b in options.peer_batches if b in options.batches]
    staged = with_peers if options.device.type == "cuda" else [b for b in with_peers if b == 1]
    elsewhere = options.batches if options.device.type == "cuda" else options.batches[:1]
    rest = [b for b in options.batches if b not in with_peers]
    for size in options.sizes:
        for batch in with_peers:
            yield "peer", "compare", (size, side, together, batch)
            if batch in staged:
                yield "stage", "stages", (size, side, first, batch)
    for size in options.sizes:
        for dtype in others:
            for batch in sorted(with_peers, key=lambda b: b != 16):
                yield "end_to_end", "compare", (size, side, (dtype,), batch)
    if options.compile and wanted(options, compile=True):
        for size in options.sizes:
            for batch in sorted({*with_peers[:1], *with_peers[-1:]}):
                yield "peer", "compile", (size, side, together, batch)
    yield "frame", "camera", (options.sizes[0], side, first)
    for size in options.sizes:
        yield "cold_start", "cold_start", (size, side, first)
    for size in options.sizes:
        for batch in rest:
            yield "end_to_end", "compare", (size, side, together, batch)
    for size in options.sizes:
        for other in sides:
            for batch in elsewhere:
                yield "end_to_end", "compare", (size, other, together, batch)
    for size in options.sizes:
        for dtype in others:
            for batch in rest:
                yield "end_to_end", "compare", (size, side, (dtype,), batch)


# ---- all of it -------------------------------------------------------------------------------


def run(
    options: Options,
    budget: float = float("inf"),
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Take the measurements until `budget` seconds are spent: {"about": ..., "rows": [...]}.

    A measurement that raises is noted in about["failed"], one that was not begun in
    about["left_out"]. show: gets lines of text as they come.
    """
    end = time.monotonic() + budget
    about = record.about(options.device) | {"left_out": [], "failed": {}}
    rows: list[Row] = []
    show(HEAD)
    for key, measure in measurements(options):
        if time.monotonic() > end:
            about["left_out"].append(key)
            continue
        try:
            found = measure()
        except Exception as error:  # the others are still worth measuring
            about["failed"][key] = f"{type(error).__name__}: {error}"
            show(f"{key}: {about['failed'][key]}")
            continue
        for one in found:
            show(line(one))
        rows += [one | {"key": key} for one in found]
    return {"about": about, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 if something failed."""
    parser = argparse.ArgumentParser(prog="bench.predictor", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="auto")
    add("--sizes", nargs="+", metavar="S", help="S, M (default both)")
    add("--batches", type=int, nargs="+", metavar="N", help="default 1 to 64; on a CPU 1 and 4")
    add("--image-sizes", type=int, nargs="+", metavar="PIXELS", help="default 256 512")
    add("--dtypes", nargs="+", metavar="DTYPE", help="default float16 bfloat16 float8_e4m3fn; on "
        "a CPU float32 and bfloat16")  # fmt: skip
    add("--peers", nargs="*", metavar="NAME", help="default all; nothing behind it: none")
    add("--peer-batches", type=int, nargs="+", metavar="N", help="default 1 16 32; on a CPU 1")
    add("--compile", action=argparse.BooleanOptionalAction, help="peers that need torch.compile "
        "(default on CUDA; a CPU takes a minute for each)")  # fmt: skip
    add("--calls", type=int, help="under the clock, of each contender")
    add("--warmup", type=int, metavar="CALLS", help="before it")
    add("--rounds", type=int, help="blocks that the calls are cut into")
    add("--seconds", type=float, help="most for all calls of a contender, per measurement")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of all together")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    values = vars(parser.parse_args(arguments))
    path, budget = values.pop("json"), values.pop("budget")
    chosen = options(values.pop("device"), **values)
    result = run(chosen, budget, functools.partial(print, flush=True))
    for key in result["about"]["left_out"]:
        print(f"left out: {key}")
    if path is not None:
        record.write(path, result["about"], result["rows"])
    return 1 if result["about"]["failed"] else 0
