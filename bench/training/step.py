"""A step of the short schedule beside the same step as a plain loop, and its least time.

    python -m bench.training.step [--threads 2] [--rounds 4] [--dtype bfloat16] [--json FILE]

Two ways take turns in one process on the same pictures, first weights and teacher (random weights:
the work is the same): the step as it is written, in plain eager torch (NCHW, autocast, the teacher
computed for every picture, torch.quantile, unfused Adam), and the trainer's. The least time is what
the machine needs for the trainer's convolutions and products, forward and backward, at the rate of
the student's largest convolution, or for what its operations read and write, if nothing stays in a
cache, at the rate of a large copy. Both rates are measured here, with one thread and with the
step's, and the better one counts: two threads that share a core may have less than one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import record
from efficientad.data.image_files import find_images
from efficientad.demo.parts import write_dataset
from efficientad.model.detector import EfficientAD
from efficientad.training.closed_form import solve_last_layers
from efficientad.training.pictures import Pictures, PictureSource, TrainingImages, to_rgb
from efficientad.training.schedules import SETTINGS
from efficientad.training.settings import Settings
from efficientad.training.short import (
    AUTOENCODER_IMAGES,
    AUTOENCODER_RATE,
    ShortTrainer,
    brightened,
)
from efficientad.training.start import start_from_teacher
from efficientad.utils.devices import lay_out

IMAGES, SIDE = 12, 256
STEPS = 3  # of a turn
LARGEST = (2, 128, 125, 125), (256, 128, 4, 4)  # the student's second layer
COPIED = 64 << 20  # bytes
CALLS = 20
CELLS = 4096  # of the closed form before the first step, which is not measured
CPU = torch.device("cpu")


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views move nothing."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.nbytes += sum(x.nbytes for x in tensors)
        return found


class PlainStep:
    """The losses of `training.short` as they are written."""

    def __init__(self, detector: EfficientAD, trainer: ShortTrainer) -> None:
        self.detector, self.trainer = detector, trainer
        settings = trainer.settings
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(detector.student.parameters()), "lr": settings.learning_rate},
                {"params": list(detector.autoencoder.parameters()), "lr": AUTOENCODER_RATE},
            ],
            foreach=False,
            fused=False,
        )
        detector.autoencoder.train()

    def target(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.detector.teacher(image).float()
            return (found - self.detector.teacher_mean) / self.detector.teacher_std

    def __call__(self, pictures: Pictures, step: int) -> float:
        detector, settings = self.detector, self.trainer.settings
        changed, image = (
            detector.normalize(to_rgb(x, CPU)).contiguous()
            for x in (pictures.augmented, pictures.image)
        )
        for group, rate in zip(self.optimizer.param_groups, self.trainer.rates(step), strict=True):
            group["lr"] = rate
        few = changed[: settings.batch_size]
        half = settings.dtype == "bfloat16"
        with (
            self.trainer.seeded(step),
            torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False),
        ):
            distances = (self.target(few) - detector.student(few)[:, :384].float()).square()
            found = detector.autoencoder(changed)
            wanted = self.target(image)
        rows = distances.flatten(1)
        limit = torch.quantile(rows.detach(), settings.hard_quantile, dim=1, keepdim=True)
        hard = torch.stack([row[row >= q].mean() for row, q in zip(rows, limit, strict=True)])
        loss = hard.mean() + (wanted - found.float()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def new_trainer(folder: Path, dtype: str) -> ShortTrainer:
    """The trainer as `fit` makes it, with a random teacher, before its first step."""
    torch.manual_seed(0)
    detector = EfficientAD("S")
    start_from_teacher(detector)
    if dtype != "float32":
        lay_out(detector, torch.channels_last)
    settings = Settings(**SETTINGS["short"], dtype=dtype)
    images = TrainingImages(find_images(folder / "train" / "good"), (SIDE, SIDE))
    source = PictureSource(
        images, None, seed=settings.seed, batch_size=AUTOENCODER_IMAGES, augment=brightened
    )
    trainer = ShortTrainer(detector, source, settings)
    solve_last_layers(
        detector, images, autoencoder=False, seed=settings.seed, half=trainer.half, cells=CELLS
    )
    detector.student.train()
    detector.autoencoder.train()
    return trainer


def copied(detector: EfficientAD) -> EfficientAD:
    """The same weights and statistics, contiguous."""
    found = EfficientAD("S")
    found.load_state_dict(detector.state_dict())
    found.set_statistics(detector.teacher_mean, detector.teacher_std)
    lay_out(found, torch.contiguous_format)
    return found


def cost(step: Callable[[], object]) -> tuple[int, int]:
    """(FLOP, bytes) of one call."""
    flop, traffic = FlopCounterMode(display=False), Traffic()
    with flop, traffic:
        step()
    return flop.get_total_flops(), traffic.nbytes


def machine(dtype: str) -> tuple[float, float]:
    """(FLOP, bytes) a second: the better of what one thread and all threads reach."""
    threads = torch.get_num_threads()
    kind = getattr(torch, dtype)
    x, weight = (
        torch.randn(shape).to(kind).to(memory_format=torch.channels_last) for shape in LARGEST
    )
    source, target = (torch.ones(COPIED // 4) for _ in range(2))
    convolve, copy = (lambda: torch.conv2d(x, weight)), (lambda: target.copy_(source))
    flop, _ = cost(convolve)
    found = []
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            found.append((flop / least(convolve), 2 * COPIED / least(copy)))
    finally:
        torch.set_num_threads(threads)
    return max(one[0] for one in found), max(one[1] for one in found)


def least(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(folder: Path, dtype: str, rounds: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds of a step by each way, taking turns, losses, and what bounds it."""
    write_dataset(folder, train=IMAGES, good=0, per_defect=0)
    trainer = new_trainer(folder, dtype)
    plain = PlainStep(copied(trainer.detector), trainer)
    ways: dict[str, Callable[[Pictures, int], float]] = {
        "plain": plain,
        "trainer": lambda pictures, _: trainer.one_step(pictures).double().sum().item(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    faults: dict[str, list[int]] = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, way in ways.items():
            for step in range(turn * STEPS, (turn + 1) * STEPS):
                pictures = trainer.source(step)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter()
                losses[name].append(way(pictures, step))
                seconds[name].append(time.perf_counter() - start)
                after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                faults[name].append(after - before)
    first = warm_up * STEPS
    median = {name: statistics.median(values[first:]) for name, values in seconds.items()}
    last = (warm_up + rounds) * STEPS
    pictures = trainer.source(last)
    flop = {"plain": cost(lambda: plain(pictures, last))[0]}
    flop["trainer"], nbytes = cost(lambda: trainer.one_step(pictures))
    flop_s, bytes_s = machine(dtype)
    return {
        "kind": "short step",
        "device": "cpu",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "steps": rounds * STEPS,
        "seconds_per_step": median,
        "seconds_min_max": {
            name: [min(values[first:]), max(values[first:])] for name, values in seconds.items()
        },
        "page_faults_per_step": {
            name: statistics.median(values[first:]) for name, values in faults.items()
        },
        "gflop": {name: count / 1e9 for name, count in flop.items()},
        "gbytes": nbytes / 1e9,
        "ceilings": {"tflops": flop_s / 1e12, "gb_s": bytes_s / 1e9},
        "least_seconds": {"arithmetic": flop["trainer"] / flop_s, "traffic": nbytes / bytes_s},
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=4, help="turns of three steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.dtype, options.rounds)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        record.write(options.json, record.about(CPU), [result])


if __name__ == "__main__":
    main()
