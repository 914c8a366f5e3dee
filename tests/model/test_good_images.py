"""Calibration that carries no information is refused and writes nothing; odd images are named."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.data.datasets import Sample
from efficientad.data.layouts import open_dataset
from efficientad.model import calibration
from efficientad.model.calibration import ChannelStatistics, calibrate, check_scale
from efficientad.model.good_images import odd_images

pytestmark = pytest.mark.usefixtures("light_networks", "unmeasured")


def write(folder: Path, **pictures: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def parts(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {f"part{i}": pixels for i, pixels in enumerate(helpers.frames(count, seed=seed))}


def one_colour(*rgb: int, noise: int = 0) -> np.ndarray:
    pixels = np.full((256, 256, 3), rgb, np.uint8)
    return pixels + np.random.default_rng(0).integers(0, noise + 1, pixels.shape, np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    ead.save(helpers.detector(), path)
    return path


@pytest.fixture
def model_file(saved, tmp_path):
    """A detector's file that a test may change."""
    return Path(shutil.copy(saved, tmp_path))


SAME = helpers.frames(1)[0]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            {**parts(5), "lens_cap": one_colour(0, 0, 0)},
            r"1 of 6 good images for quantiles and threshold \(17%\) are of one colour .*lens_cap",
        ),
        (
            {f"{i}": one_colour(0, 0, 0) for i in range(3)},
            r"3 of 3 good images .*\(100%\) are of one colour .*0\.png, .*2\.png",
        ),
        (
            {**parts(2), "blue": one_colour(10, 40, 200, noise=2)},
            r"1 of 3 good images .*blue\.png",
        ),
        ({f"{i}": SAME for i in range(3)}, "all 3 good images .* have the same pixels"),
    ],
    ids=["one black", "all black", "blue with noise", "copies"],
)
def test_it_is_refused_in_a_sentence_and_nothing_is_written(
    pictures, message, model_file, tmp_path, capsys
):
    before = model_file.read_bytes()
    folder = write(tmp_path / "good", **pictures)
    assert main(["calibrate", str(model_file), str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if not line.startswith("note: ")]
    assert re.search(message, error)
    assert model_file.read_bytes() == before


def test_a_few_images_of_one_colour_are_left_out_and_named(model_file, tmp_path, capsys):
    folder = write(tmp_path / "good", **parts(10))
    assert main(["calibrate", str(model_file), str(folder)]) == 0
    alone = ead.load(model_file)
    write(folder, a_lens_cap=one_colour(3, 3, 3))  # the first of eleven
    capsys.readouterr()
    assert main(["calibrate", str(model_file), str(folder)]) == 0
    said = capsys.readouterr().err
    assert re.search(
        r"^warning: 1 of 11 good images .*\(9%\) are of one colour, and they are left out: "
        r".*a_lens_cap\.png$", said, re.M
    )  # fmt: skip
    assert ".py:" not in said
    found = ead.load(model_file)
    assert torch.allclose(found.quantiles, alone.quantiles, rtol=1e-5, atol=0)
    assert found.threshold == pytest.approx(alone.threshold, rel=1e-5)
    facts = found.provenance["calibration"]
    assert facts["threshold_rests_on"] == 10
    assert [Path(p).name for p in facts["of_one_colour"]] == ["a_lens_cap.png"]
    json.dumps(facts, allow_nan=False)


def test_an_odd_picture_among_many_is_named(model_file, tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "good", **parts(10))
    write(folder, other=parts(1, seed=7)["part0"])
    scores = [9.0, *(0.01 * i for i in range(10))]  # by name: other.png is the first
    monkeypatch.setattr(calibration, "validation_scores", lambda *_: (scores, scores))
    assert main(["calibrate", str(model_file), str(folder)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^warning: 1 of 11 good images score far above .*other\.png", said, re.M)
    facts = ead.load(model_file).provenance["calibration"]
    assert [Path(p).name for p in facts["odd"]] == ["other.png"]


def test_odd_is_far_above_most_others_and_not_said_of_few():
    names = [f"{i}.png" for i in range(12)]
    plain = [0.1 + 0.01 * i for i in range(12)]
    assert odd_images(names, plain) == []
    assert odd_images(names, [*plain[:11], 0.5]) == []  # a long tail
    assert odd_images(names, [*plain[:11], 2.0]) == ["11.png"]
    assert odd_images(names[:7], [*plain[:6], 2.0]) == []
    assert odd_images(names, [0.2] * 11 + [0.3]) == ["11.png"]


def test_constant_maps_and_lost_quantiles_are_refused():
    model = helpers.detector()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for st, ae in (((0.1, 0.3), (0.2, 0.3)), ((0.0, 0.1), (0.0, 1e-5))):
            model.set_quantiles(*st, *ae)
            check_scale(model, 4)
        model.set_quantiles(0.1, 0.1 * (1 + 2e-5), 0.2, 0.3)
        with pytest.raises(ValueError, match="the st maps of the 4 good images are all but const"):
            check_scale(model, 4)
        model.set_quantiles(0.1, 0.3, 7.0, 7.0 * (1 + 1e-5))
        with pytest.raises(ValueError, match=r"the ae maps .* \(q_a 7, q_b 7.00007\)"):
            check_scale(model, 4)


def test_constant_teacher_channels():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 8, 30, 30, generator=generator)
    values[:, 2] = 0.7 + 1e-7 * values[:, 2]  # rounding alone
    values[:, 5] = 0
    collected = ChannelStatistics(8)
    collected.add(values)
    mean, std = collected.of_teacher()
    assert torch.equal(mean, collected.result()[0])
    assert (std == 0).nonzero().flatten().tolist() == [2, 5]
    rest = [0, 1, 3, 4, 6, 7]
    assert torch.equal(std[rest], collected.result()[1][rest])
    values[:, :5] = 0.7  # beside the sixth, which is 0
    collected = ChannelStatistics(8)
    collected.add(values)
    with pytest.raises(ValueError, match="6 of 8 teacher channels are constant"):
        collected.of_teacher()


def test_statistics_leave_out_images_of_one_colour(tmp_path):
    folder = write(tmp_path / "good", a_black=one_colour(0, 0, 0), **parts(12))
    black, *good = [Sample(path) for path in sorted(folder.iterdir())]
    found = []
    for train in (good[:10], [black, *good[:10]]):
        data = replace(open_dataset(folder), train=train, validation=good[10:])
        model = helpers.detector()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            calibrate(model, data, statistics=True)
        found.append((model.teacher_mean, model.teacher_std, [str(w.message) for w in said]))
    for of_good, of_all in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.allclose(of_good, of_all, rtol=1e-5, atol=1e-6)
    assert found[0][2] == []
    (sentence,) = found[1][2]
    assert "1 of 11 good images for the channel statistics (9%)" in sentence
    assert "a_black.png" in sentence


def test_training_refuses_before_its_first_step(tmp_path, capsys):
    folder = write(tmp_path / "good", lens_cap=one_colour(0, 0, 0), **parts(5))
    out = tmp_path / "widget.safetensors"
    assert main(["train", str(folder), "--out", str(out), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "are of one colour" in error
    assert "lens_cap.png" in error
    assert not out.exists()
