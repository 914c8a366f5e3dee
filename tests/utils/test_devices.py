"""Precision of float32 on CUDA, and whether a CPU multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch

from efficientad.utils import devices


@pytest.fixture
def precisions():
    """torch's settings of float32 on CUDA, put back after the test."""
    cudnn = torch.backends.cudnn
    yield cudnn
    torch.backends.fp32_precision = "none"
    cudnn.fp32_precision = "none"
    cudnn.allow_tf32 = True  # sets both of the newer names, too
    assert settings(cudnn)["conv"] == settings(cudnn)["rnn"] == "tf32"


def settings(cudnn) -> dict:
    """All that a program can read, by the older name and by the newer ones."""
    found = {name: getattr(cudnn, name).fp32_precision for name in ("conv", "rnn")}
    found |= {"cudnn": cudnn.fp32_precision, "all": torch.backends.fp32_precision}
    try:
        return found | {"allow_tf32": cudnn.allow_tf32}
    except RuntimeError as error:
        return found | {"allow_tf32": str(error)}


def by_the_older_name(allow: bool):
    def set_it(cudnn) -> None:
        cudnn.allow_tf32 = allow

    return set_it


def everything_in_full(cudnn) -> None:
    cudnn.allow_tf32 = False
    torch.backends.fp32_precision = "ieee"


def everything_in_tf32(cudnn) -> None:
    cudnn.allow_tf32 = True
    torch.backends.fp32_precision = "tf32"


def convolutions_alone(cudnn) -> None:
    """After it the older name cannot be read."""
    cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "user",
    [by_the_older_name(True), by_the_older_name(False), everything_in_full, everything_in_tf32,
     convolutions_alone],
    ids=["tf32", "no tf32", "all in full", "all in tf32", "mixed"],
)  # fmt: skip
def test_full_float32_switches_tf32_off_and_puts_back_what_was_there(user, precisions):
    user(precisions)
    before = settings(precisions)
    with devices.full_float32():
        inside = settings(precisions)
        assert inside["conv"] == "ieee"
        assert inside["allow_tf32"] is False or user is convolutions_alone
    assert settings(precisions) == before


def test_what_followed_a_setting_above_follows_it_afterwards(precisions):
    everything_in_full(precisions)
    with devices.full_float32():
        pass
    torch.backends.fp32_precision = "tf32"
    assert precisions.conv.fp32_precision == "tf32"


def test_full_float32_lasts_until_the_last_thread_leaves(precisions):
    first, second = devices.full_float32(), devices.full_float32()
    with first:
        second.__enter__()
    assert precisions.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert precisions.allow_tf32 is True


@pytest.mark.parametrize(
    ("avx512", "amx", "multiplies"),
    [(False, False, False), (True, False, True), (True, True, True), (False, True, True)],
)
def test_a_cpu_that_multiplies_bfloat16(avx512, amx, multiplies, monkeypatch):
    probes = {"_is_avx512_bf16_supported": avx512, "_is_amx_tile_supported": amx}
    monkeypatch.setattr(devices, "cpu_has", probes.__getitem__)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert devices.cpu_multiplies_bfloat16() == multiplies
