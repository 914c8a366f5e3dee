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
from efficientad.arguments import build_parser

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
        return COMMANDS[options.command](options)
    except (ValueError, OSError, ImportError) as error:
        print(f"efficientad {options.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"efficientad {options.command}: stopped", file=sys.stderr)
        return 130


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


COMMANDS = {
    "predict": run_predict,
    "evaluate": run_evaluate,
    "calibrate": run_calibrate,
    "convert": run_convert,
    "info": run_info,
    "demo": run_demo,
}


# ---- helpers ---------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What is installed and what the package would run on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from efficientad.ops import choose_backend

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {"triton": "triton kernels", "torch": "torch reference"}[choose_backend(device)]
    facts["fused operations"] = chosen
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
