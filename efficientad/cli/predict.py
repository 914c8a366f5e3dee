"""The command `efficientad predict`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad.cli.common import (
    EXIT_ANOMALY,
    EXIT_OK,
    EXIT_SOME_FAILED,
    UsageError,
    add_arithmetic,
    add_min_area,
    add_region,
    add_running,
    build_predictor,
    check_arithmetic,
    check_running,
    list_failed,
    load_detector,
    print_notes,
    progress_bars,
    region_of,
    require_calibration,
)

if TYPE_CHECKING:
    from efficientad.fast.predictor import FastPredictor
    from efficientad.model.detector import EfficientAD
    from efficientad.results.prediction import Prediction
    from efficientad.results.progress import Entry

OnError = Callable[[int, Any, Any], None]
Run = Callable[[list[Path], OnError], "Iterator[Prediction]"]


def add_predict(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("predict", help="score images and draw heat maps")
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("images", nargs="+", help="image files and folders")
    command.add_argument("--out", type=Path, default=Path("predictions"), help="output folder")
    command.add_argument("--threshold", type=float, help="use this instead of the detector's own")
    command.add_argument("--no-maps", action="store_true", help="write no .tiff maps")
    command.add_argument("--no-overlays", action="store_true", help="write no overlay PNGs")
    command.add_argument(
        "--resume",
        action="store_true",
        help="score only what an earlier run into the output folder has not scored, or what has "
        "changed since",
    )
    command.add_argument("--fail-on-anomaly", action="store_true", help="exit with 3 on an anomaly")
    command.add_argument(
        "--tiles",
        type=int,
        metavar="OVERLAP",
        help="look at images in full resolution, in tiles of the input size that overlap by so "
        "many pixels; for a detector that was trained and calibrated on crops of that size",
    )
    add_region(command, "in place of the detector's own, with its quantiles and threshold")
    add_min_area(command)
    add_arithmetic(command)
    add_running(
        command,
        batch_size=None,
        batch_help="images or tiles per step at most (default: 8 with --reference, otherwise what "
        "suits the device)",
    )


def run_predict(options: argparse.Namespace) -> int:
    """Score images, write overlays, maps and a report; returns the exit code."""
    from efficientad.data.decoding import ImageError, read_image
    from efficientad.data.image_files import left_out
    from efficientad.data.remarks import picture_notes
    from efficientad.model.image_score import score_notes
    from efficientad.results.output_folder import ResultFolder, output_names
    from efficientad.utils.files import plain_text

    _check(options)
    paths = _inputs(options)
    detector = load_detector(options.model, "cpu")
    if options.threshold is not None:
        detector.threshold = options.threshold
    require_calibration(detector)
    if options.fail_on_anomaly and detector.threshold is None:
        raise UsageError(
            "--fail-on-anomaly needs a threshold and the detector has none; give --threshold, or "
            f"run `efficientad calibrate {options.model} GOOD_IMAGES`"
        )
    unread = [*left_out(options.images), *picture_notes(paths, detector.value_range)]
    print_notes(unread)
    notes = [*_notes(options, detector), *score_notes(detector.score)]
    notes += [*_look_at_region(options, detector, paths), *unread]
    run = _prepare(detector, options)  # the detector may lie on a GPU now
    names = output_names(paths)
    settings = _settings(options, detector)
    kept = _kept(options.out, settings, paths, names) if options.resume else {}
    todo = [index for index in range(len(paths)) if index not in kept]
    folder = ResultFolder(
        options.out,
        detector.threshold,
        overlays=None if options.no_overlays else options.out / "overlays",
        maps=None if options.no_maps else options.out / "maps",
        min_area=options.min_area,
        score=detector.score,
        settings=settings,
        kept=list(kept.values()),
    )
    complete = False
    try:
        with progress_bars() as progress:
            left = [paths[index] for index in todo]
            predictions = run(left, lambda _, source, error: folder.fail(source, error.reason))
            for prediction in predictions if left else ():
                index = todo[prediction.index]
                path = paths[index]
                try:
                    image = (
                        prediction.image
                        if prediction.image is not None
                        else read_image(path, detector.value_range)
                    )
                except (ImageError, OSError) as error:
                    folder.fail(path, f"scored, but not readable again: {error}")
                    continue
                try:
                    folder.add(prediction, path, names[index], image=image)
                except ImageError as error:  # of a file that is read by parts
                    folder.fail(path, f"scored, but not readable again: {error}")
                    continue
                progress("images", len(kept) + prediction.index + 1, len(paths))
        complete = True
    finally:  # also when it is interrupted: hours of scores
        if not complete:
            notes.append(f"The run stopped early: {len(folder.rows)} of {len(paths)} were scored.")
        places = {plain_text(path): index for index, path in enumerate(paths)}
        folder.rows.sort(key=lambda row: places[row["path"]])  # the kept ones came first
        report = folder.close(f"Predictions of {Path(options.model).name}", notes=notes)
        anomalies = sum(bool(row["is_anomalous"]) for row in folder.rows)
        print(f"{len(folder.rows)} images, {anomalies} anomalous, {len(folder.failed)} failed")
        if detector.threshold is None:
            print("no threshold: no image was judged; give --threshold or calibrate the detector")
        print(f"report: {plain_text(report)}")
        list_failed(folder.failed)
    if anomalies and options.fail_on_anomaly:
        return EXIT_ANOMALY
    return EXIT_SOME_FAILED if folder.failed else EXIT_OK


def _check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or would do nothing."""
    from efficientad.utils.checks import check_number

    check_running(options, fewest_workers=1)
    check_number("--min-area", options.min_area, 0)
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise UsageError(f"--threshold is {options.threshold}; it must be a finite number")
    if options.reference and options.tiles is not None:
        raise UsageError("--tiles needs the fast path; leave out --reference")
    check_arithmetic(options)


def _inputs(options: argparse.Namespace) -> list[Path]:
    """The images to score, without what this or an earlier run wrote into the output folder."""
    from efficientad.data.image_files import find_images
    from efficientad.results.output_folder import earlier_files

    out = options.out.resolve()
    ours = {_place(path) for path in earlier_files(options.out)}
    kept: list[Path] = []
    found = 0
    for named in map(Path, options.images):
        paths = find_images(named)
        found += len(paths)
        around = named.is_dir() and named.resolve() in out.parents
        for path in paths:
            place = _place(path)
            if place not in ours and not (around and out in place.parents):
                kept.append(path)
    if not kept:
        raise UsageError(
            f"all images named lie in the output folder {options.out}; name another one with --out"
        )
    if len(kept) < found:
        print(f"left out: {found - len(kept)} pictures in the output folder {options.out}")
    return kept


def _settings(options: argparse.Namespace, detector: EfficientAD) -> dict[str, Any]:
    """What the run's results depend on, for `--resume`."""
    from efficientad.model.region import digest
    from efficientad.utils.files import path_digest

    return {
        "model": path_digest(options.model),
        "threshold": detector.threshold,
        "region": digest(detector.region),
        "path": "reference" if options.reference else "fast",
        "device": str(options.device),
        "dtype": str(options.dtype),
        "tiles": options.tiles,
        "min_area": options.min_area,
        "overlays": not options.no_overlays,
        "maps": not options.no_maps,
    }


def _kept(
    out: Path, settings: dict[str, Any], paths: list[Path], names: list[Path]
) -> dict[int, Entry]:
    """Index of an input -> what the run before wrote of it and is still right."""
    from efficientad.results.progress import different, read_progress, still_valid

    earlier = read_progress(out)
    if earlier.settings is None:
        print(f"nothing to go on from in {out}: all images are scored")
        return {}
    if earlier.settings != settings:
        others = ", ".join(different(earlier.settings, settings))
        raise UsageError(
            f"--resume goes on with a run of the same settings, and the one in {out} had {others}; "
            "leave out --resume to score all anew"
        )
    kept = still_valid(out, earlier.entries, paths, names)
    print(f"resumed: {len(kept)} of {len(paths)} images are scored already")
    return kept


def _place(path: Path) -> Path:
    """The path with the links of its folder followed, but not its own."""
    return path.parent.resolve() / path.name


def _notes(options: argparse.Namespace, detector: EfficientAD) -> list[str]:
    """Sentences for the report; one that doubts the verdicts is printed too."""
    if detector.threshold is None:
        return ["The detector has no threshold."]
    if options.tiles is None or options.threshold is not None:
        return []
    doubt = (
        "Scores in tiles are judged by the detector's own threshold. They are comparable with it "
        "only if the detector was trained and calibrated on such crops. If it saw whole images, "
        "the verdicts cannot be trusted: calibrate it on crops, or give --threshold."
    )
    print(f"warning: {doubt}", file=sys.stderr)
    return [doubt]


def _look_at_region(
    options: argparse.Namespace, detector: EfficientAD, paths: list[Path]
) -> list[str]:
    """Set the region of --region, if there is one; sentences about it, for the report."""
    from efficientad.model.region import reaches_beyond, share

    calibrated = detector.region
    if options.region is not None:
        detector.set_region(region_of(options, paths, detector), keep_calibration=True)
    if detector.region is None:
        return []
    if options.tiles is not None:
        raise UsageError(
            "--tiles looks at parts of an image and a region is of the whole; use a detector "
            "without a region, and no --region"
        )
    part = f"{100 * share(detector.region):.1f} %"
    notes = [f"Inspected is {part} of the frame, outlined in blue."]
    if reaches_beyond(detector.region, calibrated):
        doubt = (
            "The region reaches beyond the one in which quantiles and threshold were found; what "
            "lies there is judged by a threshold that has not seen it."
        )
        print(f"warning: {doubt}", file=sys.stderr)
        notes.append(doubt)
    return notes


def _prepare(detector: EfficientAD, options: argparse.Namespace) -> Run:
    """What gives predictions with host values and maps at source size, on the path asked for.

    All that can be wrong with the options shows here, before the output folder is touched.
    """
    if options.reference:
        from efficientad.results.plain_path import predict
        from efficientad.utils.devices import choose_device

        detector.to(choose_device(options.device))
        return lambda paths, on_error: predict(
            detector,
            paths,
            batch_size=options.batch_size or 8,
            workers=options.workers,
            on_error=on_error,
        )
    predictor = build_predictor(detector, options)
    if options.tiles is None:
        return lambda paths, on_error: (
            prediction.cpu()
            for prediction in predictor.stream(
                paths, map_size="source", workers=options.workers, on_error=on_error
            )
        )
    from efficientad.fast.tiling import check_tiles

    check_tiles(predictor.image_size, predictor.image_size, options.tiles)
    return lambda paths, on_error: _in_tiles(predictor, paths, options.tiles, on_error)


def _in_tiles(
    predictor: FastPredictor, paths: list[Path], overlap: int, on_error: OnError
) -> Iterator[Prediction]:
    from efficientad.data.decoding import ImageError

    for index, path in enumerate(paths):
        try:
            prediction = predictor.predict_large(path, overlap=overlap).cpu()
        except ImageError as error:
            on_error(index, path, error)
            continue
        except (ValueError, OSError) as error:  # smaller than the network's input, or gone
            on_error(index, path, ImageError(str(path), str(error)))
            continue
        prediction.index = index
        yield prediction
