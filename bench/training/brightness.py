"""How much of a detector's accuracy is the brightness of the pictures.

    python -m bench.training.brightness part.safetensors mvtec/screw --name screw

In some sets the good test images are of another brightness than the defective ones: a detector
that measures brightness then looks better than it is. So image AU-ROC is taken twice, of the test
images as they are, and of the same with the mean of the held-out good ones. And the held-out good
images are made darker and brighter: the median of each map's maximum against the unchanged one's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bench import record
from bench.training.accuracy import add_rows, normalization, row_of
from bench.training.scores import measuring_parser
from efficientad.checkpoint.loading import load
from efficientad.data.datasets import Sample
from efficientad.data.decoding import read_image
from efficientad.data.layouts import open_dataset
from efficientad.evaluation.metrics import image_metrics
from efficientad.fast.predictor import FastPredictor
from efficientad.results.plain_path import RawMaps, image_score
from efficientad.utils.devices import choose_device

FACTORS = (0.9, 1.1)
# normalisation, as in bench.training.accuracy -> its raw map, if it is one alone
MAPS = {"quantiles": "", "student-teacher alone": "map_st", "autoencoder alone": "map_ae"}


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    """A uint8 image in another brightness, cut off at 255."""
    return np.clip(np.rint(image.astype(np.float32) * factor), 0, 255).astype(np.uint8)


def images(
    samples: Iterable[Sample], mean: float | None = None, factor: float = 1.0
) -> Iterator[np.ndarray]:
    """Images of samples; brought to a mean, or multiplied."""
    for sample in samples:
        image = read_image(sample.path)
        yield scaled(image, factor if mean is None else mean / max(float(image.mean()), 1.0))


def reaction(held_out: list[RawMaps], changed: list[RawMaps], kind: str) -> float:
    """Median of a raw map's maximum in another brightness, as a part of the unchanged one's."""
    usual, other = (
        np.median([float(getattr(raw, kind).max()) for raw in raws]) for raws in (held_out, changed)
    )
    return float(other / usual)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a detector; writes the rows and returns them."""
    dataset = open_dataset(options.data, options.layout)
    facts = record.about(choose_device(options.device))
    detector = load(options.detector)
    predictor = FastPredictor(detector, device=options.device, dtype="float32", batch_sizes=(1,))

    def maps(samples: Iterable[Sample], **change: float) -> list[RawMaps]:
        return list(predictor.distance_maps(images(samples, **change)))

    labels = [sample.label for sample in dataset.test]
    means = [float(image.mean()) for image in images(dataset.test)]
    level = float(np.mean([image.mean() for image in images(dataset.validation)]))
    held_out = maps(dataset.validation)
    tests = maps(dataset.test), maps(dataset.test, mean=level)
    changed = {factor: maps(dataset.validation, factor=factor) for factor in FACTORS}
    detector.to(predictor.device)
    own, training = detector.quantiles.tolist(), detector.provenance["training"]
    rows = []
    for name, kind in MAPS.items():
        detector.set_quantiles(*normalization(name, detector, held_out))
        as_is, same = (
            image_metrics(labels, [image_score(detector, raw) for raw in raws]).au_roc
            for raws in tests
        )
        detector.set_quantiles(*own)
        by_factor = {
            str(factor): reaction(held_out, raws, kind) for factor, raws in changed.items() if kind
        }
        rows.append(
            row_of(
                "brightness",
                f"{options.name}, brightness, maps: {name}",
                facts,
                dataset=dataset.name,
                size=detector.size,
                teacher=training["teacher"],
                schedule=training["schedule"],
                normalization=name,
                image_auroc=as_is,
                image_auroc_same_mean=same,
                brightness_auroc=image_metrics(labels, means).au_roc,
                maximum_by_brightness=by_factor,
                backend=predictor.facts["backend"],
                test_images=len(labels),
            )
        )
        print(json.dumps(rows[-1]), flush=True)
    add_rows(options.json, rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return measuring_parser(__doc__.partition("\n")[0])


if __name__ == "__main__":
    run(parser().parse_args())
