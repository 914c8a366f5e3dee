"""Precision of float32 on CUDA, and in what a CPU computes by itself."""

from __future__ import annotations

import pytest
import torch

from efficientad.ops import compiled_conv as native_conv
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
    ("avx512", "amx", "compiled", "multiplies", "fastest"),
    [
        (False, False, True, False, False),
        (True, False, True, True, False),
        (True, False, False, True, True),
        (True, True, True, True, True),
        (False, True, False, True, True),
    ],
)
def test_what_a_cpu_computes_in(avx512, amx, compiled, multiplies, fastest, monkeypatch):
    probes = {"_is_avx512_bf16_supported": avx512, "_is_amx_tile_supported": amx}
    monkeypatch.setattr(devices, "_has", probes.__getitem__)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(native_conv, "available", lambda: compiled)
    assert devices.cpu_multiplies_bfloat16() == multiplies
    assert devices.cpu_is_fastest_in_bfloat16() == fastest
    chosen = devices.choose_dtype("auto", torch.device("cpu"), "auto")
    assert chosen == (torch.bfloat16 if fastest else torch.float32)


@pytest.mark.parametrize("sizes", [4, "14", (1.5,), (True,), (), (0,), ("1",), (1, None)])
def test_batch_sizes_are_integers(sizes):
    with pytest.raises(ValueError, match=r"batch_sizes is .*; it must be a sequence of integers"):
        devices.choose_buckets(sizes, torch.device("cpu"))
    assert devices.choose_buckets((4, 1, 4), torch.device("cpu")) == (1, 4)
