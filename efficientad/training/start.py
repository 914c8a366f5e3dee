"""What a training starts from: a detector with its teacher, and the layers that it borrows."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import nn

from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.teachers import default_teacher
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN


def new_detector(
    size: str,
    padding: bool,
    image_size: tuple[int, int],
    seed: int,
    teacher: PDN | str | os.PathLike | None,
) -> EfficientAD:
    """Student and autoencoder as torch initialises them, from the seed; the teacher loaded."""
    if teacher is None and size == "M":
        raise ValueError(
            "size is 'M' and no teacher is named; only a PDN-S teacher comes with the package: "
            "name the file of a PDN-M teacher with teacher (--teacher)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        detector = EfficientAD(size, padding=padding, image_size=image_size)
    if teacher is None:
        teacher = default_teacher()
    elif not isinstance(teacher, PDN):
        teacher = load_teacher(teacher)
    if teacher.size != size:
        raise ValueError(
            f"size is {size!r} and the teacher is a PDN-{teacher.size}; they must be the same"
        )
    detector.teacher.load_state_dict(teacher.state_dict())
    return detector


def start_from_teacher(detector: EfficientAD) -> None:
    """The student's inner layers become the teacher's, where both have the same shape."""
    teacher, student = detector.teacher.state_dict(), detector.student.state_dict()
    same = {name: value for name, value in teacher.items() if value.shape == student[name].shape}
    detector.student.load_state_dict({**student, **same})


def spread_autoencoder(detector: EfficientAD, seed: int) -> None:
    """Random weights for an autoencoder of which only the last layer will learn.

    With torch's own start an image fades over its fourteen layers and the decoder's features hardly
    differ between images. With He's (arXiv 1502.01852) every layer keeps their variance.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in detector.autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.1, generator=generator)


def teacher_digest(teacher: PDN) -> str:
    """Names a teacher's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return f"PDN-{teacher.size}, sha256 {digest.hexdigest()[:16]}"
