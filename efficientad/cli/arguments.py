"""The commands' names, arguments and help."""

from __future__ import annotations

import argparse
from pathlib import Path

from efficientad import __version__
from efficientad.cli.benchmark import add_benchmark
from efficientad.cli.distill import add_distill
from efficientad.cli.model_files import add_export
from efficientad.cli.train import add_train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="efficientad",
        description="EfficientAD anomaly detection: point it at images, get scores and heat maps.",
        epilog="exit codes: 0 ran, 1 some inputs failed (listed), 2 wrong usage, "
        "3 anomalies found (with --fail-on-anomaly)",
    )
    parser.add_argument("--version", action="version", version=f"efficientad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    add_train(commands)

    command = commands.add_parser("predict", help="score images and draw heat maps")
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("images", nargs="+", help="image files and folders")
    command.add_argument("--out", type=Path, default=Path("predictions"), help="output folder")
    command.add_argument("--threshold", type=float, help="use this instead of the detector's own")
    command.add_argument("--no-maps", action="store_true", help="write no .tiff maps")
    command.add_argument("--no-overlays", action="store_true", help="write no overlay PNGs")
    command.add_argument("--fail-on-anomaly", action="store_true", help="exit with 3 on an anomaly")
    command.add_argument(
        "--tiles",
        type=int,
        metavar="OVERLAP",
        help="look at images in full resolution, in tiles of the input size that overlap by so "
        "many pixels; for a detector that was trained and calibrated on crops of that size",
    )
    command.add_argument(
        "--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)"
    )
    command.add_argument(
        "--reference",
        action="store_true",
        help="use the plain float32 detector, not the fast path; goes with neither --tiles nor "
        "--dtype",
    )
    _running(
        command,
        batch_size=None,
        batch_help="images or tiles per step at most (default: 8 with --reference, otherwise what "
        "suits the device)",
    )

    command = commands.add_parser("evaluate", help="metrics on a test set with known defects")
    command.add_argument("model")
    command.add_argument("data", type=Path, help="MVTec AD, MVTec LOCO or VisA folder")
    command.add_argument("--out", type=Path, default=Path("evaluation"), help="output folder")
    _layout(command)
    command.add_argument(
        "--maps", action="store_true", help="write .tiff maps as the MVTec scripts read them"
    )
    command.add_argument("--overlays", action="store_true", help="write overlay PNGs")
    _running(command)

    command = commands.add_parser(
        "calibrate", help="set statistics, quantiles and threshold from good images"
    )
    command.add_argument("model")
    command.add_argument("good_images", nargs="+", help="images without defects, or a data set")
    command.add_argument("--out", type=Path, help="default: MODEL with suffix .safetensors")
    command.add_argument("--force", action="store_true", help="replace an existing other file")
    command.add_argument(
        "--fpr",
        type=float,
        default=0.01,
        help="share of good images that may exceed the threshold (default 0.01)",
    )
    command.add_argument(
        "--statistics",
        choices=("auto", "keep", "recompute"),
        default="auto",
        help="teacher channel statistics; auto computes them only if the model has none",
    )
    command.add_argument("--border", choices=("nelson", "anomalib", "paper"))
    command.add_argument("--map-padding", type=int, metavar="CELLS")
    _layout(command)
    _running(command)

    command = commands.add_parser("convert", help="turn another project's checkpoint into ours")
    command.add_argument("source", help=".ckpt, .pt, .pth, or a training's folder")
    command.add_argument("out", type=Path, help="the detector file to write (.safetensors)")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    command.add_argument(
        "--double-normalization",
        choices=("yes", "no"),
        help="whether an anomalib 1.0.x checkpoint was trained on images normalised twice",
    )

    add_export(commands)
    add_distill(commands)
    add_benchmark(commands)

    command = commands.add_parser("info", help="what is installed, or what is in a detector file")
    command.add_argument("model", nargs="?")
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("demo", help="draw parts, make a detector, find the defects")
    command.add_argument("--out", type=Path, default=Path("efficientad-demo"))
    command.add_argument("--seed", type=int, default=0)
    return parser


def _running(
    command: argparse.ArgumentParser,
    batch_size: int | None = 8,
    batch_help: str = "images per step (default 8)",
) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    command.add_argument("--batch-size", type=int, default=batch_size, help=batch_help)
    command.add_argument("--workers", type=int, default=2, help="decoding threads")


def _layout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layout",
        choices=("auto", "folder", "mvtec", "loco", "visa"),
        default="auto",
        help="auto recognises the others; folder takes every image below it as good",
    )
    command.add_argument("--category", help="object of a VisA or multi-object folder")
