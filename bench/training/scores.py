"""Image AU-ROC of a trained detector by how its maps become scores; nothing is trained.

    python -m bench.training.scores part.safetensors mvtec/screw --name screw --scores max 1 10 100

The networks run once, on the fast path in float32; every score is taken of the same maps. A row for
each, without figures of the pixels, which do not depend on it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench import record
from bench.training.accuracy import TABLE, add_rows, image_auroc, row_of
from efficientad.checkpoint.loading import load
from efficientad.data.layouts import open_dataset
from efficientad.fast.predictor import FastPredictor
from efficientad.model.image_score import described
from efficientad.utils.devices import choose_device

SCORES = ("max", 1, 3, 10, 30, 100, 300)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score the test images by every rule; writes the rows and returns them."""
    dataset = open_dataset(options.data, options.layout)
    facts = record.about(choose_device(options.device))
    detector = load(options.detector)
    start = time.monotonic()
    predictor = FastPredictor(detector, device=options.device, dtype="float32", batch_sizes=(1,))
    raws = list(predictor.distance_maps([sample.path for sample in dataset.test]))
    seconds = time.monotonic() - start
    detector.to(predictor.device)
    training = detector.provenance["training"]
    rows = [
        row_of(
            "score",
            f"{options.name}, score: {described(score)}",
            facts,
            dataset=dataset.name,
            size=detector.size,
            teacher=training["teacher"],
            schedule=training["schedule"],
            score=score,
            image_auroc=image_auroc(detector, dataset, raws, score),
            normalization="quantiles",
            backend=predictor.facts["backend"],
            seconds=round(seconds, 1),
            test_images=len(raws),
        )
        for score in options.scores
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    add_rows(options.json, rows)
    return rows


def measuring_parser(description: str) -> argparse.ArgumentParser:
    """The words of a command that measures a trained detector on a data set."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("detector", type=Path, help="file of a detector that `train` wrote")
    add("data", type=Path, help="data set with a test part")
    add("--layout", choices=("auto", "mvtec", "loco", "visa"), default="auto")
    add("--name", required=True, help="of the detector, in the table")
    add("--device", default="auto")
    add("--json", type=Path, default=TABLE, help="the table")
    return made


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = measuring_parser(__doc__.partition("\n")[0])
    made.add_argument(
        "--scores",
        nargs="+",
        default=SCORES,
        type=lambda text: int(text) if text.isdecimal() else text,
        metavar="max|K",
        help="maximum, or mean of the K largest cells",
    )
    return made


if __name__ == "__main__":
    run(parser().parse_args())
