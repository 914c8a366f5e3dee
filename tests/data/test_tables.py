"""Tables as spreadsheets and Windows write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientad.data.layouts import open_dataset
from efficientad.data.tables import listed_file, read_table

ROWS = [
    ("object", "split", "label", "image", "mask"),
    ("Dübel", "train", "normal", "Dübel/Bilder/gut 1.png", ""),
    ("Dübel", "train", "normal", "Dübel/Bilder/gut 2.png", ""),
    ("Dübel", "test", "anomaly", "Dübel/Bilder/kaputt.png", "Dübel/Masken/kaputt.png"),
]


def text(delimiter: str = ",", end: str = "\n", quote: str = "", rows=None) -> str:
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in rows or ROWS]
    return end.join(lines) + end


BACKSLASHES = [tuple(cell.replace("/", "\\") for cell in row) for row in ROWS]
HEADINGS = [(" Image ", "MASK", "Split", "note", "Object", "Label")] + [
    (row[3], row[4], row[1].upper(), "x; y", row[0], row[2].title()) for row in ROWS[1:]
]
TABLES = {
    "plain": text().encode(),
    "no line end at the end": text().rstrip("\n").encode(),
    "byte order mark": text().encode("utf-8-sig"),
    "semicolons, Windows": text(";", "\r\n").encode("cp1252"),
    "semicolons, byte order mark": text(";", "\r\n").encode("utf-8-sig"),
    "tabs, UTF-16": text("\t", "\r\n").encode("utf-16"),
    "tabs, UTF-16, big endian": b"\xfe\xff" + text("\t").encode("utf-16-be"),
    "old Macintosh": text(end="\r").encode(),
    "quoted": text(quote='"').encode(),
    "quoted, spaces": text(", ", quote='"').encode(),
    "whole lines quoted": "".join(f'"{line}"\r\n' for line in text().splitlines()).encode(),
    "backslashes": text(";", "\r\n", rows=BACKSLASHES).encode("cp1252"),
    "blank lines and empty cells": (
        "\n" + text(";").replace("\n", ";;\n\n") + ";;;;;;\n" + "  \n"
    ).encode(),
    "other order and case": text("|", rows=HEADINGS).encode(),
    "sep=": ("sep=;\r\n" + text(";", "\r\n")).encode("cp1252"),
}


def data_set(root: Path, table: bytes) -> Path:
    for row in ROWS[1:]:
        for name in filter(None, row[3:]):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_bytes(table)
    return root


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_names_the_same_files(tmp_path: Path, kind: str) -> None:
    root = data_set(tmp_path / "visa", TABLES[kind])
    data = open_dataset(root)
    assert data.name == "Dübel"
    assert [s.path for s in (*data.train, *data.validation)] == [
        root / ROWS[1][3],
        root / ROWS[2][3],
    ]
    (bad,) = data.test
    assert (bad.path, bad.masks) == (root / ROWS[3][3], (root / ROWS[3][4],))
    assert bad.label == 1
    assert data.notes == ()


def test_what_is_no_such_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    for content in (b"", b"object,split\na,b\n", b"object,image\n", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"split\.csv (lacks|is not a table)"):
            read_table(path, ("object", "image"))
    path.write_bytes(b"object;image\na;1\nb\n")
    with pytest.raises(ValueError, match=r"split\.csv, line 3: 1 cells"):
        read_table(path, ("object", "image"))


def test_rows_that_belong_nowhere_are_counted(tmp_path: Path) -> None:
    extra = "Dübel,holdout,normal,Dübel/Bilder/gut 1.png,\n" * 2
    root = data_set(tmp_path / "visa", text().encode() + extra.encode())
    (note,) = open_dataset(root, category="DÜBEL").notes
    assert note.startswith("2 rows of 1cls.csv with the split 'holdout' were left out")


def test_files_are_found_in_another_case(tmp_path: Path) -> None:
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data/A.JPG").touch()
    (tmp_path / "Data/b.png").touch()
    (tmp_path / "Data/B.png").touch()
    assert listed_file(tmp_path, r".\data\a.jpg") == tmp_path / "Data/A.JPG"
    assert listed_file(tmp_path, "Data/b.png") == tmp_path / "Data/b.png"
    assert listed_file(tmp_path, "Data/B.PNG") == tmp_path / "Data/B.PNG"  # either could be meant
    assert listed_file(tmp_path, r"data\c.png") == tmp_path / "data/c.png"
    assert listed_file(tmp_path, "/elsewhere/a.png") == Path("/elsewhere/a.png")
    for name in ("x" * 5000, "Data/" + "x" * 300 + "/a.png", "a\0.png"):  # no system has such
        assert listed_file(tmp_path, name) == tmp_path / name
