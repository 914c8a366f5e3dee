"""The fast path of a detector with a global term."""

from __future__ import annotations

import copy
import pickle

import helpers
import pytest
import torch
from helpers_fp8 import Definitions

from efficientad.fast import backends, fp8, self_check
from efficientad.fast.backends import KernelBackend, TorchBackend
from efficientad.fast.predictor import FastPredictor
from efficientad.ops import amx_conv, compiled_conv

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model():
    model = helpers.detector_with_term()
    model.threshold = 0.08
    return model


@pytest.fixture(scope="module")
def frames():
    """Of the last one the term makes something."""
    frames = helpers.frames(3)
    frames[2] = 255 - frames[2]
    return frames


@pytest.fixture(scope="module")
def expected(model, frames):
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("compiled", [True, False])
def test_it_gives_the_detectors_scores_and_maps(model, frames, expected, compiled, monkeypatch):
    """In compiled convolutions where there are any, and in torch's."""
    if not compiled:
        monkeypatch.setattr(compiled_conv, "available", lambda: False)
    predictor = FastPredictor(model, device="cpu", dtype="float32")
    found = predictor(frames)
    assert float((found.score - expected.score).abs().max()) <= 1e-4
    assert float((found.anomaly_map - expected.anomaly_map).abs().max()) <= 1e-4
    plain = copy.deepcopy(model)
    plain.set_global_term(None)
    without = FastPredictor(plain, device="cpu", dtype="float32")(frames)
    assert float(found.score[2] - without.score[2]) > 0.01  # it is there
    copied = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(copied(frames).score, found.score)


@pytest.mark.skipif(not amx_conv.available(), reason="the processor has no AMX")
def test_in_amx_tiles_it_is_there_too(model, frames, expected):
    found = FastPredictor(model, device="cpu", dtype="bfloat16")(frames)
    scale = float(expected.anomaly_map.abs().max())
    assert float((found.score - expected.score).abs().max()) <= 0.02 * scale


@pytest.mark.parametrize("images", [1, backends.IN_TURN + 1])
def test_the_kernels_backend_adds_it_to_its_partial_maps(model, frames, expected, images, device):
    """On a CPU with kernels in plain torch; a run before in the same buffers changes nothing."""
    kind = torch.device(device)
    kernels = Definitions() if device == "cpu" else None
    backend = KernelBackend(model, torch.float16, kind, kernels)
    network = TorchBackend(model, torch.float32, kind)
    packed = torch.empty(images, 256, 256, 4, dtype=torch.float16, device=kind)
    plain = torch.empty(images, 256, 256, 3, device=kind)
    chosen = torch.from_numpy(frames[-images:].copy()).to(kind)
    backend.pack(chosen, packed, channels_last=True)
    network.pack(chosen, plain, channels_last=True)
    backend.distance_maps(packed)
    found, wanted = backend.distance_maps(packed), network.distance_maps(plain)
    for one, other in zip(found, wanted, strict=True):
        difference = (one.sum(0) - other).abs().max()
        assert float(difference) <= 0.02 * float(other.abs().max())
    assert float(found[0].sum(0)[-1].min()) > float(expected.map_st[0].median())  # it is there


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_in_the_graphs(dtype, model, frames, expected, cuda):
    """At every batch size; steps neither allocate nor wait, another term is taken over in place."""
    predictor = FastPredictor(model, device=cuda, dtype=dtype, batch_sizes=(1, 4))
    scale = float(expected.anomaly_map.abs().max())
    for batch in (frames, frames[2:]):
        found = predictor(batch).cpu()
        assert float((found.score - expected.score[-len(batch) :]).abs().max()) <= 0.02 * scale
    helpers.assert_steps_neither_allocate_nor_wait(predictor, [*frames], 20)
    other = copy.deepcopy(model)
    other.global_term.set_line(0, 0)
    predictor.reload(other)
    assert predictor(frames).cpu().score[2] < found.score[-1] - 0.01


def test_the_self_check_looks_at_the_networks_without_it(model):
    backend = KernelBackend(model, torch.float16, CPU, Definitions())
    whole = backend.whole
    assert self_check.self_check(backend, model, (1,)) is None
    assert backend.whole is whole
    backend.weights.last[3].add_(0.05)
    assert "self-check failed" in self_check.self_check(backend, model, (1,))
    assert backend.whole is whole


def test_reload_takes_another_term_over_but_not_its_absence(model, frames):
    predictor = FastPredictor(model, device="cpu", dtype="float32")
    before = predictor(frames).score
    other = copy.deepcopy(model)
    other.global_term.set_line(0, 0)
    predictor.reload(other)
    assert predictor(frames).score[2] < before[2] - 0.01
    predictor.reload(model)
    assert torch.equal(predictor(frames).score, before)
    plain = copy.deepcopy(model)
    plain.set_global_term(None)
    with pytest.raises(ValueError, match="the detector has no global_term and the predictor one"):
        predictor.reload(plain)


def test_fp8_refuses_it(model):
    with pytest.raises(ValueError, match="float8_e4m3fn, and the detector has a global term"):
        fp8.build_fp8(model, [], "second", CPU, (1,))
