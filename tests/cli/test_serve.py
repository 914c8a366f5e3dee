"""`efficientad serve`: the command, from its words to its end."""

from __future__ import annotations

import json
import signal
import socket
import sys
import types
import urllib.request

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import commands

from efficientad.checkpoint.native_file import save
from efficientad.cli import main as command_line
from efficientad.cli import serve
from efficientad.demo.parts import draw_part
from efficientad.model.synthetic import random_detector


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    detector = random_detector()
    detector.threshold = 0.25
    path = tmp_path_factory.mktemp("model") / "plate.safetensors"
    save(detector, path)
    return path


@pytest.fixture
def start(model, tmp_path):
    """Starts the command; gives its process and its address."""
    command = [sys.executable, "-m", "efficientad", "serve", str(model), "--port", "0"]
    command += ["--store", str(tmp_path / "store")]
    with commands() as served:
        yield lambda *words, **environment: served([*command, *words], environment)


def post(address: str, data: bytes, **headers: str) -> dict:
    request = urllib.request.Request(address, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_same_file_gets_the_same_score_as_from_predict(start, model, tmp_path):
    process, address = start()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, suffix in enumerate(("png", "jpg", "tiff")):
        picture, _ = draw_part(np.random.default_rng(i), "scratch")
        picture.save(pictures / f"{i}.{suffix}")
    assert command_line.main(["predict", str(model), str(pictures), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["images"]
    assert len(rows) == 3
    for row in rows:
        answer = post(f"{address}/predict/plate", (pictures / row["path"]).read_bytes())
        assert answer["score"] == row["score"]
        assert answer["is_anomalous"] == row["is_anomalous"]
    process.send_signal(signal.SIGTERM)
    last = process.stdout.read().splitlines()[-1]
    assert last == "stopped; everything that was answered is stored"
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_killed_service_has_its_verdicts_in_postgresql(start, postgres, tmp_path):
    url = postgres.schema()
    process, address = start("--database", url)
    picture, _ = draw_part(np.random.default_rng(0), "scratch")
    picture.save(tmp_path / "part.png")
    data = (tmp_path / "part.png").read_bytes()
    answers = [post(f"{address}/predict/plate", data) for _ in range(3)]
    process.kill()
    process.wait()
    process, address = start("--database", url)
    with urllib.request.urlopen(f"{address}/api/verdicts", timeout=60) as answer:
        kept = json.load(answer)["verdicts"]
    assert [row["score"] for row in kept] == [one["score"] for one in answers]
    with urllib.request.urlopen(f"{address}/api/verdicts/2/picture", timeout=60) as answer:
        assert answer.read() == data
    assert post(f"{address}/predict/plate", data)["id"] == 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not (tmp_path / "store" / "verdicts.sqlite3").exists()


def usage(capsys, *words: str) -> str:
    assert command_line.main(["serve", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "which others can reach, and there is no API key"),
        (["--port", "70000"], "--port is 70000; it must be in 0..65535"),
        (["--max-body-mb", "0"], "body_mb is 0.0; it must be a finite number > 0"),
        (["--queue", "0"], "queue is 0; it must be an integer >= 1"),
        (["--keep-days", "-1"], "days is -1.0; it must be a finite number > 0"),
        (["--wait-ms", "-1"], "wait_ms is -1.0"),
        (["--min-area", "-1"], "min_area is -1.0"),
        (["--key-file", "short.key"], "short.key"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_opened(
    capsys, tmp_path, monkeypatch, words, sentence
):
    monkeypatch.delenv(serve.KEY, raising=False)
    store = tmp_path / "store"
    assert sentence in usage(capsys, "not looked at yet", "--store", str(store), *words)
    assert not store.exists()


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (["missing.safetensors"], "missing.safetensors"),
        (["a/x.pt", "b/x.pt"], "two models are called 'x'; name them with NAME=FILE"),
        (["a b.pt"], "'a b' is no name"),
        (["=x.pt"], "'' is no name"),
    ],
)
def test_names_of_models_are_checked(capsys, models, sentence):
    assert sentence in usage(capsys, *models)


def test_models_are_named_by_their_file_or_by_word(tmp_path):
    odd = tmp_path / "a=b.pt"
    odd.write_text("")
    assert serve._paths(["dir/screw.pt", "left=dir/x.pt"]) == {
        "screw": "dir/screw.pt",
        "left": "dir/x.pt",
    }
    with pytest.raises(ValueError, match="'a=b' is no name"):  # the file, not a name
        serve._paths([str(odd)])


def test_the_key_comes_from_a_file_or_the_environment_never_from_both(
    capsys, model, tmp_path, monkeypatch
):
    file = tmp_path / "key"
    file.write_text("a key of sixteen characters\n")
    ran = []
    detector = types.SimpleNamespace(calibrated=True, threshold=0.5, provenance={})
    monkeypatch.setattr(serve, "load_detector", lambda path, device: detector)
    monkeypatch.setattr(serve, "build_predictor", lambda detector, options: "predictor")
    monkeypatch.setattr(
        "efficientad.service.server.run",
        lambda models, settings, sinks: ran.append(settings),
    )
    monkeypatch.delenv(serve.KEY, raising=False)
    words = ["serve", str(model), "--host", "0.0.0.0"]
    assert command_line.main([*words, "--key-file", str(file)]) == 0
    assert command_line.main([*words, "--without-key"]) == 0
    monkeypatch.setenv(serve.KEY, "another key of the environment")
    assert command_line.main(words) == 0
    assert [one.key for one in ran] == [
        "a key of sixteen characters",
        None,
        "another key of the environment",
    ]
    assert "leave one out" in usage(capsys, str(model), "--key-file", str(file))
    assert "--without-key contradicts" in usage(capsys, str(model), "--without-key")
    monkeypatch.delenv(serve.KEY)
    file.write_text("short")
    assert "the API key has 5 characters" in usage(capsys, str(model), "--key-file", str(file))
    file.write_text("\n")
    assert "which is empty" in usage(capsys, str(model), "--key-file", str(file))


def test_the_demo_serves_its_detector(capsys, tmp_path, monkeypatch):
    ran = []
    monkeypatch.delenv(serve.KEY, raising=False)
    monkeypatch.setattr(serve, "run_serve", lambda options: ran.append(options) or 0)
    result, began = types.SimpleNamespace(metrics={}), []
    monkeypatch.setattr(
        "efficientad.demo.walkthrough.run", lambda out, **options: began.append(out) or result
    )
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    monkeypatch.setattr(serve, "PORT", taken.getsockname()[1])
    assert command_line.main(["demo", "--out", str(tmp_path)]) == 0
    assert ran == []
    began.clear()
    assert command_line.main(["demo", "--out", str(tmp_path), "--serve"]) == 2
    assert "cannot listen on 127.0.0.1 port" in capsys.readouterr().err
    assert began == []  # it is said before the training, not after it
    taken.close()
    assert command_line.main(["demo", "--out", str(tmp_path), "--serve"]) == 0
    assert f"curl --data-binary @{tmp_path}" in capsys.readouterr().out
    (options,) = ran
    assert options.models == [str(tmp_path / "detector.safetensors")]
    assert (options.store, options.host) == (tmp_path / "verdicts", "127.0.0.1")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert command_line.main(["demo", "--out", str(tmp_path), "--serve"]) == 2
    assert len(ran) == 1


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve needs uvicorn: pip install 'efficientad[serve]'" in usage(capsys, "x.pt")
