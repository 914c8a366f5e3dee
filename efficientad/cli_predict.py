"""Floor 5, imports everything below: the run of `efficientad predict`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad.cli_common import (
    EXIT_ANOMALY,
    EXIT_OK,
    EXIT_SOME_FAILED,
    list_failed,
    load_detector,
    progress_bars,
    require_calibration,
)

if TYPE_CHECKING:
    from efficientad.detector import EfficientAD
    from efficientad.prediction import Prediction


def run_predict(options: argparse.Namespace) -> int:
    """Score images, write overlays, maps and a report; returns the exit code."""
    from efficientad.images import find_images, read_image
    from efficientad.results import ResultFolder, output_names

    paths = find_images(options.images)
    detector = load_detector(options.model, "cpu")
    if options.threshold is not None:
        detector.threshold = options.threshold
    require_calibration(detector)
    folder = ResultFolder(
        options.out,
        detector.threshold,
        overlays=None if options.no_overlays else options.out / "overlays",
        maps=None if options.no_maps else options.out / "maps",
    )
    names = output_names(paths)
    anomalies = 0
    with progress_bars() as progress:
        for prediction in _predictions(
            detector,
            paths,
            options,
            on_error=lambda index, source, error: folder.fail(source, error.reason),
        ):
            anomalies += bool(prediction.is_anomalous)
            path = paths[prediction.index]
            image = prediction.image if prediction.image is not None else read_image(path)
            folder.add(prediction, path, names[prediction.index], image=image)
            progress("images", prediction.index + 1, len(paths))
    notes = [] if detector.threshold is not None else ["The detector has no threshold."]
    report = folder.close(f"Predictions of {Path(options.model).name}", notes=notes)
    print(f"{len(folder.rows)} images, {anomalies} anomalous, {len(folder.failed)} failed")
    if detector.threshold is None:
        print("no threshold: no image was judged; give --threshold or calibrate the detector")
    print(f"report: {report}")
    list_failed(folder.failed)
    if anomalies and options.fail_on_anomaly:
        return EXIT_ANOMALY
    return EXIT_SOME_FAILED if folder.failed else EXIT_OK


def _predictions(
    detector: EfficientAD,
    paths: list[Path],
    options: argparse.Namespace,
    on_error: Callable[[int, Any, Any], None],
) -> Iterator[Prediction]:
    """Predictions with host values and maps at source size, by the path that was asked for."""
    if options.reference:
        from efficientad.devices import choose_device
        from efficientad.prediction import predict

        yield from predict(
            detector.to(choose_device(options.device)),
            paths,
            batch_size=options.batch_size,
            workers=options.workers,
            on_error=on_error,
        )
        return
    from efficientad.predictor import FastPredictor

    predictor = FastPredictor(detector, device=options.device, dtype=options.dtype)
    if options.tiles is None:
        for prediction in predictor.stream(
            paths, map_size="source", workers=max(1, options.workers), on_error=on_error
        ):
            yield prediction.cpu()
        return
    from efficientad.images import ImageError, read_image
    from efficientad.tiles import check_tiles

    check_tiles(predictor.image_size, predictor.image_size, options.tiles)  # before the work
    for index, path in enumerate(paths):
        try:
            frame = read_image(path)
            prediction = predictor.predict_large(frame, overlap=options.tiles).cpu()
        except ImageError as error:
            on_error(index, path, error)
            continue
        except ValueError as error:  # an image smaller than the network's input
            on_error(index, path, ImageError(str(path), str(error)))
            continue
        prediction.index = index
        yield prediction
