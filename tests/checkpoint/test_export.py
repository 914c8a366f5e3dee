"""Export: the files give the detector's numbers, and one that does not is not written."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from torch import nn

import efficientad as ead
from efficientad.checkpoint import exporting, loading
from efficientad.checkpoint.exporting import ExportError, export
from efficientad.cli import model_files as cli_export

FORMATS = {"onnx": ".onnx", "aoti": ".pt2"}


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    model = ead.EfficientAD()
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.1, 0.2, 0.3, 0.4)
    model.threshold = 0.25
    return model


class Light(nn.Module):
    """In the detector's place where a test is not about it."""

    device = torch.device("cpu")

    def __init__(self, *_arguments):
        super().__init__()

    def forward(self, image):
        anomaly_map = image.mean(1)
        return anomaly_map.amax((1, 2)), anomaly_map


@pytest.fixture
def light(monkeypatch):
    """Writing and running without torch's exporters; gives the function that runs the file."""

    def write(model, path, size, facts):
        path.write_text(json.dumps([size, facts]))

    runs = {"run": Light(None)}
    monkeypatch.setattr(exporting, "_Wrapped", Light)
    monkeypatch.setattr(exporting, "_WRITERS", dict.fromkeys(FORMATS, write))
    runners = dict.fromkeys(FORMATS, lambda path: lambda images: runs["run"](images))
    monkeypatch.setattr(exporting, "_RUNNERS", runners)
    monkeypatch.setattr(exporting, "_require_packages", lambda: None)
    monkeypatch.setattr(exporting, "_require_compiler", lambda: None)
    return runs


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- arguments and the comparison ------------------------------------------------------------


def test_bad_arguments(model, tmp_path):
    with pytest.raises(ValueError, match=r"format is 'tflite'; it must be 'onnx' or 'aoti'"):
        export(model, tmp_path / "a.onnx", "tflite")
    with pytest.raises(ValueError, match=r"path is 'a\.onnx'; .* 'aoti' ends in '\.pt2'"):
        export(model, tmp_path / "a.onnx", "aoti")
    with pytest.raises(ValueError, match=r"image size is 255x300; .* at least 256"):
        export(model, tmp_path / "a.onnx", image_size=(255, 300))
    with pytest.raises(ValueError, match=r"image_size is 256; it must be \(height, width\)"):
        export(model, tmp_path / "a.onnx", image_size=256)
    with pytest.raises(ead.UncalibratedError, match="not calibrated"):
        export(ead.EfficientAD(), tmp_path / "a.onnx")
    assert left(tmp_path) == []


def test_the_teachers_licence_is_in_the_file(model):
    assert "teacher_license" not in exporting.metadata(model, (256, 256))
    own = copy.deepcopy(model)
    own.provenance["teacher_license"] = "for research"
    assert exporting.metadata(own, (256, 256))["teacher_license"] == "for research"


def test_an_existing_file_stays_unless_forced(model, light, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"a\.onnx exists; use force \(--force\)"):
        export(model, path)
    assert path.read_text() == "old"
    result = export(model, path, force=True)
    assert path.read_text() != "old"
    assert result.bytes == path.stat().st_size
    assert left(tmp_path) == ["a.onnx"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_agrees_is_written_and_says_what_it_is(name, model, light, tmp_path):
    path = tmp_path / "new" / f"a{FORMATS[name]}"
    result = export(model, path, name)
    assert (result.path, result.format) == (path, name)
    assert result.differences == {1: 0.0, 3: 0.0, 8: 0.0}
    size, facts = json.loads(path.read_text())
    assert size == [256, 256]
    assert facts["threshold"] == "0.25"
    assert facts["border"] == "nelson"
    assert (facts["image_height"], facts["image_width"]) == ("256", "256")
    assert facts["efficientad_version"] == ead.__version__
    assert (facts["model"], facts["map_padding"]) == ("EfficientAD-S", "4")


def wrong_score(images):
    score, anomaly_map = Light(None)(images)
    return score + (2e-4 if len(images) == 3 else 0), anomaly_map


def wrong_pixel(images):
    score, anomaly_map = Light(None)(images)
    anomaly_map[-1, 7, 9] += 2e-4 if len(images) == 8 else 0
    return score, anomaly_map


def not_a_number(images):
    score, anomaly_map = Light(None)(images)
    anomaly_map[0, 0, 0] = torch.nan
    return score, anomaly_map


def wrong_shape(images):
    score, anomaly_map = Light(None)(images)
    return score[:, None], anomaly_map


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (wrong_score, r"at batch 3 it differs .*bound 0\.0001"),
        (wrong_pixel, r"at batch 8 it differs .*bound 0\.0001"),
        (not_a_number, "at batch 1 it differs from the detector by nan"),
        (wrong_shape, r"at batch 1 a result has shape \(1, 1\) instead of \(1,\)"),
    ],
)
def test_what_differs_is_not_written(run, message, model, light, tmp_path):
    light["run"] = run
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "a.onnx")
    assert left(tmp_path) == []
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(ExportError, match="was not written"):
        export(model, tmp_path / "a.onnx", force=True)
    assert (tmp_path / "a.onnx").read_text() == "old"
    assert export(model, tmp_path / "a.onnx", force=True, verify=False).differences == {}


def test_another_size_than_the_calibrated_one_is_told(model, light, tmp_path):
    with pytest.warns(UserWarning, match="image_size is 300x256; .* found at 256x256"):
        export(model, tmp_path / "a.onnx", image_size=(300, 256))
    assert json.loads((tmp_path / "a.onnx").read_text())[0] == [300, 256]


def test_a_missing_package_is_named_with_the_line_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    line = r"needs onnx, onnxscript, onnxruntime: run `pip install onnx onnxscript onnxruntime`"
    with pytest.raises(ImportError, match=line):
        export(model, tmp_path / "a.onnx")


def test_a_missing_compiler_is_told(model, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    for get_cpp_compiler in (none, lambda: "no-such-compiler"):
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
        with pytest.raises(ExportError, match=r"'aoti' compiles C\+\+ and no compiler was found"):
            export(model, tmp_path / "a.pt2", "aoti")
    assert left(tmp_path) == []


# ---- the command -----------------------------------------------------------------------------


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli_export.add_export(parser.add_subparsers())
    return cli_export.run_export(parser.parse_args(["export", *map(str, arguments)]))


def test_command(model, light, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "model.safetensors"
    monkeypatch.setattr(loading, "load", lambda path: {str(saved): model}[path])
    assert cli_export.FORMATS == tuple(exporting.FORMATS)
    assert command(saved, tmp_path / "a.onnx") == 0
    out = capsys.readouterr().out
    for count in (1, 3, 8):
        assert f"batch {count}: differs from the detector by 0 " in out
    assert f"saved: {tmp_path / 'a.onnx'}" in out
    assert command(saved, tmp_path / "a.pt2", "--no-verify") == 0
    assert "not compared" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        command(saved, tmp_path / "a.pt2")
    assert command(saved, tmp_path / "a.pt2", "--force", "--format", "aoti") == 0
    with pytest.raises(ValueError, match=r"OUT is 'a\.bin'; its name must end in \.onnx or \.pt2"):
        command(saved, tmp_path / "a.bin")


# ---- real files ------------------------------------------------------------------------------


def check(result: exporting.Export, name: str) -> None:
    assert result.format == name
    assert list(result.differences) == [1, 3, 8]
    assert max(result.differences.values()) <= 1e-4
    assert result.bytes > 30e6


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"padding": True, "image_size": (256, 300)}])
def test_onnx(options, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = helpers.detector(**options)
    model.threshold = 0.5
    result = export(model, tmp_path / "a.onnx")
    check(result, "onnx")
    session = ort.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts == exporting.metadata(model, model.image_size)
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape[1:] == [3, *model.image_size]
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    image = helpers.images(5, *model.image_size, seed=7)
    image[3, :, 100:140, 80:120] = 0
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": image.numpy()})
    with torch.no_grad():
        expected = model(image)
    scale = max(0.1, float(expected.anomaly_map.abs().max()))
    assert (torch.from_numpy(anomaly_map) - expected.anomaly_map).abs().max() <= 1e-4 * scale
    assert (torch.from_numpy(score) - expected.score).abs().max() <= 1e-4 * scale


@pytest.mark.slow
def test_onnx_applies_the_region(tmp_path):
    """At another size than the detector's, too."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = helpers.detector()
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[64:128, 32:192] = True
    model.set_region(region, keep_calibration=True)
    with pytest.warns(UserWarning, match="image_size is 256x320"):
        check(export(model, tmp_path / "a.onnx", image_size=(256, 320)), "onnx")
    session = ort.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert float(facts["inspected"]) == pytest.approx(64 * 160 / 256**2, abs=1e-6)
    image = helpers.images(1, 256, 320, seed=7)
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": image.numpy()})
    inside = np.zeros((256, 320), bool)
    inside[64:128, 40:240] = True
    assert len(np.unique(anomaly_map[0][~inside])) == 1
    assert score[0] == anomaly_map[0][inside].max()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "aoti"])
def test_an_exported_file_takes_the_mean_of_the_largest_cells(format, tmp_path):
    """In a region, at another size than the detector's, for every batch size."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    elif shutil.which("g++") is None:
        pytest.skip("no g++, with which AOTInductor compiles")
    model = helpers.detector()
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[64:128, 32:192] = True
    model.set_region(region, keep_calibration=True)
    model.score = 10
    path = tmp_path / f"a{exporting.FORMATS[format]}"
    with pytest.warns(UserWarning, match="image_size is 256x320"):
        check(export(model, path, format, image_size=(256, 320)), format)
    inside = torch.zeros(256, 320, dtype=torch.bool)
    inside[64:128, 40:240] = True
    score, anomaly_map = exporting._RUNNERS[format](path)(helpers.images(2, 256, 320, seed=7))
    expected = anomaly_map[:, inside].sort(1).values[:, -160:].mean(1)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)
    assert exporting.metadata(model, (256, 320))["score"] == "mean of the 10 largest cells"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "aoti"])
def test_an_exported_file_has_the_global_term(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    elif shutil.which("g++") is None:
        pytest.skip("no g++, with which AOTInductor compiles")
    model = helpers.detector_with_term()
    path = tmp_path / f"a{exporting.FORMATS[format]}"
    check(export(model, path, format), format)
    image = 1 - helpers.images(2, seed=7)
    score, _ = exporting._RUNNERS[format](path)(image)
    with torch.no_grad():
        expected = model(image).score
        model.set_global_term(None)
        plain = model(image).score
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    assert (score > plain + 0.01).all()


@pytest.mark.slow
def test_onnx_of_a_half_precision_m_is_float32(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = helpers.detector("M").bfloat16()
    result = export(model, tmp_path / "a.onnx")
    check(result, "onnx")
    assert model.student.conv1.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_aoti(tmp_path):
    model = helpers.detector()
    try:
        exporting._require_compiler()
    except ExportError as error:
        pytest.skip(str(error))
    check(export(model, tmp_path / "a.pt2", "aoti"), "aoti")
    package = torch._inductor.aoti_load_package(str(tmp_path / "a.pt2"))
    assert package.get_metadata()["border"] == "nelson"
