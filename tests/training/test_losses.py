"""Loss terms, hard selection and learning rate against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_training import thin_detector

from efficientad.ops import differentiable_conv
from efficientad.training import losses
from efficientad.training.losses import StepInputs, step_losses

CELLS = 384 * 56 * 56


def test_terms_equal_a_computation_by_hand_in_float64():
    """Three networks' outputs on one image, to 1e-6."""
    rng = np.random.default_rng(0)
    teacher, student, autoencoder = (rng.normal(size=(1, 384, 5, 7)) for _ in range(3))
    d = np.sort(((teacher - student) ** 2).ravel())
    rank = 0.999 * (d.size - 1)
    low = int(rank)
    limit = d[low] + (rank - low) * (d[low + 1] - d[low])
    expected = {
        "hard": d[d >= limit].mean(),
        "penalty": (student**2).mean(),
        "difference": ((teacher - autoencoder) ** 2).mean(),
    }
    t, s, a = (torch.from_numpy(x).float() for x in (teacher, student, autoencoder))
    found = {
        "hard": losses.hard_loss(losses.squared_difference(t, s)),
        "penalty": losses.penalty_loss(s),
        "difference": losses.mean_difference(t, a),
    }
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_differences_of_one_image_after_another_are_those_of_all(dtype):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    targets = torch.randn(3, 384, 5, 7, dtype=wide)
    output = torch.randn(3, 384, 5, 7).to(dtype).requires_grad_()
    for factor in (1, 0.5):
        found = factor * losses.mean_of_differences(iter(targets.split(1)), output)
        expected = factor * losses.mean_difference(targets, output)
        torch.testing.assert_close(found, expected, rtol=1e-6 if wide != dtype else 1e-5, atol=0)
        gradients = [torch.autograd.grad(loss, output)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients)
        assert gradients[0].dtype == dtype


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_targets_as_images_are_needed(count):
    targets = torch.zeros(count, 4, 2, 2)
    with pytest.raises(ValueError, match="zip"):
        losses.mean_of_differences(targets.split(1), torch.zeros(3, 4, 2, 2))


def test_1205_of_1204224_elements_are_selected():
    torch.manual_seed(0)
    distances = torch.randn(1, 384, 56, 56).square().requires_grad_()
    losses.hard_loss(distances).backward()
    assert distances.numel() == CELLS
    assert int((distances.grad != 0).sum()) == 1205
    chosen = distances.detach()[distances.grad != 0]
    assert torch.equal(chosen.sort().values, distances.detach().flatten().sort().values[-1205:])
    torch.testing.assert_close(distances.grad[distances.grad != 0], torch.full((1205,), 1 / 1205))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 999, 1000, 1001, 65537, 384 * 56 * 56])
def test_threshold_is_torch_quantile_to_the_bit(count, dtype):
    torch.manual_seed(count)
    rows = torch.randn(2, count, dtype=dtype).square()
    quantiles = (0.999,) if count > 10**5 else (0.0, 0.3, 0.5, 0.9, 0.999, 0.9999, 1.0)
    for values in (rows, (rows * 3).round()):  # the second has ties everywhere
        for quantile in quantiles:
            expected = torch.quantile(values, quantile, dim=1, keepdim=True)
            found = losses.hard_threshold(values, quantile)
            assert torch.equal(found, expected), quantile
            assert torch.equal(values >= found, values >= expected)


def test_more_elements_than_torch_quantile_takes():
    count = 2**24 + 3
    values = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()[None]
    ordered = np.sort(values.numpy()[0])
    rank = 0.999 * (count - 1)
    low = int(rank)
    assert ordered[low] <= losses.hard_threshold(values, 0.999).item() <= ordered[low + 1]
    assert int((values >= losses.hard_threshold(values, 0.999)).sum()) == count - low - 1
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.999)


def test_ties_at_the_threshold_are_all_selected():
    """d >= quantile, not the 1 % largest: all equal elements count."""
    values = torch.zeros(1, 1, 10, 100)
    values[..., :5] = 2
    values[0, 0, 0, 0] = 8
    assert losses.hard_loss(values, 0.97).item() == pytest.approx((8 + 49 * 2) / 50)


def test_hard_loss_of_a_batch_is_the_mean_of_the_images_own():
    torch.manual_seed(0)
    distances = torch.randn(3, 384, 6, 5).square() * torch.tensor([1, 10, 100.0]).view(3, 1, 1, 1)
    own = [losses.hard_loss(one[None]).item() for one in distances]
    assert losses.hard_loss(distances).item() == pytest.approx(np.mean(own), rel=1e-6)
    assert losses.hard_loss(distances[:1]).item() == own[0]
    channels_last = distances.contiguous(memory_format=torch.channels_last)
    assert losses.hard_loss(channels_last).item() == losses.hard_loss(distances).item()


def test_quantile_zero_is_the_mean_and_nan_is_not_hidden():
    distances = torch.arange(24.0).view(1, 2, 3, 4)
    assert losses.hard_loss(distances, 0).item() == 11.5
    distances[0, 0, 0, 0] = float("nan")
    assert losses.hard_loss(distances, 0.5).isnan()
    with pytest.raises(ValueError, match=r"quantile is 1\.5"):
        losses.hard_threshold(distances.flatten(1), 1.5)


def test_half_precision_is_widened_before_squaring():
    """A difference of 300 has the square 90,000, beyond float16."""
    target, output = torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1).half()
    assert losses.squared_difference(target, output).item() == 90_000
    assert losses.penalty_loss(target).item() == 90_000


def test_learning_rate_falls_after_95_percent():
    rates = [losses.learning_rate(step, 70_000, 1e-4) for step in range(70_000)]
    assert rates[:66_500] == [1e-4] * 66_500
    assert rates[66_500:] == [1e-5] * 3_500
    assert [losses.learning_rate(i, 1, 1e-4) for i in (0,)] == [1e-5]


@pytest.mark.parametrize("own", [True, False])
def test_which_half_of_the_student_each_term_uses(own, monkeypatch):
    """Hard loss and penalty: the first 384 channels. The autoencoder's term: the second."""
    monkeypatch.setattr(differentiable_conv, "serves", lambda x: own)
    detector = thin_detector()
    torch.manual_seed(1)
    inputs = StepInputs(*torch.rand(3, 1, 3, 256, 256))
    conv = detector.student.conv4

    @torch.no_grad()
    def terms():
        return step_losses(detector, inputs, 0.999)

    def with_bias(rows, change):
        kept = conv.bias.detach().clone()
        with torch.no_grad():
            conv.bias[rows] += change
            found = terms()
            conv.bias.copy_(kept)
        return found

    before = terms()
    second_half = with_bias(slice(384, None), 1)
    first_half = with_bias(slice(0, 384), 1)
    with torch.no_grad():
        for p in (conv.weight, conv.bias):
            p.copy_(p.roll(384, 0))
    swapped = terms()
    assert (second_half != before).tolist() == [False, False, False, True]
    assert (first_half != before).tolist() == [True, True, False, False]
    assert (swapped != before).tolist() == [True, True, False, True]
