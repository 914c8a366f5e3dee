"""The fast path of a detector with a region: the same bits inside, nothing from outside."""

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
from efficientad.model.region import resized


def rectangle(rows=(60, 150), columns=(40, 200)) -> torch.Tensor:
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


class Light(TorchBackend):
    """In the network's place: distances are local brightness; of white cells NaN."""

    def distance_maps(self, packed):
        brightness = F.avg_pool2d(packed.permute(0, 3, 1, 2).float().abs(), 4)[..., 4:-4, 4:-4]
        brightness = torch.where(brightness > 2.2, torch.nan, brightness)
        return brightness[:, 0].contiguous(), brightness[:, 1].contiguous()


class LightPredictor(FastPredictor):
    torch_backend = Light


@pytest.fixture(scope="module")
def plain() -> ead.EfficientAD:
    model = helpers.detector()
    model.threshold = 0.08
    return model


@pytest.fixture(scope="module")
def model(plain) -> ead.EfficientAD:
    model = copy.deepcopy(plain)
    model.set_region(rectangle(), keep_calibration=True)
    return model


@pytest.fixture(scope="module")
def predictor(model) -> FastPredictor:
    return LightPredictor(model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def without(plain) -> FastPredictor:
    return LightPredictor(plain, device="cpu", dtype="float32")


FRAMES = helpers.frames(3, 300, 420, seed=3) // 2


@pytest.mark.parametrize("map_size", ["input", "source"])
def test_inside_every_bit_is_as_without_a_region(predictor, without, map_size):
    found, whole = (p(FRAMES, map_size=map_size) for p in (predictor, without))
    inside = resized(rectangle(), tuple(found.anomaly_map.shape[1:]))
    assert torch.equal(found.anomaly_map[:, inside], whole.anomaly_map[:, inside])
    assert found.anomaly_map[:, ~inside].unique().numel() == 1
    expected = without(FRAMES).anomaly_map[:, rectangle()].amax(1)
    assert torch.equal(found.score, expected)
    assert (found.score < whole.score).any()


def test_maps_at_feature_size_have_the_cells_of_the_region(predictor, without, model):
    found, whole = (p(FRAMES, map_size="feature").anomaly_map for p in (predictor, without))
    cells = model.region_cells
    assert torch.equal(found[:, cells], whole[:, cells])
    assert found[:, ~cells].unique().numel() == 1


def test_nan_outside_reaches_nothing_and_inside_the_score(predictor, without):
    frame = helpers.frames(1, seed=3)[0] // 2
    clean = predictor(frame)
    outside, inside = frame.copy(), frame.copy()
    outside[20:40, 20:40] = 255
    inside[100:120, 100:120] = 255
    assert without(outside).score.isnan()
    found = predictor(outside)
    assert torch.equal(found.score, clean.score)
    assert torch.equal(found.anomaly_map, clean.anomaly_map)
    assert predictor(inside).score.isnan()


def test_scores_at_the_size_of_the_frame(model, plain):
    own, other = copy.deepcopy(model), copy.deepcopy(plain)
    own.score_size = other.score_size = "source"
    found = LightPredictor(own, device="cpu", dtype="float32")(FRAMES[0], map_size="source")
    whole = LightPredictor(other, device="cpu", dtype="float32")(FRAMES[0], map_size="source")
    inside = resized(rectangle(), FRAMES[0].shape[:2])
    assert found.score == whole.anomaly_map[inside].max()


def test_the_real_network_agrees_with_the_detector(model):
    frames = helpers.frames(2)
    found = FastPredictor(model, device="cpu", dtype="float32")(frames)
    for one, expected in zip(
        found, ead.predict(model, list(frames), map_size="input"), strict=True
    ):
        assert float(one.score) == pytest.approx(expected.score, abs=1e-4)
        assert np.abs(one.anomaly_map.numpy() - expected.anomaly_map).max() <= 1e-4
        assert torch.equal(one.region, expected.region)


def test_detect_and_streams_apply_the_region(predictor):
    images = torch.from_numpy(helpers.frames(2)).permute(0, 3, 1, 2).float() / 510
    found = predictor.detect(images)
    assert torch.equal(found.score, found.anomaly_map[:, rectangle()].amax(1))
    (streamed,) = predictor.stream([FRAMES[0]])
    assert torch.equal(streamed.score, predictor(FRAMES[0]).score)


def test_reload_takes_another_region_over_but_not_its_absence(model, plain):
    predictor = LightPredictor(model, device="cpu", dtype="float32")
    before = predictor(FRAMES[0])
    other = copy.deepcopy(model)
    other.set_region(rectangle(rows=(100, 130)), keep_calibration=True)
    predictor.reload(other)
    after = predictor(FRAMES[0])
    assert torch.equal(after.score, before.anomaly_map[rectangle(rows=(100, 130))].max())
    assert torch.equal(after.region, rectangle(rows=(100, 130)))
    assert torch.equal(before.region, rectangle())
    with pytest.raises(ValueError, match="the detector has no region and the predictor one"):
        predictor.reload(plain)
    with pytest.raises(ValueError, match="the detector has a region and the predictor none"):
        LightPredictor(plain, device="cpu", dtype="float32").reload(model)


def test_pickling_keeps_the_region(predictor):
    copied = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(copied.region, rectangle())
    assert torch.equal(copied(FRAMES[0]).score, predictor(FRAMES[0]).score)


def test_tiles_are_refused(predictor):
    with pytest.raises(ValueError, match="the detector has a region, which is of whole frames"):
        predictor.predict_large(FRAMES[0])


def test_defects_outside_are_no_regions_even_below_the_lowest_value(predictor):
    one = predictor(FRAMES[0])
    (found,) = one.regions(threshold=-1e6)
    assert found.box == (
        40 * 420 // 256,
        60 * 300 // 256,
        -(-200 * 420 // 256),
        -(-150 * 300 // 256),
    )
    assert one.cpu().regions(threshold=-1e6) == [found]
    assert predictor(FRAMES)[:1][0].regions(threshold=-1e6) == [found]


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        pytest.param((256, 256), 4, marks=pytest.mark.slow),
        ((90, 300), 4),
        ((40, 31), 4),
        ((56, 56), 0),
    ],
)
def test_the_kernels_backend_gives_the_torch_backends_maps(model, device, size, padding):
    kind = torch.device(device)
    kernels, network = (b(model, torch.float16, kind) for b in (KernelBackend, TorchBackend))
    g = torch.Generator().manual_seed(4)
    st, ae = (torch.rand(3, 2, 56, 56, generator=g) for _ in range(2))
    st[0, 1, 2, 2] = torch.nan
    st, ae = st.to(kind), ae.to(kind)
    found, score = kernels.anomaly_map((st, ae), size, padding, None)
    expected, best = network.anomaly_map((st, ae), size, padding, None)
    assert torch.equal(score.isnan(), best.isnan())
    assert not score.isnan().any()
    bound = 1e-5 * float(expected.abs().max())
    assert (found - expected).abs().max() <= bound
    assert (score - best).abs().max() <= bound
    out = torch.full_like(found, torch.nan), torch.full_like(score, torch.nan)
    kernels.anomaly_map((st, ae), size, padding, out)
    assert torch.equal(out[0], found)
    assert torch.equal(out[1], score)
