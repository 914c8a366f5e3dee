"""Floor 5, imports everything below: the command line.

Exit codes: 0 ran; 1 ran, but some inputs failed (they are listed); 2 wrong usage or an unusable
model or data set; 3 with --fail-on-anomaly, an image was judged anomalous.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad import __version__

if TYPE_CHECKING:
    from efficientad.detector import EfficientAD

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_ANOMALY = 0, 1, 2, 3


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"efficientad {options.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"efficientad {options.command}: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="efficientad",
        description="EfficientAD anomaly detection: point it at images, get scores and heat maps.",
        epilog="exit codes: 0 ran, 1 some inputs failed (listed), 2 wrong usage, "
        "3 anomalies found (with --fail-on-anomaly)",
    )
    parser.add_argument("--version", action="version", version=f"efficientad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("predict", help="score images and draw heat maps")
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("images", nargs="+", help="image files and folders")
    command.add_argument("--out", type=Path, default=Path("predictions"), help="output folder")
    command.add_argument("--threshold", type=float, help="use this instead of the detector's own")
    command.add_argument("--no-maps", action="store_true", help="write no .tiff maps")
    command.add_argument("--no-overlays", action="store_true", help="write no overlay PNGs")
    command.add_argument("--fail-on-anomaly", action="store_true", help="exit with 3 on an anomaly")
    _running(command)
    command.set_defaults(run=run_predict)

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
    command.set_defaults(run=run_evaluate)

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
    command.set_defaults(run=run_calibrate)

    command = commands.add_parser("convert", help="turn another project's checkpoint into ours")
    command.add_argument("source", help=".ckpt, .pt, .pth, or a training's folder")
    command.add_argument("out", type=Path, help="the detector file to write (.safetensors)")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    command.add_argument(
        "--double-normalization",
        choices=("yes", "no"),
        help="whether an anomalib 1.0.x checkpoint was trained on images normalised twice",
    )
    command.set_defaults(run=run_convert)

    command = commands.add_parser("info", help="what is installed, or what is in a detector file")
    command.add_argument("model", nargs="?")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run_info)

    command = commands.add_parser("demo", help="draw parts, make a detector, find the defects")
    command.add_argument("--out", type=Path, default=Path("efficientad-demo"))
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run_demo)
    return parser


def _running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--workers", type=int, default=2, help="decoding threads")


def _layout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layout", choices=("auto", "folder", "mvtec", "loco", "visa"), default="auto"
    )
    command.add_argument("--category", help="object of a VisA or multi-object folder")


# ---- commands --------------------------------------------------------------------------------


def run_predict(options: argparse.Namespace) -> int:
    from efficientad.images import find_images, read_image
    from efficientad.prediction import predict
    from efficientad.results import ResultFolder, output_names

    paths = find_images(options.images)
    detector = _load(options.model, options.device)
    if options.threshold is not None:
        detector.threshold = options.threshold
    _require_calibration(detector)
    folder = ResultFolder(
        options.out,
        detector.threshold,
        overlays=None if options.no_overlays else options.out / "overlays",
        maps=None if options.no_maps else options.out / "maps",
    )
    names = output_names(paths)
    anomalies = 0
    with _progress() as progress:
        for prediction in predict(
            detector,
            paths,
            batch_size=options.batch_size,
            workers=options.workers,
            on_error=lambda index, source, error: folder.fail(source, error.reason),
        ):
            anomalies += bool(prediction.is_anomalous)
            path = paths[prediction.index]
            folder.add(prediction, path, names[prediction.index], image=read_image(path))
            progress("images", prediction.index + 1, len(paths))
    notes = [] if detector.threshold is not None else ["The detector has no threshold."]
    report = folder.close(f"Predictions of {Path(options.model).name}", notes=notes)
    print(f"{len(folder.rows)} images, {anomalies} anomalous, {len(folder.failed)} failed")
    if detector.threshold is None:
        print("no threshold: no image was judged; give --threshold or calibrate the detector")
    print(f"report: {report}")
    _list_failed(folder.failed)
    if anomalies and options.fail_on_anomaly:
        return EXIT_ANOMALY
    return EXIT_SOME_FAILED if folder.failed else EXIT_OK


def run_evaluate(options: argparse.Namespace) -> int:
    from efficientad.data import open_dataset
    from efficientad.evaluation import evaluate

    dataset = open_dataset(options.data, options.layout, options.category)
    detector = _load(options.model, options.device)
    _require_calibration(detector)
    with _progress() as progress:
        result = evaluate(
            detector,
            dataset,
            out=options.out,
            maps=options.maps,
            overlays=options.overlays,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
        )
    _print_metrics(result.metrics)
    print(f"report: {options.out / 'report.html'}")
    _list_failed(result.failed)
    return EXIT_SOME_FAILED if result.failed else EXIT_OK


def run_calibrate(options: argparse.Namespace) -> int:
    from efficientad.calibration import calibrate
    from efficientad.checkpoint import save
    from efficientad.data import open_dataset

    out = options.out or Path(options.model).with_suffix(".safetensors")
    _refuse_overwrite(out, options.force, but=Path(options.model))
    good = options.good_images
    if len(good) == 1 and Path(good[0]).is_dir():
        good = open_dataset(Path(good[0]), options.layout, options.category)
    elif options.layout != "auto" or options.category:
        raise UsageError("--layout and --category go with one folder, not with a list of images")
    detector = _load(options.model, options.device)
    if options.border is not None or options.map_padding is not None:
        detector.set_map_rule(options.border, options.map_padding)
    failed: list[tuple[str, str]] = []
    with _progress() as progress:
        calibrate(
            detector,
            good,
            false_positive_rate=options.fpr,
            statistics={"auto": None, "keep": False, "recompute": True}[options.statistics],
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
            on_error=lambda index, source, error: failed.append((str(source), error.reason)),
        )
    save(detector.cpu(), out)
    facts = detector.provenance["calibration"]
    print(
        f"threshold {detector.threshold:.6g} from {facts['threshold_rests_on']} good images "
        f"(target false-positive rate {options.fpr:g})"
    )
    if options.fpr * facts["threshold_rests_on"] < 1:
        print(
            f"note: {facts['threshold_rests_on']} images cannot show a rate of {options.fpr:g}; "
            "the threshold is the highest of their scores"
        )
    print(f"saved: {out}")
    _list_failed(failed)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def run_convert(options: argparse.Namespace) -> int:
    from efficientad.checkpoint import convert, save

    _refuse_overwrite(options.out, options.force)
    double = {None: None, "yes": True, "no": False}[options.double_normalization]
    detector = convert(options.source, double_normalization=double)
    save(detector, options.out)
    print(f"saved: {options.out}")
    if not detector.calibrated:
        print(f"not calibrated: run `efficientad calibrate {options.out} GOOD_IMAGES`")
    return EXIT_OK


def run_info(options: argparse.Namespace) -> int:
    facts: dict[str, Any] = environment() if options.model is None else describe(options.model)
    if options.json:
        print(json.dumps(facts, indent=1, default=str))
        return EXIT_OK
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    return EXIT_OK


def run_demo(options: argparse.Namespace) -> int:
    from efficientad.demo import run

    with _progress() as progress:
        result = run(options.out, seed=options.seed, progress=progress)
    _print_metrics(result.metrics)
    print(f"report: {options.out / 'report' / 'report.html'}")
    return EXIT_OK


# ---- helpers ---------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What is installed and what the package would run on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    facts: dict[str, Any] = {"efficientad": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "safetensors", "pillow", "scipy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads"
    return facts


def describe(path: str) -> dict[str, Any]:
    """What is in a detector file."""
    from efficientad.checkpoint import load

    detector = load(path)
    facts: dict[str, Any] = {
        "file": path,
        "size": f"EfficientAD-{detector.size}",
        "padding": detector.padding,
        "image size": "x".join(map(str, detector.image_size)),
        "border rule": f"{detector.border}, {detector.map_padding} cells",
        "score at": f"{detector.score_size} size",
        "statistics": "set" if detector.has_statistics else "not set",
        "quantiles": [round(q, 6) for q in detector.quantiles.tolist()]
        if detector.calibrated
        else "not set",
        "threshold": detector.threshold if detector.threshold is not None else "not set",
    }
    for key, value in detector.provenance.items():
        facts[f"provenance: {key}"] = value
    return facts


def _load(path: str, device: str) -> EfficientAD:
    import torch

    from efficientad.checkpoint import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device is {device!r} and torch sees no CUDA device; use --device cpu or auto, or "
            "install a torch build with CUDA"
        )
    try:
        torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device is {device!r}; it must be auto, cpu or cuda[:N]") from None
    return load(path).to(device)


def _require_calibration(detector: EfficientAD) -> None:
    """Fail before the work, not at the first image."""
    if not detector.calibrated:
        detector.raise_uncalibrated()


def _refuse_overwrite(out: Path, force: bool, but: Path | None = None) -> None:
    if out.exists() and out != but and not force:
        raise UsageError(f"{out} exists; give --force to replace it, or another name")


def _list_failed(failed: Sequence[tuple[str, str]]) -> None:
    for path, reason in failed:
        print(f"failed: {path}: {reason}", file=sys.stderr)


def _print_metrics(metrics: dict[str, Any]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        shown = (
            "undefined" if value is None else f"{value:.4f}" if isinstance(value, float) else value
        )
        print(f"{name:<{width}}  {shown}")


@contextmanager
def _progress() -> Iterator[Any]:
    """A callable (what, done, total) that draws progress bars on a terminal."""
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
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


if __name__ == "__main__":
    sys.exit(main())
