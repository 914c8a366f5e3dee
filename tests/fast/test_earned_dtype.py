"""In what a predictor computes follows from what its detector has earned."""

from __future__ import annotations

import re
import warnings

import helpers
import pytest
import torch
import torch.nn.functional as F

import efficientad as ead
from efficientad.fast import options, predictor
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.model.detector import EfficientAD
from efficientad.model.precision import compare
from efficientad.ops import amx_conv

SCORES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]

pytestmark = pytest.mark.usefixtures("light_networks")


def model(error: float | None) -> EfficientAD:
    """A detector with such an error in bfloat16; None: from before it was measured."""
    made = helpers.detector()
    if error is not None:
        found = compare(SCORES, {"bfloat16": [s + error for s in SCORES]}, None, "cpu")
        made.provenance["calibration"] = {"precision": found.facts()}
    return made


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A processor that is fastest in bfloat16."""
    monkeypatch.setattr(options, "cpu_is_fastest_in_bfloat16", lambda: True)


@pytest.mark.parametrize(
    ("error", "dtype", "said"),
    [
        (None, "float32", "float32, because the error of bfloat16 was not measured"),
        (1e-4, "bfloat16", "bfloat16, as earned"),
        (1e-2, "float32", "float32, because bfloat16 moves the scores of the 6 held-out images"),
    ],
)
def test_auto_takes_bfloat16_where_it_is_earned(error, dtype, said, fast_bfloat16):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = ead.FastPredictor(model(error), device="cpu").facts
    assert facts["dtype"] == dtype
    assert facts["precision"].startswith(said)


def test_a_named_dtype_is_used_and_warns_with_the_figure_beyond_the_bound():
    with pytest.warns(UserWarning, match=re.escape("by up to 0.01, 58.6 % of their spread 0.017")):
        made = ead.FastPredictor(model(1e-2), device="cpu", dtype="bfloat16")
    assert made.facts["dtype"] == "bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for error, dtype in ((1e-4, "bfloat16"), (None, "bfloat16"), (1e-2, "float32")):
            ead.FastPredictor(model(error), device="cpu", dtype=dtype)


def test_on_cuda_an_older_file_keeps_float16_and_a_measured_one_must_earn_it():
    cuda = torch.device("cuda", 0)
    made = object.__new__(predictor.FastPredictor)
    made.device = cuda

    def chosen(detector: EfficientAD) -> torch.dtype:
        return options.choose_dtype("auto", cuda, "auto", lambda d: made._doubt(detector, d))

    assert chosen(model(None)) == torch.float16
    assert chosen(model(1e-4)) == torch.float32  # float16 was not tried
    measured = model(None)
    for error, dtype in ((1e-4, torch.float16), (1e-2, torch.float32)):
        found = compare(SCORES, {"float16": [s + error for s in SCORES]}, None, "cpu")
        measured.provenance["calibration"] = {"precision": found.facts()}
        assert chosen(measured) == dtype


def test_reload_refuses_a_detector_that_did_not_earn_the_dtype(fast_bfloat16):
    made = ead.FastPredictor(model(1e-4), device="cpu")
    made.reload(model(2e-4))
    with pytest.raises(ValueError, match="which another detector earned, and bfloat16 moves"):
        made.reload(model(1e-2))
    exact = ead.FastPredictor(model(1e-2), device="cpu")
    exact.reload(model(1e-4))  # float32 stays float32
    assert exact.facts["dtype"] == "float32"


@torch.no_grad()
@pytest.mark.parametrize("padding", [False, True])
def test_the_first_layer_sees_images_and_filters_nearly_in_float32(padding, monkeypatch):
    """Rounding a flat image's one value would move all cells of its map alike."""
    monkeypatch.setattr(amx_conv, "available", lambda: False)  # that has a test of its own
    seen = {}

    class Seen(FoldedNetwork):
        def _conv(self, x, name, **options):
            seen[name] = x
            return super()._conv(x, name, **options)

    detector = helpers.detector(padding=padding)
    network = Seen(detector, torch.bfloat16)
    image = torch.full((1, 3, 256, 256), 5.6 / 255)  # far from a bfloat16 number once normalised
    image[:, :, 100:] = helpers.images(1, 156)
    x = detector.normalize(image)
    network(x.contiguous(memory_format=torch.channels_last))
    for name, conv in (("teacher1", detector.teacher.conv1), ("student1", detector.student.conv1)):
        assert seen[name].dtype == network.get_buffer(f"{name}_weight").dtype == torch.bfloat16
        products = F.conv2d(seen[name].float(), network.get_buffer(f"{name}_weight").float())
        exact = F.conv2d(x, conv.weight)
        error = float((products - exact).abs().max() / exact.abs().max())
        assert error < 2**-13, error  # one bfloat16 number each: some 2**-9
    assert seen["teacher2"].dtype == torch.bfloat16


def test_reloaded_first_layers_are_split_like_new_ones():
    first, second = helpers.detector(seed=1), helpers.detector(seed=2)
    network = FoldedNetwork(first, torch.bfloat16)
    network.reload(second)
    fresh = FoldedNetwork(second, torch.bfloat16)
    for name, value in fresh.named_buffers():
        assert torch.equal(value, network.get_buffer(name)), name
    x = second.normalize(helpers.images(1))
    for a, b in zip(network(x), fresh(x), strict=True):
        assert torch.equal(a, b)
