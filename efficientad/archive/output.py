"""The output folder: whose it is, which rows are in it, and that each is there once.

`rows/*.parquet` is the result. A file without its end, which Parquet has its table of contents in,
is one that was being written when its writer was killed, and is removed. What the other files hold
is what is done: Ray's checkpoint is written anew from it at every start.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from efficientad.archive.manifest import Manifest
from efficientad.results.progress import different
from efficientad.utils.files import replace_file, write_text

FORMAT = "efficientad-archive-1"
NAME = "archive.json"
_KEPT = pa.schema(
    [
        ("id", pa.int64()),
        ("path", pa.string()),
        ("is_anomalous", pa.bool_()),
        ("failed", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Places:
    """Where things are below an output folder."""

    root: Path

    @property
    def rows(self) -> Path:
        return self.root / "rows"

    @property
    def manifest(self) -> Path:
        """The manifest as it was checked, which the workers read."""
        return self.root / "manifest.parquet"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"


@contextmanager
def opened(out: Path, settings: Mapping[str, Any]) -> Iterator[Places]:
    """An output folder, for one run at a time; what it needs is made.

    settings: what its rows depend on; those that are there must be of the same.

    Raises:
        ValueError: a file, a folder with other things in it, one of another run's settings, or one
            in which a run is at work.
    """
    import fcntl

    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is a file; it must be a folder")
    earlier = _earlier(out)
    if earlier is None and out.exists() and any(out.iterdir()):
        raise ValueError(
            f"out is {str(out)!r}, which has files in it and no {NAME}; name a new folder, or that "
            "of an archive to go on with"
        )
    if earlier is not None and earlier != dict(settings) and row_files(Places(out)):
        raise ValueError(
            f"the rows in {out} are of other settings: {', '.join(different(earlier, settings))}; "
            "name another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)  # the folder itself; a killed process holds it no longer
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {out}; wait until it has ended") from None
        places = Places(out.resolve())
        document = {"format": FORMAT, "settings": dict(settings)}
        write_text(out / NAME, json.dumps(document, indent=1) + "\n")
        places.rows.mkdir(exist_ok=True)
        yield places
    finally:
        os.close(lock)


def _earlier(out: Path) -> dict[str, Any] | None:
    """The settings of an earlier run. ValueError for a file that is none of ours."""
    try:
        document = json.loads((out / NAME).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError
        return dict(document["settings"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{out / NAME} is none of this version's; name a new folder") from None


def row_files(places: Places) -> list[Path]:
    """The files of the result, by name."""
    return sorted(places.rows.glob("*.parquet"))


def settle(places: Places, drop_failed: bool = False) -> pa.Table:
    """Leave each row once, and no file that is cut off.

    drop_failed: drop the rows without a verdict, too, so that they are tried again.

    Returns:
        Columns id (sorted), path, is_anomalous and failed of the rows that are there.
    """
    files, tables = [], [_KEPT.empty_table()]
    for file in row_files(places):
        try:
            found = pq.read_table(file, columns=["id", "path", "is_anomalous", "error"])
        except (pa.ArrowInvalid, OSError):
            file.unlink()
            continue
        failed = pc.is_valid(found["error"])
        files.append(file)
        tables.append(found.drop_columns("error").append_column("failed", failed).cast(_KEPT))
    there = pa.concat_tables(tables)
    ids = there["id"].to_numpy()
    keep = np.zeros(len(ids), bool)
    keep[np.unique(ids, return_index=True)[1]] = True  # where each id occurs first
    if drop_failed:
        keep &= ~there["failed"].to_numpy()
    start = 0
    for file, table in zip(files, tables[1:], strict=True):
        part = keep[start : start + len(table)]
        start += len(table)
        if not part.any():
            file.unlink()
        elif not part.all():
            whole = pq.read_table(file).filter(pa.array(part))
            replace_file(file, functools.partial(pq.write_table, whole))
    return there.filter(pa.array(keep)).sort_by("id").combine_chunks()


def check_paths(manifest: Manifest, there: pa.Table, out: Path) -> None:
    """ValueError where an id of the manifest is in the output with another path."""
    ids, order = manifest.ids, np.argsort(manifest.ids)
    at = np.minimum(np.searchsorted(ids[order], there["id"].to_numpy()), len(ids) - 1)
    same_id = ids[order][at] == there["id"].to_numpy()
    paths = manifest.table["path"].take(pa.array(order[at]))
    other = same_id & pc.not_equal(paths, there["path"]).to_numpy()
    wrong = np.flatnonzero(other)
    if len(wrong):
        i = int(wrong[0])
        how = " Ids are row numbers: rows may be added at the end alone." * manifest.numbered
        raise ValueError(
            f"{len(wrong)} ids of the manifest are in {out} with another path, id "
            f"{there['id'][i]} as {there['path'][i]} and not {paths[i]}; name another folder with "
            f"--out.{how}"
        )


def prepare(places: Places, manifest: Manifest, there: pa.Table) -> int:
    """Write the manifest for the workers and the checkpoint of what is done.

    there: what `settle` gave.

    Returns the number of pictures of the manifest that are left.
    """
    replace_file(places.manifest, lambda part: pq.write_table(manifest.table, part))
    shutil.rmtree(places.checkpoint, ignore_errors=True)
    places.checkpoint.mkdir()
    path = places.checkpoint / "settled.parquet"
    replace_file(path, lambda part: pq.write_table(there.select(["id"]), part))
    return len(manifest.table) - int(np.isin(manifest.ids, there["id"].to_numpy()).sum())


@dataclass(frozen=True)
class Summary:
    """What became of a manifest's pictures: pictures = scored + failed + missing.

    Attributes:
        pictures: rows of the manifest. scored: with a verdict. failed: with an error in its place.
        missing: without a row. anomalous: of those scored. before: rows of an earlier run, of those
            scored and failed. others: rows in the output that are not in this manifest.
    """

    pictures: int
    scored: int
    failed: int
    missing: int
    anomalous: int
    before: int
    others: int


def summary(manifest: Manifest, there: pa.Table, left: int) -> Summary:
    """Count. there: what `settle` gave at the end. left: what `prepare` gave at the start."""
    mine = np.isin(there["id"].to_numpy(), manifest.ids)
    failed = there["failed"].to_numpy() & mine
    anomalous = pc.fill_null(there["is_anomalous"], False).to_numpy() & mine
    pictures = len(manifest.table)
    return Summary(
        pictures=pictures,
        scored=int(mine.sum() - failed.sum()),
        failed=int(failed.sum()),
        missing=pictures - int(mine.sum()),
        anomalous=int(anomalous.sum()),
        before=pictures - left,
        others=int((~mine).sum()),
    )
