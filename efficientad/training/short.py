"""The short schedule: closed form, a thousand gradient steps of the student, closed form again.

It begins where the instant schedule ends. The student's half that the teacher is compared with is
then trained with its inner layers, by the hard loss, on images of changed brightness whose teacher
features are those of the changed image; what the autoencoder is compared with is solved anew on the
inner layers that came out. The autoencoder stays as it was solved.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.model.calibration import Progress
from efficientad.model.region import of_cells
from efficientad.training.closed_form import GAINS, solve_last_layers, solve_second_half
from efficientad.training.losses import (
    FIRST,
    StepInputs,
    hard_loss,
    head,
    squared_difference,
    standardized,
    teacher_features,
    trunk,
)
from efficientad.training.pictures import Pictures, jitter, to_rgb
from efficientad.training.trainer import Trainer

_WARM_UP = 0.1  # part of the steps over which the learning rate rises


def brightened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (H, W, 3) in 0..1 times a factor of U(0.85, 1.1), clipped."""
    return jitter(image.astype(np.float32) / 255, "brightness", float(rng.uniform(*GAINS)))


class ShortTrainer(Trainer):
    """Trains the student's first half; pictures are `brightened`, and there are no photos."""

    algorithm = "closed form, then the student's steps (docs/training.md, short)"
    terms = ("hard",)

    def prepare(self, workers: int = 2, progress: Progress | None = None) -> None:
        """Channel statistics and the last layers in closed form; leaves out unreadable images."""
        solve_last_layers(
            self.detector, self.source.images, **self._options, workers=workers, progress=progress
        )

    def finish(self, workers: int = 2, progress: Progress | None = None) -> None:
        """What the autoencoder is compared with, on the inner layers as they are now."""
        solve_second_half(
            self.detector, self.source.images, **self._options, workers=workers, progress=progress
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {"seed": self.settings.seed, "half": self.half}

    def rate(self, step: int) -> float:
        """One cycle: up to the base rate over a tenth of the steps, down to zero as a cosine."""
        base, done = self.settings.learning_rate, (step + 1) / self.settings.steps
        if done <= _WARM_UP:
            return base * done / _WARM_UP
        return base * 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))

    def inputs(self, pictures: Pictures) -> StepInputs:
        """The changed images alone."""
        image = to_rgb(pictures.augmented, self.device)
        return StepInputs(image, image, None, None)

    def losses(self, inputs: StepInputs) -> Tensor:
        """Hard loss between the student's first half and the teacher, (1,)."""
        detector, image = self.detector, inputs.image
        target = standardized(detector, teacher_features(detector, image))
        inner = trunk(detector.student, detector.normalize(image))
        distances = squared_difference(target, head(detector.student, inner, FIRST))
        distances = of_cells(distances, self.cells)
        return torch.stack([hard_loss(distances, self.settings.hard_quantile)])
