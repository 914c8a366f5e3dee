"""What a run has written so far, line by line, so that another one goes on where it was cut off.

`progress.jsonl` lies beside the tables: the first line holds what the scores depend on, and each
other one an image: its file's size and time, its row of scores.json, its pictures and its part of
the report. Before the pictures are written, a line names them; the image's own follows when they
are whole. What a killed process left unfinished is scored again.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from efficientad.results.regions import AnomalousRegion
from efficientad.results.report import ReportItem
from efficientad.utils.files import plain_text, replace_file

PROGRESS = "progress.jsonl"
FORMAT = "efficientad-progress"
_BEGUN = '{"begun"'


@dataclass
class Entry:
    """One image: its source and name in the output, its row, and what was written for it."""

    name: str
    row: dict[str, Any]
    item: ReportItem
    files: list[str] = field(default_factory=list)
    stat: tuple[int, int] | None = None  # bytes of the source and its time in ns

    def to_line(self) -> str:
        """As a line of the file."""
        pictures = [base64.b64encode(p or b"").decode() for p in (self.item.image, self.item.heat)]
        found = {"name": self.name, "stat": self.stat, "row": self.row, "files": self.files}
        return json.dumps({**found, "pictures": pictures}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Entry:
        """Raises ValueError, KeyError or TypeError for a line that is not whole."""
        found = json.loads(line)
        row = dict(found["row"])
        image, heat = (base64.b64decode(picture, validate=True) for picture in found["pictures"])
        row["map_mean"]  # lines of older versions lack it
        regions = row["regions"]
        if regions is not None:
            regions = [
                AnomalousRegion(
                    (r["box"][0], r["box"][1], r["box"][2], r["box"][3]),
                    r["area"],
                    float("nan") if r["score"] is None else r["score"],
                )
                for r in regions
            ]
        item = ReportItem(
            name=found["name"],
            score=float(row["score"]),
            is_anomalous=row["is_anomalous"],
            label=row["label"],
            defect=row["defect"],
            image=image or None,
            heat=heat or None,
            regions=regions,
        )
        stat = None if found["stat"] is None else (found["stat"][0], found["stat"][1])
        return cls(found["name"], row, item, list(map(str, found["files"])), stat)


def source_stat(path: Any) -> tuple[int, int] | None:
    """(bytes, time of the last change in ns) of a file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, TypeError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


@dataclass
class Earlier:
    """What a progress file says: what its scores depend on (None: nothing readable), the images,
    and every picture below the folder that was written or begun."""

    settings: dict[str, Any] | None = None
    entries: list[Entry] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def read_progress(root: Path) -> Earlier:
    """The progress of a run into `root`; an empty one where there is none, or another file."""
    found = Earlier()
    try:
        lines = (root / PROGRESS).read_text(encoding="utf-8", errors="replace").splitlines()
        head = json.loads(lines[0])
        if head["format"] != FORMAT or not isinstance(head["settings"], dict):
            return found
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return found
    found.settings = head["settings"]
    for line in lines[1:]:
        try:
            if line.startswith(_BEGUN):
                found.files += map(str, json.loads(line)["begun"])
            else:
                found.entries.append(Entry.from_line(line))
                found.files += found.entries[-1].files
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # cut off while it was written
    return found


def still_valid(
    root: Path, entries: Iterable[Entry], sources: Sequence[Path], names: Sequence[Path]
) -> dict[int, Entry]:
    """Index of a source -> its last entry, if it holds: same file, same name, its pictures there.

    names: of the sources in the output, of the run that goes on.
    """
    last = {(entry.row.get("path"), entry.name): entry for entry in entries}
    kept = {}
    for index, (source, name) in enumerate(zip(sources, names, strict=True)):
        entry = last.get((plain_text(source), str(name)))
        if entry is None or entry.stat is None or entry.stat != source_stat(source):
            continue
        if all(os.path.isfile(root / file) for file in entry.files):
            kept[index] = entry
    return kept


class Progress:
    """Writes the file: whole with what is kept, then a line more for each image."""

    def __init__(self, root: Path, settings: Mapping[str, Any], kept: Iterable[Entry]) -> None:
        head = json.dumps({"format": FORMAT, "settings": dict(settings)}) + "\n"
        text = head + "".join(entry.to_line() for entry in kept)
        path = root / PROGRESS
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
        self._file: IO[str] | None = open(path, "a", encoding="utf-8")

    def begin(self, files: Sequence[str]) -> None:
        """Append the pictures that are about to be written, so that a killed run's are known."""
        self._append(json.dumps({"begun": list(files)}) + "\n")

    def add(self, entry: Entry) -> None:
        """Append an image; the system has it when this returns, whatever becomes of the process."""
        self._append(entry.to_line())

    def _append(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """No more images."""
        if self._file is not None:
            self._file.close()
            self._file = None


def different(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two runs' settings differ in, as "threshold 0.5 (now 0.6)"."""
    return [
        plain_text(f"{key} {earlier.get(key)} (now {now.get(key)})")
        for key in {**earlier, **now}
        if earlier.get(key) != now.get(key)
    ]
