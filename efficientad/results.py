"""Floor 4, imports prediction, overlay and report: what a run leaves in its output folder."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from efficientad.files import replace_file, write_text
from efficientad.overlay import overlay
from efficientad.prediction import Prediction
from efficientad.report import ReportItem, thumbnail, write_report

COLUMNS = ("path", "score", "is_anomalous", "defect", "label")


def write_tiff(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a float32 map (H, W) as the MVTec evaluation scripts read it; whole or not at all."""
    import tifffile

    values = np.asarray(anomaly_map, dtype=np.float32)
    replace_file(path, lambda temporary: tifffile.imwrite(temporary, values))


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a uint8 image (H, W, 3) as PNG; whole or not at all."""
    from PIL import Image

    replace_file(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def output_names(paths: Sequence[Path]) -> list[Path]:
    """A relative name without suffix for every input, unique, keeping the folders below their root.

    Inputs that differ in nothing but the suffix keep it ("a.png" and "a.jpg"); an input named twice
    gets a number.
    """
    resolved = [Path(os.path.abspath(p)) for p in paths]
    if not resolved:
        return []
    root = Path(os.path.commonpath([str(p.parent) for p in resolved]))
    names = [p.relative_to(root) for p in resolved]
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


@dataclass
class ResultFolder:
    """Writes what a run shows: overlays, maps, `scores.csv`, `scores.json` and `report.html`.

    Args:
        root: the output folder; it is made if need be.
        threshold: of the detector, for the overlays' scale; None if it has none.
        overlays, maps: folders for the pictures and the .tiff maps; None leaves them out.
    """

    root: Path
    threshold: float | None
    overlays: Path | None = None
    maps: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: list[ReportItem] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"out is {str(self.root)!r}, which is a file; it must be a folder")
        self.root.mkdir(parents=True, exist_ok=True)

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

        image: uint8 (H, W, 3), for the pictures.
        """
        if self.maps is not None:
            write_tiff(self.maps / name.with_name(f"{name.name}.tiff"), prediction.anomaly_map)
        if self.overlays is not None:
            picture = overlay(image, prediction.anomaly_map, self.threshold)
            write_png(self.overlays / name.with_name(f"{name.name}.png"), picture)
        self.rows.append(
            {
                "path": str(source),
                "score": prediction.score,
                "is_anomalous": prediction.is_anomalous,
                "defect": defect,
                "label": label,
            }
        )
        shown, heat = thumbnail(image, prediction.anomaly_map, self.threshold)
        self.items.append(
            ReportItem(
                name=str(name),
                score=prediction.score,
                is_anomalous=prediction.is_anomalous,
                label=label,
                defect=defect,
                image=shown,
                heat=heat,
            )
        )

    def fail(self, source: Any, reason: str) -> None:
        """Remember an input that gave no result."""
        self.failed.append((str(source), reason))

    def close(
        self, title: str, *, metrics: dict[str, Any] | None = None, notes: Sequence[str] = ()
    ) -> Path:
        """Write the tables and the report; returns the report's path."""
        labelled = any(row["label"] is not None for row in self.rows)
        columns = COLUMNS if labelled else COLUMNS[:3]
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.root / "scores.csv", table.getvalue())
        document = {
            "threshold": self.threshold,
            "images": [{k: _json(row[k]) for k in columns} for row in self.rows],
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
        }
        if metrics is not None:
            document["metrics"] = metrics
        write_text(self.root / "scores.json", json.dumps(document, indent=1))
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


def _json(value: Any) -> Any:
    """NaN and infinity have no place in JSON; they are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
