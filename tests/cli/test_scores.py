"""`judge` and `drift`: what they print, write and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def store(folder, scores, threshold=0.5, labels=None, means=None, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"path": f"{i:04}.png", "score": float(score)} for i, score in enumerate(scores)]
    for row, label in zip(rows, [] if labels is None else labels, strict=labels is not None):
        row["label"] = label
    for row, mean in zip(rows, [] if means is None else means, strict=means is not None):
        row["map_mean"] = float(mean)
    document = {"threshold": threshold, "images": rows, **facts}
    (folder / "scores.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "a.safetensors"
    model = ead.EfficientAD("S")
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.0, 1.0, 0.0, 1.0)
    model.threshold = 0.5
    scores = np.random.default_rng(0).normal(0.2, 0.05, 80).tolist()
    means = np.random.default_rng(3).normal(0.02, 0.01, 80).tolist()
    model.provenance["calibration"] = {"scores": scores, "map_means": means}
    ead.save(model, path)
    return path


def test_judge_counts_by_kind_and_names_what_changes(tmp_path, capsys):
    folder = store(tmp_path / "run", [0.1, 0.3, 0.6, 0.9], labels=[0, 0, 1, 1])
    before = (folder / "scores.json").read_bytes()
    assert run("judge", folder, "--threshold", 0.7) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "threshold 0.7; the run's own is 0.5",
        "good             2 images       0 anomalous (0.0%); with 95% confidence at most 78% of "
        "such parts are",
        "defective        2 images       1 anomalous (50.0%), 1 missed",
        "verdicts that change: 1",
        "  0.6  0002.png  now normal",
    ]
    assert (folder / "scores.json").read_bytes() == before
    assert Image.open(folder / "judged" / "scores.png").format == "PNG"
    verdicts = json.loads((folder / "judged" / "scores.json").read_text())["images"]
    assert [row["is_anomalous"] for row in verdicts] == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("judge", "nowhere", "--threshold", 1), "nowhere"),
        (("judge", "RUN", "--threshold", "nan"), "threshold is nan"),
        (("judge", "RUN", "--threshold", 1, "--out", "RUN"), "is not of an earlier `judge`"),
        (("drift", "RUN", "MODEL"), "holds 4 scores; a comparison needs 20"),
        (("drift", "RUN", "RUN/scores.json"), "scores.json"),
    ],
)
def test_wrong_usage_gives_2(model_file, tmp_path, capsys, arguments, message):
    folder = store(tmp_path / "run", [0.1, 0.3, 0.6, 0.9])
    places = {"RUN": str(folder), "MODEL": str(model_file)}
    words = [places.get(str(a), str(a).replace("RUN/", f"{folder}/")) for a in arguments]
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "judged").exists()


def test_drift_says_since_when(model_file, tmp_path, capsys):
    scores = np.random.default_rng(1).normal(0.2, 0.05, 400)
    scores[250:] += 0.15
    folder, picture = store(tmp_path / "run", scores), tmp_path / "drift.png"
    assert run("drift", folder, model_file, "--picture", picture) == 0
    printed = capsys.readouterr().out
    since = int(printed.split("drift of the score since image ")[1].split()[0])
    assert abs(since - 251) <= 8
    assert f"of 400, {since - 1:04}.png" in printed
    assert Image.open(picture).format == "PNG"
    assert run("drift", folder, model_file, "--fail-on-drift") == 3


def test_drift_of_the_map_means_alone_is_named(model_file, tmp_path, capsys):
    """And a judgement by another threshold keeps the means."""
    rng = np.random.default_rng(4)
    scores, means = rng.normal(0.2, 0.05, 400), rng.normal(0.02, 0.01, 400)
    means[300:] += 0.03
    folder = store(tmp_path / "run", scores, means=means)
    assert run("judge", folder, "--threshold", 0.5) == 0
    for results in (folder, folder / "judged"):
        capsys.readouterr()
        assert run("drift", results, model_file, "--fail-on-drift") == 3
        printed = capsys.readouterr().out
        since = int(printed.split("drift of the map's mean since image ")[1].split()[0])
        assert abs(since - 301) <= 8
        assert "map's mean  distance" in printed
        assert "scores alone" not in printed


def test_a_run_without_map_means_is_said_to_have_none(model_file, tmp_path, capsys):
    scores = np.random.default_rng(2).normal(0.2, 0.05, 100)
    folder = store(tmp_path / "run", scores)
    assert run("drift", folder, model_file) == 0
    said = capsys.readouterr().err
    assert f"scores alone are compared: {folder / 'scores.json'} holds no map means" in said


def test_no_drift(model_file, tmp_path, capsys):
    scores = np.random.default_rng(2).normal(0.2, 0.05, 100)
    folder = store(tmp_path / "run", scores, threshold=0.4)
    assert run("drift", folder, model_file, "--fail-on-drift") == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("no drift\n")
    assert "judged by 0.4 and the detector's threshold is 0.5" in printed.err


def test_scores_of_another_rule_are_refused(model_file, tmp_path, capsys):
    scores = np.random.default_rng(2).normal(0.2, 0.05, 100)
    folder = store(tmp_path / "run", scores, score_rule=64)
    assert run("drift", folder, model_file) == 2
    said = capsys.readouterr().err
    assert "is the mean of the 64 largest cells" in said
    assert "the maximum of the map; they do not compare" in said
    assert run("judge", folder, "--threshold", 0.7) == 0
    assert "is the mean of the 64 largest cells. The threshold must" in capsys.readouterr().out
    assert run("drift", folder / "judged", model_file) == 2
    assert run("drift", store(tmp_path / "max", scores, score_rule="max"), model_file) == 0


def test_a_detector_without_scores_is_told_what_to_do(tmp_path, capsys):
    folder = store(tmp_path / "run", [0.1] * 30)
    path = tmp_path / "old.safetensors"
    ead.save(ead.EfficientAD("S"), path)
    assert run("drift", folder, path) == 2
    assert f"efficientad calibrate {path} GOOD_IMAGES" in capsys.readouterr().err


def test_nearly_all_rejected_is_no_verdict(model_file, tmp_path, capsys):
    folder = store(tmp_path / "run", [0.9] * 30)
    assert run("drift", folder, model_file, "--fail-on-drift") == 0
    printed = capsys.readouterr()
    assert "30 above the threshold (100.0%)" in printed.out
    assert "no verdict on drift" in printed.out
    assert "look at the images" in printed.err
