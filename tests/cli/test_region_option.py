"""--region: kept at training and calibration, applied once at prediction, refused where it errs."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.training import fitting

MASK = np.zeros((300, 400), dtype=bool)
MASK[80:200, 100:300] = True

pytestmark = pytest.mark.usefixtures("light_networks")


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures, regions and a detector's file."""
    root = tmp_path_factory.mktemp("region")
    (root / "good").mkdir()
    for i, pixels in enumerate(helpers.frames(3, 300, 400, seed=5)):
        Image.fromarray(pixels).save(root / "good" / f"{i}.png")
    Image.fromarray(MASK).save(root / "region.png")
    Image.fromarray(np.roll(MASK, 20, 1)).save(root / "shifted.png")
    Image.fromarray(MASK.T).save(root / "turned.png")
    box = [[100, 80], [300, 80], [300, 200], [100, 200]]
    document = {"width": 400, "height": 300, "inspect": [box]}
    (root / "region.json").write_text(json.dumps(document))
    detector = helpers.detector()
    detector.threshold = 0.05
    ead.save(detector, root / "whole.safetensors")
    detector.set_region(MASK, keep_calibration=True)
    ead.save(detector, root / "part.safetensors")
    return root


@pytest.mark.usefixtures("unmeasured")
def test_calibrate_finds_the_numbers_in_the_region_and_keeps_it(folder, tmp_path, capsys):
    pictures = [folder / "good" / "0.png", folder / "good" / "1.png"]
    found = []
    for name, model, words in (
        ("a", "whole", ["--region", folder / "region.json"]),
        ("b", "part", ["--no-region"]),
    ):
        out = tmp_path / f"{name}.safetensors"
        model = folder / f"{model}.safetensors"
        assert run("calibrate", model, *pictures, "--out", out, *words) == 0
        found.append(ead.load(out, verify=False))
    drawn, whole = found
    expected = ead.load(folder / "part.safetensors", verify=False)
    assert torch.equal(drawn.region, expected.region)
    assert whole.region is None
    assert not torch.equal(drawn.quantiles, whole.quantiles)
    assert drawn.provenance["calibration"]["inspected"] == pytest.approx(0.2, abs=0.01)
    assert "inspected" not in whole.provenance["calibration"]
    capsys.readouterr()
    assert run("info", tmp_path / "a.safetensors") == 0
    assert "% of the frame" in capsys.readouterr().out


def rows(out: Path) -> list[dict]:
    return json.loads((out / "scores.json").read_text())["images"]


def test_predict_applies_the_detectors_region_on_both_paths(folder, tmp_path):
    found = []
    for name, words in (("fast", ["--dtype", "float32"]), ("plain", ["--reference"])):
        out = tmp_path / name
        assert run("predict", folder / "part.safetensors", folder / "good", "--out", out,
                   "--threshold", -10, *words) == 0  # fmt: skip
        found.append(rows(out))
        notes = json.loads((out / "scores.json").read_text())["notes"]
        assert notes[0].startswith("Inspected is ")
    for fast, plain in zip(*found, strict=True):
        assert fast["score"] == pytest.approx(plain["score"], abs=2e-3)  # Pillow rounds levels
        for row in (fast, plain):
            (region,) = row["regions"]  # everything lies above -10: the region itself
            x0, y0, x1, y1 = region["box"]
            assert np.abs(np.array([x0, y0, x1, y1]) - [100, 80, 300, 200]).max() <= 3


def test_predict_takes_another_region_once(folder, tmp_path, capsys):
    whole, shown = folder / "whole.safetensors", ["--dtype", "float32", "--no-overlays"]
    scores = []
    for name, model, words in (
        ("a", "part", []),
        ("b", "whole", ["--region", folder / "region.png"]),
        ("c", "whole", []),
    ):
        out = tmp_path / name
        model = folder / f"{model}.safetensors"
        assert run("predict", model, folder / "good", "--out", out, *shown, *words) == 0
        scores.append([row["score"] for row in rows(out)])
    assert scores[0] == scores[1]
    assert all(a <= b for a, b in zip(scores[0], scores[2], strict=True))
    assert scores[0] != scores[2]
    assert ead.load(whole, verify=False).region is None
    assert "beyond" not in capsys.readouterr().err
    assert run("predict", folder / "part.safetensors", folder / "good", "--out", tmp_path / "d",
               *shown, "--region", folder / "shifted.png") == 0  # fmt: skip
    assert "The region reaches beyond the one in which" in capsys.readouterr().err
    assert "reaches beyond" in (tmp_path / "d" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "whole", "good", "--region", "turned.png"], "has its aspect"),
        (["predict", "whole", "good", "--region", "gone.png"], "gone.png"),
        (["predict", "part", "good", "--tiles", "48"], "--tiles looks at parts of an image"),
        (["calibrate", "whole", "good", "--region", "turned.png"], "has its aspect"),
        (["calibrate", "whole", "good", "--region", "region.png", "--no-region"], "leave one out"),
        (["train", "good", "--region", "turned.png"], "has its aspect"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(folder, tmp_path, words, message, capsys):
    def place(word: str) -> str:
        known = folder / word, folder / f"{word}.safetensors"
        return next((str(path) for path in known if path.exists()), word)

    out = tmp_path / "out.safetensors"
    assert run(*map(place, words), "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_train_hands_the_region_over(folder, tmp_path, monkeypatch):
    seen = {}

    def fit(dataset, **options):
        seen.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(fitting, "fit", fit)
    words = ["--out", tmp_path / "x.safetensors", "--region", folder / "region.json"]
    assert run("train", folder / "good", *words) == 2
    assert seen["region"] == folder / "region.json"
