"""What the global term does to a trained detector's accuracy; its networks stay as they are.

    python -m bench.training.global_term part.safetensors mvtec/screw --name screw

The term is solved from the data set's training images and calibrated on its held-out ones, as `fit`
does it. Three rows: the detector with and without it, both calibrated here, and the term's distance
alone as a score, without figures of the pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np

from bench import record
from bench.training.accuracy import add_rows, figures, row_of
from bench.training.scores import measuring_parser
from efficientad.checkpoint.loading import load
from efficientad.data.datasets import DataSet
from efficientad.data.layouts import open_dataset
from efficientad.evaluation.metrics import image_metrics
from efficientad.fast.predictor import FastPredictor
from efficientad.model.calibration import calibrate
from efficientad.model.detector import EfficientAD
from efficientad.results.plain_path import RawMaps, image_score
from efficientad.training.pictures import TrainingImages
from efficientad.training.whole_images import solve_term
from efficientad.utils.devices import choose_device


def with_term(detector: EfficientAD, dataset: DataSet, seed: int) -> EfficientAD:
    """A copy with the term of the data set's training images."""
    found = copy.deepcopy(detector)
    paths = [sample.path for sample in dataset.train]
    images = TrainingImages(paths, found.image_size, value_range=found.value_range)
    found.set_global_term(solve_term(found, images, seed=seed))
    return found


def judged(detector: EfficientAD, dataset: DataSet, raws: list[RawMaps]) -> dict[str, Any]:
    """Figures of a calibrated detector, and the shares above its threshold."""
    assert detector.threshold is not None
    scores = np.array([image_score(detector, raw) for raw in raws])
    labels = np.array([dataset.test[raw.index].label for raw in raws])
    above = scores > detector.threshold
    return {
        **figures(detector, dataset, raws),
        "good_above_threshold": float(above[labels == 0].mean()),
        "defective_above_threshold": float(above[labels == 1].mean()),
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a detector; writes the rows and returns them."""
    dataset = open_dataset(options.data, options.layout)
    facts = record.about(choose_device(options.device))
    detector = load(options.detector).to(choose_device(options.device))
    detector.set_global_term(None)
    training, held_out = detector.provenance["training"], replace(dataset, train=dataset.validation)
    paths = [sample.path for sample in dataset.test]
    found: dict[str, dict[str, Any]] = {}
    start = time.monotonic()
    with_it = with_term(detector, dataset, options.seed)
    solved = time.monotonic() - start
    raws: dict[str, list[RawMaps]] = {}
    for name, one in (("without", detector), ("with", with_it)):
        calibrate(one, held_out, statistics=False)
        predictor = FastPredictor(one, device=options.device, dtype="float32", batch_sizes=(1,))
        raws[name] = list(predictor.distance_maps(paths))
        found[name] = judged(one, dataset, raws[name])
    # What lies below its start adds nothing, so that the distances alone are taken with start 0.
    assert with_it.global_term is not None
    with_it.global_term.set_line(1, 0)
    predictor = FastPredictor(with_it, device=options.device, dtype="float32", batch_sizes=(1,))
    alone = zip(predictor.distance_maps(paths), raws["without"], strict=True)
    distances = [float((a.map_st - b.map_st).mean()) for a, b in alone]
    labels = [sample.label for sample in dataset.test]
    found["alone"] = {"image_auroc": image_metrics(labels, distances).au_roc}
    rows = [
        row_of(
            "global term",
            f"{options.name}, global term: {name}",
            facts,
            dataset=dataset.name,
            size=detector.size,
            teacher=training["teacher"],
            schedule=training["schedule"],
            global_term=name,
            **values,
            seconds_to_solve=round(solved, 1),
            seed=options.seed,
            test_images=len(labels),
        )
        for name, values in found.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    add_rows(options.json, rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = measuring_parser(__doc__.partition("\n")[0])
    made.add_argument("--seed", type=int, default=42, help="of the brightness of the images")
    return made


if __name__ == "__main__":
    run(parser().parse_args())
