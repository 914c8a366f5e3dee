"""The short schedule: closed form, a thousand gradient steps, closed form again.

The student begins where the instant schedule's ends, and the autoencoder from random numbers. The
student's half that the teacher is compared with is trained with its inner layers, by the hard loss,
on images of changed brightness whose teacher features are those of the changed image. Beside it the
autoencoder learns, from more images, to give the teacher's features of the image whose brightness
was not changed, so that it does not measure brightness. At the end what it is compared with is
solved on the inner layers that came out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.data.images import load_batches
from efficientad.model.calibration import Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.region import index_of, of_cells
from efficientad.training import closed_form
from efficientad.training.closed_form import GAINS, solve_last_layers, solve_second_half
from efficientad.training.losses import (
    FIRST,
    StepInputs,
    hard_loss,
    head,
    mean_of_differences,
    squared_difference,
    standardized,
    teacher_features,
    trunk,
)
from efficientad.training.pictures import Pictures, jitter, to_rgb
from efficientad.training.trainer import Trainer

AUTOENCODER_IMAGES = 8  # of a step; its step on one image costs an eighth of the student's
AUTOENCODER_RATE = 1e-3
_AUTOENCODER = {"autoencoder": {"images": AUTOENCODER_IMAGES, "learning_rate": AUTOENCODER_RATE}}
_WARM_UP = 0.1  # part of the steps over which the learning rates rise
LEAST_WEIGHT = 0.05  # of the autoencoder's map, where it explains nothing


def brightened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (H, W, 3) in 0..1 times a factor of U(0.85, 1.1), clipped."""
    return jitter(image.astype(np.float32) / 255, "brightness", float(rng.uniform(*GAINS)))


@torch.no_grad()
def autoencoder_weight(
    detector: EfficientAD, held_out: Iterable[Path], *, half: bool = False, workers: int = 2
) -> float:
    """How much its map counts: the square of what it explains of held-out good images.

    That is 1 - sum (T - A)^2 / sum T^2 over all cells that count, with T the teacher's standardised
    features, whose mean over the training images is 0; the result is at least `LEAST_WEIGHT`. What
    an autoencoder can't predict on good images is noise in its map, and no sign of a defect; the
    square is what several sets gained by (docs/training.md).

    Args:
        detector: with its channel statistics and a trained autoencoder, in eval mode.
        held_out: good images that were not trained on; unreadable ones are passed over.
        half: networks in bfloat16.
    """
    cells, device = index_of(detector.region_cells), detector.teacher_mean.device
    error = variance = 0.0
    for batch in load_batches(
        held_out,
        detector.image_size,
        batch_size=1,
        workers=workers,
        on_error=lambda index, path, reason: None,
        value_range=detector.value_range,
    ):
        image = batch.images.to(device)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            target = standardized(detector, teacher_features(detector, image))
            found = detector.autoencoder(detector.normalize(image))
        target = of_cells(target.float(), cells)
        error += squared_difference(target, of_cells(found, cells)).double().sum().item()
        variance += target.double().square().sum().item()
    explained = max(1 - error / variance, 0.0) if variance else 0.0
    return max(explained**2, LEAST_WEIGHT)


def facts() -> dict[str, Any]:
    """What a detector's file says of it."""
    solved = closed_form.facts()
    del solved["ridge"]["decoder"]  # learned here
    return {**solved, **_AUTOENCODER}


class ShortTrainer(Trainer):
    """Trains the student's first half and the autoencoder; pictures are `brightened`.

    The source gives as many pictures as the larger batch has; there are no photos.
    """

    algorithm = "closed form, then steps of student and autoencoder (docs/training.md, short)"
    terms = ("hard", "autoencoder")
    recipe = _AUTOENCODER

    def prepare(self, workers: int = 2, progress: Progress | None = None) -> None:
        """Channel statistics and the student's first half; leaves out unreadable images."""
        solve_last_layers(
            self.detector,
            self.source.images,
            autoencoder=False,
            **self._options,
            workers=workers,
            progress=progress,
        )

    def finish(self, workers: int = 2, progress: Progress | None = None) -> None:
        """What the autoencoder is compared with, on the inner layers as they are now."""
        solve_second_half(
            self.detector, self.source.images, **self._options, workers=workers, progress=progress
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {"seed": self.settings.seed, "half": self.half}

    def rates(self, step: int) -> tuple[float, float]:
        """One cycle: up to the base rate over a tenth of the steps, down to zero as a cosine."""
        done = (step + 1) / self.settings.steps
        part = done / _WARM_UP
        if part > 1:
            part = 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))
        return part * self.settings.learning_rate, part * AUTOENCODER_RATE

    def inputs(self, pictures: Pictures) -> StepInputs:
        """The changed images, the student's and the autoencoder's, and features of the latter.

        The features are those of the images as they are.
        """
        changed, n = to_rgb(pictures.augmented, self.device), AUTOENCODER_IMAGES
        image = to_rgb(pictures.image[:n], self.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half, cache_enabled=False):
            features = [
                self._teacher(i, image[k : k + 1]) for k, i in enumerate(pictures.indices[:n])
            ]
        return StepInputs(
            changed[: self.settings.batch_size], changed[:n], None, torch.cat(features)
        )

    def losses(self, inputs: StepInputs) -> Tensor:
        """Hard loss of the student's first half, and the autoencoder's mean loss, (2,)."""
        detector, image = self.detector, inputs.image
        target = standardized(detector, teacher_features(detector, image))
        inner = trunk(detector.student, detector.normalize(image))
        distances = squared_difference(target, head(detector.student, inner, FIRST))
        assert inputs.features is not None
        unchanged = (
            of_cells(standardized(detector, one), self.cells) for one in inputs.features.split(1)
        )
        found = detector.autoencoder(detector.normalize(inputs.augmented))
        return torch.stack(
            [
                hard_loss(of_cells(distances, self.cells), self.settings.hard_quantile),
                mean_of_differences(unchanged, of_cells(found, self.cells)),
            ]
        )
