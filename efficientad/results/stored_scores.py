"""Scores that an earlier run stored, read again and judged by another threshold."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientad.model.image_score import ScoreRule, check_threshold
from efficientad.results.output_folder import write_tables
from efficientad.results.prediction import is_anomalous
from efficientad.results.report_page import KINDS
from efficientad.utils.checks import is_number

_MARK = "judged_from"  # in the JSON of a judgement


@dataclass(frozen=True)
class StoredScore:
    """An image of a run.

    Attributes:
        path: as it was stored. score: NaN for none. map_mean: NaN where it is unknown, as in a
            table and in files of older versions. label, defect: None for none.
    """

    path: str
    score: float
    label: int | None = None
    defect: str | None = None
    map_mean: float = math.nan


@dataclass(frozen=True)
class StoredScores:
    """What a run stored, in its order.

    threshold: by which it judged. score_rule: how its maps became scores (`model.image_score`).
    Either is None where it is unknown, as in a table and in files of older versions.
    """

    file: Path
    images: tuple[StoredScore, ...]
    threshold: float | None
    score_rule: ScoreRule | None = None

    def by_kind(self) -> dict[str, list[float]]:
        """Scores of the good, the defective and the unlabelled images, where there are any."""
        groups = {
            name: [image.score for image in self.images if image.label == label]
            for label, name in KINDS
        }
        return {name: scores for name, scores in groups.items() if scores}


@dataclass(frozen=True)
class Judgement:
    """Verdicts by a threshold. changed: images whose verdict was another one by the run's own."""

    threshold: float
    anomalous: tuple[bool, ...]
    changed: tuple[StoredScore, ...]


def read_scores(results: str | os.PathLike) -> StoredScores:
    """The scores of `scores.json` or `scores.csv`, or of a folder that holds one of them.

    Raises:
        FileNotFoundError: nothing is there. ValueError: not such a file, damaged, or without an
            image; the message says where.
    """
    file = Path(results)
    if file.is_dir():
        found = [file / name for name in ("scores.json", "scores.csv") if (file / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{file} holds no scores.json and no scores.csv")
        file = found[0]
    if not file.exists():
        raise FileNotFoundError(f"no such file or folder: {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {error}") from error
    threshold, rule = None, None
    if text.lstrip()[:1] == "{":
        rows, threshold, rule = _json_rows(file, text)
    else:
        rows = _csv_rows(file, text)
    images = tuple(_image(file, number, row) for number, row in enumerate(rows, start=1))
    if not images:
        raise ValueError(f"{file} holds the score of no image")
    return StoredScores(file, images, threshold, rule)


def judge(stored: StoredScores, threshold: float) -> Judgement:
    """The verdicts on stored scores by a threshold; no score is computed again.

    Raises:
        ValueError: threshold is not a finite number.
    """
    if check_threshold(threshold) is None:
        raise ValueError("threshold is None; it must be a finite number")
    verdicts = tuple(bool(is_anomalous(image.score, threshold)) for image in stored.images)
    changed = []
    if stored.threshold is not None:
        for image, verdict in zip(stored.images, verdicts, strict=True):
            if is_anomalous(image.score, stored.threshold) != verdict:
                changed.append(image)
    return Judgement(float(threshold), verdicts, tuple(changed))


def write_judged(out: str | os.PathLike, stored: StoredScores, found: Judgement) -> None:
    """Write `scores.csv` and `scores.json` with the new verdicts into a folder.

    Raises:
        ValueError: out is a file, or holds scores that are not of such a judgement.
    """
    out = Path(out)
    check_judged_folder(out)
    rows = [
        {
            "path": image.path,
            "score": image.score,
            "map_mean": image.map_mean,
            "is_anomalous": verdict,
            "defect": image.defect,
            "label": image.label,
        }
        for image, verdict in zip(stored.images, found.anomalous, strict=True)
    ]
    facts = {"failed": [], "notes": [], "files": [], _MARK: str(stored.file)}
    write_tables(out, rows, found.threshold, stored.score_rule, facts, more=("map_mean",))


def check_judged_folder(out: Path) -> None:
    """Raise what `write_judged` does."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is a file; it must be a folder")
    earlier = [out / name for name in ("scores.json", "scores.csv") if (out / name).exists()]
    try:
        ours = _MARK in json.loads((out / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if earlier and not ours:
        raise ValueError(
            f"{earlier[0]} is not of an earlier `judge`, and is not replaced; name another folder"
        )


def _json_rows(file: Path, text: str) -> tuple[list[Any], float | None, ScoreRule | None]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    rows = document.get("images")
    if not isinstance(rows, list):
        raise ValueError(f"{file} has no list 'images'; it must be a scores.json of a run")
    threshold = document.get("threshold")
    if not (threshold is None or is_number(threshold)):
        raise ValueError(f"{file} has the threshold {threshold!r}; it must be a number or null")
    rule = document.get("score_rule")
    whole = isinstance(rule, int) and not isinstance(rule, bool) and rule > 0
    if not (rule is None or rule == "max" or whole):
        raise ValueError(
            f"{file} has the score_rule {rule!r}; it must be 'max', a number of cells or null"
        )
    return rows, None if threshold is None else float(threshold), rule


def _csv_rows(file: Path, text: str) -> list[Any]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        columns, rows = set(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(f"{file} is no table: {error}") from error
    if not {"path", "score"} <= columns:
        raise ValueError(
            f"{file} has no columns path and score; it must be a scores.json or scores.csv of a run"
        )
    return rows


def _image(file: Path, number: int, row: object) -> StoredScore:
    def wrong(name: str, rule: str) -> ValueError:
        value = row.get(name) if isinstance(row, Mapping) else row
        return ValueError(f"{file}, image {number}: {name} is {value!r}; it must be {rule}")

    if not isinstance(row, Mapping) or not isinstance(row.get("path"), str):
        raise wrong("path", "text")
    score = row.get("score")
    if score is None:  # JSON has no NaN
        score = math.nan
    elif isinstance(score, str):
        try:
            score = float(score)
        except ValueError:
            raise wrong("score", "a number") from None
    elif not isinstance(score, (int, float)) or isinstance(score, bool):
        raise wrong("score", "a number or null")
    label = row.get("label")
    if isinstance(label, str):
        label = {"": None, "0": 0, "1": 1}.get(label, label)
    if label not in (0, 1, None) or isinstance(label, (bool, float)):
        raise wrong("label", "0, 1 or empty")
    defect = row.get("defect") or None
    if not (defect is None or isinstance(defect, str)):
        raise wrong("defect", "text")
    mean = row.get("map_mean")
    if not (mean is None or is_number(mean)):
        raise wrong("map_mean", "a number or null")
    mean = math.nan if mean is None else float(mean)
    return StoredScore(row["path"], float(score), label, defect, mean)
