"""The command line.

Exit codes: 0 ran; 1 ran, but some inputs failed (they are listed); 2 wrong usage or an unusable
model or data set; 3 with --fail-on-anomaly, an image was judged anomalous; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientad.cli.arguments import build_parser
from efficientad.cli.benchmark import run_benchmark
from efficientad.cli.common import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UsageError,
    check_running,
    list_failed,
    load_detector,
    print_metrics,
    print_notes,
    progress_bars,
    refuse_overwrite,
    require_calibration,
)
from efficientad.cli.distill import run_distill
from efficientad.cli.model_files import run_export
from efficientad.cli.predict import run_predict
from efficientad.cli.train import run_train


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
        return EXIT_STOPPED


# ---- commands --------------------------------------------------------------------------------


def run_evaluate(options: argparse.Namespace) -> int:
    from efficientad.data.layouts import open_dataset
    from efficientad.evaluation.evaluation import evaluate

    check_running(options)
    dataset = open_dataset(options.data, options.layout, options.category)
    detector = load_detector(options.model, options.device)
    require_calibration(detector)
    with progress_bars() as progress:
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
    print_metrics(result.metrics)
    print(f"report: {options.out / 'report.html'}")
    print_notes(result.notes)
    list_failed(result.failed)
    return EXIT_SOME_FAILED if result.failed else EXIT_OK


def run_calibrate(options: argparse.Namespace) -> int:
    from efficientad.checkpoint.native_file import save
    from efficientad.data.layouts import open_dataset
    from efficientad.model.calibration import calibrate

    check_running(options)
    out = options.out or Path(options.model).with_suffix(".safetensors")
    refuse_overwrite(out, options.force, but=Path(options.model))
    good = options.good_images
    if len(good) == 1 and Path(good[0]).is_dir():
        good = open_dataset(Path(good[0]), options.layout, options.category)
    elif options.layout != "auto" or options.category:
        raise UsageError("--layout and --category go with one folder, not with a list of images")
    detector = load_detector(options.model, options.device)
    if options.border is not None or options.map_padding is not None:
        detector.set_map_rule(options.border, options.map_padding)
    failed: list[tuple[str, str]] = []
    with progress_bars() as progress:
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
    list_failed(failed)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def run_convert(options: argparse.Namespace) -> int:
    from efficientad.checkpoint.loading import convert
    from efficientad.checkpoint.native_file import save

    refuse_overwrite(options.out, options.force)
    double = {None: None, "yes": True, "no": False}[options.double_normalization]
    detector = convert(options.source, double_normalization=double)
    save(detector, options.out)
    print(f"saved: {options.out}")
    if not detector.calibrated:
        print(f"not calibrated: run `efficientad calibrate {options.out} GOOD_IMAGES`")
    return EXIT_OK


def run_info(options: argparse.Namespace) -> int:
    from efficientad.cli.environment import environment

    facts: dict[str, Any] = environment() if options.model is None else describe(options.model)
    if options.json:
        print(json.dumps(facts, indent=1, default=str))
        return EXIT_OK
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    return EXIT_OK


def run_demo(options: argparse.Namespace) -> int:
    from efficientad.demo.walkthrough import run

    with progress_bars() as progress:
        result = run(options.out, seed=options.seed, progress=progress)
    print_metrics(result.metrics)
    print(f"report: {options.out / 'report' / 'report.html'}")
    return EXIT_OK


COMMANDS = {
    "train": run_train,
    "predict": run_predict,
    "evaluate": run_evaluate,
    "calibrate": run_calibrate,
    "convert": run_convert,
    "export": run_export,
    "distill": run_distill,
    "benchmark": run_benchmark,
    "info": run_info,
    "demo": run_demo,
}


def describe(path: str) -> dict[str, Any]:
    """What is in a detector file."""
    from efficientad.checkpoint.loading import load

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
    if detector.calibrated:
        from efficientad.fast.predictor import FastPredictor

        fast = FastPredictor(detector, batch_sizes=(1,)).facts
        facts["fast path"] = f"{fast['backend']}, {fast['dtype']}, {fast['device']}"
        if fast["reason"]:
            facts["kernels not used"] = fast["reason"]
    for key, value in detector.provenance.items():
        facts[f"provenance: {key}"] = value
    return facts


if __name__ == "__main__":
    sys.exit(main())
