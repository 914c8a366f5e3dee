"""Floor 5, imports everything below: `efficientad demo`, from nothing to a report of defects."""

from __future__ import annotations

from pathlib import Path

from efficientad.calibration import Progress, calibrate
from efficientad.checkpoint import load, save
from efficientad.data import open_dataset
from efficientad.demo_fit import closed_form_detector
from efficientad.demo_parts import write_dataset
from efficientad.evaluation import Evaluation, evaluate
from efficientad.images import load_batches

NOTE = (
    "A demonstration: the detector was fitted in closed form to drawn parts in about a minute. It "
    "is not an EfficientAD training, and its figures say nothing about real parts."
)


def run(out: str | Path, *, seed: int = 0, progress: Progress | None = None) -> Evaluation:
    """Draw a data set, fit, calibrate, save and reload a detector, evaluate it, write a report.

    Everything lands in the folder `out`: `parts/` (MVTec AD layout), `detector.safetensors` and
    `report/`. Works offline.

    Raises:
        ValueError: `out` holds something that is not an earlier demo.
    """
    out = Path(out)
    marker = out / "detector.safetensors"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"out is {str(out)!r}, which holds other files; name a new folder")
    print(f"drawing parts in {out / 'parts'}")
    dataset = open_dataset(write_dataset(out / "parts", seed=seed), "mvtec")
    print(f"fitting a detector to {len(dataset.train)} good parts")
    paths = [sample.path for sample in dataset.train]
    detector = closed_form_detector(
        [batch.images for batch in load_batches(paths, (256, 256))], seed=seed
    )
    calibrate(detector, dataset, progress=progress)
    save(detector, marker)
    print("looking at the test parts")
    return evaluate(
        load(marker), dataset, out=out / "report", overlays=True, notes=[NOTE], progress=progress
    )
