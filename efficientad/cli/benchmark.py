"""The command `efficientad benchmark`."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad.cli.common import EXIT_OK, EXIT_SOME_FAILED, UsageError, require_calibration
from efficientad.cli.model_files import environment
from efficientad.utils.files import write_text

if TYPE_CHECKING:
    from efficientad.model.detector import EfficientAD

_EPILOG = """\
A call takes a uint8 frame from host memory to its anomaly map in host memory. On CUDA 1000 calls
are timed after 1000 that are not, as in the paper; on a CPU 20 after 2, or fewer if 8 seconds do
not suffice. What differs from the plain float32 detector by more than its bound gets no time.
"""


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "benchmark",
        help="how fast, and how exactly, a detector runs on this machine",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", nargs="?", help="detector file; without it random weights, equally fast")
    add("--size", choices=("S", "M"), help="of the random weights (default S)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    add(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="the network's input, of the random weights (default 256 256)",
    )
    add("--calls", type=int, help="under the clock, of each")
    add("--warmup", type=int, metavar="CALLS", help="before the clock")
    add(
        "--peers-free",
        action="store_true",
        help="the predictor alone, without the plain detector beside it",
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")


def run_benchmark(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 1 if something was wrong and got no time."""
    from efficientad.benchmark.cold_start import cold_start
    from efficientad.benchmark.contenders import HEAD, line
    from efficientad.benchmark.end_to_end import CAMERA, benchmark, build_predictor
    from efficientad.benchmark.stages import stages

    _check(options)
    detector, weights = _detector(options)
    predictor = build_predictor(detector, options.batch_sizes, options.device, options.dtype)
    about = _about(weights)
    used = ", ".join(predictor.facts[name] for name in ("device", "dtype", "backend"))
    print(f"EfficientAD-{detector.size} at {detector.image_size[0]}x{detector.image_size[1]}")
    print(f"weights: {weights}\nmachine: {about['device']}, torch {about['torch']}\nruns: {used}")
    print(HEAD)
    rows: list[dict[str, Any]] = []

    def show(found: list[dict[str, Any]]) -> None:
        for row in found:
            print(line(row), flush=True)
        rows.extend(found)

    show(
        benchmark(
            predictor,
            detector=detector,
            batch_sizes=options.batch_sizes,
            calls=options.calls,
            warmup=options.warmup,
            frame_size=CAMERA,
            plain=not options.peers_free,
        )
    )
    wrong = any(row["no_time"] for row in rows)
    if not wrong:
        show(stages(predictor, min(predictor.batch_sizes), calls=options.calls))
        try:
            show([cold_start(detector, device=options.device, dtype=options.dtype)])
        except RuntimeError as error:  # the rest is worth keeping
            print(f"no cold start: {error}", file=sys.stderr)
            wrong = True
    print("one frame at a time unless batch says more; map error: largest, of the maps' scale")
    if options.json is not None:
        text = json.dumps({"about": about, "rows": rows}, indent=1, allow_nan=False)
        write_text(options.json, text + "\n")
        print(f"saved: {options.json}")
    return EXIT_SOME_FAILED if wrong else EXIT_OK


def _check(options: argparse.Namespace) -> None:
    """Fail before the work."""
    for name, values in (
        ("batch-sizes", options.batch_sizes),
        ("calls", [options.calls]),
        ("warmup", [options.warmup]),
    ):
        if any(value is not None and value < 1 for value in values):
            shown = " ".join(map(str, values))
            raise UsageError(f"--{name} is {shown}; it must be at least 1")
    if options.model is not None and (options.size or options.image_size):
        raise UsageError("--size and --image-size are for random weights; MODEL has its own")


def _detector(options: argparse.Namespace) -> tuple[EfficientAD, str]:
    """The detector, and what its weights are."""
    if options.model is not None:
        from efficientad.checkpoint.loading import load

        detector = load(options.model)
        require_calibration(detector)
        return detector, options.model
    from efficientad.model.synthetic import random_detector

    size = tuple(options.image_size or (256, 256))
    made = random_detector(options.size or "S", image_size=size)
    return made, "random (no MODEL was given): times are those of a trained one, scores are not"


def _about(weights: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return environment() | {"weights": weights, "date": now}
