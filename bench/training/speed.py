"""Steps per second of the training against the paper's algorithm as a plain eager loop.

    python -m bench.training.speed [--steps 5] [--rounds 3] [--size S] [--json FILE]

Both loops run in one process on the same drawn parts, photos, first weights and teacher (random
weights: the work is the same). The plain loop is Algorithm 1 as it is written: batch 1, float32,
NCHW, the teacher computed for both pictures, three student passes, torch.quantile, unfused Adam,
decoding in line. The loops take turns, `rounds` times `steps` steps each, so that a busy machine
slows both; the ratio is that of the median times per step. The pictures of a step are the same in
both; the dropout masks too, since each step seeds them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import record
from efficientad.data.decoding import read_image
from efficientad.data.image_files import find_images
from efficientad.data.images import resize_image, to_tensor
from efficientad.demo.parts import write_dataset
from efficientad.model.detector import EfficientAD
from efficientad.training.losses import learning_rate
from efficientad.training.pictures import (
    Photos,
    PictureSource,
    TrainingImages,
    augmented,
    penalty_photo,
)
from efficientad.training.settings import Settings
from efficientad.training.trainer import Trainer
from efficientad.utils.devices import lay_out
from efficientad.utils.prefetch import ahead
from efficientad.utils.sampling import random_numbers, shuffled

IMAGES, PHOTOS, SIDE = 12, 12, 256


class PlainLoop:
    """Algorithm 1 without a thought for speed; the same pictures and masks as the trainer's."""

    def __init__(self, detector: EfficientAD, trainer: Trainer) -> None:
        self.detector, self.settings, self.trainer = detector, trainer.settings, trainer
        self.device = detector.teacher_mean.device
        photos = trainer.source.photos
        assert photos is not None  # the penalty is one of the terms
        self.images, self.photos = trainer.source.images.paths, photos.paths
        parameters = [*detector.student.parameters(), *detector.autoencoder.parameters()]
        self.optimizer = torch.optim.Adam(
            parameters, lr=1e-4, weight_decay=1e-5, foreach=False, fused=False
        )
        self.step = 0
        detector.autoencoder.train()

    def pictures(self) -> list[torch.Tensor]:
        seed, step, size = self.settings.seed, self.step, (SIDE, SIDE)
        path = self.images[shuffled(seed, "images", len(self.images), step)]
        image = resize_image(read_image(path), size)
        pixels = augmented(image, random_numbers(seed, "augmentation", step, 0))
        photo = read_image(self.photos[shuffled(seed, "photos", len(self.photos), step)])
        photo = penalty_photo(photo, size, random_numbers(seed, "photo", step, 0))
        changed = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
        found = (to_tensor([image]), changed, to_tensor([photo]))
        return [self.detector.normalize(x.to(self.device)) for x in found]

    def __call__(self) -> float:
        detector, s = self.detector, self.settings
        image, changed, photo = self.pictures()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, s.steps, s.learning_rate)
        with self.trainer.seeded(self.step):
            with torch.no_grad():
                target = (detector.teacher(image) - detector.teacher_mean) / detector.teacher_std
            distances = (target - detector.student(image)[:, :384]) ** 2
            limit = torch.quantile(distances.flatten(), s.hard_quantile)
            hard = distances[distances >= limit].mean()
            penalty = (detector.student(photo)[:, :384] ** 2).mean()
            autoencoder = detector.autoencoder(changed)
            with torch.no_grad():
                target = (detector.teacher(changed) - detector.teacher_mean) / detector.teacher_std
            second = detector.student(changed)[:, 384:]
            loss = hard + penalty
            loss = (
                loss + ((target - autoencoder) ** 2).mean() + ((autoencoder - second) ** 2).mean()
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.step += 1
        return loss.item()


def write_pictures(folder: Path) -> None:
    """Drawn parts, and photos of smooth random colours as JPEG of 640 x 480."""
    write_dataset(folder, train=IMAGES, good=0, per_defect=0)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        photo = small.resize((640, 480), Image.Resampling.BICUBIC)
        photo.save(folder / "photos" / f"{i:02}.jpg", quality=90)


def new_trainer(folder: Path, options: argparse.Namespace) -> Trainer:
    """The trainer as `fit` makes it, with a random teacher."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    detector = EfficientAD(options.size).to(device)
    if device.type == "cuda" or options.dtype != "float32":
        lay_out(detector, torch.channels_last)
    settings = Settings(steps=10**6, dtype=options.dtype, learning_rate=options.learning_rate)
    images = TrainingImages(find_images(folder / "train" / "good"), (SIDE, SIDE))
    photos = Photos(folder / "photos", (SIDE, SIDE), settings.seed)
    source = PictureSource(
        images, photos, seed=settings.seed, batch_size=1, pinned=device.type == "cuda"
    )
    return Trainer(detector, source, settings)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds per step of both loops, taking turns, and their losses step by step."""
    write_pictures(folder)
    trainer = new_trainer(folder, options)
    trainer.prepare()
    torch.manual_seed(0)
    detector = EfficientAD(options.size).to(trainer.device)  # the same first weights
    detector.set_statistics(trainer.detector.teacher_mean, trainer.detector.teacher_std)
    plain = PlainLoop(detector, trainer)
    trainer.detector.autoencoder.train()
    losses: dict[str, list[float]] = {"plain": [], "trainer": []}
    seconds: dict[str, list[float]] = {"plain": [], "trainer": []}
    total = options.warm_up + options.rounds * options.steps
    work: dict[str, list[float]] = {"plain": [], "trainer": []}
    pictures = ahead(trainer.source, range(total), workers=2, depth=5)

    def step(kind: str) -> None:
        start, used = time.perf_counter(), time.process_time()
        if kind == "plain":
            loss = plain()
        else:
            loss = trainer.one_step(next(pictures)).double().sum().item()  # waits for the device
        seconds[kind].append(time.perf_counter() - start)
        work[kind].append(time.process_time() - used)
        losses[kind].append(loss)

    for kind in ("plain", "trainer"):
        for _ in range(options.warm_up):
            step(kind)
    for _ in range(options.rounds):
        for kind in ("plain", "trainer"):
            for _ in range(options.steps):
                step(kind)
    pictures.close()
    timed = {kind: values[options.warm_up :] for kind, values in seconds.items()}
    cpu = {kind: statistics.median(values[options.warm_up :]) for kind, values in work.items()}
    median = {kind: statistics.median(values) for kind, values in timed.items()}
    differences = [abs(a - b) / a for a, b in zip(losses["plain"], losses["trainer"], strict=True)]
    return {
        "size": options.size,
        "kind": "training",
        "device": trainer.device.type,
        "dtype": options.dtype,
        "steps": len(timed["plain"]),
        "steps_per_second": {kind: 1 / value for kind, value in median.items()},
        "seconds_per_step_min_median_max": {
            kind: [min(values), median[kind], max(values)] for kind, values in timed.items()
        },
        "ratio": median["plain"] / median["trainer"],
        "ratio_of_fastest_steps": min(timed["plain"]) / min(timed["trainer"]),
        "cpu_seconds_per_step": cpu,  # of all threads: less moved by other programs
        "ratio_of_cpu_seconds": cpu["plain"] / cpu["trainer"],
        "losses": losses,
        "largest_relative_difference_of_losses": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("S", "M"), default="S")
    parser.add_argument("--steps", type=int, default=3, help="of each loop, per turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each before the clock")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        record.write(options.json, record.about(options.device), [result])


if __name__ == "__main__":
    main()
