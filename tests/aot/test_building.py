"""Bundles as they are built and launched: compiled here, run in the simulator."""

from __future__ import annotations

import helpers_aot
import pytest
from ptx.launch import replay
from ptx.recordings import compare

LAST = "90:last"  # with a tensor map, in the default run
OTHERS = ("80:strided", "80:map", "89:bottleneck", "90:first", "90:pair", "120:resize")


def test_a_kernel_of_a_bundle_computes_what_the_definition_does():
    recording = helpers_aot.results(LAST)[LAST]
    assert recording.launches
    compare(recording, replay(recording))


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_kernels_of_bundles_do(case):
    recording = helpers_aot.results(*OTHERS)[case]
    assert recording.launches
    compare(recording, replay(recording))


def test_a_predictor_launches_nothing_that_its_bundle_lacks():
    assert helpers_aot.results(LAST)["own"] == []
    assert helpers_aot.results(LAST)["fp8"] == []


def test_what_a_bundle_lacks_is_left_to_triton_and_said_once():
    name, said = helpers_aot.results(LAST)["other"]
    assert name == "_pack_kernel"
    assert "kernel bundle file lacks _pack_kernel as it is launched here" in said
    assert helpers_aot.results(LAST)["described"] == [
        "file: 0 kernels launched from it, compiled here: _pack_kernel"
    ]
