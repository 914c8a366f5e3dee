"""In what a device computes by itself, batch sizes, and compilers that are not to be trusted."""

from __future__ import annotations

import pytest
import torch

from efficientad.fast import options
from efficientad.ops import compiled_conv

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("avx512", "amx", "compiled", "fastest"),
    [
        (False, False, True, False),
        (True, False, True, False),
        (True, False, False, True),
        (True, True, True, True),
        (True, True, False, True),
        (False, True, False, True),
    ],
)
def test_what_a_cpu_computes_in(avx512, amx, compiled, fastest, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(compiled_conv, "available", lambda: compiled)
    assert options.cpu_is_fastest_in_bfloat16() == fastest
    chosen = options.choose_dtype("auto", CPU, "auto")
    assert chosen == (torch.bfloat16 if fastest else torch.float32)


@pytest.mark.parametrize(
    ("capability", "triton", "problem"),
    [
        ((10, 0), "3.6.0", "Triton 3.6.0 compiles wrong code for sm_100; install 3.7.1"),
        ((10, 3), "3.7.0+git1", "Triton 3.7.0"),
        ((10, 0), "3.7.1", None),
        ((10, 0), "3.10.0", None),
        ((9, 0), "3.6.0", None),
        ((12, 0), "3.6.0", None),
    ],
)
def test_a_triton_that_miscompiles_for_a_device(capability, triton, problem, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("triton.__version__", triton)
    found = options.unsafe_compiler(torch.device("cuda", 0))
    assert (found is None) if problem is None else (problem in found)
    assert options.unsafe_compiler(CPU) is None


@pytest.mark.parametrize("sizes", [4, "14", (1.5,), (True,), (), (0,), ("1",), (1, None)])
def test_batch_sizes_are_integers(sizes):
    with pytest.raises(ValueError, match=r"batch_sizes is .*; it must be a sequence of integers"):
        options.choose_buckets(sizes, CPU)
    assert options.choose_buckets((4, 1, 4), CPU) == (1, 4)
