"""Fast path against the float32 reference: bounds of the maps, scores and their ranking."""

from __future__ import annotations

import itertools
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from efficientad import EfficientAD, Prediction
from efficientad.data.decoding import read_image
from efficientad.data.image_files import find_images
from efficientad.data.images import resize_image, to_tensor
from efficientad.data.layouts import open_dataset
from efficientad.fast import self_check
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS
from efficientad.model.calibration import calibrate


def bounds(dtype: torch.dtype, expected: torch.Tensor) -> tuple[float, float]:
    scale = max(0.1, float(expected.abs().max()))
    return tuple(bound * scale for bound in BOUNDS[dtype])


def assert_close(found, maps, scores, dtype) -> None:
    """Maps within the largest and RMS bound; scores in the same order where they differ by more."""
    largest, rms = bounds(dtype, maps)
    difference = torch.as_tensor(found.anomaly_map).float().cpu() - maps
    assert difference.abs().max() <= largest
    assert difference.square().mean().sqrt() <= rms
    fast = found.score.float().cpu()
    assert (fast - scores).abs().max() <= largest
    for i, j in itertools.combinations(range(len(scores)), 2):
        if abs(scores[i] - scores[j]) > 2 * largest:
            assert (scores[i] > scores[j]) == (fast[i] > fast[j])


def reference(model: EfficientAD, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        outputs = [model(to_tensor([frame])) for frame in frames]
    return torch.cat([o.anomaly_map for o in outputs]), torch.cat([o.score for o in outputs])


def test_small_networks_at_256_pixels(device, shared_data, request):
    """Real and random images: 100 of each with --full or on a GPU, else 6."""
    many = request.config.getoption("--full") or device != "cpu"
    each = 100 if many else 6
    root = Path(shared_data) / "mvtec_screw_256"
    paths = find_images(root / "test")
    real = [resize_image(read_image(p), (256, 256)) for p in paths[:: len(paths) // each][:each]]
    frames = np.stack([*real, *helpers.frames(each, seed=20)])
    model = helpers.detector("S", calibrated=False)
    calibrate(model, [sample.path for sample in open_dataset(root).train[:4]])
    predictor = FastPredictor(model, device=device)
    assert_close(predictor(frames), *reference(model, frames), predictor.dtype)


COMBINATIONS = [
    (size, padding, image_size)
    for image_size in ((256, 256), (256, 512), (500, 777))
    for size in ("S", "M")
    for padding in (False, True)
]


@pytest.mark.parametrize(
    ("size", "padding", "image_size"),
    [
        pytest.param(*c, marks=[] if c == ("S", False, (256, 256)) else pytest.mark.slow)
        for c in COMBINATIONS
    ],
)
def test_every_size_and_padding_in_batches_of_one_three_and_two(size, padding, image_size, device):
    model = helpers.detector(size, padding=padding, image_size=image_size)
    frames = helpers.frames(6, *image_size, seed=21)
    predictor = FastPredictor(model, device=device, batch_sizes=(1, 2, 3))
    maps, scores = reference(model, frames)
    parts = [predictor(frames[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    whole = Prediction(
        range(6),
        torch.cat([p.score for p in parts]),
        None,
        torch.cat([p.anomaly_map for p in parts]),
        [image_size] * 6,
    )
    assert_close(whole, maps, scores, predictor.dtype)


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        pytest.param("S", False, marks=pytest.mark.slow),
        pytest.param("S", True, marks=pytest.mark.slow),
        pytest.param("M", False, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_through_the_predictor(size, padding, device, monkeypatch):
    """Twice, so that the second run writes to the buffers that the first one allocated."""
    if device == "cpu":
        few = helpers.interpreted_in_few_programs()
        monkeypatch.setattr(self_check, "Kernels", lambda way: few)
        monkeypatch.setattr(self_check, "self_check", lambda *arguments: None)
    model = helpers.detector(size, padding=padding)
    frames = helpers.frames(2, seed=22)
    predictor = FastPredictor(
        model, device=device, dtype="float16", backend="triton", batch_sizes=(1,)
    )
    assert predictor.facts["backend"] == "triton kernels"
    first, second = (predictor(frame[None]) for frame in frames)
    for i, found in enumerate((first, second)):
        assert_close(found, *reference(model, frames[i : i + 1]), torch.float16)
