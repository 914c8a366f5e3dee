"""The commands `efficientad evaluate` and `efficientad calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from efficientad.cli.common import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    UsageError,
    add_arithmetic,
    add_layout,
    add_min_area,
    add_region,
    add_running,
    add_score,
    add_value_range,
    build_predictor,
    check_arithmetic,
    check_running,
    list_failed,
    load_detector,
    print_metrics,
    print_notes,
    print_threshold_trust,
    progress_bars,
    refuse_overwrite,
    region_of,
    require_calibration,
    value_range_of,
)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("evaluate", help="metrics on a test set with known defects")
    command.add_argument("model")
    command.add_argument("data", type=Path, help="a data set in a known layout, with test images")
    command.add_argument("--out", type=Path, default=Path("evaluation"), help="output folder")
    add_layout(command)
    command.add_argument(
        "--maps", action="store_true", help="write .tiff maps as the MVTec scripts read them"
    )
    command.add_argument("--overlays", action="store_true", help="write overlay PNGs")
    add_min_area(command)
    add_arithmetic(command)
    add_running(command)


def run_evaluate(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.data.layouts import open_dataset
    from efficientad.data.remarks import picture_notes
    from efficientad.evaluation.evaluation import evaluate
    from efficientad.utils.checks import check_number

    check_running(options)
    check_arithmetic(options)
    check_number("--min-area", options.min_area, 0)
    dataset = open_dataset(options.data, options.layout, options.category)
    detector = load_detector(options.model, options.device)
    require_calibration(detector)
    print_notes(picture_notes([sample.path for sample in dataset.test], detector.value_range))
    predictor = None if options.reference else build_predictor(detector, options)
    with progress_bars() as progress:
        result = evaluate(
            detector,
            dataset,
            out=options.out,
            maps=options.maps,
            overlays=options.overlays,
            min_area=options.min_area,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
            predictor=predictor,
        )
    print_metrics(result.metrics, result.undefined)
    print(f"computed in {result.arithmetic}")
    print(f"report: {options.out / 'report.html'}")
    print_notes(result.notes)
    list_failed(result.failed)
    return EXIT_SOME_FAILED if result.failed else EXIT_OK


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "calibrate", help="set statistics, quantiles and threshold from good images"
    )
    command.add_argument("model")
    command.add_argument(
        "good_images",
        nargs="+",
        help="images without defects, or a data set; of several folders (days, lots) the rate of "
        "each is shown",
    )
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
    add_value_range(command)
    add_region(command, "quantiles and threshold are found in it, and the detector keeps it")
    command.add_argument("--no-region", action="store_true", help="inspect the whole frame again")
    add_score(command, "as it is")
    command.add_argument("--border", choices=("nelson", "anomalib", "paper"))
    command.add_argument("--map-padding", type=int, metavar="CELLS")
    add_layout(command)
    add_running(command)


def run_calibrate(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.calibration.calibrating import calibrate
    from efficientad.checkpoint.native_file import save
    from efficientad.data.image_files import left_out
    from efficientad.data.layouts import open_dataset
    from efficientad.data.remarks import picture_notes
    from efficientad.model.calibration import GoodImages, split_good_images

    check_running(options)
    if options.region is not None and options.no_region:
        raise UsageError("--region names a region and --no-region takes it away; leave one out")
    out = options.out or Path(options.model).with_suffix(".safetensors")
    refuse_overwrite(out, options.force, but=Path(options.model))
    value_range = value_range_of(options)
    named = options.good_images
    good: GoodImages = named
    if len(named) == 1 and Path(named[0]).is_dir():
        good = open_dataset(Path(named[0]), options.layout, options.category)
        print_notes(good.notes)
    else:
        _check_named(named, options)
        print_notes(left_out(named))
    detector = load_detector(options.model, options.device)
    if options.border is not None or options.map_padding is not None:
        detector.set_map_rule(options.border, options.map_padding)
    if value_range is not None:
        detector.value_range = value_range
    if options.score is not None:
        detector.score = options.score
    held_out = split_good_images(good, False)[1]
    if options.region is not None or options.no_region:
        detector.set_region(region_of(options, held_out, detector))
    print_notes(picture_notes(held_out, detector.value_range))
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
    print_threshold_trust(facts, options.fpr)
    _print_lots(facts["lots"])
    print(f"saved: {out}")
    list_failed(failed)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _check_named(named: list[str], options: argparse.Namespace) -> None:
    """Refuse folders that may hold more than good images, and what goes with one folder alone."""
    from efficientad.data.layouts import open_dataset

    folders = [Path(name) for name in named if Path(name).is_dir()]
    useful = ("auto", "folder") if folders else ("auto",)
    if options.category or options.layout not in useful:
        raise UsageError(
            "--layout and --category go with one folder, not with a list of images; of several "
            "folders --layout folder says that all images below them are good"
        )
    for folder in folders if options.layout == "auto" else ():
        layout = open_dataset(folder).layout
        if layout != "folder":
            raise UsageError(
                f"{folder} has the layout {layout}; of several folders each must hold good images "
                "alone: name its folder of them, or say --layout folder"
            )


def _print_lots(lots: list[dict[str, Any]]) -> None:
    """A row per folder: how many of its images are above the threshold, and above the others'."""
    if not lots:
        return
    width = max(len("folder"), *(len(lot["folder"]) for lot in lots))
    print(f"{'folder':<{width}}  images  above  above the threshold of the other folders")
    for lot in lots:
        count, above, others = lot["images"], lot["above_threshold"], lot["above_others"]
        shown = "" if others is None else f"{others} ({others / count:.1%})"
        print(f"{lot['folder']:<{width}}  {count:>6}  {above:>5}  {shown}")
