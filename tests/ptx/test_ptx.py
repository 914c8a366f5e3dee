"""The compiled kernels, simulated: values, races, copies, fences, bounds and barriers."""

from __future__ import annotations

import pytest

from ptx.cases import ARCHITECTURES, EARLY, STARTED_EARLY, cases
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


EARLY_ONES = [f"{arch}:{name}{EARLY}" for arch in (90, 120) for name in STARTED_EARLY]


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY_ONES)
def test_kernel_that_starts_before_the_one_before_has_ended(name):
    recording = recorded(*EARLY_ONES)[name]
    assert all(launch.overlapped for launch in recording.launches)
    compare(recording, replay(recording))
