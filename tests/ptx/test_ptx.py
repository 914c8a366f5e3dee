"""The compiled kernels, simulated: values, races, copies, fences, bounds and barriers."""

from __future__ import annotations

import pytest

from ptx.cases import ARCHITECTURES, cases
from ptx.launch import replay
from ptx.recordings import compare, recorded

SMALL = ("80:strided", "89:strided, bf16", "90:last", "120:strided")  # in the default run


@pytest.mark.parametrize("name", SMALL)
def test_small_kernel(name):
    recording = recorded(*SMALL)[name]
    compare(recording, replay(recording))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{arch}:{case}" for arch in ARCHITECTURES for case in cases(arch)]
)
def test_kernel(name):
    arch = name.split(":")[0]
    recording = recorded(*(f"{arch}:{case}" for case in cases(int(arch))))[name]
    compare(recording, replay(recording))
