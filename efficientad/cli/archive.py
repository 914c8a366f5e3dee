"""The command `efficientad archive`."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from efficientad.cli.common import (
    EXIT_ANOMALY,
    EXIT_OK,
    EXIT_SOME_FAILED,
    UsageError,
    load_detector,
    print_notes,
    progress_bars,
    require_calibration,
    require_packages,
)

if TYPE_CHECKING:
    from efficientad.archive.output import Summary

PACKAGES = ("ray.data", "pyarrow", "fsspec")


def add_archive(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "archive",
        help="score the pictures of a table on a Ray cluster, into Parquet",
        epilog="The same command again goes on where a run was stopped or killed. See "
        "docs/archive.md.",
    )
    command.add_argument(
        "manifest", help="Parquet or CSV with a column path or url; a file, a folder or a URL"
    )
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    command.add_argument("--threshold", type=float, help="use this instead of the detector's own")
    command.add_argument(
        "--retry-failed",
        action="store_true",
        help="try pictures again that an earlier run into the folder could not read",
    )
    command.add_argument("--fail-on-anomaly", action="store_true", help="exit with 3 on an anomaly")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda; a GPU a process")
    command.add_argument("--dtype", default="auto", help="as for predict")
    command.add_argument("--batch-size", type=int, metavar="N", help="pictures in one step at most")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode (default: what fits)"
    )
    command.add_argument(
        "--scorers",
        type=int,
        metavar="N",
        help="processes that score (default: one for each GPU, or for each four CPUs)",
    )
    command.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or None,
        help="of a Ray cluster (default: RAY_ADDRESS, else a cluster of its own on this machine)",
    )


def run_archive(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    require_packages("archive", PACKAGES)
    from efficientad.archive.running import Running, archive
    from efficientad.model.image_score import score_notes
    from efficientad.utils.files import path_digest

    if options.threshold is not None and not math.isfinite(options.threshold):
        raise UsageError(f"--threshold is {options.threshold}; it must be a finite number")
    running = Running(
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        workers=options.workers,
        scorers=options.scorers,
        address=options.address,
    )
    detector = load_detector(options.model, "cpu")
    if options.threshold is not None:
        detector.threshold = options.threshold
    require_calibration(detector)
    if options.fail_on_anomaly and detector.threshold is None:
        raise UsageError("--fail-on-anomaly needs a threshold and the detector has none")
    print_notes(score_notes(detector.score))
    with progress_bars(lines=True) as bars:
        found = archive(
            options.manifest,
            detector,
            path_digest(options.model),
            options.out,
            running,
            retry_failed=options.retry_failed,
            progress=lambda done, total: bars("pictures", done, total),
            stopped=lambda found: show(found, options.out),
        )
    show(found, options.out)
    if detector.threshold is None:
        print("no threshold: no picture was judged; give --threshold or calibrate the detector")
    if found.anomalous and options.fail_on_anomaly:
        return EXIT_ANOMALY
    return EXIT_SOME_FAILED if found.failed or found.missing else EXIT_OK


def show(found: Summary, out: Path) -> None:
    """Print the sums of a run."""
    from efficientad.archive.output import Places

    print(
        f"{found.pictures} pictures = {found.scored} scored + {found.failed} failed"
        + (f" + {found.missing} left" if found.missing else "")
        + (f"; {found.before} of them were there before" if found.before else "")
    )
    print(f"{found.anomalous} anomalous")
    if found.failed:
        print("what failed has its reason in the column error; --retry-failed tries it again")
    if found.missing:
        print("the same command again goes on with those left")
    if found.others:
        print(f"{found.others} rows more are of pictures that are not in this manifest")
    print(f"rows: {Places(out).rows}")
