"""`fit`, from images to a detector.

Source: arXiv 2303.14535, Algorithm 1. The defaults are the paper's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.teachers import default_teacher, teacher_license
from efficientad.data.datasets import DataSet
from efficientad.data.layouts import open_dataset
from efficientad.model.calibration import FALSE_POSITIVE_RATE, Progress, calibrate
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN
from efficientad.training.losses import HARD_QUANTILE
from efficientad.training.pictures import Photos, PictureSource, TrainingImages
from efficientad.training.settings import (
    Settings,
    TrainingError,
    TrainingStopped,
    check_data,
    check_files,
    choose_dtype,
    determinism,
)
from efficientad.training.trainer import Trainer
from efficientad.utils.checks import check_flag, check_integer, check_number, check_path
from efficientad.utils.devices import choose_device
from efficientad.utils.files import write_text

__all__ = ["TrainingError", "fit"]

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
    seed, batch_size = settings.seed, settings.batch_size
    check_number("false_positive_rate", false_positive_rate, 0, 1)
    flags = {"padding": padding, "warm_start": warm_start, "force": force}
    for name, value in (flags | {"deterministic": deterministic}).items():
        check_flag(name, value)
    check_integer("workers", workers, 0)
    check_integer("checkpoint_every", checkpoint_every, 1)
    check_integer("evaluate_every", evaluate_every, 0)
    if penalty is not None:
        for folder in penalty if isinstance(penalty, (list, tuple)) else [penalty]:
            check_path("penalty", folder, "a folder of photos")
    if teacher is not None and not isinstance(teacher, PDN):
        check_path("teacher", teacher, "a teacher's file")
    out, checkpoint, resume = check_files(out, checkpoint, resume, force)
    dataset = data if isinstance(data, DataSet) else open_dataset(data)
    check_data(dataset, evaluate_every)

    detector = _new_detector(size, padding, image_size, seed, teacher)
    license = teacher_license(teacher)
    if warm_start:
        _start_from_teacher(detector)
    identity = {
        "size": size,
        "padding": padding,
        "image_size": list(detector.image_size),
        "teacher": _digest(detector.teacher),
        "warm_start": warm_start,
    }
    photos = None
    if penalty is not None:
        photos = Photos(penalty, detector.image_size, seed)
    else:
        warnings.warn(
            "no penalty set: the pretraining penalty of the paper (section 3.1) is left out, which "
            "cost 0.4 points of AU-ROC there; name a folder of photos with penalty",
            stacklevel=2,
        )
    identity["photos"] = 0 if photos is None else len(photos)
    images = TrainingImages([sample.path for sample in dataset.train], detector.image_size)
    source = PictureSource(
        images, photos, seed=seed, batch_size=batch_size, pinned=device.type == "cuda"
    )
    detector.to(device)
    if device.type == "cuda" or settings.dtype != "float32":
        detector.to(memory_format=torch.channels_last)
    failed: list[tuple[str, str]] = []
    # `calibrate` takes all of a plain folder; here only what was not trained on may serve.
    held_out = dataclasses.replace(dataset, train=dataset.validation)

    def calibrated() -> EfficientAD:
        failed.clear()
        return calibrate(
            detector,
            held_out,
            false_positive_rate=false_positive_rate,
            statistics=False,
            workers=workers,
            on_error=lambda index, path, error: failed.append((str(path), error.reason)),
        )

    def evaluate() -> dict[str, Any]:
        from efficientad.evaluation.evaluation import evaluate as measure

        quantiles = calibrated().quantiles.tolist()
        return {"quantiles": quantiles, "metrics": measure(detector, dataset).metrics}

    with determinism(deterministic, device):
        trainer = Trainer(detector, source, settings, identity=identity)
        if resume:
            trainer.resume(checkpoint)
        else:
            trainer.prepare(workers, progress)
        first = trainer.step
        try:
            trainer.run(
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                evaluate=evaluate if evaluate_every else None,
                evaluate_every=evaluate_every,
                workers=workers,
                progress=progress,
                on_history=on_history,
            )
        finally:
            _write_history(checkpoint, trainer.history)
        detector.to(memory_format=torch.contiguous_format).cpu()
        detector.requires_grad_(False)
        detector.student.requires_grad_(True)
        detector.autoencoder.requires_grad_(True)
        try:
            calibrated()
        except KeyboardInterrupt:
            raise TrainingStopped(trainer.step, checkpoint) from None
    detector.provenance["training"] = {
        "algorithm": "EfficientAD, arXiv 2303.14535, Algorithm 1",
        "data": dataset.name,
        "images": len(images),
        "images_held_out": len(dataset.validation),
        "pretraining_penalty": f"{len(photos)} photos" if photos else "none: no photos were given",
        "teacher": identity["teacher"],
        "warm_start": warm_start,
        **dataclasses.asdict(settings),
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "resumed_at_step": first if resume else None,
        "seconds": round(time.monotonic() - started, 1),
        "unreadable": [*images.failed, *failed, *(photos.failed if photos else [])],
        "last_losses": trainer.history[-1] if trainer.history else None,
    }
    if license is not None:
        detector.provenance["teacher_license"] = license
    if out is not None:
        try:
            save(detector, out)
        except OSError as error:
            raise OSError(f"{error}. The training's state is in {checkpoint}") from error
    return detector


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
