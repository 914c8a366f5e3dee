"""What `drift` sees of another light, another focus and noise, on the demo's drawn parts.

    python -m bench.training.drift --out runs/drift

An instant detector of 100 parts, calibrated on 100 others, looks at 100 more, as they are and
changed. A row for each change says what a stretch of these looks like beside the calibration, by
the scores and by the means of the maps. The detector in the output folder is kept and used again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from bench import record
from efficientad.checkpoint.loading import load
from efficientad.demo.parts import write_dataset
from efficientad.evaluation.drift import find_drift
from efficientad.fast.predictor import FastPredictor
from efficientad.model.calibration import calibrate
from efficientad.model.trust import calibration_of
from efficientad.training.fitting import fit

COUNT = 100  # parts of each of the three
FACTORS = (0.98, 0.96, 0.94, 0.9, 1.02, 1.05)  # of brightness
RADII = (0.3, 0.5, 0.8)  # of a Gaussian blur, pixels
NOISE = (2.0, 4.0)  # levels, standard deviation


def levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def lit(image: np.ndarray, factor: float) -> np.ndarray:
    return levels(factor * image)


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: np.ndarray, spread: float) -> np.ndarray:
    rng = np.random.default_rng(int(image.sum()))  # another noise for each picture
    return levels(image + rng.normal(0, spread, image.shape))


def changes() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> what is done to a picture, uint8 (H, W, 3)."""
    return {
        "as they are": lambda image: image,
        **{f"{f:g} of the light": partial(lit, factor=f) for f in FACTORS},
        **{f"blurred by {r:g} pixels": partial(blurred, radius=r) for r in RADII},
        **{f"noise of {s:g} levels": partial(noisy, spread=s) for s in NOISE},
    }


def measure(out: Path) -> list[record.Row]:
    """A row for each change."""
    parts = out / "parts"
    if not parts.exists():
        write_dataset(parts, train=3 * COUNT, good=1, per_defect=1)
    paths = sorted((parts / "train" / "good").glob("*.png"))
    file = out / "detector.safetensors"
    if not file.exists():
        learn = out / "learn"
        learn.mkdir(exist_ok=True)
        for path in paths[:COUNT]:
            shutil.copy(path, learn)
        fit(learn, schedule="instant", device="cpu", out=file)
    detector = calibrate(load(file), paths[COUNT : 2 * COUNT], statistics=False)
    calibration, threshold = calibration_of(detector.provenance), detector.threshold
    assert calibration is not None
    predictor = FastPredictor(detector, device="cpu")
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths[2 * COUNT :]]
    rows = []
    for name, change in changes().items():
        results = [predictor(change(picture), map_size="input").cpu() for picture in pictures]
        means = [result.map_mean() for result in results]
        scores = [result.score for result in results]
        found = find_drift(scores, calibration, threshold, map_means=means)
        row: record.Row = {"change": name, "parts": len(results), "above": found.above}
        for figure, one in (("score", found.score), ("map_mean", found.map_mean)):
            if one is not None:  # some lie below the threshold, and are compared
                row |= {
                    f"{figure}_p": one.p_value,
                    f"{figure}_distance": one.distance,
                    f"{figure}_medians": one.medians,
                    f"{figure}_drifted": one.since is not None,
                }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> int:
    """Measure, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for parts and detector")
    parser.add_argument("--json", type=Path, default=record.RESULTS / "drift_demo.json")
    options = parser.parse_args()
    record.write(options.json, record.about(), measure(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
