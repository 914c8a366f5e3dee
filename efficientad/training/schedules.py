"""How long and by what a detector is trained: the schedules, their settings, what each can use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from efficientad.training.losses import HARD_QUANTILE
from efficientad.utils.devices import choose_device

# What `fit` takes where a setting is not named.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {
        "steps": 70_000,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "hard_quantile": HARD_QUANTILE,
    },
    "short": {
        "steps": 1_000,
        "batch_size": 2,
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "hard_quantile": HARD_QUANTILE,
    },
    "instant": {},
}
_PAPERS_OWN = ("penalty", "warm_start")  # the others start from the teacher, without photos
_OF_STEPS = (*SETTINGS["paper"], "checkpoint", "resume", "evaluate_every")
ASKED = (*_PAPERS_OWN, *_OF_STEPS)  # arguments of `fit` that say, or depend on, the schedule


def choose_schedule(
    schedule: str | None, device: str | torch.device, given: Mapping[str, Any]
) -> tuple[str, torch.device]:
    """The schedule of a training, and the device on which it runs.

    Args:
        schedule: its name, or None: "short" on a CPU where neither steps nor anything that only the
            paper's has is given, else "paper".
        device: as for `choose_device`; "auto" is the CPU for all but the paper's.
        given: the arguments `ASKED` by name; None and False are not given.

    Raises:
        ValueError: an unknown name, a device or an argument that the schedule has no use for.
    """
    if not (schedule is None or schedule in SETTINGS):
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SETTINGS)}")
    closed = schedule in ("short", "instant")
    chosen = choose_device("cpu" if closed and device == "auto" else device)
    named = [name for name in ASKED if given[name] is not None and given[name] is not False]
    if schedule is None:
        papers = chosen.type != "cpu" or {"steps", *_PAPERS_OWN} & set(named)
        return "paper" if papers else "short", chosen
    if closed and chosen.type != "cpu":
        raise ValueError(f"device is '{chosen}'; schedule {schedule!r} computes on the CPU")
    useless, why = {
        "paper": ((), ""),
        "short": (_PAPERS_OWN, "starts from the teacher and takes no photos"),
        "instant": (ASKED, "takes no gradient step and no photos"),
    }[schedule]
    for name in named:
        if name in useless and not (name == "evaluate_every" and given[name] == 0):
            raise ValueError(
                f"{name} is {given[name]!r}; schedule {schedule!r} {why}. Leave it out, or use "
                "schedule 'paper'"
            )
    return schedule, chosen


def settings_of(schedule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule's settings, with those in place that are given and not None."""
    usual = SETTINGS[schedule]
    return usual | {name: given[name] for name in usual if given[name] is not None}
