"""Folded weights: the fused operations and the folded torch network against the detector."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers_fp8 import Definitions

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
