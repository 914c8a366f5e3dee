"""`efficientad bundle` and what `efficientad info` says of its file."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from efficientad.aot import building
from efficientad.checkpoint import loading
from efficientad.cli.main import main
from efficientad.fast import options
from efficientad.model.detector import EfficientAD, UncalibratedError
from efficientad.ops.kernel_bundle import Bundle, CompiledKernel, source_digest, write_bundle


class Calibrated(EfficientAD):
    """A detector of which nothing is read."""

    calibrated = True

    def __init__(self):
        pass


def made(arch: int = 90, **changes) -> Bundle:
    row = CompiledKernel("_a", "_a", 4, 16, ((0, "*fp16"),), b"cubin")
    facts = {"arch": arch, "triton": triton.__version__, "source": source_digest()} | changes
    return Bundle(**facts, made_for={"dtype": "float16"}, kernels={"a": row})


@pytest.fixture
def asked(monkeypatch):
    """What `build_bundle` was called with; it writes a bundle of one kernel."""
    calls = []

    def build(detector, path, arch, **settings):
        calls.append((detector, arch, settings))
        write_bundle(made(), path)
        return made()

    monkeypatch.setattr(building, "build_bundle", build)
    monkeypatch.setattr(loading, "load", lambda path: f"detector of {path}")
    return calls


def test_the_command_builds_what_it_is_asked_for(asked, tmp_path, capsys):
    out = tmp_path / "x.kernels"
    command = ["bundle", "m.safetensors", str(out), "--arch", "sm_90", "--batch-sizes", "1", "8"]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    settings = {"dtype": "bfloat16", "batch_sizes": [1, 8], "fp8_layers": "second"}
    assert asked == [("detector of m.safetensors", "sm_90", settings)]
    assert capsys.readouterr().out == f"saved: {out} (1 for sm_90, 0.0 MB)\n"
    assert main(command) == 2
    assert "exists; give --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_info_names_a_bundle_and_whether_it_serves(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.kernels"
    write_bundle(made(), path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kernels"], facts["dtype"]) == ("1 for sm_90, 0.0 MB", "float16")
    assert facts["usable here"] == "with a GPU of sm_90, and there is none"
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        for capability, usable in (
            ((9, 0), "yes"),
            ((8, 0), "is for sm_90 and the device is sm_80"),
        ):
            there.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
            assert main(["info", str(path), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["usable here"].startswith(usable)
    write_bundle(made(triton="3.0.0"), path)
    monkeypatch.setenv(options.BUNDLE, str(path))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["kernel bundle"]
    assert facts["usable here"].startswith("was compiled by Triton 3.0.0")
    monkeypatch.setenv(options.BUNDLE, str(tmp_path / "nowhere"))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["kernel bundle"]
    assert "nowhere is not a file" in facts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"arch": "hopper"}, "arch is 'hopper'; it must be a compute capability such as 'sm_90'"),
        ({"arch": "sm_75"}, "target is sm_75; the kernels need sm_80 or newer"),
        ({"dtype": "float32"}, "dtype is 'float32'; it must be one of float16, bfloat16, float8"),
        ({"arch": 80, "dtype": "float8_e4m3fn"}, "arch sm_80; fp8 needs sm_89 or newer"),
        ({"batch_sizes": ()}, r"batch_sizes is \(\)"),
        ({"batch_sizes": [0]}, r"batch_sizes is \[0\]; it must be a sequence of integers"),
        ({"interpret": "1"}, "TRITON_INTERPRET is '1', which leaves nothing to compile"),
    ],
)
def test_wrong_arguments_are_named(settings, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", settings.pop("interpret", "0"))
    settings = {"arch": "sm_90"} | settings
    with pytest.raises(ValueError, match=sentence):
        building.build_bundle(Calibrated(), tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_a_detector_without_numbers_is_refused(tmp_path):
    with pytest.raises(UncalibratedError):
        building.build_bundle(EfficientAD("S"), tmp_path / "x", "sm_90")
