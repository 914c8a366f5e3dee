"""What is given by mistake: a path for a detector, one image for many, text for a number."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.data.decoding import ImageError
from efficientad.data.images import as_sources
from efficientad.fast.frame_inputs import read_frame
from efficientad.results.prediction import Prediction
from efficientad.utils.checks import check_number

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    return helpers.detector()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, frame in enumerate(helpers.frames(2)):
        Image.fromarray(np.asarray(frame)).save(folder / f"{i}.png")
    return folder


# ---- a detector ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: ead.FastPredictor(wrong),
        lambda wrong: ead.predict(wrong, []),
        lambda wrong: ead.calibrate(wrong, []),
        lambda wrong: ead.export(wrong, "a.onnx"),
        lambda wrong: ead.FastPredictor.reload(None, wrong),
    ],
)
def test_a_path_is_no_detector(call):
    rule = r"it must be an EfficientAD: load it with efficientad\.load"
    with pytest.raises(ValueError, match=rf"detector is 'm\.safetensors', a str; {rule}"):
        call("m.safetensors")
    with pytest.raises(ValueError, match=rf"detector is a Linear; {rule}"):
        call(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True, [0.5]])
def test_a_threshold_is_a_finite_number(value):
    model = ead.EfficientAD("S")
    model.threshold = 0.25
    with pytest.raises(ValueError, match=r"threshold is .*; it must be a finite number, or None"):
        model.threshold = value
    assert model.threshold == 0.25


def test_a_threshold_is_kept_as_before(tmp_path):
    model = ead.EfficientAD("S")
    assert model.threshold is None
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.1, 0.2, 0.3, 0.4)
    for value in (np.float32(0.5), torch.tensor(0.5), 0.5):
        model.threshold = value
        assert type(model.threshold) is float
    assert copy.deepcopy(model).threshold == 0.5
    assert "threshold" not in " ".join(model.state_dict())
    ead.save(model, tmp_path / "m.safetensors")
    assert ead.load(tmp_path / "m.safetensors").threshold == 0.5
    model.set_quantiles(0.1, 0.2, 0.3, 0.5)
    assert model.threshold is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "no"}, "padding is 'no'; it must be True or False"),
        ({"image_size": (256.5, 256)}, r"image_size is \(256\.5, 256\); it must be \(height"),
        ({"image_size": "256"}, "image_size is '256'"),
    ],
)
def test_options_of_a_detector(options, message):
    with pytest.raises(ValueError, match=message):
        ead.EfficientAD("S", **options)


def test_info_shows_the_licence_of_the_teacher(tmp_path, capsys):
    model = ead.EfficientAD("S")
    model.provenance["teacher_license"] = "for non-commercial research use only"
    ead.save(model, tmp_path / "m.safetensors")
    assert main(["info", str(tmp_path / "m.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if "license" in x and x.endswith("non-commercial research use only")]


# ---- images ----------------------------------------------------------------------------------


def test_predict_searches_a_folder(model, folder):
    expected = [p.score for p in ead.predict(model, sorted(folder.iterdir()))]
    assert [p.score for p in ead.predict(model, str(folder))] == expected
    assert len(expected) == 2
    assert [p.score for p in ead.predict(model, folder / "1.png")] == pytest.approx(expected[1:])
    with pytest.raises(FileNotFoundError, match="no such file or folder: zoo"):
        ead.predict(model, "zoo")


@pytest.mark.parametrize(
    "one", [np.zeros((4, 5, 3), np.uint8), torch.zeros(4, 5, 3), b"bytes", Image.new("RGB", (4, 4))]
)
def test_one_image_is_not_many(model, one):
    with pytest.raises(ValueError, match=r"sources is .*; it must be an iterable of images, or a"):
        ead.predict(model, one)
    assert as_sources([one]) == [one]


def test_a_folder_in_a_list_is_named(model, folder):
    with pytest.raises(ImageError, match=f"cannot read {folder}: it is a folder, not an image"):
        list(ead.predict(model, [folder]))
    with pytest.raises(ImageError, match="it is a folder"):
        read_frame(folder)


def test_a_tensor_with_a_gradient_is_a_frame_of_floats(model):
    frame = torch.zeros(4, 5, 3, requires_grad=True)
    for read in (read_frame, lambda frame: list(ead.predict(model, [frame]))):
        with pytest.raises(ImageError, match=r"pixels are float32.*only uint8 or uint16 are read"):
            read(frame)


def test_a_slice_of_a_batch_is_a_batch():
    """Maps of several sizes; NaN scores keep their numbers."""
    score, maps = torch.tensor([1.0, 2.0, torch.nan, 4.0]), [torch.ones(i, 2) for i in range(1, 5)]
    bad: set[int] = set()
    sizes = [(i, 2) for i in range(4)]
    batch = Prediction(range(4), score, 1.5, maps, sizes, None, serial=10, not_numbers=bad)
    part = batch[1:3]
    assert list(part.index) == [1, 2]
    assert [m.shape[0] for m in part.anomaly_map] == [2, 3]
    assert part.source_size == [(1, 2), (2, 2)]
    assert part.is_anomalous.tolist() == [True, True]
    part.cpu()
    assert bad == {12}
    assert [one.index for one in part[-1:]] == [2]
    assert len(batch[9:]) == 0
    with pytest.raises(ValueError, match="the step of the slice is -1"):
        batch[::-1]


def test_numbers_say_their_range():
    with pytest.raises(ValueError, match=r"x is 0; it must be in \(0, 1\)"):
        check_number("x", 0, 0, 1, above=True)
    assert check_number("x", np.float32(0.5), 0, 1) == 0.5
