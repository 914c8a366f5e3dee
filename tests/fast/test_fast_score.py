"""The fast path of a detector whose score is the mean of the largest cells."""

from __future__ import annotations

import copy
import pickle

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import efficientad as ead
from efficientad.fast.backends import KernelBackend, TorchBackend
from efficientad.fast.predictor import FastPredictor
from efficientad.fast.tiling import tiled_anomaly_map
from efficientad.model.image_score import pixels_of

FRAMES = helpers.frames(3, 300, 420, seed=3) // 2
REGION = torch.zeros(256, 256, dtype=torch.bool)
REGION[60:150, 40:200] = True


class Light(TorchBackend):
    """In the network's place: distances are local brightness; of white cells NaN."""

    def distance_maps(self, packed):
        brightness = F.avg_pool2d(packed.permute(0, 3, 1, 2).float().abs(), 4)[..., 4:-4, 4:-4]
        brightness = torch.where(brightness > 2.2, torch.nan, brightness)
        return brightness[:, 0].contiguous(), brightness[:, 1].contiguous()


class LightPredictor(FastPredictor):
    torch_backend = Light


def light(model: ead.EfficientAD, **options) -> FastPredictor:
    return LightPredictor(model, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    """Calibrated by hand: what stands in for its networks needs no more."""
    model = ead.EfficientAD()
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.5, 1.5, 0.5, 1.5)
    model.score = 10
    model.threshold = 0.08
    return model


@pytest.fixture(scope="module")
def predictor(model) -> FastPredictor:
    return light(model)


def mean_of_largest(anomaly_map, count: int) -> float:
    return float(np.sort(np.asarray(anomaly_map, np.float64).ravel())[-count:].mean())


@pytest.mark.parametrize("map_size", ["input", "source", "feature", None])
def test_it_is_of_the_map_at_input_size_whatever_map_is_asked_for(predictor, map_size):
    expected = [mean_of_largest(one, 160) for one in predictor(FRAMES).anomaly_map]
    found = predictor(FRAMES, map_size=map_size).score
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    streamed = [float(p.score) for p in predictor.stream(list(FRAMES), map_size=map_size)]
    assert streamed == found.tolist()
    assert float(predictor(FRAMES[1], map_size=map_size).score) == found[1]


def test_at_the_size_of_the_frame(model):
    own = copy.deepcopy(model)
    own.score_size = "source"
    found = light(own)(FRAMES[0], map_size="source")
    count = pixels_of(10, (300, 420), (56, 56), 4)
    assert count == round(10 * 300 * 420 / 64**2)
    assert float(found.score) == pytest.approx(mean_of_largest(found.anomaly_map, count), rel=1e-6)


def test_a_value_that_is_not_finite_makes_it_nan(predictor):
    frame = FRAMES[0].copy()
    frame[100:120, 100:120] = 255
    found = predictor(frame)
    assert found.score.isnan()
    assert found.is_anomalous


def test_detect_gives_it(predictor):
    images = torch.from_numpy(helpers.frames(2)).permute(0, 3, 1, 2).float() / 510
    found = predictor.detect(images)
    expected = [mean_of_largest(one, 160) for one in found.anomaly_map]
    assert found.score.tolist() == pytest.approx(expected, rel=1e-6)


def test_of_tiles_it_is_of_the_blended_map_with_a_tiles_cells(predictor):
    frame = helpers.frames(1, 300, 500, seed=4)[0] // 2

    def one(image: torch.Tensor) -> torch.Tensor:
        tile = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
        return predictor(tile, map_size="input").anomaly_map[None]

    found = predictor.predict_large(frame)
    image = torch.from_numpy(frame).permute(2, 0, 1)
    expected, score = tiled_anomaly_map(one, image, (256, 256), 48, (18, 18), pixels=160)
    assert float(score) == pytest.approx(mean_of_largest(expected, 160), rel=1e-6)
    assert float(found.score) == pytest.approx(float(score), rel=1e-5)
    frame = frame.copy()
    frame[120:140, 300:320] = 255
    assert predictor.predict_large(frame).score.isnan()


def test_reload_and_pickling_keep_it(model, predictor):
    copied = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(copied(FRAMES).score, predictor(FRAMES).score)
    other = copy.deepcopy(model)
    other.score = "max"
    with pytest.raises(ValueError, match="the detector has score max and the predictor 10"):
        copied.reload(other)
    copied.reload(model)


@pytest.mark.parametrize("region", [None, REGION])
@pytest.mark.parametrize(("size", "padding"), [((70, 64), 4), ((56, 56), 0)])
def test_the_kernels_backend_gives_the_torch_backends_scores(model, device, region, size, padding):
    own, kind = copy.deepcopy(model), torch.device(device)
    own.set_region(region, keep_calibration=True)
    kernels, network = (b(own, torch.float16, kind) for b in (KernelBackend, TorchBackend))
    st, ae = (torch.rand(3, 2, 56, 56, generator=torch.Generator().manual_seed(4)) for _ in "ab")
    st[0, 1, 25, 25] = torch.nan
    st, ae = st.to(kind), ae.to(kind)
    found, score = kernels.anomaly_map((st, ae), size, padding, None)
    expected, mean = network.anomaly_map((st, ae), size, padding, None)
    assert score.isnan().tolist() == mean.isnan().tolist() == [False, True]
    assert abs(score[0] - mean[0]) <= 1e-5 * float(expected[0].abs().max())
    assert score[0] < expected[0].max()
    out = torch.full_like(found, torch.inf), torch.full_like(score, torch.inf)
    kernels.anomaly_map((st, ae), size, padding, out)
    assert torch.equal(out[1][:1], score[:1])
    assert out[1][1].isnan()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_in_the_graphs(dtype, cuda):
    """The mean of the map that came with it, at every batch size; steps neither allocate nor wait.

    A region of another size is taken over in place.
    """
    frames, model = helpers.frames(3), helpers.detector()
    model.score = 10
    predictor = FastPredictor(model, device=cuda, dtype=dtype, batch_sizes=(1, 4))
    for batch in (frames, frames[:1]):
        found = predictor(batch).cpu()
        expected = [mean_of_largest(one, 160) for one in found.anomaly_map]
        assert found.score.tolist() == pytest.approx(expected, rel=1e-5)
        assert (found.score < found.anomaly_map.max((1, 2))).all()
    helpers.assert_steps_neither_allocate_nor_wait(predictor, [*frames], 20)
    parts = [copy.deepcopy(model) for _ in range(2)]
    small = torch.zeros_like(REGION)
    small[100:110, 60:70] = True
    for part, region in zip(parts, (REGION, small), strict=True):
        part.set_region(region, keep_calibration=True)
    predictor = FastPredictor(parts[0], device=cuda, dtype=dtype, batch_sizes=(1, 4))
    for part, count in zip(parts, (160, 100), strict=True):
        predictor.reload(part)
        found = predictor(frames).cpu()
        inside = part.region.numpy()
        expected = [mean_of_largest(one[inside], count) for one in found.anomaly_map]
        assert found.score.tolist() == pytest.approx(expected, rel=1e-5)
