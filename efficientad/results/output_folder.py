"""What a run leaves in its output folder."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from efficientad.model.image_score import ScoreRule
from efficientad.results.overlay import overlay_strips
from efficientad.results.prediction import Prediction
from efficientad.results.progress import PROGRESS, Entry, Progress, read_progress, source_stat
from efficientad.results.report import ReportItem, thumbnail, write_report
from efficientad.utils.checks import check_number
from efficientad.utils.files import plain_text, replace_file, write_text

COLUMNS = ("path", "score", "is_anomalous", "defect", "label")
TABLES = ("scores.csv", "scores.json", "report.html", PROGRESS)
_PICTURES = (".png", ".tiff")


def write_tiff(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a float32 map (H, W) as the MVTec evaluation scripts read it; whole or not at all."""
    import tifffile

    values = np.asarray(anomaly_map, dtype=np.float32)
    replace_file(path, lambda temporary: tifffile.imwrite(temporary, values))


def write_picture(path: Path, picture: Any) -> None:
    """Write a Pillow image as PNG; whole or not at all."""
    replace_file(path, lambda temporary: picture.save(temporary, format="PNG"))


def overlay_picture(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    region: Tensor | None = None,
) -> Any:
    """`overlay` as a Pillow image, without a second copy of a large picture."""
    from PIL import Image

    picture = Image.new("RGB", (image.shape[1], image.shape[0]))
    for rows, part in overlay_strips(image, anomaly_map, threshold, region=region):
        picture.paste(Image.fromarray(part), (0, rows.start))
    return picture


def output_names(paths: Sequence[Path]) -> list[Path]:
    """A relative name without suffix for every input, unique, keeping the folders below their root.

    Otherwise as `unique_names`.
    """
    resolved = [Path(os.path.abspath(p)) for p in paths]
    if not resolved:
        return []
    root = Path(os.path.commonpath([str(p.parent) for p in resolved]))
    return unique_names([p.relative_to(root) for p in resolved])


def unique_names(names: Sequence[Path]) -> list[Path]:
    """The names without suffix, each of them once, as text that can be written anywhere.

    Names that differ in nothing but the suffix keep it ("a.png" and "a.jpg"); one that occurs twice
    gets a number.
    """
    names = [Path(plain_text(name)) for name in names]
    stems: dict[Path, set[Path]] = {}
    for name in names:
        stems.setdefault(name.with_suffix(""), set()).add(name)
    out, used = [], set()
    for name in names:
        plain = name.with_suffix("")
        wanted = candidate = plain if len(stems[plain]) == 1 else name
        number = 2
        while candidate in used:
            candidate = wanted.with_name(f"{wanted.name}_{number}")
            number += 1
        used.add(candidate)
        out.append(candidate)
    return out


def earlier_files(root: Path) -> list[Path]:
    """Overlays and maps of an earlier run into `root` that are still there.

    By its scores.json, and by the progress of one that was killed before it wrote that.
    """
    names = [Path(name) for name in read_progress(root).files]
    try:
        document = json.loads((root / "scores.json").read_text(encoding="utf-8"))
        names += [Path(name) for name in document["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    ours = [
        name
        for name in dict.fromkeys(names)
        if name.parts[:1] in (("overlays",), ("maps",))
        and ".." not in name.parts
        and name.suffix in _PICTURES
    ]
    return [root / name for name in ours if os.path.isfile(root / name)]


@dataclass
class ResultFolder:
    """Writes what a run shows: overlays, maps, `scores.csv`, `scores.json` and `report.html`.

    Overlays and maps that an earlier run wrote into the same folder are removed first, those that
    its `scores.json` or its progress lists and no other file.

    Args:
        root: the output folder; it is made if need be.
        threshold: of the detector, for the overlays' scale; None if it has none.
        overlays, maps: folders below root's "overlays" and "maps" for the pictures and the .tiff
            maps; None leaves them out.
        min_area: smaller regions of a map, in pixels of the image, are not listed.
        score: how a map became its image's score (`model.image_score`), for JSON; None: unknown.
        settings: what the scores depend on, for JSON; with it the progress is written, too.
        kept: images of an earlier run that hold, see `still_valid`; their pictures stay.

    Raises:
        ValueError: root is a file, overlays or maps hold pictures that no earlier run listed, or
            min_area is negative.
    """

    root: Path
    threshold: float | None
    overlays: Path | None = None
    maps: Path | None = None
    min_area: float = 0
    score: ScoreRule | None = None
    settings: Mapping[str, Any] | None = None
    kept: Sequence[Entry] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: list[ReportItem] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_number("min_area", self.min_area, 0)
        self.root = Path(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"out is {str(self.root)!r}, which is a file; it must be a folder")
        self._remove_earlier()
        self.root.mkdir(parents=True, exist_ok=True)
        for entry in self.kept:
            self.rows.append(entry.row)
            self.items.append(entry.item)
            self.files += entry.files
        self._progress = None
        if self.settings is not None:
            self._progress = Progress(self.root, self.settings, self.kept)

    def _remove_earlier(self) -> None:
        listed = earlier_files(self.root)
        for folder in (self.overlays, self.maps):
            inside = () if folder is None else folder.rglob("*")
            pictures = {p for p in inside if p.suffix.lower() in _PICTURES and p.name[0] != "."}
            others = pictures - set(listed)
            if others:
                raise ValueError(
                    f"{folder} holds {len(others)} pictures that {self.root / 'scores.json'} does "
                    f"not list ({min(others).name}); move them, or name another output folder"
                )
        kept = {self.root / name for entry in self.kept for name in entry.files}
        for path in listed:
            if path in kept:
                continue
            path.unlink()
            for parent in path.parents:
                if parent == self.root or any(parent.iterdir()):
                    break
                parent.rmdir()
        for name in TABLES if listed else ():
            if name != PROGRESS or self.settings is None:  # otherwise it is replaced, never absent
                (self.root / name).unlink(missing_ok=True)

    def add(
        self,
        prediction: Prediction,
        source: Any,
        name: Path,
        *,
        image: np.ndarray,
        label: int | None = None,
        defect: str | None = None,
    ) -> None:
        """Write one image's pictures, named `name` without suffix, and remember its row.

        image: uint8 (H, W, 3), for the pictures. Where they cannot be written the image is among
        `failed`, and its score is kept. ImageError: of a `TiffParts` that cannot be read any more.
        """
        written: list[str] = []
        failed = len(self.failed)
        try:
            for path in self._begin(name):
                if path.suffix == ".tiff":
                    write_tiff(path, prediction.anomaly_map)
                else:
                    drawn = prediction.anomaly_map, self.threshold, prediction.region
                    write_picture(path, overlay_picture(image, *drawn))
                written.append(path.relative_to(self.root).as_posix())
        except OSError as error:
            self.fail(source, f"scored, but not written: {error.strerror or error}")
        self.files += written
        regions = None
        if prediction.threshold is not None:
            regions = prediction.regions(min_area=self.min_area)
        row = {
            "path": plain_text(source),
            "score": prediction.score,
            "map_mean": prediction.map_mean(),
            "is_anomalous": prediction.is_anomalous,
            "defect": defect,
            "label": label,
            "regions": None if regions is None else [r.to_dict() for r in regions],
        }
        shown, heat = thumbnail(
            image, prediction.anomaly_map, self.threshold, region=prediction.region
        )
        self.rows.append(row)
        item = ReportItem(
            name=str(name),
            score=prediction.score,
            is_anomalous=prediction.is_anomalous,
            label=label,
            defect=defect,
            image=shown,
            heat=heat,
            regions=regions,
        )
        self.items.append(item)
        if self._progress is not None and len(self.failed) == failed:
            self._progress.add(Entry(str(name), row, item, written, source_stat(source)))

    def _begin(self, name: Path) -> list[Path]:
        """The pictures of an image, which are about to be written."""
        folders = ((self.maps, ".tiff"), (self.overlays, ".png"))
        paths = [f / name.with_name(name.name + end) for f, end in folders if f is not None]
        if self._progress is not None:
            self._progress.begin([path.relative_to(self.root).as_posix() for path in paths])
        return paths

    def fail(self, source: Any, reason: str) -> None:
        """Remember an input that gave no result, or not all of it."""
        self.failed.append((plain_text(source), plain_text(reason)))

    def close(
        self, title: str, *, metrics: dict[str, Any] | None = None, notes: Sequence[str] = ()
    ) -> Path:
        """Write the tables and the report; returns the report's path. notes: sentences."""
        if self._progress is not None:
            self._progress.close()
        facts: dict[str, Any] = {
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "notes": [plain_text(note) for note in notes],
            "files": self.files,
        }
        if metrics is not None:
            facts["metrics"] = {plain_text(k): _json(v) for k, v in metrics.items()}
        write_tables(
            self.root, self.rows, self.threshold, self.score, facts, more=("map_mean", "regions")
        )
        report = self.root / "report.html"
        write_report(
            report,
            title=title,
            items=self.items,
            threshold=self.threshold,
            metrics=metrics,
            failed=self.failed,
            notes=notes,
        )
        return report


def write_tables(
    root: Path,
    rows: Sequence[dict[str, Any]],
    threshold: float | None,
    score: ScoreRule | None,
    facts: Mapping[str, Any],
    *,
    more: Sequence[str] = (),
) -> None:
    """Write `scores.csv` and `scores.json`, each whole or not at all.

    rows: with `COLUMNS`, whose last two are left out where no image has a label. facts: of the
    JSON document. more: columns that are in it alone.
    """
    labelled = any(row["label"] is not None for row in rows)
    columns = COLUMNS if labelled else COLUMNS[:3]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(root / "scores.csv", table.getvalue())
    document = {
        "threshold": _json(threshold),
        "score_rule": score,
        "images": [{k: _json(row[k]) for k in (*columns, *more)} for row in rows],
        **facts,
    }
    write_text(root / "scores.json", json.dumps(document, indent=1, allow_nan=False))


def _json(value: Any) -> Any:
    """NaN and infinity have no place in JSON; they are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
