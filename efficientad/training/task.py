"""What a training is asked for as a whole, and what is checked of it before the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from efficientad.checkpoint.teachers import named_teacher
from efficientad.data.datasets import DataSet
from efficientad.data.layouts import open_dataset
from efficientad.data.region_files import check_frames
from efficientad.model.calibration import Progress
from efficientad.model.global_term import WHOLE_OR_PART, check_images
from efficientad.model.image_score import ScoreRule
from efficientad.model.networks import PDN
from efficientad.model.region import RegionLike, as_mask
from efficientad.training.settings import Settings, check_data, check_files
from efficientad.utils.checks import (
    check_flag,
    check_integer,
    check_number,
    check_path,
    check_value_range,
)


@dataclass(frozen=True)
class Task:
    """What `fit` was asked for; see there. After `checked`, resume is a bool."""

    settings: Settings
    device: torch.device
    schedule: str
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
    threads: int | None
    checkpoint_every: int
    evaluate_every: int
    deterministic: bool
    value_range: tuple[float, float] | None
    region: RegionLike | None
    score: ScoreRule
    global_term: bool
    progress: Progress | None
    on_history: Callable[[dict[str, Any]], None] | None


def checked(data: DataSet | str | os.PathLike, force: bool, task: Task) -> tuple[Task, DataSet]:
    """The task with its files settled, and its data. Raises what `fit` does, before the work."""
    check_number("false_positive_rate", task.false_positive_rate, 0, 1)
    for name, value in {
        "padding": task.padding,
        "warm_start": task.warm_start,
        "force": force,
        "deterministic": task.deterministic,
        "global_term": task.global_term,
    }.items():
        check_flag(name, value)
    check_integer("workers", task.workers, 0)
    if task.threads is not None:
        check_integer("threads", task.threads, 1)
    check_integer("checkpoint_every", task.checkpoint_every, 1)
    check_integer("evaluate_every", task.evaluate_every, 0)
    penalty, teacher = task.penalty, named_teacher(task.teacher)
    if penalty is not None:
        for folder in penalty if isinstance(penalty, (list, tuple)) else [penalty]:
            check_path("penalty", folder, "a folder of photos")
    if teacher is not None and not isinstance(teacher, PDN):
        check_path("teacher", teacher, "a teacher's file")
    out, checkpoint, resume = check_files(
        task.out, task.checkpoint, task.resume, force, stateless=task.schedule == "instant"
    )
    dataset = data if isinstance(data, DataSet) else open_dataset(data)
    task = replace(task, teacher=teacher, value_range=check_value_range(task.value_range))
    check_data(dataset, task.evaluate_every, task.value_range)
    if task.global_term:
        check_images(len(dataset.train))
        if task.region is not None:
            raise ValueError(WHOLE_OR_PART)
    if task.region is not None:
        mask = as_mask(task.region)
        check_frames(mask, [sample.path for sample in dataset.train], task.image_size)
        task = replace(task, region=mask)
    return replace(task, out=out, checkpoint=checkpoint, resume=resume), dataset
