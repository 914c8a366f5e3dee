"""The predictor's CUDA graphs: replay against eager, allocation, synchronisation, streams.

Run with `pytest --device cuda`; skipped elsewhere.
"""

from __future__ import annotations

import threading

import helpers
import numpy as np
import pytest
import torch

from efficientad.fast import backends
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS


@pytest.fixture(scope="module")
def predictor(cuda) -> FastPredictor:
    return FastPredictor(helpers.detector(), device=cuda, batch_sizes=(1, 4))


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 256, 256, 3), np.uint8)


def eager(predictor: FastPredictor, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(anomaly map, score) of the predictor's backend, launched one by one."""
    backend = predictor.engine.backend
    image = torch.from_numpy(frames).to(predictor.device)
    height, width = (length + 2 * backend.border for length in predictor.image_size)
    shape = (len(frames), height, width, backend.channels)
    packed = torch.empty(shape, dtype=backend.dtype, device=predictor.device)
    with torch.no_grad():
        backend.pack(image, packed, channels_last=True)
        maps = backend.distance_maps(packed)
        return backend.anomaly_map(maps, predictor.image_size, predictor.map_padding, None)


def test_the_kernels_are_used(predictor):
    assert predictor.facts["backend"] == "triton kernels", predictor.facts["reason"]


def test_kernels_that_start_early_give_the_same_bits(predictor, cuda, monkeypatch):
    """Programmatic dependent launch in the branch, in graphs and out of them."""
    monkeypatch.setattr(backends, "PDL", True)
    early = FastPredictor(helpers.detector(), device=cuda, batch_sizes=(1, 4), backend="triton")
    for n in (1, 4) * 20:
        frames = noise(n, seed=n)
        for found, wanted in zip(eager(early, frames), eager(predictor, frames), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(early(frames).anomaly_map, predictor(frames).anomaly_map)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("size", "padding"), [("S", False), ("S", True), ("M", False)])
def test_graphs_equal_the_float32_detector(size, padding, dtype, cuda):
    model = helpers.detector(size, padding=padding)
    frames = helpers.frames(6, seed=1)
    with torch.no_grad():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        expected = torch.cat([model(one[None]).anomaly_map for one in images])
    found = FastPredictor(model, device=cuda, dtype=dtype, batch_sizes=(1, 2))(frames)
    difference = found.anomaly_map.cpu() - expected
    scale = max(0.1, float(expected.abs().max()))
    largest, rms = BOUNDS[getattr(torch, dtype)]
    assert difference.abs().max() <= largest * scale
    assert difference.square().mean().sqrt() <= rms * scale


def test_replay_equals_eager_for_a_thousand_inputs(predictor):
    for seed in range(250):
        frames = noise(4, seed)
        found = predictor(frames)
        anomaly_map, score = eager(predictor, frames)
        assert torch.equal(found.score, score)
        assert torch.equal(found.anomaly_map, anomaly_map.float())


def test_replay_after_a_reload_and_beside_another_predictor(cuda):
    first, second = helpers.detector(seed=0), helpers.detector(seed=1)
    one = FastPredictor(first, device=cuda, batch_sizes=(1,))
    other = FastPredictor(second, device=cuda, batch_sizes=(1,))
    frame = noise(1)[0]
    scores = float(one(frame).score), float(other(frame).score)
    assert scores[0] != scores[1]
    for _ in range(20):
        assert (float(one(frame).score), float(other(frame).score)) == scores
    one.reload(second)
    assert float(one(frame).score) == scores[1]
    one.reload(first)
    assert float(one(frame).score) == scores[0]


def test_two_threads(predictor):
    frames = noise(8, seed=5)
    expected = [float(predictor(frame).score) for frame in frames]
    found: dict[int, list[float]] = {}

    def work(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(predictor.device)):
            found[k] = [float(predictor(frames[i % 8]).score) for i in range(200)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [expected[i % 8] for i in range(200)] for k in range(2)}


def test_predictors_constructed_at_once(cuda):
    """Captures of two threads do not break each other."""
    model, frame = helpers.detector(), noise(1)[0]
    found: dict[int, tuple[str, float]] = {}

    def work(k: int) -> None:
        made = FastPredictor(model, device=cuda, batch_sizes=(1, 2))
        found[k] = made.facts["backend"], float(made(frame).score)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found.values())) == 1, found


def test_weights_that_are_still_being_written_are_waited_for(cuda):
    """The detector lies on the device and the caller's stream has not reached the last write."""
    old, new = helpers.detector(seed=0).to(cuda), helpers.detector(seed=1).to(cuda)
    frame, target = noise(1)[0], helpers.detector(seed=0).to(cuda)
    predictor = FastPredictor(old, device=cuda, batch_sizes=(1,))
    expected = float(FastPredictor(new, device=cuda, batch_sizes=(1,))(frame).score)
    torch.cuda._sleep(200_000_000)  # some tenth of a second
    target.load_state_dict(new.state_dict())
    predictor.reload(target)
    assert float(predictor(frame).score) == expected


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_step_neither_allocates_nor_waits(where, predictor):
    frames = list(noise(8, seed=6))
    if where == "device":
        frames = [torch.from_numpy(frame).to(predictor.device) for frame in frames]
    helpers.assert_steps_neither_allocate_nor_wait(predictor, frames, 1000)


def test_frames_of_every_place_and_size_give_the_same(predictor):
    frame = helpers.frames(1, 400, 300, seed=7)[0]
    on_host = predictor([frame, helpers.frames(1)[0]])
    on_device = predictor(
        [torch.from_numpy(f).to(predictor.device) for f in (frame, helpers.frames(1)[0])]
    )
    bound = 2 * BOUNDS[torch.float16][0] * max(0.1, float(on_host.anomaly_map.abs().max()))
    assert (on_host.score - on_device.score).abs().max() <= bound


def test_the_map_at_source_size(predictor):
    frame = helpers.frames(1, 256, 256)[0]
    found = predictor(frame, map_size="source")
    assert torch.equal(found.anomaly_map, predictor(frame).anomaly_map)
    assert predictor(frame, map_size="feature").anomaly_map.shape == (56, 56)


def test_the_callers_stream_sees_the_results(predictor):
    frame = torch.from_numpy(noise(1, seed=8)[0])
    expected = float(predictor(frame.numpy()).score)
    with torch.cuda.stream(torch.cuda.Stream(predictor.device)):
        for _ in range(50):
            moved = frame.pin_memory().to(predictor.device, non_blocking=True)
            assert float(predictor(moved).score * 1) == expected


def test_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    model, frame = helpers.detector(), noise(1)[0]
    with torch.cuda.device(0):
        found = FastPredictor(model, device="cuda:1")(frame)
    assert found.score.device.index == 1
    assert float(found.score) == float(FastPredictor(model, device="cuda:0")(frame).score)


def test_the_torch_network_in_the_graph(cuda):
    model, frame = helpers.detector(), helpers.frames(1)[0]
    fast = FastPredictor(model, device=cuda, backend="torch")
    assert fast.facts["backend"] == "folded torch network"
    assert fast.facts["dtype"] == "float16"
    expected = float(FastPredictor(model, device="cpu", dtype="float32")(frame).score)
    assert float(fast(frame).score) == pytest.approx(expected, abs=1e-2 * max(0.1, expected))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_region_in_the_graphs(dtype, cuda):
    """Inside the bits that there are without one; another region is taken over in place."""
    plain, model, other = helpers.detector(), helpers.detector(), helpers.detector()
    masks = torch.zeros(2, 256, 256, dtype=torch.bool)
    masks[0, 60:150, 40:200] = masks[1, 100:120, 50:90] = True
    for detector, mask in ((model, masks[0]), (other, masks[1])):
        detector.set_region(mask, keep_calibration=True)
    whole = FastPredictor(plain, device=cuda, dtype=dtype, batch_sizes=(1, 4))
    predictor = FastPredictor(model, device=cuda, dtype=dtype, batch_sizes=(1, 4))
    frames = noise(3)
    for mask, reload in zip(masks, (model, other), strict=True):
        predictor.reload(reload)
        for size in ("input", "source"):
            found, expected = (p(frames, map_size=size).cpu() for p in (predictor, whole))
            inside = mask.numpy()
            assert np.array_equal(found.anomaly_map[:, inside], expected.anomaly_map[:, inside])
            assert len(np.unique(found.anomaly_map[:, ~inside])) == 1
            assert np.array_equal(found.score, expected.anomaly_map[:, inside].max(1))
    helpers.assert_steps_neither_allocate_nor_wait(predictor, [*frames], 20)
