"""`fit`, from images to a detector.

Source: arXiv 2303.14535, Algorithm 1. The defaults are the paper's.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from efficientad.calibration.measuring import measure_precision
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.teachers import teacher_license
from efficientad.data.datasets import DataSet
from efficientad.data.remarks import ValueRangeWarning, range_notes
from efficientad.evaluation.evaluation import evaluate as measure
from efficientad.model.calibration import FALSE_POSITIVE_RATE, Measure, Progress, calibrate
from efficientad.model.detector import EfficientAD
from efficientad.model.image_score import ScoreRule
from efficientad.model.networks import PDN
from efficientad.model.region import RegionLike, digest
from efficientad.model.region import facts as region_facts
from efficientad.training import closed_form, short, whole_images
from efficientad.training.pictures import Photos, PictureSource, TrainingImages, augmented
from efficientad.training.schedules import choose_schedule, settings_of
from efficientad.training.settings import (
    PenaltyWarning,
    Settings,
    TrainingStopped,
    determinism,
    fastest_for_teacher,
)
from efficientad.training.start import (
    new_detector,
    spread_autoencoder,
    start_from_teacher,
    teacher_digest,
)
from efficientad.training.task import Task, checked
from efficientad.training.trainer import Trainer, write_history
from efficientad.utils.devices import choose_dtype, lay_out
from efficientad.utils.threads import computing_threads

CHECKPOINT_EVERY = 1000


def fit(
    data: DataSet | str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    schedule: str | None = None,
    size: str = "S",
    steps: int | None = None,
    batch_size: int | None = None,
    teacher: PDN | str | os.PathLike | None = None,
    penalty: str | os.PathLike | None = None,
    image_size: tuple[int, int] = (256, 256),
    padding: bool = False,
    seed: int = 42,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    hard_quantile: float | None = None,
    warm_start: bool = False,
    false_positive_rate: float = FALSE_POSITIVE_RATE,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    workers: int = 2,
    threads: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    resume: bool | str = False,
    force: bool = False,
    evaluate_every: int = 0,
    log_every: int = 100,
    deterministic: bool = False,
    value_range: tuple[float, float] | None = None,
    region: RegionLike | None = None,
    score: ScoreRule = "max",
    global_term: bool = False,
    progress: Progress | None = None,
    on_history: Callable[[dict[str, Any]], None] | None = None,
) -> EfficientAD:
    """Train a detector on good images, calibrate it and save it.

    Args:
        data: a folder of good images, a data set in a known layout, or a `DataSet`. Its validation
            part (one tenth of the good images where the data set brings none) is not trained on.
        schedule: "paper"; "short": minutes on a CPU (`short.py`); "instant": a minute, no gradient
            step (`closed_form.py`). None: "short" on a CPU without any of `steps`, `penalty` and
            `warm_start`, else "paper".
        size: "S" or "M". padding: True for the padded PDN. image_size: (height, width), >= 256.
        steps, batch_size, learning_rate, weight_decay, hard_quantile: None: the schedule's
            (`training/schedules.py`). hard_quantile 0 takes the mean over all elements.
        teacher: a name of `teachers.SHIPPED` or what `load_teacher` takes. out: file, or None.
        penalty: folder of photos of anything for the pretraining penalty, missing without it.
        warm_start: the student's inner layers start as the teacher's; see docs/training.md.
        false_positive_rate: see `calibrate`. device: "auto", "cpu", "cuda:0" ....
        dtype: "float32", "bfloat16" (autocast), "auto": bfloat16 where the device computes in it.
        workers: threads that decode and augment ahead. threads: torch's, on a CPU; None: as many
            as are fastest now, or those of the training that is resumed.
        checkpoint: state to resume from, every checkpoint_every steps, with the history beside it
            as JSON; None: beside `out`, if there is one.
        resume: True continues from the checkpoint, "auto" does if it is there, False starts anew.
            On a CPU with the same number of threads the result is the same bit for bit.
        force: replace a checkpoint that is there. deterministic: the same bits on a GPU, slower.
        evaluate_every, log_every: steps between tests (0: none) and between entries of the history.
        value_range: (low, high) of samples above 8 bits (`data/samples.py`).
        region: what is inspected, a file or bool (H, W). score, global_term: docs/image-score.md.
        progress: called with (what, done, total). on_history: with every entry of the history.

    Returns:
        The detector, calibrated, float32, on the CPU, in eval mode. `provenance` says what it was
        made from, and the licence that its teacher's file names.

    Raises:
        ValueError: bad arguments, too few images, none that can be read of those held out.
        TrainingError: a loss that is not finite, or a checkpoint of another training.
        FileNotFoundError, FileExistsError: data, photos, teacher or checkpoint that are not there,
            or a checkpoint that is, with neither `resume` nor `force`.
        OSError: a file cannot be written; the last checkpoint is whole.
        TrainingStopped: Ctrl-C; the step's state is written first.
    """
    started = time.monotonic()
    asked: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay":
        weight_decay, "hard_quantile": hard_quantile, "penalty": penalty, "warm_start": warm_start,
        "checkpoint": checkpoint, "resume": resume, "evaluate_every": evaluate_every,
    }  # fmt: skip
    schedule, device = choose_schedule(schedule, device, asked)
    dtype = choose_dtype(dtype, device)
    settings = Settings(**settings_of(schedule, asked), seed=seed, dtype=dtype, log_every=log_every)
    task, dataset = checked(data, force, Task(
        settings, device, schedule=schedule, out=out, checkpoint=checkpoint, resume=resume,
        size=size, padding=padding, image_size=image_size, teacher=teacher, penalty=penalty,
        warm_start=warm_start, false_positive_rate=false_positive_rate, workers=workers,
        checkpoint_every=checkpoint_every, evaluate_every=evaluate_every, value_range=value_range,
        threads=threads, deterministic=deterministic, region=region, score=score,
        global_term=global_term, progress=progress, on_history=on_history,
    ))  # fmt: skip
    parts = _prepare(task, dataset)
    with computing_threads(_threads(task, parts)):
        trained = (_solve if schedule == "instant" else _train)(task, dataset, parts)
        parts.detector.provenance.update(_provenance(task, dataset, parts, trained, started))
    _save(task, parts.detector)
    return parts.detector


class _Parts(NamedTuple):
    """What a training works with. identity: what a state must share with it, beside settings."""

    detector: EfficientAD
    source: PictureSource
    identity: dict[str, Any]
    license: str | None


class _Trained(NamedTuple):
    """What a file says of its training, and (path, reason) of held-out images not read."""

    facts: dict[str, Any]
    unreadable: list[tuple[str, str]]


def _prepare(task: Task, dataset: DataSet) -> _Parts:
    """The detector on its device, and the source of its pictures."""
    seed = task.settings.seed
    detector = new_detector(task.size, task.padding, task.image_size, seed, task.teacher)
    detector.value_range = task.value_range
    detector.set_region(task.region)
    detector.score = task.score
    paths = [sample.path for sample in dataset.train]
    for note in range_notes(paths, task.value_range):
        warnings.warn(note, ValueRangeWarning, stacklevel=3)
    license = teacher_license(task.teacher)
    if task.warm_start or task.schedule != "paper":
        start_from_teacher(detector)
    if task.schedule == "instant":
        spread_autoencoder(detector, seed)
        detector.autoencoder_weight = closed_form.AUTOENCODER_WEIGHT
    photos = None
    if task.penalty is not None:
        photos = Photos(task.penalty, detector.image_size, seed)
    elif task.schedule == "paper":
        warnings.warn(
            "no penalty set: the pretraining penalty of the paper (section 3.1) is left out, which "
            "cost 0.4 points of AU-ROC there; name a folder of photos with penalty",
            PenaltyWarning,
            stacklevel=3,  # where `fit` is called
        )
    identity = {
        "schedule": task.schedule,
        "size": task.size,
        "padding": task.padding,
        "image_size": list(detector.image_size),
        "teacher": teacher_digest(detector.teacher),
        "warm_start": task.warm_start,
        "photos": 0 if photos is None else len(photos),
        "region": digest(detector.region),
        **({} if task.value_range is None else {"value_range": list(task.value_range)}),
    }
    batch, augment = task.settings.batch_size, augmented
    if task.schedule == "short":
        batch, augment = max(batch, short.AUTOENCODER_IMAGES), short.brightened
    source = PictureSource(
        TrainingImages(paths, detector.image_size, value_range=task.value_range),
        photos,
        seed=seed,
        batch_size=batch,
        augment=augment,
        pinned=task.device.type == "cuda",
    )
    detector.to(task.device)
    if task.device.type == "cuda" or task.settings.dtype != "float32":
        lay_out(detector, torch.channels_last)
    return _Parts(detector, source, identity, license)


def _threads(task: Task, parts: _Parts) -> int:
    """To compute with; a training that is resumed takes its own, see `_train`."""
    if task.threads is None and task.device.type == "cpu" and not task.resume:
        return fastest_for_teacher(parts.detector, task.settings)
    return task.threads or torch.get_num_threads()


def _solve(task: Task, dataset: DataSet, parts: _Parts) -> _Trained:
    """The last layers in closed form, then the calibration."""
    settings = task.settings
    closed_form.solve_last_layers(
        parts.detector,
        parts.source.images,
        seed=settings.seed,
        half=settings.dtype == "bfloat16",
        workers=task.workers,
        progress=task.progress,
    )
    lay_out(parts.detector, torch.contiguous_format)
    facts = {
        "algorithm": "closed form: ridge regressions of the last layers, no gradient step",
        **closed_form.facts(),
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    return _Trained(facts, _calibrate(task, dataset, parts, measure_precision))


def _train(task: Task, dataset: DataSet, parts: _Parts) -> _Trained:
    """All steps, then the calibration; leaves the detector on the CPU."""
    detector = parts.detector

    def evaluate() -> dict[str, Any]:
        trainer.finish(task.workers)
        _calibrate(task, dataset, parts)
        quantiles = detector.quantiles.tolist()
        return {"quantiles": quantiles, "metrics": measure(detector, dataset).metrics}

    with determinism(task.deterministic, task.device):
        trainer = (short.ShortTrainer if task.schedule == "short" else Trainer)(
            detector, parts.source, task.settings, identity=parts.identity
        )
        if task.resume:
            assert task.checkpoint is not None  # `check_files` has seen to it
            trainer.resume(task.checkpoint)
            if task.threads is None and trainer.threads is not None:
                torch.set_num_threads(trainer.threads)
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
            write_history(task.checkpoint, trainer.history)
        try:
            trainer.finish(task.workers, task.progress)
            lay_out(detector, torch.contiguous_format)
            detector.cpu()
            detector.requires_grad_(False)
            detector.student.requires_grad_(True)
            detector.autoencoder.requires_grad_(True)
            unreadable = _calibrate(task, dataset, parts, measure_precision)
        except KeyboardInterrupt:
            raise TrainingStopped(trainer.step, task.checkpoint) from None
    photos, history = parts.source.photos, trainer.history
    facts = {
        "algorithm": trainer.algorithm,
        **(short.facts() if task.schedule == "short" else {}),
        "pretraining_penalty": f"{len(photos)} photos" if photos else "none: no photos were given",
        "warm_start": task.warm_start,
        **asdict(task.settings),
        "resumed_at_step": first if task.resume else None,
        "last_losses": history[-1] if history else None,
    }
    return _Trained(facts, unreadable)


def _calibrate(
    task: Task, dataset: DataSet, parts: _Parts, precision: Measure | None = None
) -> list[tuple[str, str]]:
    """Calibrate on what was held out; (path, reason) of what could not be read."""
    unreadable: list[tuple[str, str]] = []
    if task.schedule == "short":
        parts.detector.autoencoder_weight = short.autoencoder_weight(
            parts.detector,
            [sample.path for sample in dataset.validation],
            half=task.settings.dtype == "bfloat16",
            workers=task.workers,
        )
    if task.global_term:
        parts.detector.set_global_term(whole_images.solve_term(
            parts.detector,
            parts.source.images,
            seed=task.settings.seed,
            workers=task.workers,
            progress=task.progress,
        ))  # fmt: skip
    known = parts.source.images.known()  # `calibrate` looks for them among those held out
    parts.detector.provenance["training"] = {"known_pictures": known}
    calibrate(
        parts.detector,
        # `calibrate` takes all of a plain folder; only what was not trained on may serve.
        replace(dataset, train=dataset.validation),
        false_positive_rate=task.false_positive_rate,
        statistics=False,
        workers=task.workers,
        on_error=lambda index, path, error: unreadable.append((str(path), error.reason)),
        measure=precision,
    )
    return unreadable


def _provenance(
    task: Task, dataset: DataSet, parts: _Parts, trained: _Trained, started: float
) -> dict[str, Any]:
    """What the detector was made from. started: `time.monotonic()` when `fit` began."""
    images, photos = parts.source.images, parts.source.photos
    training = {
        "schedule": task.schedule,
        **trained.facts,
        "data": dataset.name,
        "images": len(images),
        "images_held_out": len(dataset.validation),
        "known_pictures": images.known(),
        **region_facts(parts.detector.region),
        "teacher": parts.identity["teacher"],
        "device": str(task.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
        "unreadable": [*images.failed, *trained.unreadable, *(photos.failed if photos else [])],
    }
    license = {} if parts.license is None else {"teacher_license": parts.license}
    return {"training": training, **license}


def _save(task: Task, detector: EfficientAD) -> None:
    """Write the detector, if a file is named."""
    if task.out is None:
        return
    try:
        save(detector, task.out)
    except OSError as error:
        raise OSError(f"{error}. The training's state is in {task.checkpoint}") from error
