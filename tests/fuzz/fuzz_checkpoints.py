"""Mutated model files: the same detector as before, or refused by CheckpointError."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import helpers_foreign as foreign
import torch
from fuzz_common import Finding, Outcome, attempt, mutated, numbers_of
from torch import nn

from efficientad.checkpoint.loading import load
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.safe_pickle import CheckpointError
from efficientad.checkpoint.teachers import teacher_facts
from efficientad.model.detector import EfficientAD
from efficientad.utils.run_state import load_state, save_state

HEAD = 8_000  # bytes at the beginning and end in which most changes lie: names, sizes, settings


class Target(NamedTuple):
    """A file to damage, what reads it, and what it must then say if it is read."""

    file: Path
    read: Callable[[], str]
    refusals: tuple[type[Exception], ...] = (CheckpointError,)


def said(detector: EfficientAD) -> str:
    """All that a detector is, by its values."""
    tensors = sorted(detector.state_dict().items())
    sums = [(name, float(value.double().nan_to_num(7).sum())) for name, value in tensors]
    facts = [
        getattr(detector, name)
        for name in (
            "size",
            "padding",
            "image_size",
            "border",
            "map_padding",
            "score",
            "score_size",
        )
    ]
    source = detector.provenance.get("source")
    region = None if detector.region is None else int(detector.region.sum())
    settings = detector.threshold, detector.value_range, region
    return repr((sums, facts, settings, source))


def seeds(folder: Path) -> dict[str, Target]:
    """Whole files of every kind, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    native = EfficientAD()
    native.set_statistics(torch.rand(384) - 0.5, torch.rand(384) + 0.5)
    native.set_quantiles(0.25, 0.75, 0.5, 1.25)
    native.threshold, native.value_range = 0.5, (0.0, 4095.0)
    native.provenance = {"source": "drawn", "notes": ["nothing to add"]}
    save(native, folder / "native.safetensors")
    model = foreign.anomalib_model()
    resize = foreign.Compose([foreign.Resize((256, 256))])
    for version in (1, 2):
        checkpoint = foreign.lightning_checkpoint(model, version, 0.75, resize)
        foreign.torch_save(checkpoint, folder / f"anomalib{version}.ckpt")
    nelson = folder / "nelson"
    nelson.mkdir()
    student = foreign.PatchNetwork(768, False)
    for role, net in (("teacher", model.teacher), ("student", student)):
        torch.save(foreign.nelson_pdn(net), nelson / f"{role}_final.pth")
    torch.save(_nelson_autoencoder(model.ae), nelson / "autoencoder_final.pth")
    state = {"weights": torch.arange(20_000.0), "step": torch.tensor(3)}
    save_state(folder / "run.training", state, {"step": 7, "history": [{"step": 1, "loss": 0.5}]})

    def loading(path: Path) -> Callable[[], str]:
        return lambda: said(load(path))

    def run_state() -> str:
        tensors, facts = load_state(folder / "run.training")
        return "" if isinstance(facts, dict) and isinstance(tensors, dict) else "no state"

    def facts() -> str:
        return "" if isinstance(teacher_facts(folder / "native.safetensors"), dict) else "no facts"

    found = {
        name: Target(folder / name, loading(folder / name))
        for name in ("native.safetensors", "anomalib1.ckpt", "anomalib2.ckpt")
    }
    for role in ("teacher", "student", "autoencoder"):
        found[f"nelson {role}"] = Target(nelson / f"{role}_final.pth", loading(nelson))
    found["run state"] = Target(folder / "run.training", run_state, (ValueError,))
    found["teacher facts"] = Target(folder / "native.safetensors", facts, (ValueError,))
    return found


def _nelson_autoencoder(source: foreign.AutoEncoder) -> nn.Sequential:
    convs = [m for m in source.modules() if isinstance(m, nn.Conv2d)]
    layers: list[nn.Module] = []
    for i, conv in enumerate(convs):
        if 6 <= i <= 12:
            layers.append(nn.Upsample(size=(3, 8, 15, 32, 63, 127, 56)[i - 6], mode="bilinear"))
        layers.append(conv)
        if i not in (5, 13):
            layers.append(nn.ReLU(inplace=True))
        if 6 <= i <= 11:
            layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers)


class Damage(NamedTuple):
    """New bytes in place of those from `at` to `end`."""

    at: int
    end: int
    new: bytes


def damage(data: bytes, rng: random.Random) -> Damage:
    """A bit anywhere, the end cut off, or changes where names, sizes and settings are."""
    what, length = rng.random(), len(data)
    if what < 0.1:
        at = rng.randrange(length)
        return Damage(at, at + 1, bytes([data[at] ^ 1 << rng.randrange(8)]))
    if what < 0.2:
        return Damage(rng.randrange(length), length, b"")
    at, end = (0, HEAD) if what < 0.6 else (max(0, length - HEAD), length)
    return Damage(at, end, mutated(data[at:end], rng))


def write(path: Path, data: bytes, done: Damage) -> None:
    """Put the damage into a file that holds `data`; only what changes is written."""
    behind = b"" if len(done.new) == done.end - done.at else data[done.end :]
    with open(path, "r+b") as file:
        file.seek(done.at)
        file.write(done.new + behind)
        file.truncate(len(data) + len(done.new) - (done.end - done.at))


def undo(path: Path, data: bytes, done: Damage) -> None:
    """Make the file `data` again."""
    same = len(done.new) == done.end - done.at
    with open(path, "r+b") as file:
        file.seek(done.at)
        file.write(data[done.at : done.end if same else None])
        file.truncate(len(data))


def run(count: int, seed: int, folder: Path, first: int = 0) -> Outcome:
    """Try so many files. A file that is read must give what the whole one gives."""
    found = seeds(folder / "checkpoints")
    whole: dict[str, tuple[bytes, str]] = {}
    began, outcome = time.monotonic(), Outcome()
    for number in range(first, first + count):
        rng = numbers_of("checkpoint", seed, number)
        name = rng.choice(sorted(found))
        target = found[name]
        if name not in whole:
            whole[name] = target.file.read_bytes(), target.read()
        data, expected = whole[name]
        done = damage(data, rng)
        write(target.file, data, done)

        def work(target: Target = target, expected: str = expected) -> str:
            if target.read() != expected:
                raise Finding("accepted, and not what the whole file says")
            return "read as before"

        attempt(outcome, f"checkpoint {number} ({name})", target.refusals, work)
        undo(target.file, data, done)
    outcome.seconds = time.monotonic() - began
    return outcome
