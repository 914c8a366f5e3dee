"""SIGTERM stops a command as Ctrl-C does: exit code 130, and what is done is kept."""

from __future__ import annotations

import json
import signal
import warnings

import helpers
import numpy as np
import pytest
from PIL import Image

import efficientad as ead
from efficientad.cli import main as command_line
from efficientad.cli.main import main
from efficientad.evaluation import evaluation
from efficientad.model import calibration
from efficientad.results.output_folder import ResultFolder
from efficientad.training.trainer import Trainer

SIGNALS = [signal.SIGTERM, signal.SIGINT]

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(autouse=True)
def default_handlers():
    before = {n: signal.getsignal(n) for n in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # put back by the command
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    model = helpers.detector()
    model.threshold = 0.08
    ead.save(model, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two good pictures to train on, three to test, and three with a defect and its mask."""
    root = tmp_path_factory.mktemp("data") / "widget"
    for i, pixels in enumerate(helpers.frames(8, seed=31)):
        part = "train/good" if i < 2 else "test/good" if i < 5 else "test/scratch"
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / f"{i}.png")
        if i >= 5:
            (root / "ground_truth" / "scratch").mkdir(parents=True, exist_ok=True)
            mask = np.zeros((256, 256), np.uint8)
            mask[100:140, 90:150] = 255
            Image.fromarray(mask).save(root / "ground_truth" / "scratch" / f"{i}_mask.png")
    return root


def send_at(monkeypatch, owner, name: str, call: int, number: signal.Signals) -> None:
    """Send a signal to this process at the call-th call of a function."""
    original, calls = getattr(owner, name), []

    def function(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)  # to this thread, at once
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, function)


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("reference", [(), ("--reference",)], ids=["fast", "reference"])
def test_evaluate_keeps_what_it_has(
    number, reference, model_file, data, tmp_path, monkeypatch, capsys
):
    send_at(monkeypatch, evaluation, "read_image", 5, number)
    out = tmp_path / "out"
    assert run("evaluate", model_file, data, "--out", out, "--workers", 0, *reference) == 130
    assert "stopped: 4 of 6 test images were scored" in capsys.readouterr().err
    document = json.loads((out / "scores.json").read_text())
    assert len(document["images"]) == 4
    assert document["metrics"]["images"] == 4
    assert document["metrics"]["image AU-ROC"] is not None
    assert any(n.startswith("The evaluation stopped early: 4 of 6") for n in document["notes"])
    assert (out / "report.html").exists()


def test_evaluate_stopped_before_the_first_image(model_file, data, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, evaluation, "image_score", 1, signal.SIGTERM)
    out = tmp_path / "out"
    assert run("evaluate", model_file, data, "--out", out) == 130
    assert json.loads((out / "scores.json").read_text())["images"] == []
    assert "0 of 6" in capsys.readouterr().err


def test_predict_keeps_its_scores(model_file, data, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, ResultFolder, "add", 3, signal.SIGTERM)
    out = tmp_path / "out"
    common = ("--out", out, "--no-maps", "--no-overlays")
    assert run("predict", model_file, data / "test", *common) == 130
    assert len(json.loads((out / "scores.json").read_text())["images"]) == 2
    assert "stopped" in capsys.readouterr().err


def test_calibrate_leaves_the_file_alone(model_file, data, monkeypatch):
    before = model_file.read_bytes()
    send_at(monkeypatch, calibration, "set_quantiles_from_maps", 1, signal.SIGTERM)
    assert run("calibrate", model_file, data / "test" / "good") == 130
    assert model_file.read_bytes() == before


def test_train_finishes_the_step_and_keeps_its_state(data, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, Trainer, "one_step", 2, signal.SIGTERM)
    out = tmp_path / "widget.safetensors"
    assert run("train", data, "--out", out, "--steps", 5, "--log-every", 5) == 130
    assert "step 2" in capsys.readouterr().err
    assert out.with_suffix(".training").exists()
    assert not out.exists()


def test_who_handles_the_signal_keeps_it(monkeypatch):
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))

    def command(options) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setitem(command_line.COMMANDS, "info", (command_line.COMMANDS["info"][0], command))
    assert run("info") == 0
    assert seen == [1]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_warnings_are_sentences_said_once(monkeypatch, capsys):
    def command(options) -> int:
        for _ in range(2):
            warnings.warn("the part is\nodd", UserWarning, stacklevel=1)
            warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
        return 0

    monkeypatch.setitem(command_line.COMMANDS, "info", (command_line.COMMANDS["info"][0], command))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info") == 0
    assert capsys.readouterr().err == "warning: the part is odd\n"
