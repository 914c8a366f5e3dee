"""The state of an interrupted training, in one file.

A safetensors file: tensors, and facts (JSON) in the header. It is replaced atomically, so a killed
or full machine leaves the last good state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from efficientad.utils.files import digest_of, replace_file

FORMAT = "efficientad-run"
_ADAM = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write tensors and JSON facts to `path`; the old file stays until the new one is on the disk.

    Raises:
        OSError: it cannot be written (a full disk, no permission); an old file is still whole.
        ValueError: facts that JSON cannot hold.
    """
    try:
        text = json.dumps(dict(facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts of a run cannot be stored as JSON: {error}") from error
    stored = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    header = {"format": FORMAT, "facts": text, "sha256": digest_of(stored, {"facts": text})}
    try:
        replace_file(path, lambda part: save_file(stored, part, header), durable=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{path} cannot be written: {error}. An older state there is unchanged"
        ) from error


def load_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and facts of a file of `save_state`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: damaged, cut short, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        # Read at once: safe_open opens a file twice, and a writer may replace it in between.
        data = path.read_bytes()
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not the state of a training run")
        text = header["facts"]
        # Older states have no checksum.
        if header.get("sha256") not in (None, digest_of(tensors, {"facts": text})):
            raise ValueError(f"{path} is damaged: its checksum differs")
        facts = json.loads(text)
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not the state of a training run: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged: its facts are not a JSON object")
    return tensors, facts


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Adam's state, as "optimizer.NAME.exp_avg", ".exp_avg_sq" and ".step".

    names: one for each parameter, in the optimizer's order; a parameter that was never stepped has
    no entry.
    """
    return {
        f"optimizer.{name}.{key}": torch.as_tensor(state[key])
        for name, _, state in _parameters(optimizer, names)
        for key in _ADAM
        if state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back; further steps are then bit for bit the same.

    Learning rates are not part of it: they are functions of the step. Raises ValueError for a
    missing entry or a wrong shape.
    """
    for name, parameter, state in _parameters(optimizer, names):
        places = {key: f"optimizer.{name}.{key}" for key in _ADAM}
        found = {key: tensors[place] for key, place in places.items() if place in tensors}
        if not found:
            state.clear()
            continue
        for key in _ADAM:
            value = found.get(key)
            shape = torch.Size() if key == "step" else parameter.shape
            if value is None or value.shape != shape:
                got = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ValueError(f"state of the optimizer: {key} of {name} {got}")
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = found["step"].to(parameter.device if on_device else "cpu", copy=True)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter, requires_grad=False).copy_(found[key])


def _parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]):
    """(name, parameter, its state dict in the optimizer) in the optimizer's order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != len(names) or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} names for {len(parameters)} parameters of the optimizer")
    for name, parameter in zip(names, parameters, strict=True):
        yield name, parameter, optimizer.state[parameter]
