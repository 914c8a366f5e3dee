"""A detector's figures on a test set."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from efficientad.data.datasets import GOOD, DataSet, Sample
from efficientad.data.decoding import read_image
from efficientad.data.layouts import open_dataset
from efficientad.data.masks import REMARKS
from efficientad.evaluation.aupimo import FPR_BOUNDS
from efficientad.evaluation.intervals import au_roc_interval
from efficientad.evaluation.metrics import PixelMetrics, image_metrics, saturated_pro
from efficientad.model.calibration import Progress
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.model.image_score import score_notes
from efficientad.model.region import share
from efficientad.results.output_folder import ResultFolder, unique_names
from efficientad.results.plain_path import (
    OnError,
    RawMaps,
    distance_maps,
    image_score,
    sized_map,
)
from efficientad.results.prediction import Prediction, is_anomalous
from efficientad.utils.files import listed, plain_text

_LISTED = 20  # names in a note
_AUPIMO_OF = "AUPIMO, images with a mask"


class MapSource(Protocol):
    """What `evaluate` asks of a `FastPredictor`."""

    facts: dict[str, Any]

    def distance_maps(
        self, sources: Iterable[Any], *, workers: int = 2, on_error: OnError | None = None
    ) -> Generator[RawMaps, None, None]:
        """Raw maps of images, one by one, on the detector's device."""


class EvaluationStopped(KeyboardInterrupt):
    """Ctrl-C came during an evaluation; the report of what was scored by then is written."""


@dataclass
class Evaluation:
    """What a detector does on the test images of a data set.

    Attributes:
        dataset: its name.
        metrics: figure -> value, None where it is undefined (one class only, no masks). AU-ROC, AP
            and F1-max of the images, AU-ROC per defect (each against the good images), AU-ROC and
            AU-PRO of the pixels, AUPIMO and of how many images it is the mean, for MVTec LOCO AD in
            place of both the saturated AU-PRO of its authors, and with a threshold the numbers of
            false alarms and missed defects.
        samples, scores: the test images that were scored, and their scores.
        failed: (path, reason) of the others, and of those whose pictures could not be written.
        notes: sentences about what is missing (masks, and with them the figures of the pixels) and
            about masks that do not say plainly what they mark (see `efficientad.data.masks`).
        undefined: figure -> why it is None.
        arithmetic: what computed the scores: dtype, network and device.
    """

    dataset: str
    metrics: dict[str, float | int | None]
    samples: list[Sample] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undefined: dict[str, str] = field(default_factory=dict)
    arithmetic: str = ""


def evaluate(
    detector: EfficientAD,
    data: DataSet | str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    maps: bool = False,
    overlays: bool = False,
    min_area: float = 0,
    notes: Sequence[str] = (),
    batch_size: int = 8,
    workers: int = 2,
    progress: Progress | None = None,
    predictor: MapSource | None = None,
) -> Evaluation:
    """Score the test images of a data set and compute its metrics, in bounded memory.

    Args:
        detector: calibrated; it runs on its own device.
        data: a `DataSet`, or a folder in one of the layouts of `open_dataset`.
        out: folder for `report.html`, `scores.csv` and `scores.json`; None writes nothing.
        maps: also write `maps/<object>/test/<defect>/<stem>.tiff`, float32 at the image's own size,
            as the MVTec evaluation scripts read them; names alike but for the suffix keep it.
        overlays: also write a picture per image.
        min_area: regions above the threshold of fewer pixels of the image are not listed in `out`.
        notes: sentences for the report.
        batch_size, workers: images per forward pass and decoding threads.
        progress: called with (what, images done, images in all).
        predictor: the detector's `FastPredictor` on the detector's device: its arithmetic is judged
            then, image by image. None: the detector itself in float32, as in `efficientad.predict`.

    Maps are resized, bilinear, to the size of the masks, which are read by the rules of
    `efficientad.data.masks`. An image or mask that cannot be read and a score that is not finite
    are listed in `failed` and left out of the metrics.

    Raises:
        ValueError: not a detector, no test images; UncalibratedError: no statistics or quantiles.
        EvaluationStopped: Ctrl-C, a KeyboardInterrupt; with `out` the report of what was scored by
            then is written first.
    """
    check_detector(detector)
    dataset = data if isinstance(data, DataSet) else open_dataset(data)
    if not dataset.test:
        raise ValueError(
            f"{dataset.root} has no test images; `predict` scores images without labels"
        )
    if not detector.calibrated:
        detector.raise_uncalibrated()
    result = Evaluation(dataset.name, {}, notes=[*dataset.notes, *_missing_masks(dataset)])
    result.notes += score_notes(detector.score)
    if detector.region is not None:
        result.notes.append(
            f"Inspected is {100 * share(detector.region):.1f} % of the frame, outlined in blue; a "
            "defect outside counts as missed."
        )
    result.arithmetic = _arithmetic(detector, predictor)
    folder = None
    if out is not None:
        folder = ResultFolder(
            Path(out),
            detector.threshold,
            overlays=Path(out) / "overlays" if overlays else None,
            maps=Path(out) / "maps" / dataset.name / "test" if maps else None,
            min_area=min_area,
            score=detector.score,
            failed=result.failed,
        )
    run = _Run(detector, dataset, result, folder)
    paths = [sample.path for sample in dataset.test]
    options: dict[str, Any] = {
        "workers": workers,
        "on_error": lambda index, source, error: run.fail(source, error.reason),
    }
    if predictor is None:
        raws = distance_maps(detector, paths, batch_size=batch_size, **options)
    else:
        raws = predictor.distance_maps(paths, **options)
    stopped = False
    try:
        with closing(raws):
            for raw in raws:
                if progress is not None:
                    progress("test images", raw.index + 1, len(dataset.test))
                run.add(raw)
    except KeyboardInterrupt:
        stopped = True
        done = f"{len(result.scores)} of {len(dataset.test)} test images"
        result.notes.insert(0, f"The evaluation stopped early: {done} were scored.")

    result.metrics = _figures(result, dataset, run.pixels, detector.threshold)
    result.notes += _remarks(run.remarks)
    result.undefined = _undefined(result)
    if folder is not None:
        said = [*notes, *result.notes, *_reasons(result.undefined)]
        if predictor is not None:
            said.append(f"Scores were computed in {result.arithmetic}.")
        folder.close(f"Evaluation on {dataset.name}", metrics=result.metrics, notes=said)
    if stopped:
        raise EvaluationStopped(f"stopped: {done} were scored")
    return result


class _Run:
    """The loop of `evaluate`: what every image adds to the result, the folder and the metrics."""

    def __init__(
        self,
        detector: EfficientAD,
        dataset: DataSet,
        result: Evaluation,
        folder: ResultFolder | None,
    ) -> None:
        self.detector, self.dataset = detector, dataset
        self.result, self.folder = result, folder
        self.remarks: dict[str, list[str]] = defaultdict(list)
        # Saturated PRO is defined per folder of test images; each accumulator takes up to 64 MB.
        self.pixels: dict[str, PixelMetrics] = defaultdict(PixelMetrics)
        self.region = None if detector.region is None else detector.region.cpu()
        self._names = unique_names([Path(s.defect) / s.path.name for s in dataset.test])

    def fail(self, path: Path, reason: str) -> None:
        """List an image that gave no score, or whose score does not count."""
        self.result.failed.append((plain_text(path), plain_text(reason)))

    def add(self, raw: RawMaps) -> None:
        """Score an image and compare its map with its mask."""
        detector, dataset = self.detector, self.dataset
        sample = dataset.test[raw.index]
        score = image_score(detector, raw)
        own_size = sized_map(detector, raw, raw.source_size)
        if self.folder is not None:
            self.folder.add(
                Prediction(
                    raw.index,
                    score,
                    detector.threshold,
                    own_size,
                    raw.source_size,
                    region=self.region,
                ),
                sample.path,
                self._names[raw.index],
                image=read_image(sample.path, detector.value_range),
                label=sample.label,
                defect=sample.defect,
            )
        if not math.isfinite(score):
            return self.fail(sample.path, f"its score is {score}")
        if dataset.has_masks:
            try:
                _add_pixels(self.pixels, self.remarks, detector, dataset, raw, own_size)
            except (ValueError, FileNotFoundError) as error:  # ImageError is a ValueError
                return self.fail(sample.path, f"mask: {error}")
        self.result.samples.append(sample)
        self.result.scores.append(score)
        return None


def _arithmetic(detector: EfficientAD, predictor: MapSource | None) -> str:
    """What computes: dtype, network and device."""
    if predictor is None:
        return f"float32, the detector itself, on {detector.affine.device}"
    return "{dtype}, {backend}, on {device}".format(**predictor.facts)


def _missing_masks(dataset: DataSet) -> list[str]:
    """A sentence that says why there are no figures of the pixels, if masks are missing."""
    missing = dataset.without_masks
    if not missing:
        return []
    count = sum(sample.label for sample in dataset.test)
    if len(missing) == count:
        return ["No figures of the pixels: no defective test image has a mask."]
    names = [f"{sample.defect}/{sample.path.name}" for sample in missing]
    return [
        f"No figures of the pixels: {len(missing)} of {count} defective test images have no mask: "
        f"{listed(names, _LISTED)}."
    ]


def _add_pixels(
    pixels: dict[str, PixelMetrics],
    remarks: dict[str, list[str]],
    detector: EfficientAD,
    dataset: DataSet,
    raw: RawMaps,
    own_size: np.ndarray,
) -> None:
    """Add a map, at the size of its mask, to the pixel metrics, and the remarks about the mask."""
    sample = dataset.test[raw.index]
    truth = dataset.read_truth(sample)
    for remark in truth.remarks:
        remarks[remark].append(f"{sample.defect}/{sample.path.name}")
    if sample.label and not truth.mask.any():
        return
    part = pixels[sample.defect if dataset.saturation else ""]
    height, width = truth.mask.shape
    same = (height, width) == raw.source_size
    sized = own_size if same else sized_map(detector, raw, (height, width))
    if dataset.saturation:
        part.update(sized, regions=truth.regions)
    else:
        part.update(sized, truth.mask)


def _remarks(remarks: dict[str, list[str]]) -> list[str]:
    """A sentence for every kind of remark about masks, with the pictures whose they are."""
    sentences = []
    for kind, sentence in REMARKS.items():
        if names := remarks.get(kind):
            sentences.append(f"{sentence}: {listed(names, _LISTED)}.")
    return sentences


def _undefined(result: Evaluation) -> dict[str, str]:
    """Why figures are None: what they compare with what was not there."""
    labels = {sample.label for sample in result.samples}
    scored = {sample.defect for sample in result.samples}
    reasons = {}
    for name, value in result.metrics.items():
        if value is not None:
            continue
        if not labels:
            reasons[name] = "no test image was scored"
        elif name.startswith("image"):
            missing = "defective" if 0 in labels else "good"
            reasons[name] = f"no {missing} test image was scored"
        elif labels == {0} or scored == {GOOD}:
            reasons[name] = "no defective test image was scored"
        elif name == "AUPIMO" and 0 not in labels:
            reasons[name] = "no good test image was scored"
        elif name == "AUPIMO" and result.metrics[_AUPIMO_OF]:
            reasons[name] = (
                "the good test images have too few pixels for a false positive rate of "
                f"{FPR_BOUNDS[0]:g}, or too many share the highest value"
            )
        else:
            reasons[name] = "no mask that was read marks a defect, or none leaves a good pixel"
    return reasons


def _reasons(undefined: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in undefined.items():
        names[reason].append(name)
    return [f"Undefined, because {why}: {', '.join(which)}." for why, which in names.items()]


def _figures(
    result: Evaluation,
    dataset: DataSet,
    pixels: dict[str, PixelMetrics],
    threshold: float | None,
) -> dict[str, float | int | None]:
    labels = [sample.label for sample in result.samples]
    image = image_metrics(labels, result.scores)
    low, high = au_roc_interval(labels, result.scores) or (None, None)
    figures: dict[str, float | int | None] = {
        "images": len(labels),
        "image AU-ROC": image.au_roc,
        "image AU-ROC, 95 % interval from": low,
        "image AU-ROC, 95 % interval to": high,
        "image AP": image.average_precision,
        "image F1-max": image.f1_max,
    }
    scored = list(zip(result.samples, result.scores, strict=True))
    for defect in sorted({sample.defect for sample in result.samples} - {GOOD}):
        part = [(s.label, score) for s, score in scored if s.defect in (GOOD, defect)]
        figures[f"image AU-ROC, {defect}"] = image_metrics(*zip(*part, strict=True)).au_roc
    if pixels:
        first, *rest = pixels.values()
        if dataset.saturation:
            for limit, area in saturated_pro(pixels)["mean"].items():
                figures[f"AU-sPRO, FPR {limit:g}"] = area
        for other in rest:
            first.merge(other)
        pixel = first.compute()
        figures["pixel AU-ROC"] = pixel.au_roc
        figures["pixel F1-max"] = pixel.f1_max
        if not dataset.saturation:
            for limit, area in pixel.au_pro.items():
                figures[f"AU-PRO, FPR {limit:g}"] = area
            figures["AUPIMO"] = pixel.mean_aupimo
            figures[_AUPIMO_OF] = len(first.found)
    if threshold is not None:
        verdicts = [
            (label, is_anomalous(score, threshold))
            for label, (_, score) in zip(labels, scored, strict=True)
        ]
        figures["false alarms"] = sum(flag and not label for label, flag in verdicts)
        figures["missed defects"] = sum(label and not flag for label, flag in verdicts)
    return figures
