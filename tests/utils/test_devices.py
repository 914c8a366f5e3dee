"""Precision of float32 on CUDA, and whether a CPU multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch

from efficientad.utils import devices


@pytest.fixture
def precisions():
    """torch's settings of float32 on CUDA, put back after the test."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    yield cudnn
    torch.backends.fp32_precision = "none"
    cudnn.conv.fp32_precision = before
    assert cudnn.allow_tf32 is True


def test_full_float32_switches_tf32_off_and_back(precisions):
    for before in (True, False, True):
        precisions.allow_tf32 = before
        with devices.full_float32():
            assert precisions.conv.fp32_precision == "ieee"
        assert precisions.allow_tf32 is before


def test_full_float32_where_a_user_has_set_the_precision_by_its_newer_name(precisions):
    torch.backends.fp32_precision = "ieee"
    precisions.conv.fp32_precision = "ieee"
    with devices.full_float32():
        assert precisions.conv.fp32_precision == "ieee"
    assert precisions.conv.fp32_precision == "ieee"


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
