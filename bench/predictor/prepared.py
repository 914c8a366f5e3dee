"""Detectors that know a part, and pictures whose verdicts are in doubt, kept in a folder.

What `bench.predictor.processes` compares contenders on: with random weights a turned verdict would
mean nothing. Everything is made once and read afterwards.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.predictor import peers, peers_packages
from efficientad.benchmark.contenders import reference
from efficientad.checkpoint.loading import load
from efficientad.checkpoint.native_file import save
from efficientad.data.datasets import DataSet, Sample
from efficientad.data.images import load_batches
from efficientad.data.layouts import open_dataset
from efficientad.demo.parts import write_dataset
from efficientad.fast.predictor import FastPredictor
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN
from efficientad.training.fitting import fit
from efficientad.utils.files import write_text

SIDE = 256
# Pictures: so many that a verdict means something, and as few as the closed form looks at once.
TRAINED, HELD_OUT, CANDIDATES = 48, 20, 48
PICTURES = 16  # kept of the candidates, nearest to the threshold
GOOD = 24  # of those trained on, for what is calibrated on them


class Pictures(NamedTuple):
    """Pictures of a size of network, and what its plain float32 detector says of them.

    frames: uint8 (N, 256, 256, 3), nearest to the threshold first. scores: (N,). maps: (N, 256,
    256). threshold: the detector's. good: uint8 (M, 256, 256, 3), of the training set.
    """

    frames: np.ndarray
    scores: Tensor
    maps: Tensor
    threshold: float
    good: np.ndarray


def read_pictures(folder: Path, size: str, most: int = PICTURES) -> Pictures:
    """What `prepare` left there, with the `most` nearest to the threshold at most."""
    with np.load(folder / f"{size}.npz") as found:
        scores, maps = (torch.from_numpy(found[name][:most]) for name in ("scores", "maps"))
        threshold = float(found["threshold"])
        return Pictures(found["frames"][:most], scores, maps, threshold, found["good"])


def read_detector(folder: Path, size: str) -> EfficientAD:
    """The detector that `prepare` left there."""
    return load(folder / f"{size}.safetensors")


def prepare(folder: Path, size: str, data: Path | None) -> None:
    """Make what is missing in the folder for a size: detector, pictures, exported files.

    data: a data set in a known layout; None: drawn parts. The detector is trained by the "instant"
    schedule. No PDN-M teacher comes with the package: M's has random weights, and its detector the
    work and the spread of scores of a trained one without its accuracy.

    Raises:
        ValueError: the folder was made from other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remember(folder, data)
    model = folder / f"{size}.safetensors"
    if not (model.is_file() and (folder / f"{size}.npz").is_file()):
        dataset = _open(folder, data)
        if not model.is_file():
            save(_trained(dataset, size), model)
        _choose(folder, size, dataset)
    detector = read_detector(folder, size)
    place = peers.Place(torch.device("cpu"), 1, folder, good=read_pictures(folder, size).good)
    for make in (peers_packages.exported, peers_packages.quantised):
        try:
            make(detector, place)
        except Exception as error:  # a contender will say so in its row
            print(f"{size}: {make.__name__} files: {peers.reason(error)}", flush=True)


def _remember(folder: Path, data: Path | None) -> None:
    path, said = folder / "data.json", None if data is None else str(data.resolve())
    if not path.is_file():
        write_text(path, json.dumps({"data": said}) + "\n")
    elif (before := json.loads(path.read_text(encoding="utf-8"))["data"]) != said:
        raise ValueError(
            f"folder {folder} was prepared from {before or 'drawn parts'}, and data is "
            f"{said or 'drawn parts'}; name another folder"
        )


def _open(folder: Path, data: Path | None) -> DataSet:
    if data is None:
        data = folder / "parts"
        if not data.is_dir():
            write_dataset(data)
    whole = open_dataset(data)
    train, held_out = _some(whole.train, TRAINED), _some(whole.validation, HELD_OUT)
    return replace(whole, train=train, validation=held_out, test=_some(whole.test, CANDIDATES))


def _some(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """At most so many, evenly spread."""
    return tuple(samples[:: max(1, -(-len(samples) // most))])


def _trained(dataset: DataSet, size: str) -> EfficientAD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher = None if size == "S" else random_teacher(size)
        return fit(dataset, schedule="instant", size=size, teacher=teacher)


def random_teacher(size: str, seed: int = 0) -> PDN:
    """A PDN whose features are random filters': He's start keeps their variance."""
    made, generator = PDN(size), torch.Generator().manual_seed(seed)
    for conv, _ in made.layers():
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    return made.requires_grad_(False).eval()


def _choose(folder: Path, size: str, dataset: DataSet) -> None:
    """Write the pictures nearest to the threshold, with what the plain detector says of them."""
    detector = read_detector(folder, size)
    assert detector.threshold is not None  # training ended with one
    frames = _frames(dataset.test)
    predictor = FastPredictor(detector, device="cpu", dtype="float32", map_size=None)
    found = np.array([float(predictor(frame).score) for frame in frames])
    nearest = frames[np.argsort(np.abs(found - detector.threshold), kind="stable")[:PICTURES]]
    scores, maps = reference(detector, nearest)
    good = _frames(_some(dataset.train, GOOD))
    temporary = folder / f"{size}.part.npz"
    np.savez(
        temporary,
        frames=nearest,
        scores=scores.numpy(),
        maps=maps.numpy(),
        threshold=np.array(detector.threshold),
        good=good,
    )
    temporary.replace(folder / f"{size}.npz")


def _frames(samples: Sequence[Sample]) -> np.ndarray:
    """Pictures as the networks see them, uint8 (N, 256, 256, 3)."""
    batches = load_batches([sample.path for sample in samples], (SIDE, SIDE), workers=1)
    images = torch.cat([batch.images for batch in batches])
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
