"""Tables of files as people and spreadsheets write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from os.path import exists, isfile  # False for names that no system can have
from pathlib import Path

from efficientad.utils.folders import visible

_DELIMITERS = ",;\t|"


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a text table that has (at least) these columns: column -> cell, stripped.

    UTF-8 with or without a byte order mark, UTF-16 with one, or Windows-1252; any line ends;
    commas, semicolons, tabs or bars between cells; quotes around cells, or around whole lines as a
    spreadsheet leaves them that expected another separator; headings in any case; blank lines.

    Raises:
        ValueError: no such columns, no row, or a row with fewer cells than the columns need.
        FileNotFoundError: no file.
    """
    wanted = list(columns)
    text = _text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    if text[:4].lower() == "sep=":  # a spreadsheet's own first line
        text = text.partition("\n")[2]
    try:
        lines = _lines(text, wanted)
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error}") from error
    if lines is None or len(lines) < 2:
        raise ValueError(f"{path} lacks rows or one of the columns {','.join(wanted)}")
    (_, first), *rest = lines
    places = {name: _plain(first).index(name) for name in wanted}
    rows = []
    for number, cells in rest:
        if len(cells) <= max(places.values()):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells, fewer than its columns")
        rows.append({name: cells[place].strip() for name, place in places.items()})
    return rows


def _text(data: bytes) -> str:
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _lines(text: str, wanted: list[str]) -> list[tuple[int, list[str]]] | None:
    """(line number, cells) of the lines that are not blank, headings first; None: no such table."""
    plain = _parsed(text, ",")
    quoted_whole = "\n".join(cells[0] if cells else "" for _, cells in plain)
    for source in (text, quoted_whole):
        for delimiter in _DELIMITERS:
            lines = [(n, cells) for n, cells in _parsed(source, delimiter) if any(cells)]
            if lines and set(wanted) <= set(_plain(lines[0][1])):
                return lines
    return None


def _parsed(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    return [(reader.line_num, cells) for cells in reader]


def _plain(headings: list[str]) -> list[str]:
    return [heading.strip().casefold() for heading in headings]


def listed_file(root: Path, name: str) -> Path:
    """The file that a table names, relative to root: also with "\\" and in another case.

    Where there is none it is the path as it was written, with "/".
    """
    plain = root / name
    if isfile(plain) or not name:
        return plain
    plain = root / name.replace("\\", "/")
    if isfile(plain) or not plain.is_relative_to(root):
        return plain
    found = root
    for part in plain.relative_to(root).parts:
        if not exists(found / part):
            alike = [p for p in visible(found) if p.name.casefold() == part.casefold()]
            if len(alike) != 1:
                return plain
            part = alike[0].name
        found = found / part
    return found
