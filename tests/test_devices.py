"""Precision of float32 on CUDA, and in what a CPU computes by itself."""

from __future__ import annotations

import pytest
import torch

from efficientad import devices, native_conv


def test_full_float32_switches_tf32_off_and_back():
    cudnn = torch.backends.cudnn
    original = cudnn.allow_tf32
    try:
        for before in (True, False):
            cudnn.allow_tf32 = before
            with devices.full_float32():
                assert cudnn.allow_tf32 is False
            assert cudnn.allow_tf32 is before
    finally:
        cudnn.allow_tf32 = original


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
