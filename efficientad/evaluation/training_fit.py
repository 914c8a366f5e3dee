"""How well a trained detector fits its own training images, so that a bad part among them shows."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from efficientad.data.decoding import ImageError, read_image
from efficientad.evaluation.evaluation import MapSource
from efficientad.model.calibration import Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.good_images import odd_images
from efficientad.results.plain_path import RawMaps, distance_maps, image_score, sized_map
from efficientad.utils.files import plain_text
from efficientad.utils.sampling import evenly

MOST_IMAGES = 1000  # scored; evenly spread over all of them
WORST = 5


@dataclass(frozen=True)
class Misfit:
    """A training image with a high score.

    Attributes:
        path, score: of the image. far: whether it lies far above all others' scores.
        image: uint8 (H, W, 3). anomaly_map: (H, W) float32.
    """

    path: Path
    score: float
    far: bool
    image: np.ndarray
    anomaly_map: np.ndarray


@dataclass(frozen=True)
class TrainingFit:
    """Scores of a detector's training images.

    Attributes:
        scores: of the images that were looked at and could be read. images: how many there are.
        worst: up to five of them with the highest scores, the highest first.
        failed: (path, reason) of those that could not be read.
    """

    images: int
    scores: list[float] = field(default_factory=list)
    worst: list[Misfit] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def training_fit(
    detector: EfficientAD,
    paths: Sequence[Path],
    *,
    predictor: MapSource | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> TrainingFit:
    """Score the images that a detector was trained on, and find those that fit worst.

    Their scores are lower than those of other good images. A bad part among them has been learned,
    too, but of few like it less well than the others.

    Args:
        detector: calibrated; it runs on its own device.
        paths: the training images; of more than `MOST_IMAGES` so many, evenly spread.
        predictor: the detector's `FastPredictor` on the same device; None: the detector itself.
        workers: decoding threads. progress: called with (what, images done, images in all).

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
    """
    if not detector.calibrated:
        detector.raise_uncalibrated()
    chosen = [paths[i] for i in evenly(len(paths), MOST_IMAGES)]
    fit = TrainingFit(len(paths))
    read: list[Path] = []
    highest: list[tuple[float, int, RawMaps]] = []

    def failed(index: int, source: object, error: ImageError) -> None:
        fit.failed.append((str(source), error.reason))

    if predictor is None:
        raws = distance_maps(detector, chosen, workers=workers, on_error=failed)
    else:
        raws = predictor.distance_maps(chosen, workers=workers, on_error=failed)
    with closing(raws):
        for raw in raws:
            score = image_score(detector, raw)
            read.append(chosen[raw.index])
            fit.scores.append(score)
            rank = math.inf if math.isnan(score) else score
            heapq.heappush(highest, (rank, -raw.index, raw))
            if len(highest) > WORST:
                heapq.heappop(highest)
            if progress is not None:
                progress("fit of the training images", raw.index + 1, len(chosen))
    far = set(odd_images(read, fit.scores))
    for rank, _, raw in sorted(highest, reverse=True):
        path = chosen[raw.index]
        try:
            image = read_image(path, detector.value_range)
        except ImageError as error:
            fit.failed.append((str(path), error.reason))
            continue
        heat = sized_map(detector, raw, raw.source_size)
        fit.worst.append(Misfit(path, rank, plain_text(path) in far, image, heat))
    return fit
