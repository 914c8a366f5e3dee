"""A camera of 12 bits in files of 16: the range is kept in the detector and applied everywhere."""

from __future__ import annotations

import csv

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.data.remarks import ValueRangeWarning
from efficientad.training.settings import PenaltyWarning

RANGE = (0.0, 4095.0)
pytestmark = pytest.mark.usefixtures("light_networks", "unmeasured")


def to12(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels * (4095 / 255)).astype(np.uint16)


@pytest.fixture(scope="module")
def detectors():
    """(of 8 bits, the same for 12 bits)."""
    pair = helpers.detector(), helpers.detector()
    for one in pair:
        one.threshold = 0.5
    pair[1].value_range = RANGE
    return pair


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of the same grey pictures in 8 and in 12 bits, laid out as MVTec AD does."""
    root = tmp_path_factory.mktemp("pictures")
    images = (helpers.images(7, 256, 256, seed=4).mean(1) * 255).round().byte().numpy()
    for number, image in enumerate(images):
        part = "train/good" if number < 4 else "test/good" if number < 6 else "test/dent"
        for bits, pixels in ((8, image), (12, to12(image))):
            path = root / str(bits) / "part" / part / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root / "8" / "part", root / "12" / "part"


def scores(path) -> list[float]:
    with open(path / "scores.csv", newline="") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_the_file_keeps_the_range(detectors, tmp_path, capsys):
    ead.save(detectors[1], tmp_path / "a.safetensors")
    assert ead.load(tmp_path / "a.safetensors").value_range == RANGE
    assert main(["info", str(tmp_path / "a.safetensors")]) == 0
    assert "(0.0, 4095.0)" in capsys.readouterr().out
    ead.save(detectors[0], tmp_path / "b.safetensors")
    assert ead.load(tmp_path / "b.safetensors").value_range is None
    broken = helpers.detector()
    broken.value_range = (5, 5)
    with pytest.raises(ValueError, match=r"value_range is \(5, 5\); it must be None or a pair"):
        ead.save(broken, tmp_path / "c.safetensors")


def test_every_way_to_a_score_applies_it(detectors, pictures):
    plain, ranged = detectors
    paths = [sorted(folder.rglob("*.png")) for folder in pictures]
    expected = [prediction.score for prediction in ead.predict(plain, paths[0])]
    found = [prediction.score for prediction in ead.predict(ranged, paths[1])]
    assert found == expected
    wrong = [prediction.score for prediction in ead.predict(plain, paths[1])]
    assert max(abs(a - b) for a, b in zip(wrong, expected, strict=True)) > 0.01
    one, other = (ead.FastPredictor(d, device="cpu", dtype="float32") for d in detectors)
    frame8, frame12 = (np.array(Image.open(part[0])) for part in paths)
    for score in (
        other(frame12).score,
        other(paths[1][0]).score,
        next(iter(other.stream([frame12]))).score,
    ):
        assert score.item() == one(frame8).score.item()
    large8, large12 = np.tile(frame8, (2, 2)), np.tile(frame12, (2, 2))
    assert torch.equal(other.predict_large(large12).score, one.predict_large(large8).score)
    with pytest.raises(ValueError, match="value_range"):
        one.reload(ranged)


def test_calibrate_and_evaluate_apply_it(detectors, pictures, tmp_path, capsys):
    ead.save(detectors[0], tmp_path / "model.safetensors")
    for bits, folder, words in (
        ("8", pictures[0], []),
        ("12", pictures[1], ["--max-value", "4095"]),
    ):
        made = str(tmp_path / f"{bits}.safetensors")
        base = ["calibrate", str(tmp_path / "model.safetensors"), str(folder / "train/good")]
        assert main([*base, "--out", made, *words]) == 0
        assert main(["evaluate", made, str(folder), "--out", str(tmp_path / bits)]) == 0
        assert main(["predict", made, str(folder), "--out", str(tmp_path / f"p{bits}")]) == 0
    eight, twelve = (ead.load(tmp_path / f"{bits}.safetensors") for bits in ("8", "12"))
    assert twelve.value_range == RANGE
    assert twelve.threshold == eight.threshold
    assert torch.equal(twelve.quantiles, eight.quantiles)
    assert scores(tmp_path / "12") == scores(tmp_path / "8")
    assert scores(tmp_path / "p12") == scores(tmp_path / "p8")
    assert "--max-value" not in capsys.readouterr().err
    again = ["--max-value", "4095", "--value-range", "0", "4095"]
    assert main([*base, "--out", str(tmp_path / "x.safetensors"), *again]) == 2
    assert main([*base, "--out", str(tmp_path / "x.safetensors"), "--max-value", "-1"]) == 2


def test_it_is_said_where_no_range_is_given(detectors, pictures, tmp_path, capsys):
    ead.save(detectors[0], tmp_path / "model.safetensors")
    folder = str(pictures[1] / "train/good")
    out = str(tmp_path / "out.safetensors")
    assert main(["calibrate", str(tmp_path / "model.safetensors"), folder, "--out", out]) == 0
    assert "a small part of 0 to 65535" in capsys.readouterr().err


def test_fit_keeps_it_and_warns_without_it(pictures):
    options = {"steps": 1, "device": "cpu", "dtype": "float32"}
    with pytest.warns(PenaltyWarning):
        assert ead.fit(pictures[1], value_range=RANGE, **options).value_range == RANGE
    with pytest.warns(ValueRangeWarning, match="--max-value 4095"):
        ead.fit(pictures[1], **options)


@pytest.mark.slow
def test_an_export_says_its_range(detectors, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ead.export(detectors[1], tmp_path / "x.onnx")
    facts = {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert facts["value_range"] == "0 4095"


def test_train_says_it_once(pictures, tmp_path, capsys):
    out = str(tmp_path / "detector.safetensors")
    options = ["--out", out, "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    assert main(["train", str(pictures[1]), *options]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("a small part of 0 to 65535") == 1
    assert "warning: The numbers of all" in said.err
