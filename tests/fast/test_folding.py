"""Folded weights: the fused operations and the folded torch network against the detector."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers_fp8 import Definitions

from efficientad.fast.backends import TorchBackend
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.fast.folding import fold
from efficientad.fast.fused_network import Plan, Workspace, forward
from efficientad.model.detector import UncalibratedError
from efficientad.ops import reference

CASES = [
    ("S", False, (256, 256)),
    pytest.param("S", True, (257, 290), marks=pytest.mark.slow),
    pytest.param("M", False, (256, 288), marks=pytest.mark.slow),
    pytest.param("M", True, (256, 256), marks=pytest.mark.slow),
]


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.abs().max().clamp(min=0.1))


@pytest.mark.parametrize(("size", "padding", "image_size"), CASES)
def test_the_folded_network_is_the_detector_in_float64(size, padding, image_size):
    """So are the folded operations: tests/ops/test_reference.py composes them."""
    model = helpers.detector(size, padding=padding, image_size=image_size).double()
    image = helpers.images(1, *image_size, seed=3).double()
    with torch.no_grad():
        expected = model.distance_maps(image)
        found = FoldedNetwork(model, torch.float64)(model.normalize(image))
    for a, b in zip(found, expected, strict=True):
        assert _relative(a, b) < 1e-10


def shared_detector(seed: int = 0, **options):
    """A detector whose student has the teacher's inner layers."""
    model = helpers.detector("S", seed=seed, calibrated=False, **options)
    layers = list(zip(model.student.layers(), model.teacher.layers(), strict=True))
    for (mine, _), (theirs, _) in layers[:-1]:
        mine.load_state_dict(theirs.state_dict())
    helpers.calibrate_on_own_maps(model, helpers.images(2, seed=seed + 100))
    return model


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inner_layers_that_are_the_same_are_computed_once(padding, dtype):
    model = shared_detector(padding=padding)
    image = helpers.images(2, seed=3).to(dtype)
    network = FoldedNetwork(model, dtype)
    assert network.shared
    assert not [name for name, _ in network.named_buffers() if name.startswith("student")]
    with torch.no_grad():
        found = network(model.to(dtype).normalize(image))
        expected = model.distance_maps(image)
    for a, b in zip(found, expected, strict=True):
        assert _relative(a, b) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_a_last_bit_keeps_inner_layers_apart():
    model = shared_detector()
    with torch.no_grad():
        model.student.conv3.bias[5] += 1e-6
    assert not FoldedNetwork(model, torch.float32).shared


def test_a_reload_may_begin_and_end_the_sharing():
    ordinary, shared = helpers.detector("S", seed=0), shared_detector(seed=1)
    image = helpers.images(1, seed=4)
    backend = TorchBackend(ordinary, torch.float32, torch.device("cpu"))
    name = backend.name
    for model in (shared, ordinary, ordinary, shared, shared):
        backend.reload(model)
        assert ("inner layers shared" in backend.name) == (model is shared)
        packed = model.normalize(image).permute(0, 2, 3, 1).contiguous()
        for a, b in zip(backend.distance_maps(packed), model.distance_maps(image), strict=True):
            assert _relative(a, b) < 1e-4
    backend.reload(ordinary)
    assert backend.name == name


def test_reloading_weights_keeps_every_storage_and_gives_the_new_detector():
    old, new = helpers.detector("S", seed=0), helpers.detector("S", seed=1)
    image = helpers.images(1, seed=4)
    weights, network = fold(old, torch.float32), FoldedNetwork(old, torch.float32)
    before = [t.data_ptr() for t in weights.tensors()]
    buffers = {name: t.data_ptr() for name, t in network.named_buffers()}
    weights.copy_(fold(new, torch.float32))
    network.reload(new)
    assert [t.data_ptr() for t in weights.tensors()] == before
    assert {name: t.data_ptr() for name, t in network.named_buffers()} == buffers
    with torch.no_grad():
        expected = new.distance_maps(image)
        for maps in (network(new.normalize(image)), _through_operations(new, weights, image)):
            for found, value in zip(maps, expected, strict=True):
                assert _relative(found, value) < 1e-4
        assert _relative(network(old.normalize(image))[0], old.distance_maps(image)[0]) > 1e-2


def _through_operations(model, weights, image):
    plan = Plan(model.size, model.padding, tuple(image.shape[-2:]), model.map_padding)
    means = weights.image_mean, weights.image_std
    packed = reference.pack(image, *means, channels_last=False, dtype=torch.float32)
    return [m.sum(0) for m in forward(plan, weights, packed, reference)]


def test_weights_of_another_network_are_refused():
    small, medium = helpers.detector("S"), helpers.detector("M")
    with pytest.raises(ValueError, match="another network size"):
        fold(small, torch.float32).copy_(fold(medium, torch.float32))
    with pytest.raises(ValueError, match="EfficientAD-M"):
        FoldedNetwork(small, torch.float32).reload(medium)
    with pytest.raises(ValueError, match="padding=True"):
        FoldedNetwork(small, torch.float32).reload(helpers.detector("S", padding=True))


def test_an_uncalibrated_detector_is_refused():
    with pytest.raises(UncalibratedError):
        fold(helpers.detector("S", calibrated=False), torch.float32)


def test_the_grouped_layers_are_consecutive_views_of_one_buffer():
    for weights, biases in fold(helpers.detector("M"), torch.float16).trunk:
        for tensors in (weights, biases):
            first, second = tensors
            assert second.data_ptr() == first.data_ptr() + first.numel() * first.itemsize


def test_a_workspace_serves_smaller_batches_from_the_same_memory():
    model = helpers.detector("S")
    image = helpers.images(3, seed=5)
    weights = fold(model, torch.float32)
    plan, operations, workspace = Plan("S", False, (256, 256), 4), Definitions(), Workspace()
    means = weights.image_mean, weights.image_std
    packed = reference.pack(image, *means, channels_last=False, dtype=torch.float32)
    for images in (3, 1, 2):
        run = workspace.runner(images)
        found = forward(plan, weights, packed[:images].contiguous(), operations, run)
        kept = workspace.bytes()
        expected = model.distance_maps(image[:images])
        for a, b in zip(found, expected, strict=True):
            assert _relative(a.sum(0), b) < 1e-4
        if images == 3:
            first = kept
        assert kept == first
