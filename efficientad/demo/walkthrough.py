"""`efficientad demo`, from nothing to a report of defects."""

from __future__ import annotations

from pathlib import Path

from efficientad.checkpoint.loading import load
from efficientad.checkpoint.native_file import save
from efficientad.data.layouts import open_dataset
from efficientad.demo.parts import write_dataset
from efficientad.evaluation.evaluation import Evaluation, evaluate
from efficientad.model.calibration import Progress
from efficientad.training.fitting import fit

NOTE = (
    "A demonstration: the detector was made in closed form from drawn parts, with the default "
    "teacher and no gradient step (the instant schedule). The paper's training has 70,000 steps, "
    "and these figures say nothing about real parts."
)


def run(out: str | Path, *, seed: int = 0, progress: Progress | None = None) -> Evaluation:
    """Draw a data set, make, calibrate, save and reload a detector, evaluate it, write a report.

    Everything lands in the folder `out`: `parts/` (MVTec AD layout), `detector.safetensors` and
    `report/`. Works offline.

    Raises:
        ValueError: `out` holds something that is not an earlier demo.
        FileNotFoundError: the default teacher is missing from the installation.
    """
    out = Path(out)
    model = out / "detector.safetensors"
    others = (
        {p.name for p in out.iterdir()} - {"parts", "report", "verdicts", model.name}
        if out.exists()
        else ()
    )
    if others:
        raise ValueError(
            f"out is {str(out)!r}, which holds other files ({min(others)}); name a new folder"
        )
    print(f"drawing parts in {out / 'parts'}")
    dataset = open_dataset(write_dataset(out / "parts", seed=seed), "mvtec")
    print(f"making a detector from {len(dataset.train)} good parts")
    detector = fit(dataset, schedule="instant", seed=seed, progress=progress)
    save(detector, model)
    print("looking at the test parts")
    return evaluate(
        load(model), dataset, out=out / "report", overlays=True, notes=[NOTE], progress=progress
    )
