"""--score: kept at training and calibration, shown by info, refused where it errs."""

from __future__ import annotations

import json

import helpers
import pytest
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.training import fitting

pytestmark = pytest.mark.usefixtures("light_networks")


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    (root / "good").mkdir()
    for i, pixels in enumerate(helpers.frames(2, 300, 400, seed=5)):
        Image.fromarray(pixels).save(root / "good" / f"{i}.png")
    detector = helpers.detector()
    detector.threshold = 0.05
    ead.save(detector, root / "part.safetensors")
    return root


@pytest.mark.usefixtures("unmeasured")
def test_calibrate_changes_the_score_or_keeps_it(folder, tmp_path, capsys):
    picture = folder / "good" / "0.png"
    source, found = folder / "part.safetensors", []
    for name, words in (("mean", ["--score", 10]), ("kept", [])):
        out = tmp_path / f"{name}.safetensors"
        assert run("calibrate", source, picture, "--out", out, *words) == 0
        found.append(ead.load(out, verify=False))
        source = out
    mean, kept = found
    assert mean.score == kept.score == 10
    (score,) = mean.provenance["calibration"]["scores"]
    assert mean.threshold == kept.threshold == score
    (result,) = ead.predict(mean, [picture])
    assert result.score == score < result.anomaly_map.max()
    words = ["--out", tmp_path / "results", "--dtype", "float32", "--no-overlays"]
    assert run("predict", tmp_path / "mean.safetensors", picture, *words) == 0
    document = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert "The score of an image is the mean of the 10 largest cells." in document["notes"]
    assert document["score_rule"] == 10
    assert document["images"][0]["score"] == pytest.approx(score, abs=2e-3)
    capsys.readouterr()
    assert run("info", tmp_path / "mean.safetensors") == 0
    assert "mean of the 10 largest cells, at input size" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["calibrate", "train"])
@pytest.mark.parametrize("value", ["0", "4000", "-3", "1.5", "mean"])
def test_what_is_no_score_is_refused(folder, tmp_path, command, value, capsys):
    out = tmp_path / "x.safetensors"
    model = [folder / "part.safetensors"] if command == "calibrate" else []
    words = [*model, folder / "good", "--out", out, f"--score={value}"]
    assert run(command, *words) == 2
    assert "it must be 'max' or a number of cells, 1 to 3136" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "score", "term"),
    [([], "max", False), (["--score", 10], 10, False), (["--global-term"], "max", True)],
)
def test_train_hands_the_score_over(folder, tmp_path, monkeypatch, words, score, term):
    seen = {}

    def fit(dataset, **options):
        seen.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(fitting, "fit", fit)
    assert run("train", folder / "good", "--out", tmp_path / "x.safetensors", *words) == 2
    assert (seen["score"], seen["global_term"]) == (score, term)


def test_info_says_whether_there_is_a_global_term(tmp_path, capsys):
    for name, detector in (("no", helpers.detector()), ("a", helpers.detector_with_term())):
        ead.save(detector, tmp_path / name)
        assert run("info", tmp_path / name) == 0
        found = capsys.readouterr().out
        (line,) = [line for line in found.splitlines() if line.startswith("global term")]
        assert line.split()[-1] == ("none" if name == "no" else "set")
