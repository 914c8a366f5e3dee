"""`fit`, from images to a detector.

Source: arXiv 2303.14535, Algorithm 1. The defaults are the paper's.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.teachers import default_teacher, teacher_license
from efficientad.data.datasets import DataSet
from efficientad.data.layouts import open_dataset
from efficientad.evaluation.evaluation import evaluate as measure
from efficientad.model.calibration import FALSE_POSITIVE_RATE, Progress, calibrate
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN
from efficientad.training.losses import HARD_QUANTILE
from efficientad.training.pictures import Photos, PictureSource, TrainingImages
from efficientad.training.settings import (
    PenaltyWarning,
    Settings,
    TrainingStopped,
    check_data,
    check_files,
    choose_dtype,
    determinism,
)
from efficientad.training.trainer import Trainer
from efficientad.utils.checks import check_flag, check_integer, check_number, check_path
from efficientad.utils.devices import choose_device, lay_out
from efficientad.utils.files import write_text

CHECKPOINT_EVERY = 1000


def fit(
    data: DataSet | str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    size: str = "S",
    steps: int = 70_000,
    batch_size: int = 1,
    teacher: PDN | str | os.PathLike | None = None,
    penalty: str | os.PathLike | None = None,
    image_size: tuple[int, int] = (256, 256),
    padding: bool = False,
    seed: int = 42,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    hard_quantile: float = HARD_QUANTILE,
    warm_start: bool = False,
    false_positive_rate: float = FALSE_POSITIVE_RATE,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    workers: int = 2,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    resume: bool | str = False,
    force: bool = False,
    evaluate_every: int = 0,
    log_every: int = 100,
    deterministic: bool = False,
    progress: Progress | None = None,
    on_history: Callable[[dict[str, Any]], None] | None = None,
) -> EfficientAD:
    """Train a detector on good images, calibrate it and save it: Algorithm 1 of the paper.

    Args:
        data: a folder of good images, a data set in a known layout, or a `DataSet`. Its validation
            part (one tenth of the good images where the data set brings none) is not trained on.
        out: file to write; None writes none.
        size: "S" or "M". padding: True for the padded PDN. image_size: (height, width), >= 256.
        steps, batch_size: above one image a step, losses are the means of the images' own.
        teacher: a teacher's file, anything that `load_teacher` takes; None: the one that ships.
        penalty: folder of photos of anything for the pretraining penalty (ImageNet in the paper);
            without it that term is missing, which is said in a warning and in the provenance.
        hard_quantile: 0 takes the mean over all elements, an ablation of the paper.
        warm_start: the student's inner layers start as the teacher's, where both have the same
            shape, and only its last layers from random numbers. Not in the paper: for short
            trainings, in which random inner layers learn too little (see docs/training.md).
        false_positive_rate: see `calibrate`.
        device: "auto", "cpu", "cuda:0" .... dtype: "float32", "bfloat16" (autocast), or "auto":
            bfloat16 where the device computes in it.
        workers: threads that decode and augment ahead.
        checkpoint: state to resume from; None: beside `out`, if there is one. Beside it goes the
            history, as JSON. checkpoint_every: steps.
        resume: True continues from the checkpoint, "auto" does if it is there, False starts anew.
            On a CPU with the same number of threads the result is the same bit for bit.
        force: replace a checkpoint that is there, which is refused otherwise.
        evaluate_every: steps between evaluations on the test images; 0 for none.
        log_every: steps between entries of the history.
        deterministic: the same bits again on a GPU too, slower.
        progress: called with (what, done, total). on_history: with every entry of the history.

    Returns:
        The detector, calibrated, float32, on the CPU, in eval mode. `provenance` says what it was
        made from; "teacher_license" is there where the teacher's file names one, the default's too.

    Raises:
        ValueError: bad arguments, fewer than two readable images, none in a folder, none readable
            of those held out.
        TrainingError: a loss that is not finite, or a checkpoint of another training.
        FileNotFoundError: data, photos, teacher or a checkpoint to resume that do not exist.
        FileExistsError: a checkpoint is there, and neither `resume` nor `force` is given.
        OSError: a file cannot be written; the last checkpoint is whole.
        TrainingStopped: Ctrl-C, a KeyboardInterrupt; the step's state is written first.
    """
    started = time.monotonic()
    device = choose_device(device)
    settings = Settings(
        steps, batch_size, seed, learning_rate, weight_decay, hard_quantile,
        choose_dtype(dtype, device), log_every,
    )  # fmt: skip
    task, dataset = _check(data, force, _Task(
        settings, device, out=out, checkpoint=checkpoint, resume=resume, size=size,
        padding=padding, image_size=image_size, teacher=teacher, penalty=penalty,
        warm_start=warm_start, false_positive_rate=false_positive_rate, workers=workers,
        checkpoint_every=checkpoint_every, evaluate_every=evaluate_every,
        deterministic=deterministic, progress=progress, on_history=on_history,
    ))  # fmt: skip
    parts = _prepare(task, dataset)
    trained = _train(task, dataset, parts)
    parts.detector.provenance.update(_provenance(task, dataset, parts, trained, started))
    _save(task, parts.detector)
    return parts.detector


@dataclass(frozen=True)
class _Task:
    """What `fit` was asked for; see there. After `_check`, resume is a bool."""

    settings: Settings
    device: torch.device
    out: str | os.PathLike | None
    checkpoint: str | os.PathLike | None
    resume: bool | str
    size: str
    padding: bool
    image_size: tuple[int, int]
    teacher: PDN | str | os.PathLike | None
    penalty: str | os.PathLike | None
    warm_start: bool
    false_positive_rate: float
    workers: int
    checkpoint_every: int
    evaluate_every: int
    deterministic: bool
    progress: Progress | None
    on_history: Callable[[dict[str, Any]], None] | None


class _Parts(NamedTuple):
    """What a training works with. identity: what a state must share with it, beside settings."""

    detector: EfficientAD
    source: PictureSource
    identity: dict[str, Any]
    license: str | None


class _Trained(NamedTuple):
    """first: the step from which this run trained. unreadable: (path, reason) of held-out ones."""

    trainer: Trainer
    first: int
    unreadable: list[tuple[str, str]]


def _check(data: DataSet | str | os.PathLike, force: bool, task: _Task) -> tuple[_Task, DataSet]:
    """The task with its files settled, and its data. Raises what `fit` does, before the work."""
    check_number("false_positive_rate", task.false_positive_rate, 0, 1)
    for name, value in {
        "padding": task.padding,
        "warm_start": task.warm_start,
        "force": force,
        "deterministic": task.deterministic,
    }.items():
        check_flag(name, value)
    check_integer("workers", task.workers, 0)
    check_integer("checkpoint_every", task.checkpoint_every, 1)
    check_integer("evaluate_every", task.evaluate_every, 0)
    penalty, teacher = task.penalty, task.teacher
    if penalty is not None:
        for folder in penalty if isinstance(penalty, (list, tuple)) else [penalty]:
            check_path("penalty", folder, "a folder of photos")
    if teacher is not None and not isinstance(teacher, PDN):
        check_path("teacher", teacher, "a teacher's file")
    out, checkpoint, resume = check_files(task.out, task.checkpoint, task.resume, force)
    dataset = data if isinstance(data, DataSet) else open_dataset(data)
    check_data(dataset, task.evaluate_every)
    return replace(task, out=out, checkpoint=checkpoint, resume=resume), dataset


def _prepare(task: _Task, dataset: DataSet) -> _Parts:
    """The detector on its device, and the source of its pictures."""
    seed = task.settings.seed
    detector = _new_detector(task.size, task.padding, task.image_size, seed, task.teacher)
    license = teacher_license(task.teacher)
    if task.warm_start:
        _start_from_teacher(detector)
    photos = None
    if task.penalty is not None:
        photos = Photos(task.penalty, detector.image_size, seed)
    else:
        warnings.warn(
            "no penalty set: the pretraining penalty of the paper (section 3.1) is left out, which "
            "cost 0.4 points of AU-ROC there; name a folder of photos with penalty",
            PenaltyWarning,
            stacklevel=3,  # where `fit` is called
        )
    identity = {
        "size": task.size,
        "padding": task.padding,
        "image_size": list(detector.image_size),
        "teacher": _digest(detector.teacher),
        "warm_start": task.warm_start,
        "photos": 0 if photos is None else len(photos),
    }
    source = PictureSource(
        TrainingImages([sample.path for sample in dataset.train], detector.image_size),
        photos,
        seed=seed,
        batch_size=task.settings.batch_size,
        pinned=task.device.type == "cuda",
    )
    detector.to(task.device)
    if task.device.type == "cuda" or task.settings.dtype != "float32":
        lay_out(detector, torch.channels_last)
    return _Parts(detector, source, identity, license)


def _train(task: _Task, dataset: DataSet, parts: _Parts) -> _Trained:
    """All steps, then the calibration; leaves the detector on the CPU."""
    detector = parts.detector

    def evaluate() -> dict[str, Any]:
        _calibrate(task, dataset, detector)
        quantiles = detector.quantiles.tolist()
        return {"quantiles": quantiles, "metrics": measure(detector, dataset).metrics}

    with determinism(task.deterministic, task.device):
        trainer = Trainer(detector, parts.source, task.settings, identity=parts.identity)
        if task.resume:
            assert task.checkpoint is not None  # `check_files` has seen to it
            trainer.resume(task.checkpoint)
        else:
            trainer.prepare(task.workers, task.progress)
        first = trainer.step
        try:
            trainer.run(
                checkpoint=task.checkpoint,
                checkpoint_every=task.checkpoint_every,
                evaluate=evaluate if task.evaluate_every else None,
                evaluate_every=task.evaluate_every,
                workers=task.workers,
                progress=task.progress,
                on_history=task.on_history,
            )
        finally:
            _write_history(task.checkpoint, trainer.history)
        lay_out(detector, torch.contiguous_format)
        detector.cpu()
        detector.requires_grad_(False)
        detector.student.requires_grad_(True)
        detector.autoencoder.requires_grad_(True)
        try:
            unreadable = _calibrate(task, dataset, detector)
        except KeyboardInterrupt:
            raise TrainingStopped(trainer.step, task.checkpoint) from None
    return _Trained(trainer, first, unreadable)


def _calibrate(task: _Task, dataset: DataSet, detector: EfficientAD) -> list[tuple[str, str]]:
    """Calibrate on what was held out; (path, reason) of what could not be read."""
    unreadable: list[tuple[str, str]] = []
    calibrate(
        detector,
        # `calibrate` takes all of a plain folder; only what was not trained on may serve.
        replace(dataset, train=dataset.validation),
        false_positive_rate=task.false_positive_rate,
        statistics=False,
        workers=task.workers,
        on_error=lambda index, path, error: unreadable.append((str(path), error.reason)),
    )
    return unreadable


def _provenance(
    task: _Task, dataset: DataSet, parts: _Parts, trained: _Trained, started: float
) -> dict[str, Any]:
    """What the detector was made from. started: `time.monotonic()` when `fit` began."""
    images, photos, history = parts.source.images, parts.source.photos, trained.trainer.history
    training = {
        "algorithm": "EfficientAD, arXiv 2303.14535, Algorithm 1",
        "data": dataset.name,
        "images": len(images),
        "images_held_out": len(dataset.validation),
        "pretraining_penalty": f"{len(photos)} photos" if photos else "none: no photos were given",
        "teacher": parts.identity["teacher"],
        "warm_start": task.warm_start,
        **asdict(task.settings),
        "device": str(task.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "resumed_at_step": trained.first if task.resume else None,
        "seconds": round(time.monotonic() - started, 1),
        "unreadable": [*images.failed, *trained.unreadable, *(photos.failed if photos else [])],
        "last_losses": history[-1] if history else None,
    }
    if parts.license is None:
        return {"training": training}
    return {"training": training, "teacher_license": parts.license}


def _save(task: _Task, detector: EfficientAD) -> None:
    """Write the detector, if a file is named."""
    if task.out is None:
        return
    try:
        save(detector, task.out)
    except OSError as error:
        raise OSError(f"{error}. The training's state is in {task.checkpoint}") from error


def _new_detector(
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


def _start_from_teacher(detector: EfficientAD) -> None:
    teacher, student = detector.teacher.state_dict(), detector.student.state_dict()
    same = {name: value for name, value in teacher.items() if value.shape == student[name].shape}
    detector.student.load_state_dict({**student, **same})


def _digest(teacher: PDN) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return f"PDN-{teacher.size}, sha256 {digest.hexdigest()[:16]}"


def _write_history(checkpoint: str | os.PathLike | None, history: list[dict[str, Any]]) -> None:
    if checkpoint is not None and history:
        path = Path(checkpoint)
        write_text(path.with_name(f"{path.name}.history.json"), json.dumps(history, indent=1))
