"""What `predict` leaves in its output folder, however it ends, and what it never touches."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import helpers
import numpy as np
import pytest
from PIL import Image

import efficientad as ead
from efficientad.cli.main import main
from efficientad.results.output_folder import (
    TABLES,
    ResultFolder,
    earlier_files,
    output_names,
    unique_names,
)
from efficientad.results.prediction import Prediction
from efficientad.utils.files import replace_file, write_text

THRESHOLD = 0.5

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    model = helpers.detector()
    model.threshold = THRESHOLD
    ead.save(model, path)
    return path


@pytest.fixture
def scores(monkeypatch) -> list:
    """Scores for the images in turn, without a network; an exception among them is raised."""
    values: list = []

    def prepare(detector, options):
        def run(paths, on_error):
            for index, value in enumerate(values[: len(paths)]):
                if isinstance(value, BaseException):
                    raise value
                anomaly_map = np.full((8, 10), value, np.float32)
                yield Prediction(index, value, detector.threshold, anomaly_map, (8, 10))

        return run

    monkeypatch.setattr("efficientad.cli.predict._prepare", prepare)
    return values


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # Pillow would need a name that is text
        Image.fromarray(np.full((8, 10, 3), 90, np.uint8)).save(file, "PNG")
    return path


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def strict(path: Path) -> dict:
    """The JSON document; NaN and Infinity, which no other reader takes, are an error here too."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_regions_smaller_than_min_area_are_not_listed(model_file, tmp_path, scores, capsys):
    picture(tmp_path / "a.png")
    scores += [0.75]
    rows = []
    for least in (80, 81):
        assert run("predict", model_file, tmp_path / "a.png", "--out", tmp_path / str(least),
                   "--min-area", least) == 0  # fmt: skip
        rows += strict(tmp_path / str(least) / "scores.json")["images"]
    assert [r["is_anomalous"] for r in rows] == [True, True]
    assert [len(r["regions"]) for r in rows] == [1, 0]
    assert run("predict", model_file, tmp_path / "a.png", "--min-area", -1) == 2
    assert "--min-area is -1.0; it must be a finite number >= 0" in capsys.readouterr().err


# ---- ends early ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("the disk is gone"), 2)]
)
def test_what_was_scored_is_kept_when_the_run_ends_early(model_file, tmp_path, scores, error, code):
    for i in range(4):
        picture(tmp_path / "in" / f"{i}.png")
    scores += [0.25, 0.75, error]
    out = tmp_path / "out"
    assert run("predict", model_file, tmp_path / "in", "--out", out) == code
    document = strict(out / "scores.json")
    assert [r["score"] for r in document["images"]] == [0.25, 0.75]
    assert document["notes"] == ["The run stopped early: 2 of 4 were scored."]
    assert (out / "scores.csv").read_text().count("\n") == 3
    assert "The run stopped early" in (out / "report.html").read_text()


def test_a_name_that_is_no_text_is_written_with_backslashes(model_file, tmp_path, scores):
    try:
        path = picture(Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/a\xff.png")))
    except OSError:
        pytest.skip("this file system takes no such name")
    picture(tmp_path / "in" / "b.png")
    scores += [0.25, 0.75]
    out = tmp_path / "out"
    assert run("predict", model_file, tmp_path / "in", "--out", out) == 0
    shown = str(path).replace("\udcff", "\\udcff")
    paths = [r["path"] for r in strict(out / "scores.json")["images"]]
    assert sorted(paths) == sorted([shown, str(tmp_path / "in" / "b.png")])
    assert shown in (out / "scores.csv").read_text(encoding="utf-8")
    assert (out / "overlays" / "a\\udcff.png").is_file()
    assert len(earlier_files(out)) == 4


def test_an_image_whose_pictures_cannot_be_written_fails_alone(
    model_file, tmp_path, scores, capsys
):
    longest = picture(tmp_path / "in" / f"{'a' * 251}.png")  # its map's name has 256 characters
    picture(tmp_path / "in" / f"{'b' * 249}.png")
    scores += [0.75, 0.25]
    out = tmp_path / "out"
    assert run("predict", model_file, tmp_path / "in", "--out", out) == 1
    assert f"failed: {longest}: scored, but not written: " in capsys.readouterr().err
    document = strict(out / "scores.json")
    assert [r["score"] for r in document["images"]] == [0.75, 0.25]  # the verdict is not lost
    assert [f["path"] for f in document["failed"]] == [str(longest)]
    assert (out / "maps" / f"{'b' * 249}.tiff").is_file()
    assert set(document["files"]) == below(out) - set(TABLES)


def test_nan_is_null_in_json_and_keeps_its_verdict(model_file, tmp_path, scores):
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png")
    scores += [float("nan"), float("inf"), 0.25]
    out = tmp_path / "out"
    assert run("predict", model_file, tmp_path / "in", "--out", out, "--fail-on-anomaly") == 3
    rows = strict(out / "scores.json")["images"]
    assert [r["score"] for r in rows] == [None, None, 0.25]
    assert [r["is_anomalous"] for r in rows] == [True, True, False]
    folder = ResultFolder(tmp_path / "direct", float("nan"))
    folder.close("x", metrics={"pixel AU-ROC": float("nan"), "images": 0})
    document = strict(tmp_path / "direct" / "scores.json")
    assert document["threshold"] is None
    assert document["metrics"] == {"pixel AU-ROC": None, "images": 0}


# ---- the output folder -----------------------------------------------------------------------


def test_the_output_folder_is_not_searched(model_file, tmp_path, scores, capsys):
    folder = tmp_path / "in"
    picture(folder / "0.png")
    scores += [0.25] * 9
    for _ in range(2):
        assert run("predict", model_file, folder, "--out", folder / "results") == 0
        rows = strict(folder / "results" / "scores.json")["images"]
        assert [r["path"] for r in rows] == [str(folder / "0.png")]
    assert "left out: 2 pictures in the output folder" in capsys.readouterr().out
    folder = tmp_path / "own"  # as output too: only what was written there is left out
    for name in ("0.png", "results/1.png"):
        picture(folder / name)
    for _ in range(2):
        assert run("predict", model_file, folder, "--out", folder) == 0
        rows = strict(folder / "scores.json")["images"]
        assert [r["path"] for r in rows] == [str(folder / n) for n in ("0.png", "results/1.png")]
    assert run("predict", model_file, folder / "overlays", "--out", folder) == 2
    assert "lie in the output folder" in capsys.readouterr().err
    assert (folder / "overlays" / "0.png").is_file()


def test_pictures_of_an_earlier_run_are_removed_and_no_other_file(model_file, tmp_path, scores):
    out = tmp_path / "out"
    for name in ("a", "b", "deep/c"):
        picture(tmp_path / "in" / f"{name}.png")
    scores += [0.25] * 3
    assert run("predict", model_file, tmp_path / "in", "--out", out) == 0
    assert "maps/deep/c.tiff" in below(out)
    kept = ("overlays/notes.txt", "maps/deep/notes.txt", "mine.png", "other/0.png")
    for name in kept:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    assert run("predict", model_file, tmp_path / "in" / "b.png", "--out", out) == 0
    tables = set(TABLES)
    assert below(out) == {*kept, *tables, "overlays/b.png", "maps/b.tiff"}
    assert not (out / "overlays" / "deep").exists()


def test_pictures_that_no_run_listed_are_not_overwritten(model_file, tmp_path, scores, capsys):
    mine = tmp_path / "out" / "overlays" / "0.png"
    picture(mine)
    before = mine.read_bytes()
    source = picture(tmp_path / "in" / "0.png")
    scores += [0.25]
    assert run("predict", model_file, source, "--out", tmp_path / "out") == 2
    assert "move them, or name another output folder" in capsys.readouterr().err
    assert below(tmp_path / "out") == {"overlays/0.png"}
    assert mine.read_bytes() == before
    assert run("predict", model_file, source, "--out", tmp_path / "out", "--no-overlays") == 0
    assert mine.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"files": 3}',
        '{"files": [3]}',
        '{"images": []}',
        "[" * 100_000,
        json.dumps({"files": ["overlays/" + "x" * 5000 + ".png", "maps/\0.tiff"]}),
        '{"files": ["../in/a.png", "in/a.png", "overlays/../in/a.png", "/in/a.png", "maps"]}',
    ],
)
def test_only_our_own_files_are_taken_for_ours(tmp_path, text):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "overlays").mkdir()
    (tmp_path / "scores.json").write_text(text)
    assert earlier_files(tmp_path) == []
    ResultFolder(tmp_path, None)
    assert (tmp_path / "in" / "a.png").is_file()


def test_unique_names():
    names = ["a/x.png", "a/x.jpg", "b/x.png", "a/y.png", "a/y.png", "a/z\udcff.png"]
    found = [n.as_posix() for n in unique_names([Path(n) for n in names])]
    assert found == ["a/x.png", "a/x.jpg", "b/x", "a/y", "a/y_2", "a/z\\udcff"]


# ---- verdicts in tiles -----------------------------------------------------------------------


def test_tiles_warn_that_the_threshold_may_not_fit(model_file, tmp_path, scores, capsys):
    for i in range(2):
        picture(tmp_path / "in" / f"{i}.png")
    scores += [0.25, 0.75]
    common = ("predict", model_file, tmp_path / "in", "--out", tmp_path / "out")
    assert run(*common, "--tiles", 32) == 0
    error = capsys.readouterr().err
    assert error.count("warning: ") == error.count("calibrated on such crops") == 1
    assert "calibrated on such crops" in (tmp_path / "out" / "report.html").read_text()
    assert run(*common, "--tiles", 32, "--threshold", 0.5) == 0
    assert run(*common) == 0
    assert "warning" not in capsys.readouterr().err
    assert strict(tmp_path / "out" / "scores.json")["notes"] == []


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="no permissions of that kind")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_follow_the_umask(tmp_path, umask, mode):
    def private(path: Path) -> None:
        path.touch(mode=0o600)

    before = os.umask(umask)
    try:
        replace_file(tmp_path / "a.bin", private)
        ead.save(ead.EfficientAD("S"), tmp_path / "d.safetensors")
    finally:
        os.umask(before)
    for name in ("a.bin", "d.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_the_longest_names_can_be_written(tmp_path):
    write_text(tmp_path / ("a" * 251 + ".txt"), "text")
    assert below(tmp_path) == {"a" * 251 + ".txt"}


def test_output_names_are_unique_and_keep_folders(tmp_path):
    paths = [tmp_path / p for p in ("a/x.png", "a/x.jpg", "b/x.png", "a/y.png", "a/y.png")]
    names = [str(n) for n in output_names(paths)]
    assert names == ["a/x.png", "a/x.jpg", "b/x", "a/y", "a/y_2"]
    assert output_names([]) == []
    assert [str(n) for n in output_names([tmp_path / "one.png"])] == ["one"]


def test_a_file_in_the_way_of_the_output_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="which is a file"):
        ResultFolder(tmp_path / "out", None)
    assert (tmp_path / "out").read_text() == "mine"
