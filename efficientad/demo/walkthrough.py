"""`efficientad demo`, from nothing to a report of defects."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from efficientad.checkpoint.loading import load
from efficientad.checkpoint.native_file import save
from efficientad.data.layouts import open_dataset
from efficientad.demo.parts import write_dataset
from efficientad.evaluation.evaluation import Evaluation, evaluate
from efficientad.model.calibration import Progress
from efficientad.training.fitting import fit
from efficientad.training.settings import PenaltyWarning

# A real training that fits into a coffee break: Algorithm 1 with a hundredth of its steps needs a
# student that starts near the teacher, all elements in its loss, and larger steps.
STEPS = 120
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "hard_quantile": 0.0,
    "warm_start": True,
    "log_every": 10,
}
NOTE = (
    f"A demonstration: the detector was trained for {STEPS} steps on drawn parts, with the default "
    "teacher, a warm start and no pretraining penalty. The paper's training has 70,000 steps, and "
    "these figures say nothing about real parts."
)


def run(
    out: str | Path, *, seed: int = 0, steps: int = STEPS, progress: Progress | None = None
) -> Evaluation:
    """Draw a data set, train, calibrate, save and reload a detector, evaluate it, write a report.

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
    print(f"training a detector on {len(dataset.train)} good parts, {steps} steps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PenaltyWarning)
        detector = fit(dataset, steps=steps, seed=seed, progress=progress, **RECIPE)
    save(detector, model)
    print("looking at the test parts")
    return evaluate(
        load(model), dataset, out=out / "report", overlays=True, notes=[NOTE], progress=progress
    )
