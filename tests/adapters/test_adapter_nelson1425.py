"""The drop-in for nelson1425: his arguments and results, changed weights noticed."""

from __future__ import annotations

import gc
import weakref

import helpers
import helpers_foreign
import pytest
import torch
from helpers_adapters import TOLERANCE, largest_difference
from torch import Tensor, nn

from efficientad.adapters import nelson1425
from efficientad.adapters.nelson1425 import predict


def nelson_networks(seed: int = 0, medium: bool = False) -> list:
    """teacher, student, autoencoder, teacher_mean, teacher_std."""
    model = helpers_foreign.anomalib_model(seed, medium=medium)
    networks = [
        helpers_foreign.nelson_pdn(model.teacher),
        helpers_foreign.nelson_pdn(model.student),
        helpers_foreign.nelson_autoencoder(model.ae, dropout=True).eval(),
    ]
    statistics = [model.mean_std[name].detach() for name in ("mean", "std")]
    return networks + statistics


@torch.no_grad()
def formula(image, teacher, student, autoencoder, mean, std, *q):
    """nelson1425's function, from its description."""
    s = student(image)
    st = (((teacher(image) - mean) / std - s[:, :384]) ** 2).mean(1, keepdim=True)
    ae = ((autoencoder(image) - s[:, 384:]) ** 2).mean(1, keepdim=True)
    if q:
        st, ae = 0.1 * (st - q[0]) / (q[1] - q[0]), 0.1 * (ae - q[2]) / (q[3] - q[2])
    return (st + ae) / 2, st, ae


def normalised(n: int, seed: int) -> Tensor:
    return (helpers.images(n, seed=seed) - helpers_foreign.MEAN) / helpers_foreign.STD


@pytest.fixture(scope="module")
def networks() -> list:
    return nelson_networks()


@pytest.mark.parametrize("quantiles", [(), (0.25, 0.75, 0.5, 1.25)])
def test_nelson_maps(networks, quantiles):
    image = normalised(1, seed=1)
    found = predict(image, *networks, *quantiles)
    assert type(found) is tuple
    assert [tuple(m.shape) for m in found] == [(1, 1, 56, 56)] * 3
    assert largest_difference(found, formula(image, *networks, *quantiles)) <= TOLERANCE


@pytest.mark.slow
def test_nelson_arguments_by_name_and_half_of_the_quantiles(networks):
    teacher, student, autoencoder, mean, std = networks
    image = normalised(2, seed=2)
    found = predict(
        image=image, teacher=teacher, student=student, autoencoder=autoencoder,
        teacher_mean=mean, teacher_std=std, q_st_start=torch.tensor(0.2), q_st_end=0.9,
    )  # fmt: skip
    _, st, ae = formula(image, *networks)
    st = 0.1 * (st - 0.2) / 0.7
    assert largest_difference(found, (0.5 * st + 0.5 * ae, st, ae)) <= TOLERANCE


def test_nelson_predictor_is_kept_and_follows_the_weights():
    networks = nelson_networks(seed=3)
    teacher, student = networks[:2]
    image = normalised(1, seed=3)
    predict(image, *networks)
    server = nelson1425._servers[student]
    predict(image, *networks)
    assert nelson1425._servers[student] is server
    with torch.no_grad():
        teacher[0].weight.mul_(1.1)
        networks[3].add_(0.1)  # teacher_mean
    assert largest_difference(predict(image, *networks), formula(image, *networks)) <= TOLERANCE
    assert nelson1425._servers[student] is server
    gone = weakref.ref(server)
    del networks, teacher, student, server
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_nelson_dropout_stays_dropout(networks):
    image = normalised(1, seed=4)
    networks[2].train()
    try:
        torch.manual_seed(0)
        first = predict(image, *networks)
        torch.manual_seed(0)
        assert torch.equal(formula(image, *networks)[0], first[0])
    finally:
        networks[2].eval()


def test_nelson_networks_that_are_none(networks):
    image = normalised(1, seed=5)
    teacher, student, autoencoder, mean, std = networks
    with pytest.raises(ValueError, match="the teacher given is a student; it must be"):
        predict(image, student, teacher, autoencoder, mean, std)
    with pytest.raises(ValueError, match="no network of"):
        predict(image, nn.Sequential(nn.Conv2d(3, 3, 3)), student, autoencoder, mean, std)
