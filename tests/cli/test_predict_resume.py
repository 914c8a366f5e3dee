"""`predict --resume`: what is scored and unchanged is kept, whatever ended the run before."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.results.output_folder import ResultFolder
from efficientad.results.prediction import Prediction
from efficientad.results.progress import PROGRESS, read_progress

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def detector() -> ead.EfficientAD:
    found = helpers.detector()
    found.threshold = 0.5
    return found


@pytest.fixture
def model_file(tmp_path, detector, monkeypatch) -> Path:
    monkeypatch.setattr(
        "efficientad.cli.predict.load_detector", lambda *words: copy.deepcopy(detector)
    )
    (tmp_path / "widget.safetensors").write_bytes(b"widget")
    return tmp_path / "widget.safetensors"


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """Names of the images that a network would have seen; their score is their brightness."""
    seen: list[str] = []

    def prepare(detector, options):
        def run(paths, on_error):
            for index, path in enumerate(paths):
                if path.name == "stop.png":
                    raise KeyboardInterrupt
                seen.append(path.name)
                value = float(np.asarray(Image.open(path)).max()) / 255
                found = np.full((8, 10), value, np.float32)
                yield Prediction(index, value, detector.threshold, found, (8, 10))

        return run

    monkeypatch.setattr("efficientad.cli.predict._prepare", prepare)
    return seen


def picture(path: Path, value: int = 51) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(path)
    return path


def predict(model_file: Path, folder: Path, *more: object) -> int:
    words = ["predict", model_file, folder / "in", "--out", folder / "out", *more]
    return main([str(word) for word in words])


def document(folder: Path) -> dict:
    return json.loads((folder / "out" / "scores.json").read_text())


@pytest.fixture
def four(tmp_path, model_file, scored) -> Path:
    """A run over four pictures, the third of them defective."""
    for name, value in (("a", 51), ("b", 51), ("c", 204), ("d", 51)):
        picture(tmp_path / "in" / f"{name}.png", value)
    assert predict(model_file, tmp_path) == 0
    scored.clear()
    return tmp_path


def test_a_second_run_scores_nothing_and_writes_the_same(four, model_file, scored, capsys):
    files = [p for p in (four / "out").rglob("*") if p.is_file() and p.name != PROGRESS]
    before = [p.read_bytes() for p in files]
    assert predict(model_file, four, "--resume") == 0
    assert scored == []
    assert "resumed: 4 of 4 images are scored already" in capsys.readouterr().out
    assert before == [p.read_bytes() for p in files]
    assert len(files) == 3 + 2 * 4


def test_only_new_and_changed_pictures_are_scored(four, model_file, scored):
    picture(four / "in" / "aa.png", 102)
    picture(four / "in" / "d.png", 255)
    os.utime(four / "in" / "b.png", ns=(1, 1))
    (four / "out" / "overlays" / "c.png").unlink()
    (four / "in" / "a.png").unlink()
    assert predict(model_file, four, "--resume", "--fail-on-anomaly") == 3
    assert scored == ["aa.png", "b.png", "c.png", "d.png"]
    found = [(Path(r["path"]).name, r["score"]) for r in document(four)["images"]]
    assert found == [("aa.png", 0.4), ("b.png", 0.2), ("c.png", 0.8), ("d.png", 1.0)]
    pictures = sorted(p.name for p in (four / "out" / "overlays").iterdir())
    assert pictures == ["aa.png", "b.png", "c.png", "d.png"]  # and none of the picture that left


def test_rows_stand_in_the_order_of_the_pictures(four, model_file, scored):
    picture(four / "in" / "0.png")
    picture(four / "in" / "bb.png")
    assert predict(model_file, four, "--resume") == 0
    assert scored == ["0.png", "bb.png"]
    names = [Path(row["path"]).name for row in document(four)["images"]]
    assert names == ["0.png", "a.png", "b.png", "bb.png", "c.png", "d.png"]
    assert document(four)["images"][4]["regions"][0]["box"] == [0, 0, 10, 8]
    assert (four / "out" / "report.html").read_text().count("<figure") >= 6


def test_without_resume_everything_is_scored_anew(four, model_file, scored):
    assert predict(model_file, four) == 0
    assert scored == ["a.png", "b.png", "c.png", "d.png"]


def test_an_interrupted_run_goes_on(tmp_path, model_file, scored):
    for name in ("a", "b", "stop", "z"):
        picture(tmp_path / "in" / f"{name}.png")
    assert predict(model_file, tmp_path) == 130
    picture(tmp_path / "in" / "stop.png").rename(tmp_path / "in" / "go.png")
    assert predict(model_file, tmp_path, "--resume") == 0
    assert scored == ["a.png", "b.png", "go.png", "z.png"]
    assert len(document(tmp_path)["images"]) == 4
    assert not any("stopped early" in note for note in document(tmp_path)["notes"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--threshold", 0.25], "threshold 0.5 (now 0.25)"),
        (["--no-maps"], "maps True (now False)"),
        (["--reference"], "path fast (now reference)"),
        (["--min-area", 3], "min_area 0"),
    ],
)
def test_another_run_is_not_gone_on_with(four, model_file, scored, capsys, more, said):
    before = (four / "out" / "scores.json").read_bytes()
    assert predict(model_file, four, "--resume", *more) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "leave out --resume to score all anew" in message
    assert (four / "out" / "scores.json").read_bytes() == before


def test_another_model_is_not_gone_on_with(four, model_file, scored, capsys):
    model_file.write_bytes(b"retrained")
    assert predict(model_file, four, "--resume") == 2
    assert "had model " in capsys.readouterr().err


def test_lines_that_are_cut_or_foreign_are_not_read(four, model_file, scored):
    path = four / "out" / PROGRESS
    lines = [line for line in path.read_text().splitlines() if not line.startswith('{"begun"')]
    lines[1] = lines[1][: len(lines[1]) // 2]
    lines[2] = '{"name": "b", "row": 3}'
    lines[3] = "[]"
    path.write_text("\n".join(lines))
    assert predict(model_file, four, "--resume") == 0
    assert scored == ["a.png", "b.png", "c.png"]
    assert len(read_progress(four / "out").entries) == 4


def test_a_line_of_an_older_version_is_scored_again(four, model_file, scored):
    """It has no mean of the map, and would leave the whole run without."""
    path = four / "out" / PROGRESS
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"map_mean"' in line)
    older = json.loads(lines[at])
    del older["row"]["map_mean"]
    lines[at] = json.dumps(older)
    path.write_text("\n".join(lines) + "\n")
    assert predict(model_file, four, "--resume") == 0
    assert scored == [older["name"] + ".png"]
    document = json.loads((four / "out" / "scores.json").read_text())
    assert all(isinstance(row["map_mean"], float) for row in document["images"])


@pytest.mark.parametrize("text", ["", "[]\n", '{"format": "other", "settings": {}}\n', "\0"])
def test_a_file_of_another_kind_counts_as_none(four, model_file, scored, capsys, text):
    (four / "out" / PROGRESS).write_text(text)
    assert predict(model_file, four, "--resume") == 0
    assert "nothing to go on from" in capsys.readouterr().out
    assert len(scored) == 4


def test_a_picture_that_failed_is_tried_again(four, model_file, scored, capsys):
    shutil.rmtree(four / "out")
    (four / "out").mkdir()
    (four / "out" / "maps").write_text("in the way")
    with pytest.raises(OSError, match="maps"):
        (four / "out" / "maps" / "x").write_text("")
    assert predict(model_file, four) == 1
    (four / "out" / "maps").unlink()
    scored.clear()
    assert predict(model_file, four, "--resume") == 0
    assert scored == ["a.png", "b.png", "c.png", "d.png"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from efficientad.results import output_folder
from efficientad.results.output_folder import ResultFolder
from efficientad.results.prediction import Prediction
root = Path(sys.argv[1])
folder = ResultFolder(root, 0.5, overlays=root / "overlays", settings={"a": 1})
for name in "ab":
    found = np.full((8, 10), 0.2, np.float32)
    source = root.parent / f"{name}.png"
    folder.add(Prediction(0, 0.2, 0.5, found, (8, 10)), source, Path(name),
               image=np.zeros((8, 10, 3), np.uint8))
def die(path, picture):
    picture.save(path)
    os.kill(os.getpid(), signal.SIGKILL)
output_folder.write_picture = die
folder.add(Prediction(0, 0.2, 0.5, found, (8, 10)), source, Path("c"),
           image=np.zeros((8, 10, 3), np.uint8))
"""


def test_after_kill_9_what_was_written_is_known(tmp_path):
    picture(tmp_path / "a.png")
    root = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)])
    assert done.returncode == -signal.SIGKILL
    assert not (root / "scores.json").exists()
    earlier = read_progress(root)
    assert earlier.settings == {"a": 1}
    assert [(e.name, e.stat is None) for e in earlier.entries] == [("a", False), ("b", True)]
    assert (root / "overlays" / "c.png").is_file()  # written when the process died
    ResultFolder(root, 0.5, overlays=root / "overlays")  # a run anew knows whose pictures they are
    assert list(root.rglob("*.png")) == []
