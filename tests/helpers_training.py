"""Thin networks and small pictures, with which a training step takes milliseconds.

As a program, `python helpers_training.py FOLDER STEPS` trains and prints every step: to be killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from efficientad import EfficientAD
from efficientad.training.pictures import Photos, PictureSource, TrainingImages
from efficientad.training.settings import Settings
from efficientad.training.trainer import Trainer

WIDTH = 4


def thin_detector(size: str = "S", seed: int = 0, **options) -> EfficientAD:
    """An EfficientAD whose inner layers have 4 channels; its outputs have the usual width."""
    torch.manual_seed(seed)
    detector = EfficientAD(size, **options)
    for net in (detector.teacher, detector.student, *detector.autoencoder.children()):
        convs = list(net.named_children())
        for i, (name, conv) in enumerate(convs):
            first = i == 0 and conv.in_channels == 3
            last = i == len(convs) - 1 and conv.out_channels >= 384
            thin = nn.Conv2d(
                3 if first else WIDTH,
                conv.out_channels if last else WIDTH,
                conv.kernel_size,
                conv.stride,
                conv.padding,
            )
            setattr(net, name, thin)
    detector.teacher.requires_grad_(False)
    return detector


def write_pictures(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 50)):
    """PNG pictures of a smooth pattern that differs a little from one to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base = rng.uniform(0, 255, (5, 6, 3))
    for i in range(count):
        pixels = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03}.png")
    return folder


def thin_trainer(
    folder: Path, steps: int, *, photos: bool = True, device: str = "cpu", **options
) -> Trainer:
    """A trainer on the pictures of folder/good, and folder/photos."""
    settings = {
        name: options.pop(name)
        for name in ("batch_size", "seed", "hard_quantile", "learning_rate", "log_every")
        if name in options
    }
    settings = Settings(steps, **{"log_every": 2, **settings})
    images = TrainingImages(sorted((folder / "good").iterdir()), (256, 256))
    set_of_photos = Photos(folder / "photos", (256, 256), settings.seed) if photos else None
    source = PictureSource(
        images, set_of_photos, seed=settings.seed, batch_size=settings.batch_size
    )
    return Trainer(thin_detector().to(device), source, settings, **options)


def main(folder: str, steps: str) -> None:
    torch.set_num_threads(1)
    trainer = thin_trainer(Path(folder), int(steps))
    trainer.prepare()
    trainer.run(
        checkpoint=Path(folder) / "state",
        checkpoint_every=3,
        progress=lambda what, done, total: print(what, done, flush=True),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
