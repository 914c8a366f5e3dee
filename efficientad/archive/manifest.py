"""The manifest: which pictures an archive holds, checked before any work begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from pyarrow import parquet as pq

PLACES = ("path", "url")  # names that the column of pictures may have
_NAMED = 3  # examples in a message


class ManifestError(ValueError):
    """A manifest that cannot be worked through."""


@dataclass(frozen=True)
class Manifest:
    """The pictures of an archive.

    Attributes:
        table: columns id (int64, unique), path (text) and, if there is one, label.
        root: the folder or URL that relative paths are below: the manifest's own.
        numbered: whether the ids are the rows' numbers, since the manifest names none.
    """

    table: pa.Table
    root: str
    numbered: bool

    @property
    def ids(self) -> np.ndarray:
        """int64, in the order of the rows."""
        return self.table["id"].to_numpy()


def read_manifest(source: str | os.PathLike) -> Manifest:
    """The pictures that a manifest names.

    Args:
        source: a Parquet file, a folder of them (read in the order of their names), or a CSV file
            whose name ends in .csv; a path or a URL of fsspec. It has a column `path`, or `url`, of
            text. It may have `id`, of integers, each of them once: without it a picture's id is the
            number of its row, from 0. It may have `label`, of text, numbers or booleans, which is
            handed on.

    Raises:
        ManifestError: no Parquet or CSV, no such column or one of another type, no row, a path that
            is null or empty, an id that is null or occurs twice.
        FileNotFoundError: nothing is there.
    """
    source = os.fspath(source)
    filesystem, place = _place(source)
    if not filesystem.exists(place):
        raise FileNotFoundError(f"no such manifest: {source}")
    folder = filesystem.isdir(place)
    files = _parquet_files(filesystem, place, source) if folder else [place]
    tables = [_read(filesystem, file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.column_names != tables[0].column_names:
            raise ManifestError(
                f"manifest {file} has the columns {_words(table.column_names)} and {files[0]} "
                f"{_words(tables[0].column_names)}; all files of a manifest must have the same"
            )
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ManifestError(f"the files of manifest {source} do not agree: {error}") from error
    root = place if folder else filesystem._parent(place)
    root = root if "://" not in source else filesystem.unstrip_protocol(root)
    return _checked(table, root, source)


def resolved(path: str, root: str) -> str:
    """Where a picture is: a URL or an absolute path stays, any other is below the root."""
    if "://" in path or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}" if "://" in root else os.path.join(root, path)


def _place(source: str) -> tuple[Any, str]:
    """fsspec's file system and the path on it."""
    import fsspec

    if "://" not in source:
        return fsspec.filesystem("file"), os.path.abspath(source)
    try:
        return fsspec.core.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise ManifestError(f"manifest {source} cannot be reached: {error}") from error


def _parquet_files(filesystem: Any, place: str, source: str) -> list[str]:
    found = [
        file
        for file in sorted(filesystem.find(place))
        if file.endswith(".parquet") and not file.rpartition("/")[2].startswith((".", "_"))
    ]
    if not found:
        raise ManifestError(f"manifest {source} is a folder without a .parquet file")
    return found


def _read(filesystem: Any, file: str) -> pa.Table:
    """The columns of one file that matter, by their names and types."""
    try:
        with filesystem.open(file, "rb") as stream:
            if file.lower().endswith(".csv"):
                text = dict.fromkeys(PLACES, pa.string())
                table = csv.read_csv(stream, convert_options=csv.ConvertOptions(column_types=text))
                table = table.select(_wanted(table.column_names, file))
            else:
                handle = pq.ParquetFile(stream)
                table = handle.read(_wanted(handle.schema_arrow.names, file))
    except (pa.ArrowException, UnicodeError) as error:
        raise ManifestError(
            f"manifest {file} cannot be read: {error}; it must be Parquet, or CSV with a name that "
            "ends in .csv"
        ) from error
    columns = {}
    for name in table.column_names:
        kind = pa.int64() if name == "id" else pa.string()
        if name == "label":
            kind = _label_type(table["label"].type)
        columns["path" if name in PLACES else name] = _cast(table[name], kind, name, file)
    return pa.table(columns)


def _wanted(names: list[str], file: str) -> list[str]:
    """The columns to read: id, path or url, label. ManifestError where they are otherwise."""
    has = None
    if len(set(PLACES) & set(names)) == 2:
        has = "both path and url"
    elif not set(PLACES) & set(names):
        has = f"the columns {_words(names)}"
    if has is not None:
        raise ManifestError(f"manifest {file} has {has}; it must have one column path, or url")
    wanted = [name for name in ("id", *PLACES, "label") if name in names]
    for name in wanted:
        if names.count(name) > 1:
            raise ManifestError(f"manifest {file} has {names.count(name)} columns {name}")
    return wanted


def _label_type(kind: pa.DataType) -> pa.DataType:
    kind = _value_type(kind)
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return kind if numbers else pa.string()


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _cast(column: pa.ChunkedArray, wanted: pa.DataType, name: str, file: str) -> pa.ChunkedArray:
    kind = _value_type(column.type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    fits = text if pa.types.is_string(wanted) else pa.types.is_integer(kind) or kind == wanted
    try:
        if fits:
            return column.cast(wanted)
        problem = f"is {column.type}"
    except pa.ArrowInvalid as error:
        problem = f"is {column.type} ({error})"
    rule = {"id": "integers (int64), each of them once", "label": "text, numbers or booleans"}
    raise ManifestError(
        f"column {name} of manifest {file} {problem}; it must be {rule.get(name, 'text')}"
    )


def _checked(table: pa.Table, root: str, source: str) -> Manifest:
    if not len(table):
        raise ManifestError(f"manifest {source} has no row")
    path = table["path"]
    missing = pc.fill_null(pc.equal(path, ""), True)
    _refuse(missing.to_numpy(), "path", "null or empty", source)
    numbered = "id" not in table.column_names
    if numbered:
        table = table.add_column(0, "id", pa.array(np.arange(len(table), dtype=np.int64)))
    _refuse(pc.is_null(table["id"]).to_numpy(), "id", "null", source)
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(again):
        named = [
            f"{ids[order[i]]} (rows {order[i]} and {order[i + 1]})" for i in again[:_NAMED].tolist()
        ]
        raise ManifestError(
            f"column id of manifest {source} has {len(again)} values that occurred before: "
            f"{_words(named, len(again))}; each id must occur once"
        )
    return Manifest(table.combine_chunks(), root, numbered)


def _refuse(wrong: np.ndarray, name: str, problem: str, source: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        named = _words([str(row) for row in rows[:_NAMED].tolist()], len(rows))
        raise ManifestError(
            f"column {name} of manifest {source} is {problem} in {len(rows)} rows ({named}, from "
            f"0); it must be set in every row"
        )


def _words(names: list[str], count: int = 0) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more
