"""The predictor in fp8: calibration, the check of its scores, refusals; kernels in plain torch."""

from __future__ import annotations

import copy
import math
import re

import helpers
import numpy as np
import pytest
import torch
from helpers_fp8 import Definitions, interpret_fp8_exactly, write_images

from efficientad.fast import backends, fp8
from efficientad.fast.folding_fp8 import LAYERS
from efficientad.fast.fp8 import Fp8Check, Fp8Error, changed_order
from efficientad.fast.options import choose_dtype
from efficientad.fast.predictor import FastPredictor
from efficientad.fast.self_check import self_check
from efficientad.utils.devices import FP8

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def light(device):
    """Kernels in plain torch, and few images: a pass over one takes a second."""
    if device != "cpu":
        pytest.skip(
            "a CPU has fp8 in Triton's interpreter alone; GPUs: tests/fast/test_fp8_cuda.py"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "Kernels", Definitions)
        patch.setattr(fp8, "FEWEST_IMAGES", 4)
        yield


@pytest.fixture(scope="module")
def model():
    model = helpers.detector()
    model.threshold = 0.08
    model.provenance["calibration"] = {"false_positive_rate": 0.25}
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Eight good images."""
    images = torch.cat([helpers.images(4, seed=seed) for seed in (31, 32)])
    return write_images(tmp_path_factory.mktemp("good"), images)


@pytest.fixture(scope="module")
def before(model):
    """The detector's state before the predictor is built from it."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def predictor(model, before, good) -> FastPredictor:
    return FastPredictor(model, device="cpu", dtype="float8_e4m3fn", calibration=good[:4])


@pytest.fixture(scope="module")
def images():
    """The four that the predictor was calibrated with."""
    return torch.from_numpy(helpers.frames(4, seed=31)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def maps(predictor, images):
    return predictor.detect(images)


# ---- what is accepted ------------------------------------------------------------------------


def test_a_plain_detector_is_accepted(predictor):
    assert predictor.dtype == FP8
    facts = predictor.facts
    assert facts["dtype"] == "float8_e4m3fn"
    assert facts["backend"] == "triton kernels, fp8"
    found = facts["fp8"]
    assert found["layers"] == "second"
    assert found["images"] == 4
    assert 1 <= found["pairs"] <= 6
    assert 0 <= found["discordant"] <= fp8.DISCORDANT_BOUND
    assert 0 < found["map_error"] <= fp8.MAP_BOUND


def test_quantiles_and_threshold_are_those_of_the_fp8_maps(predictor, maps, model):
    levels = (0.9, 0.995)
    expected = [np.quantile(m.numpy(), q) for m in (maps.map_st, maps.map_ae) for q in levels]
    a_st, a_ae, offset, _ = predictor.engine.backend.weights.affine.tolist()
    for a, (qa, qb) in ((a_st, expected[:2]), (a_ae, expected[2:])):
        assert a == pytest.approx(0.05 / (qb - qa), rel=1e-4)
    assert offset == pytest.approx(-a_st * expected[0] - a_ae * expected[2], rel=1e-4)
    # A quarter of the four images may exceed the threshold.
    assert predictor.threshold == pytest.approx(float(maps.score.sort().values[2]), rel=1e-5)


def test_the_maps_are_fp8_ones_and_the_users_detector_is_not_touched(
    predictor, maps, images, model, before
):
    with torch.no_grad():
        expected = model.distance_maps(images[:1])
    for found, own in zip((maps.map_st, maps.map_ae), expected, strict=True):
        error = (found[0] - own[0]).square().mean().sqrt() / own.std()
        assert 1e-4 < error < 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.threshold == 0.08
    assert not torch.allclose(predictor.engine.backend.weights.affine, model.affine, rtol=1e-4)


def test_a_frame_through_the_predictor(predictor, maps):
    frame = helpers.frames(4, seed=31)[0]
    assert float(predictor(frame).score) == pytest.approx(float(maps.score[0]), rel=1e-2)


def test_a_damaged_image_has_no_score(predictor, images):
    damaged = images[:1].clone()
    damaged[0, 0, 100, 100] = math.nan
    assert predictor.detect(damaged).score.isnan().all()


def test_another_detector_needs_another_predictor(predictor, model):
    kept = [t.float() for t in predictor.engine.backend.weights.tensors()]
    with pytest.raises(ValueError, match="build a new predictor with calibration images"):
        predictor.reload(model)
    tensors = predictor.engine.backend.weights.tensors()
    assert all(torch.equal(a, b.float()) for a, b in zip(kept, tensors, strict=True))
    assert predictor.threshold != model.threshold


def test_maps_that_are_not_finite_are_refused(predictor, images):
    damaged = images[:1].clone()
    damaged[0, 0, 100, 100] = math.nan
    with pytest.raises(Fp8Error, match="not finite in float8_e4m3fn"):
        fp8._fp8_maps(predictor.engine.backend, damaged)


def test_a_detector_without_a_threshold_gets_none(model):
    own = copy.deepcopy(model)
    own.threshold = None
    maps = fp8.MapFile(56, 56)
    maps.add(torch.rand(4, 56, 56), torch.rand(4, 56, 56))
    assert fp8._recalibrated(own, maps, [(256, 256)] * 4)[0].threshold is None
    recalibrated, scores = fp8._recalibrated(model, maps, [(256, 256)] * 4)
    assert recalibrated.threshold == sorted(scores)[2]
    assert recalibrated.teacher is model.teacher
    maps.close()


# ---- what is refused -------------------------------------------------------------------------


@torch.no_grad()
def fitted(distance: float):
    """A student that differs from its teacher by less than fp8 tells apart; no autoencoder."""
    model = helpers.detector()
    generator = torch.Generator().manual_seed(0)
    for i in (1, 2, 3):
        teacher, student = (getattr(n, f"conv{i}") for n in (model.teacher, model.student))
        noise = torch.randn(teacher.weight.shape, generator=generator)
        student.weight.copy_(teacher.weight + distance * teacher.weight.std() * noise)
        student.bias.copy_(teacher.bias)
    last, student = model.teacher.conv4, model.student.conv4
    std, mean = model.teacher_std.flatten(), model.teacher_mean.flatten()
    student.weight[:384] = last.weight / std[:, None, None, None]
    student.bias[:384] = (last.bias - mean) / std
    for layer in (student.weight[384:], student.bias[384:]):
        layer.zero_()
    for parameter in model.autoencoder.decoder.deconv8.parameters():
        parameter.zero_()
    helpers.calibrate_on_own_maps(model, helpers.images(2, seed=100))
    return model


@pytest.mark.filterwarnings("ignore:q_a and q_b of the ae map")
def test_a_detector_whose_ranking_is_lost_is_refused(good, monkeypatch):
    monkeypatch.setattr(fp8, "self_check", lambda *arguments: None)
    model = fitted(1e-3)
    affine = model.affine.clone()
    with pytest.raises(Fp8Error) as caught:
        FastPredictor(model, device="cpu", dtype=FP8, calibration=good)
    message = re.fullmatch(
        r"float8_e4m3fn in layers 'second' does not keep this detector's scores: of (\d+) pairs of "
        r"the 8 calibration images whose float32 scores are more than 0.02 apart, ([0-9.]+) % "
        r"change their order \(bound 5 %\), and the maps differ by ([0-9.]+) of their standard "
        r"deviation \(bound 0.33\)\. Use dtype='float16'",
        str(caught.value),
    )
    pairs, changed, error = map(float, message.groups())
    assert pairs > 5
    assert changed > 3 * 100 * fp8.DISCORDANT_BOUND
    assert error > 1.2 * fp8.MAP_BOUND
    assert torch.equal(model.affine, affine)


def test_either_bound_refuses():
    sound = {"images": 20, "pairs": 100, "discordant": 0.05, "map_error": 0.3}
    assert Fp8Check(**sound).problem() is None
    for bad in ({"discordant": 0.06}, {"map_error": 0.34}, {"map_error": math.nan}):
        problem = Fp8Check(**(sound | bad)).problem()
        assert "100 pairs of the 20 calibration images" in problem


def test_pairs_in_another_order_are_counted():
    expected = [0.0, 0.01, 0.1, 0.2]
    assert changed_order(expected, expected, 0.02) == (5, 0)
    assert changed_order(expected, expected, 0.0) == (6, 0)
    assert changed_order(expected, [0.01, 0.0, 0.1, 0.2], 0.02) == (5, 0)  # too close to count
    assert changed_order(expected, [0.0, 0.01, 0.2, 0.1], 0.02) == (5, 1)
    assert changed_order(expected, expected[::-1], 0.02) == (5, 5)
    assert changed_order(expected, [0.0, 0.1, 0.1, 0.2], 0.02) == (5, 1)  # a tie
    assert changed_order(expected, [0.0, 0.01, 0.1, math.nan], 0.02) == (5, 3)
    assert changed_order([0.1], [0.1], 0.02) == (0, 0)


def test_kernels_that_are_broken_are_named_and_nothing_takes_their_place(model, monkeypatch):
    """A wrong scale in one layer: told from what fp8 costs without a calibration image."""

    class Broken(Definitions):
        def __getattr__(self, name):
            operation = super().__getattr__(name)
            if name != "conv_relu_pool":
                return operation
            return lambda *a, scale, **options: operation(
                *a, scale=[s * 1.2 for s in scale], **options
            )

    largest = [torch.full((2,), 4.0), torch.full((2,), 2.0), torch.ones(2)]
    monkeypatch.setattr(backends, "Kernels", Broken)
    broken = backends.Fp8Backend(model, largest, "second", CPU)
    with pytest.raises(
        Fp8Error, match=r"kernels cannot be used in float8_e4m3fn on cpu: self-check"
    ):
        fp8._check_kernels(broken, model, (1,))
    broken._kernels = None
    with pytest.raises(Fp8Error, match=r"on cpu: AttributeError: .*Use dtype='float16'"):
        fp8._check_kernels(broken, model, (1,))


def test_bad_arguments(model, good, monkeypatch):
    options = {"device": "cpu", "dtype": "float8_e4m3fn"}
    with pytest.raises(ValueError, match="calibration is None and dtype float8_e4m3fn"):
        FastPredictor(model, **options)
    with pytest.raises(ValueError, match="calibration is given and dtype is torch"):
        FastPredictor(model, device="cpu", dtype="float32", calibration=good)
    with pytest.raises(ValueError, match=r"calibration has 3 good images; .* at least 4"):
        FastPredictor(model, **options, calibration=good[:3])
    with pytest.raises(ValueError, match="fp8_layers is 'last'"):
        FastPredictor(model, **options, calibration=good, fp8_layers="last")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FastPredictor(model, **options, calibration="nowhere")
    for backend in ("torch", "fast"):
        with pytest.raises(ValueError, match=f"backend is '{backend}' and dtype float8_e4m3fn"):
            FastPredictor(model, **options, calibration=good, backend=backend)
    monkeypatch.setenv("EFFICIENTAD_BACKEND", "torch")
    with pytest.raises(ValueError, match="backend is 'torch' and dtype float8_e4m3fn"):
        FastPredictor(model, **options, calibration=good)


def test_devices_without_fp8_are_refused(monkeypatch):
    assert choose_dtype("float8_e4m3fn", CPU, "auto") == FP8
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"the device a CPU; fp8 needs a CUDA device from sm_89"):
        choose_dtype(FP8, CPU, "triton")
    cuda = torch.device("cuda", 0)
    for capability, good in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        if good:
            assert choose_dtype("float8_e4m3fn", cuda, "auto") == FP8
            continue
        message = f"cuda:0 is sm_8{capability[1]}; fp8 needs a CUDA device from sm_89 on"
        with pytest.raises(ValueError, match=message):
            choose_dtype("float8_e4m3fn", cuda, "auto")


# ---- kernels ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
def test_interpreted_kernels_give_their_definition(layers, model, monkeypatch):
    """The whole network at 256x256, within the bound of the self-check."""
    interpret_fp8_exactly(monkeypatch)
    monkeypatch.setattr(backends, "Kernels", helpers.interpreted_in_few_programs)
    largest = [torch.full((2,), 4.0), torch.full((2,), 2.0), torch.ones(2)]
    backend = backends.Fp8Backend(model, largest, layers, CPU)
    assert self_check(backend, model, (1,)) is None
