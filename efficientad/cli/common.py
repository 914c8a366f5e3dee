"""What the commands share (arguments, loading, progress, exit codes)."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientad.fast.predictor import FastPredictor
    from efficientad.model.detector import EfficientAD

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_ANOMALY = 0, 1, 2, 3
EXIT_STOPPED = 130  # by Ctrl-C or SIGTERM
SECONDS_BETWEEN_LINES = 30


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


def add_running(
    command: argparse.ArgumentParser,
    batch_size: int | None = 8,
    batch_help: str = "images per step (default 8)",
) -> None:
    """Add --device, --batch-size and --workers; `check_running` checks the numbers."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    command.add_argument("--batch-size", type=int, default=batch_size, help=batch_help)
    command.add_argument("--workers", type=int, default=2, help="decoding threads")


def add_arithmetic(command: argparse.ArgumentParser) -> None:
    """Add --dtype and --reference; `build_predictor` and `check_arithmetic` read them."""
    command.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, float16 or bfloat16 (default auto: the fastest that the detector's "
        "calibration found accurate, see `info`)",
    )
    command.add_argument(
        "--reference",
        action="store_true",
        help="use the plain float32 detector, not the fast path; goes without --dtype",
    )


def check_arithmetic(options: argparse.Namespace) -> None:
    if options.reference and options.dtype != "auto":
        raise UsageError(
            f"--dtype is {options.dtype}, and --reference computes in float32; leave one out"
        )


def build_predictor(detector: EfficientAD, options: argparse.Namespace) -> FastPredictor:
    """The fast predictor that --device, --dtype and --batch-size ask for."""
    from efficientad.fast.options import DEFAULT_BUCKETS
    from efficientad.fast.predictor import FastPredictor

    most, sizes = options.batch_size, None
    if most is not None:
        sizes = (*(size for size in DEFAULT_BUCKETS["cuda"] if size < most), most)
    return FastPredictor(detector, device=options.device, dtype=options.dtype, batch_sizes=sizes)


def add_layout(command: argparse.ArgumentParser) -> None:
    """Add --layout and --category, the words of `open_dataset`."""
    command.add_argument(
        "--layout",
        choices=("auto", "folder", "mvtec", "mvtec2", "loco", "visa", "realiad"),
        default="auto",
        help="auto recognises the others; folder takes every image below it as good",
    )
    command.add_argument("--category", help="object of a VisA, Real-IAD or multi-object folder")


def add_value_range(command: argparse.ArgumentParser) -> None:
    """Add --max-value and --value-range, which `value_range_of` reads."""
    command.add_argument(
        "--max-value",
        type=float,
        metavar="N",
        help="largest value of a camera of more than 8 bits, 4095 of one of 12 bits in files of "
        "16; kept in the detector (default: the range of the type)",
    )
    command.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the same with a lowest"
    )


def value_range_of(options: argparse.Namespace) -> tuple[float, float] | None:
    """The value range that the options name, None for none. UsageError for both, ValueError."""
    from efficientad.utils.checks import check_value_range

    if options.max_value is not None and options.value_range is not None:
        raise UsageError("--max-value and --value-range say the same; leave one out")
    if options.max_value is not None:
        return check_value_range((0.0, options.max_value))
    return check_value_range(options.value_range)


def add_region(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add --region; purpose: what the command does with it."""
    command.add_argument(
        "--region",
        type=Path,
        metavar="FILE",
        help="the part of a frame that is inspected: a picture (white is inspected) or polygons in "
        f"JSON, see docs/regions.md; {purpose}",
    )


def add_score(command: argparse.ArgumentParser, default: str) -> None:
    """Add --score, "max" or a number; default: what holds without it."""
    command.add_argument(
        "--score",
        type=lambda text: int(text) if text.isdecimal() else text,
        metavar="max|K",
        help="how a map becomes a score: its maximum, or the mean of its K largest cells, see "
        f"docs/image-score.md; kept in the detector (default: {default})",
    )


def region_of(options: argparse.Namespace, paths: Sequence[Path], detector: EfficientAD) -> Any:
    """The mask of --region, or None, checked against the frames that it is drawn on. ValueError."""
    from efficientad.data.region_files import check_frames, read_region

    if options.region is None:
        return None
    mask = read_region(options.region)
    check_frames(mask, paths, detector.image_size)
    return mask


def add_min_area(command: argparse.ArgumentParser) -> None:
    """Add --min-area, of the regions that the output folder lists."""
    command.add_argument(
        "--min-area",
        type=float,
        default=0,
        metavar="PIXELS",
        help="list no region above the threshold that is smaller, in pixels of the image; the "
        "verdict is the score's and does not change",
    )


def load_detector(path: str, device: str) -> EfficientAD:
    from efficientad.checkpoint.loading import load
    from efficientad.utils.devices import choose_device

    return load(path).to(choose_device(device))


def require_calibration(detector: EfficientAD) -> None:
    """Fail before the work, not at the first image."""
    if not detector.calibrated:
        detector.raise_uncalibrated()


def require_packages(extra: str, packages: Iterable[str]) -> None:
    """Raise ImportError, with the pip line, unless an extra's packages are there.

    extra: it has the name of its command.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{extra} needs {package}: pip install 'efficientad[{extra}]'"
            ) from error


def refuse_overwrite(out: Path, force: bool, but: Path | None = None) -> None:
    if out.exists() and out != but and not force:
        raise UsageError(f"{out} exists; give --force to replace it, or another name")


def check_running(options: argparse.Namespace, fewest_workers: int = 0) -> None:
    """ValueError unless --batch-size and --workers are usable."""
    from efficientad.utils.checks import check_integer

    if options.batch_size is not None:
        check_integer("--batch-size", options.batch_size, 1)
    check_integer("--workers", options.workers, fewest_workers)


def list_failed(failed: Sequence[tuple[str, str]]) -> None:
    for path, reason in failed:
        print(f"failed: {path}: {reason}", file=sys.stderr)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_metrics(
    metrics: dict[str, Any], undefined: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print figures, one a line. undefined: why one is None."""
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        if value is None:
            shown = f"undefined: {undefined[name]}" if name in undefined else "undefined"
        print(f"{name:<{width}}  {shown}")


def print_threshold_trust(
    facts: Mapping[str, Any], false_positive_rate: float, what: str = "good images"
) -> None:
    """Say how far a threshold can be trusted; arguments as of `trust_sentence`."""
    images = facts["threshold_rests_on"]
    print(trust_sentence(facts, what))
    if false_positive_rate * images < 1:
        print(
            f"note: {images} images cannot show a rate of {false_positive_rate:g}; the threshold "
            "is the highest of their scores"
        )


def trust_sentence(facts: Mapping[str, Any], what: str = "good images") -> str:
    """What the record of a calibration says about false rejects. what: the images behind it."""
    return (
        f"{facts['above_threshold']} of the {facts['threshold_rests_on']} {what} are above it; "
        f"with {facts['confidence']:.0%} confidence at most "
        f"{100 * facts['false_reject_bound']:.2g}% of parts like these are (exact binomial bound)"
    )


class Bars:
    """Progress bars: `bars(what, done, total)` moves one, `log` prints a line above them.

    terminal: whether there are bars to see.
    """

    def __init__(self, progress: Any, lines: bool) -> None:
        self.terminal = bool(progress.console.is_terminal)
        self._progress, self._lines = progress, lines and not self.terminal
        self._tasks: dict[str, Any] = {}
        self._shown = time.monotonic()

    def __call__(self, what: str, done: int, total: int, said: str = "") -> None:
        """said: behind the bar, to the next call."""
        if self._lines and time.monotonic() - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, said="")
        self._progress.update(self._tasks[what], completed=done, total=total, said=said)

    def log(self, text: str) -> None:
        if self.terminal:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, flush=True)


@contextmanager
def progress_bars(lines: bool = False) -> Iterator[Bars]:
    """Bars with the time to go on a terminal; elsewhere nothing, or `lines`, two a minute."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[said]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield Bars(progress, lines)
