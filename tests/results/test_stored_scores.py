"""Stored scores: read as they were written, refused where damaged, judged by another threshold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from efficientad.results.output_folder import ResultFolder
from efficientad.results.prediction import Prediction
from efficientad.results.stored_scores import judge, read_scores, write_judged

SCORES = [0.1, 0.5, 0.50001, math.nan, 0.9]
LABELS = [0, 0, 1, 1, None]


@pytest.fixture
def run(tmp_path):
    """A run's output folder; one name has a comma, quotes and a line break."""
    folder = ResultFolder(tmp_path / "run", 0.5, score=64)
    for i, (score, label) in enumerate(zip(SCORES, LABELS, strict=True)):
        heat = np.full((4, 5), score, np.float32)
        name = 'a, "b"\nc.png' if i == 1 else f"{i}.png"
        folder.add(
            Prediction(i, score, 0.5, heat, (4, 5)),
            name,
            folder.root / str(i),
            image=np.zeros((4, 5, 3), np.uint8),
            label=label,
            defect=None if label is None else ("good", "dent")[label],
        )
    folder.close("run")
    return folder.root


@pytest.mark.parametrize("name", ["", "scores.json", "scores.csv"])
def test_what_a_run_wrote_is_read(run, name):
    stored = read_scores(run / name)
    np.testing.assert_array_equal([image.score for image in stored.images], SCORES)
    means = [math.nan] * 5 if name == "scores.csv" else SCORES  # each map is of one value
    np.testing.assert_allclose([image.map_mean for image in stored.images], means)
    assert [image.label for image in stored.images] == LABELS
    assert stored.images[1].path == 'a, "b"\nc.png'
    assert [image.defect for image in stored.images] == ["good", "good", "dent", "dent", None]
    known = (None, None) if name == "scores.csv" else (0.5, 64)
    assert (stored.threshold, stored.score_rule) == known
    kinds = stored.by_kind()
    assert {kind: len(scores) for kind, scores in kinds.items()} == {
        "good": 2,
        "defective": 2,
        "unlabelled": 1,
    }


def test_the_table_is_read_where_there_is_no_document(run):
    (run / "scores.json").unlink()
    assert len(read_scores(run).images) == 5


def test_verdicts_are_those_of_the_new_threshold(run):
    stored = read_scores(run)
    same = judge(stored, 0.5)
    assert same.anomalous == (False, False, True, True, True)
    assert same.changed == ()
    higher = judge(stored, 0.9)
    assert higher.anomalous == (False, False, False, True, False)  # not a number: anomalous
    assert [image.path for image in higher.changed] == ["2.png", "4.png"]
    assert judge(read_scores(run / "scores.csv"), 0.9).changed == ()


@pytest.mark.parametrize("threshold", [math.nan, math.inf, None, "0.5"])
def test_a_threshold_that_is_none_is_refused(run, threshold):
    with pytest.raises(ValueError, match="threshold is"):
        judge(read_scores(run), threshold)


def test_a_judgement_is_read_like_a_run_and_replaced_by_the_next(run, tmp_path):
    stored = read_scores(run)
    for threshold in (0.7, 0.9):
        write_judged(tmp_path / "judged", stored, judge(stored, threshold))
    again = read_scores(tmp_path / "judged")
    assert (again.threshold, again.score_rule) == (0.9, 64)
    assert [image.path for image in again.images] == [image.path for image in stored.images]
    document = json.loads((tmp_path / "judged" / "scores.json").read_text())
    assert [row["is_anomalous"] for row in document["images"]] == [False] * 3 + [True, False]
    assert document["judged_from"] == str(run / "scores.json")


@pytest.mark.parametrize("name", ["scores.json", "scores.csv"])
def test_scores_of_a_run_are_not_replaced(run, tmp_path, name):
    stored = read_scores(run)
    (tmp_path / "other").mkdir()
    (run / name).rename(tmp_path / "other" / name)
    with pytest.raises(ValueError, match=f"{name} is not of an earlier `judge`"):
        write_judged(tmp_path / "other", stored, judge(stored, 0.7))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="which is a file"):
        write_judged(file, stored, judge(stored, 0.7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no columns path and score"),
        ("{", "is no JSON"),
        ("{}", "has no list 'images'"),
        ('{"images": {}}', "has no list 'images'"),
        ('{"images": []}', "holds the score of no image"),
        ("path,score\n", "holds the score of no image"),
        ('{"images": [3]}', "image 1: path is 3; it must be text"),
        ('{"images": [{"score": 1}]}', "image 1: path is None"),
        ('{"images": [{"path": "a", "score": true}]}', "image 1: score is True"),
        ('{"images": [{"path": "a", "score": [1]}]}', r"image 1: score is \[1\]"),
        ('{"images": [], "threshold": "x"}', "has the threshold 'x'"),
        ('{"images": [], "score_rule": "mean"}', "has the score_rule 'mean'"),
        ('{"images": [], "score_rule": 0}', "has the score_rule 0"),
        ('{"images": [], "score_rule": true}', "has the score_rule True"),
        ('{"images": [], "score_rule": 2.0}', "has the score_rule 2.0"),
        ('{"images": [{"path": "a", "score": 1, "label": 2}]}', "label is 2"),
        ('{"images": [{"path": "a", "score": 1, "label": [1]}]}', r"label is \[1\]"),
        ('{"images": [{"path": "a", "score": 1, "label": true}]}', "label is True"),
        ('{"images": [{"path": "a", "score": 1, "defect": 5}]}', "defect is 5"),
        ("path,score\na,high\n", "image 1: score is 'high'"),
        ("path,score\na,0.5\nb\n", "image 2: score is ''"),
        ("path,score\na,0.5\n,,,,", "image 2: score is ''"),
        ("path,score,label\na,0.5,good\n", "label is 'good'"),
        ("a,b\n1,2\n", "has no columns path and score"),
    ],
)
def test_damaged_files_are_refused_by_place_and_rule(tmp_path, text, message):
    path = tmp_path / "scores"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scores(path)


def test_what_is_no_text_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_scores(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no scores\.json"):
        read_scores(tmp_path)
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        read_scores(tmp_path / "picture")
