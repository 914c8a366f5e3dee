"""What a calibration measures of the dtypes, beside the same scores computed here."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.calibration import measuring
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.model.precision import stored_precision
from efficientad.utils.devices import cpu_convolves_bfloat16

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for i, pixels in enumerate(helpers.frames(6, seed=3)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ead.calibrate(helpers.detector(), folder)


def test_the_errors_are_those_of_the_predictor(model, folder):
    paths = sorted(folder.iterdir())
    exact = np.array([p.score for p in ead.predict(model, paths)])
    found = stored_precision(model)
    assert found.images == 6
    assert found.spread == pytest.approx(
        min(exact.std(), np.subtract(*np.quantile(exact, (0.75, 0.25))))
    )
    assert found.margin == pytest.approx(model.threshold - np.median(exact))
    assert 0 < found.errors["float16"] < found.spread
    if cpu_convolves_bfloat16():
        predictor = ead.FastPredictor(model, device="cpu", dtype="bfloat16")
        scores = np.array([predictor(path).cpu().score for path in paths])
        assert found.errors["bfloat16"] == pytest.approx(np.abs(scores - exact).max())
        assert found.errors["bfloat16"] != found.errors["float16"]  # measured apart
    else:
        assert set(found.errors) == {"float16"}


def test_measuring_anew_does_not_warn_of_what_was_measured_before(model, folder, recwarn):
    before = model.provenance["calibration"]["precision"]["errors"]
    before.update(dict.fromkeys(before, 9.0))
    ead.calibrate(model, folder)
    assert not recwarn.list
    after = stored_precision(model).errors
    assert set(after) == set(before)
    assert max(after.values()) < 9


def test_many_images_are_a_sample_from_first_to_last(model, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, *_, **__):
            pass

        def __call__(self, image):
            seen.append(image)
            return ead.Prediction(0, torch.tensor(2.0 * image), None, None, (1, 1))

    monkeypatch.setattr(measuring, "_ways", lambda device: {"float16": Recorder})
    found = measuring.measure_precision(model, range(1000), [float(i) for i in range(1000)])
    assert len(seen) == measuring.MOST_IMAGES
    assert (seen[0], seen[-1]) == (0, 999)
    assert found.errors["float16"] == 999  # 2 * 999 beside 999


@torch.no_grad()
def test_float16_is_simulated_layer_by_layer(model):
    """Weights and inputs of every layer of teacher and student are float16 numbers."""
    inputs = {}

    class Seen(measuring._RoundedNetwork):
        def _conv(self, x, name, **options):
            inputs[name] = x
            return super()._conv(x, name, **options)

    network = Seen(model, torch.float32, torch.device("cpu"))
    weight = network.teacher2_weight
    assert torch.equal(weight, weight.half().float())
    x = model.normalize(helpers.images(1))
    exact = FoldedNetwork(model, torch.float32, torch.device("cpu"))(x)
    rounded = network(x)
    for a, b in zip(rounded, exact, strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        assert 1e-6 < error < 1e-2
    assert set(inputs) == {f"{n}{i}" for n in ("teacher", "student") for i in (1, 2, 3)} | {
        "st",
        "ae",
    }
