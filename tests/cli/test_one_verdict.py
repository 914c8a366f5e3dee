"""One file, one verdict: whatever computes the scores of dark pictures, they are judged alike."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.fast import options
from efficientad.fast.folded_network import network_name
from efficientad.utils.devices import cpu_multiplies_bfloat16

DARK = 16  # times darker than what the detector was calibrated on

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch):
    """A processor that is fastest in bfloat16, on which "auto" was bfloat16 unasked."""
    monkeypatch.setattr(options, "cpu_is_fastest_in_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An MVTec folder whose test pictures are dark."""
    root = tmp_path_factory.mktemp("dark") / "widget"
    pictures = helpers.frames(7, 256, 256, seed=21)
    for i, pixels in enumerate(pictures):
        part = "train/good" if i < 3 else "test/good" if i < 5 else "test/odd"
        pixels = pixels if i < 3 else pixels // DARK
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model_file(folder, tmp_path_factory):
    """A detector with a threshold between one dark picture's scores in bfloat16 and float32.

    Calibrated by the command, so that what it earned is in the file.
    """
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    ead.save(helpers.detector(), path)
    assert main(["calibrate", str(path), str(folder / "train")]) == 0
    detector = ead.load(path)
    pictures = sorted((folder / "test").rglob("*.png"))
    exact, rounded = (
        np.array([ead.FastPredictor(detector, dtype=name)(p).cpu().score for p in pictures])
        for name in ("float32", "bfloat16")
    )
    middle = (exact + rounded) / 2
    parts = (exact.min() < middle) & (middle < exact.max())  # as a threshold, the pictures
    most = int(np.where(parts, np.abs(exact - rounded), -1).argmax())
    detector.threshold = float(middle[most])
    precision = detector.provenance["calibration"]["precision"]
    precision["errors"]["bfloat16"] = precision["spread"]  # whatever random weights gave
    assert np.abs(exact - detector.threshold).min() > 1e-6  # float32 can tell
    ead.save(detector, path)
    return path


def verdicts(folder, out) -> dict[str, bool]:
    rows = json.loads((out / "scores.json").read_text())["images"]
    return {row["path"].rpartition("/")[2]: row["is_anomalous"] for row in rows}


def run(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.mark.slow
def test_dark_pictures_are_judged_alike_by_everything(model_file, folder, tmp_path, capsys):
    pictures = sorted((folder / "test").rglob("*.png"))
    found = {"evaluate": tmp_path / "evaluate", "evaluate --reference": tmp_path / "plain"}
    run("evaluate", model_file, folder, "--out", found["evaluate"])
    assert "computed in float32, folded torch network" in capsys.readouterr().out
    run("evaluate", model_file, folder, "--out", found["evaluate --reference"], "--reference")
    assert "computed in float32, the detector itself, on cpu" in capsys.readouterr().out
    for arguments in ((), ("--reference",), ("--dtype", "float32")):
        name = " ".join(("predict", *arguments))
        found[name] = tmp_path / name.replace(" ", "_")
        common = ("--no-maps", "--no-overlays", "--out", found[name])
        run("predict", model_file, folder / "test", *common, *arguments)
    judged = {name: verdicts(folder, out) for name, out in found.items()}
    judged["ONNX"] = onnx(model_file, pictures, tmp_path)
    first = judged["evaluate"]
    assert len(first) == 4
    assert set(first.values()) == {True, False}
    for name, given in judged.items():
        assert given is None or given == first, name
    named = tmp_path / "named"
    common = ("--no-maps", "--no-overlays", "--out", named, "--dtype", "bfloat16")
    run("predict", model_file, folder / "test", *common)
    assert verdicts(folder, named) != first  # the threshold is one that bfloat16 misses


def onnx(model_file, pictures, tmp_path) -> dict[str, bool] | None:
    """Verdicts of the exported file; None where what runs it is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # exports
    except ImportError:
        return None
    run("export", model_file, tmp_path / "widget.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "widget.onnx")
    threshold = ead.load(model_file).threshold
    judged = {}
    for path in pictures:
        pixels = np.asarray(Image.open(path), np.float32)[None].transpose(0, 3, 1, 2) / 255
        outputs = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {session.get_inputs()[0].name: pixels}),
                strict=True,
            )
        )
        judged[path.name] = bool(outputs["score"][0] > threshold)
    return judged


@pytest.mark.skipif(
    not cpu_multiplies_bfloat16(),
    reason="this processor has no bfloat16: it takes minutes, and is never chosen",
)
def test_where_bfloat16_is_earned_evaluate_and_predict_both_take_it(
    model_file, folder, tmp_path, capsys
):
    detector = ead.load(model_file)
    facts = detector.provenance["calibration"]["precision"]
    facts["images"] = 6
    facts["errors"]["bfloat16"] = 0.01 * min(facts["spread"], facts["margin"])
    ead.save(detector, tmp_path / "earned.safetensors")
    run("info", tmp_path / "earned.safetensors")
    assert "bfloat16, as earned" in capsys.readouterr().out
    run("evaluate", tmp_path / "earned.safetensors", folder, "--out", tmp_path / "e")
    name = network_name(torch.bfloat16, torch.device("cpu"))
    assert f"computed in bfloat16, {name}, on cpu" in capsys.readouterr().out
    assert "Scores were computed in bfloat16" in (tmp_path / "e" / "report.html").read_text()
    run(
        "predict", tmp_path / "earned.safetensors", folder / "test", "--no-maps",
        "--no-overlays", "--out", tmp_path / "p",
    )  # fmt: skip
    assert verdicts(folder, tmp_path / "e") == verdicts(folder, tmp_path / "p")
    scores = [
        {r["path"].rpartition("/")[2]: r["score"] for r in json.loads(p.read_text())["images"]}
        for p in (tmp_path / "e" / "scores.json", tmp_path / "p" / "scores.json")
    ]
    assert scores[0] == scores[1]  # bit for bit
