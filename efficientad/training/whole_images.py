"""The global term of a trained detector, from the images that it was trained on."""

from __future__ import annotations

import torch

from efficientad.model.calibration import Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.global_term import GlobalTerm, check_images, fitted, means_of_hidden
from efficientad.training.closed_form import GAINS
from efficientad.training.losses import trunk
from efficientad.training.pictures import TrainingImages, to_rgb
from efficientad.utils.sampling import random_numbers


@torch.no_grad()
def solve_term(
    detector: EfficientAD,
    images: TrainingImages,
    *,
    seed: int,
    workers: int = 2,
    progress: Progress | None = None,
) -> GlobalTerm:
    """Mean and covariance of the student's spatial means over the good images.

    Each is looked at in another brightness, so that a brighter image is not an odd one: without
    that the distance measures brightness, and finds nothing else (docs/image-score.md). Unreadable
    images are left out.

    Raises:
        ValueError: no image can be read, too many are of one colour, or too few are left.
    """
    means = []
    for i, found in images.read_all("global term", workers, progress):
        gain = float(random_numbers(seed, "global term", i).uniform(*GAINS))
        image = to_rgb(torch.tensor(found)[None], detector.affine.device) * gain
        inner = trunk(detector.student, detector.normalize(image.clamp_(0, 1)))
        means.append(means_of_hidden(detector.student, inner.permute(0, 2, 3, 1)))
    check_images(len(means))
    return fitted(torch.cat(means))
