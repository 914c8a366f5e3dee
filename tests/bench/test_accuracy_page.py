"""The accuracy table of docs/training.md, by hand and against its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import record
from bench.report import accuracy

ROWS = [
    {"kind": "yardstick", "dataset": "a", "teacher": "T", "seconds": 120, "image_auroc": 0.9,
     "pixel_auroc": None, "aupro": None},
    {"kind": "efficientad", "dataset": "a", "teacher": "T", "seconds": 60, "image_auroc": 0.8,
     "pixel_auroc": None, "aupro": None, "schedule": "instant", "normalization": "quantiles"},
    {"kind": "efficientad", "dataset": "a", "teacher": "T", "seconds": 60, "image_auroc": 0.1,
     "pixel_auroc": None, "aupro": None, "schedule": "instant", "normalization": "gaussian"},
    {"kind": "efficientad", "dataset": "a", "teacher": "T", "seconds": 60, "image_auroc": 0.3,
     "pixel_auroc": None, "aupro": None, "schedule": "instant", "normalization": "quantiles",
     "score": 10},
    {"kind": "efficientad", "dataset": "a", "teacher": "other", "seconds": 60, "image_auroc": 0.2,
     "pixel_auroc": None, "aupro": None, "schedule": "instant", "normalization": "quantiles"},
    {"kind": "yardstick", "dataset": "b", "teacher": "T", "seconds": 120, "image_auroc": 1.0,
     "pixel_auroc": 0.5, "aupro": 0.25},
    {"kind": "efficientad", "dataset": "b", "teacher": "T", "seconds": 90, "image_auroc": 0.7,
     "pixel_auroc": 0.6, "aupro": 0.5, "schedule": "instant", "normalization": "quantiles"},
    *(
        {"kind": "efficientad", "dataset": "b", "teacher": "T", "seconds": 600, "image_auroc": v,
         "pixel_auroc": 0.75, "aupro": 0.5, "schedule": "short", "normalization": "quantiles"}
        for v in (0.95, 0.9, 0.99)
    ),
]  # fmt: skip


def test_the_table_by_hand():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in accuracy.accuracy_table(ROWS, "T").splitlines()[2:]
    ]
    assert lines == [
        ["a, nearest neighbour", "0.900", "-", "-", "2.0", "-"],
        ["a, instant", "0.800", "-", "-", "1.0", "1"],
        ["b, nearest neighbour", "1.000", "0.500", "0.250", "2.0", "-"],
        ["b, instant", "0.700", "0.600", "0.500", "1.5", "1"],
        ["b, short", "0.950 (0.900 to 0.990)", "0.750 (0.750 to 0.750)",
         "0.500 (0.500 to 0.500)", "10.0", "3"],
        ["mean of 2 real sets, nearest neighbour", "0.950", "-", "-", "-", "-"],
        ["mean of 2 real sets, instant", "0.750", "-", "-", "-", "-"],
    ]  # fmt: skip


def test_drawn_parts_are_in_the_table_and_not_in_the_means():
    drawn = [{**row, "dataset": "drawn_parts", "image_auroc": 0.5} for row in ROWS[:2]]
    table = accuracy.accuracy_table([*ROWS, *drawn], "T")
    plain = accuracy.accuracy_table(ROWS, "T").splitlines()
    assert "drawn_parts, instant" in table
    assert [line.split("|")[1:3] for line in table.splitlines()[-2:]] == [
        line.split("|")[1:3] for line in plain[-2:]
    ]


def test_a_seed_that_was_run_again_counts_once():
    rows = [{**row, "seed": seed} for seed, row in enumerate(ROWS)]
    again = {**rows[-1], "name": "on another machine", "seconds": 9999}
    assert accuracy.accuracy_table([*rows, again], "T") == accuracy.accuracy_table(ROWS, "T")
    assert accuracy.accuracy_table([*rows, {**again, "seed": 99}], "T") != (
        accuracy.accuracy_table(ROWS, "T")
    )


def test_a_row_of_an_earlier_recipe_has_a_star_and_its_mean_too():
    rows = [{**row, "recipe": "before"} if row["dataset"] == "b" else row for row in ROWS[:7]]
    labels = [
        line.split("|")[1].strip() for line in accuracy.accuracy_table(rows, "T").splitlines()
    ]
    assert labels[2:] == [
        "a, nearest neighbour", "a, instant", "b, nearest neighbour *", "b, instant *",
        "mean of 2 real sets, nearest neighbour *", "mean of 2 real sets, instant *",
    ]  # fmt: skip


def test_the_page_says_what_the_file_does():
    assert accuracy.main(["--check"]) == 0


def test_a_page_that_says_else_is_noticed_and_mended(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for part in (accuracy.PAGE, Path("bench/results/accuracy.json")):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.ROOT / part, tmp_path / part)
    page = tmp_path / accuracy.PAGE
    text = accuracy.BLOCK.sub(
        lambda m: m[0].replace(m["teacher"], "T"), page.read_text(encoding="utf-8")
    )
    page.write_text(text.replace("instant |", "instant! |"), encoding="utf-8")
    (tmp_path / "bench/results/accuracy.json").write_text(json.dumps(ROWS))
    assert accuracy.main(["--check", "--root", str(tmp_path)]) == 1
    assert "the table is not that of accuracy.json" in capsys.readouterr().err
    assert accuracy.main(["--root", str(tmp_path)]) == 0
    assert accuracy.main(["--check", "--root", str(tmp_path)]) == 0
    assert (tmp_path / accuracy.PICTURE).stat().st_size > 1000
    page.write_text("no table")
    with pytest.raises(ValueError, match="has no `<!-- accuracy"):
        accuracy.main(["--check", "--root", str(tmp_path)])
