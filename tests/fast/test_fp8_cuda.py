"""fp8 on a GPU: graphs against fp8's definition, the facts of the check, damaged images.

Run with `pytest --device cuda`; skipped elsewhere and below sm_89.
"""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from helpers_fp8 import write_images

from efficientad.fast import fp8
from efficientad.fast.folding_fp8 import LAYERS
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS
from efficientad.utils.devices import FP8


@pytest.fixture(scope="module")
def cuda(cuda) -> torch.device:
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("fp8 needs sm_89 or newer")
    return cuda


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("good"), helpers.images(16, seed=41))


@pytest.fixture(scope="module")
def predictor(cuda, good) -> FastPredictor:
    options = {"dtype": FP8, "calibration": good, "batch_sizes": (1, 4)}
    return FastPredictor(helpers.detector(), device=cuda, **options)


def images(n: int, seed: int = 42) -> torch.Tensor:
    return torch.from_numpy(helpers.frames(n, seed=seed)).permute(0, 3, 1, 2).float() / 255


def test_the_facts_say_what_fp8_changed(predictor):
    facts = predictor.facts
    assert facts["backend"] == "triton kernels, fp8"
    assert facts["dtype"] == "float8_e4m3fn"
    found = facts["fp8"]
    assert (found["layers"], found["images"]) == ("second", 16)
    assert found["pairs"] >= 1
    assert 0 <= found["discordant"] <= fp8.DISCORDANT_BOUND
    assert 0 < found["map_error"] <= fp8.MAP_BOUND


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("size", "padding"), [("S", False), ("S", True), ("M", False)])
def test_graphs_equal_the_definition(size, padding, layers, cuda, good, monkeypatch):
    """The built-in image at construction, and others here in batches of 1 and 2."""
    monkeypatch.setattr(fp8, "MAP_BOUND", math.inf)  # random detectors need not keep their scores
    monkeypatch.setattr(fp8, "DISCORDANT_BOUND", 1.0)
    predictor = FastPredictor(
        helpers.detector(size, padding=padding), device=cuda, dtype="float8_e4m3fn",
        calibration=good, fp8_layers=layers, batch_sizes=(1, 2),
    )  # fmt: skip
    found = predictor.detect(images(3))
    with torch.no_grad():
        parts = [predictor.engine.backend.definition(image[None].to(cuda)) for image in images(3)]
    expected = torch.cat([anomaly_map for anomaly_map, _ in parts])
    scale = max(0.1, float(expected.abs().max()))
    largest, rms = BOUNDS[FP8]
    difference = found.anomaly_map - expected
    assert difference.abs().max() <= largest * scale
    assert difference.square().mean().sqrt() <= rms * scale
    assert (found.score - torch.cat([score for _, score in parts])).abs().max() <= largest * scale


def test_replay_equals_eager(predictor):
    backend = predictor.engine.backend
    for seed in range(50):
        batch = images(4, seed)
        packed = torch.empty((4, 256, 256, 4), dtype=torch.float16, device=predictor.device)
        with torch.no_grad():
            backend.pack(batch.to(predictor.device), packed, channels_last=False)
            maps = backend.distance_maps(packed)
            anomaly_map, score = backend.anomaly_map(maps, (256, 256), predictor.map_padding, None)
        torch.cuda.synchronize()  # both write to the same buffers, on two streams
        found = predictor.detect(batch)
        assert torch.equal(found.score, score)
        assert torch.equal(found.anomaly_map, anomaly_map.float())


def test_quantiles_are_those_of_the_fp8_maps(predictor):
    maps = predictor.detect(images(16, seed=41))
    a_st, a_ae, *_ = predictor.engine.backend.weights.affine.tolist()
    levels = torch.tensor([0.9, 0.995], dtype=torch.float64)
    for a, values in ((a_st, maps.map_st), (a_ae, maps.map_ae)):
        qa, qb = torch.quantile(values.double().flatten().cpu(), levels).tolist()
        assert a == pytest.approx(0.05 / (qb - qa), rel=1e-3)


def test_a_damaged_image_has_no_score_and_its_neighbours_keep_theirs(predictor):
    batch = images(4)
    expected = predictor.detect(batch)
    for value in (math.nan, math.inf, -math.inf):
        batch[2, 1, 100, 50] = value
        found = predictor.detect(batch)
        assert found.score[2].isnan()
        others = [0, 1, 3]
        assert torch.equal(found.score[others], expected.score[others])
        assert torch.equal(found.anomaly_map[others], expected.anomaly_map[others])


def test_a_step_neither_allocates_nor_waits(predictor):
    frame = torch.from_numpy(helpers.frames(1)[0]).to(predictor.device)
    helpers.assert_steps_neither_allocate_nor_wait(predictor, [frame] * 8, 200)
