"""What a training is asked for, checked first; in which precision it runs, how repeatably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from efficientad.data.datasets import DataSet
from efficientad.data.decoding import ImageError, read_image
from efficientad.model.detector import EfficientAD
from efficientad.model.good_images import GoodImagesSeen
from efficientad.training.losses import HARD_QUANTILE
from efficientad.utils.checks import ValueRange, check_integer, check_number, check_writable
from efficientad.utils.threads import fastest_threads


class TrainingError(ValueError):
    """A training that cannot go on, or a state that does not belong to it."""


class TrainingStopped(KeyboardInterrupt):
    """Ctrl-C during the steps of a training.

    step: the next one. checkpoint: the file that holds the state of that step, None if none does.
    """

    def __init__(self, step: int, checkpoint: str | os.PathLike | None) -> None:
        state = "no state of that step was written"
        if checkpoint is not None:
            state = f"the state is in {checkpoint}, continue with --resume (resume=True)"
        super().__init__(f"stopped at step {step}; {state}")
        self.step, self.checkpoint = step, checkpoint


class PenaltyWarning(UserWarning):
    """A training without the pretraining penalty of the paper."""


@dataclass(frozen=True)
class Settings:
    """What the result of a training depends on, beside networks and pictures; see `fit`."""

    steps: int = 70_000
    batch_size: int = 1
    seed: int = 42
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    hard_quantile: float = HARD_QUANTILE
    dtype: str = "float32"
    log_every: int = 100

    def __post_init__(self) -> None:
        checked: dict[str, float] = {
            name: check_integer(name, getattr(self, name), 1)
            for name in ("steps", "batch_size", "log_every")
        }
        checked["seed"] = check_integer("seed", self.seed)
        checked["learning_rate"] = check_number("learning_rate", self.learning_rate, 0, above=True)
        checked["weight_decay"] = check_number("weight_decay", self.weight_decay, 0)
        checked["hard_quantile"] = check_number("hard_quantile", self.hard_quantile, 0, 1)
        for name, value in checked.items():  # plain numbers, which a state can hold as JSON
            object.__setattr__(self, name, value)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")


def state_beside(out: Path) -> Path:
    """Where the state of a training lies that writes the detector `out`, if nobody says."""
    return out.with_suffix(".training")


def check_files(
    out: str | os.PathLike | None,
    checkpoint: str | os.PathLike | None,
    resume: bool | str,
    force: bool,
    stateless: bool = False,
) -> tuple[Path | None, Path | None, bool]:
    """The files of a training and whether it continues, before hours of work; arguments of `fit`.

    stateless: no state is kept, and one of another training beside `out` is left alone.

    Raises:
        ValueError: a wrong argument, a folder, or one file for both. FileNotFoundError: no folder
            for `out`, or nothing to resume. FileExistsError: a checkpoint to neither continue nor
            replace. OSError: a place that takes no file.
    """
    if not (resume is True or resume is False or resume == "auto"):
        raise ValueError(f"resume is {resume!r}; it must be True, False or 'auto'")
    if out is not None:
        check_writable("out", out)
        out = Path(out)
        if stateless:
            return out, None, False
        checkpoint = state_beside(out) if checkpoint is None else checkpoint
    if checkpoint is None:
        if resume is True:
            raise ValueError("resume is True; name the checkpoint, or `out` beside which it lies")
        return out, None, False
    check_writable("checkpoint", checkpoint, make_folders=True)
    checkpoint = Path(checkpoint)
    if out is not None and out.absolute() == checkpoint.absolute():
        raise ValueError(f"out and checkpoint are both {str(out)!r}; they are two files")
    if not checkpoint.exists():
        if resume is True:
            raise FileNotFoundError(f"no such file: {checkpoint}, from which to resume")
        return out, checkpoint, False
    if not resume and not force:
        raise FileExistsError(
            f"{checkpoint} is the state of an earlier training; use resume (--resume) to continue "
            "it, or force (--force) to replace it"
        )
    return out, checkpoint, bool(resume)


def check_data(
    dataset: DataSet, evaluate_every: int, value_range: ValueRange | None = None
) -> None:
    """Raise ValueError unless there is something to train on, and something held out that shows a
    part."""
    for part, samples in (("training", dataset.train), ("validation", dataset.validation)):
        if not samples:
            raise ValueError(f"{dataset.root} has no {part} images; at least one is needed")
    if set(dataset.train) == set(dataset.validation):
        raise ValueError(
            f"{dataset.root} has one good image; training needs at least two, one to train on and "
            "another for the validation"
        )
    if evaluate_every and not dataset.test:
        raise ValueError(
            f"evaluate_every is {evaluate_every} and {dataset.root} has no test images; use 0"
        )
    failed, seen = [], GoodImagesSeen("quantiles and threshold")
    for sample in dataset.validation:
        try:
            seen.add_pixels(read_image(sample.path, value_range), sample.path)
        except ImageError as error:
            failed.append(f"{sample.path}: {error.reason}")
    if seen.count:
        return seen.check("they will be left out", alike=False)
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    raise ValueError(
        f"none of the {len(failed)} held-out images can be read, on which the threshold would "
        f"rest: {'; '.join(failed[:5])}{more}"
    )


@torch.no_grad()
def fastest_for_teacher(detector: EfficientAD, settings: Settings) -> int:
    """The number of threads with which the teacher is fastest on this CPU, as it is now."""
    images = torch.zeros(2, 3, *detector.image_size)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            detector.teacher(images)

    return fastest_threads(work)


@contextmanager
def determinism(wanted: bool, device: torch.device) -> Iterator[None]:
    """On a GPU: cuDNN's search for the fastest algorithm, or if `wanted` nothing that varies."""
    if device.type != "cuda":
        yield
        return
    benchmark = torch.backends.cudnn.benchmark
    strict = torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(strict)
