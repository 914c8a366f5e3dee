"""What an anomaly map marks: connected regions above the threshold, as boxes and areas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from efficientad.data.samples import strips
from efficientad.model.region import resized
from efficientad.utils.checks import check_number


@dataclass(frozen=True)
class AnomalousRegion:
    """One connected region of an anomaly map above the threshold.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the original frame; x1 and y1 are behind the last pixel.
        area: in pixels of the original frame, of the region itself, not of its box.
        score: the largest value of the map inside; NaN if one of them is.
    """

    box: tuple[int, int, int, int]
    area: int
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; a NaN score is None."""
        score = self.score if math.isfinite(self.score) else None
        return {"box": list(self.box), "area": self.area, "score": score}


def anomalous_regions(
    anomaly_map: np.ndarray,
    source_size: tuple[int, int],
    threshold: float,
    *,
    region: Tensor | None = None,
    min_area: float = 0,
) -> list[AnomalousRegion]:
    """The regions of a map above the threshold, the highest score first (NaN before all).

    Pixels that touch at a corner are one region. NaN lies above every threshold, as in the verdict.

    Args:
        anomaly_map: (h, w) float, of the whole frame, at any size.
        source_size: (height, width) of the frame in pixels.
        threshold: in the map's unit.
        region: what is inspected, bool of any size; None is everything.
        min_area: smaller regions, in pixels of the frame, are left out.

    Raises:
        ValueError: min_area is negative or no number.
    """
    from scipy import ndimage

    check_number("min_area", min_area, 0)
    values = np.asarray(anomaly_map, dtype=np.float32)
    above = np.less_equal(values, np.float32(threshold))
    np.logical_not(above, out=above)
    if region is not None:
        above &= resized(region, values.shape).numpy()
    if not above.any():
        return []
    labels = _labelled(above)
    places = ndimage.find_objects(labels)
    areas, scores = _areas_and_scores(labels, values, len(places))
    (rows, columns), (height, width) = values.shape, source_size
    regions = []
    for number, place in enumerate(places):
        area = max(1, round(int(areas[number]) * (height * width) / (rows * columns)))
        if area < min_area:
            continue
        y, x = place
        box = (
            x.start * width // columns,
            y.start * height // rows,
            -(-x.stop * width // columns),
            -(-y.stop * height // rows),
        )
        regions.append(AnomalousRegion(box, area, float(scores[number])))
    return sorted(regions, key=lambda r: (-math.inf if math.isnan(r.score) else -r.score, r.box))


def _labelled(above: np.ndarray) -> np.ndarray:
    """Numbers 1, 2, ... of the regions, 0 elsewhere; in 16 bits if they suffice: maps are large."""
    from scipy import ndimage

    corners = np.ones((3, 3))
    try:
        return ndimage.label(above, corners, output=np.uint16)[0]
    except RuntimeError:  # more regions than that
        return ndimage.label(above, corners)[0]


def _areas_and_scores(
    labels: np.ndarray, values: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cells and largest value of each region; a NaN counts as the largest."""
    areas, scores = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)
    for rows in strips(*labels.shape):
        inside = labels[rows] > 0
        numbers = labels[rows][inside].astype(np.intp) - 1
        areas += np.bincount(numbers, minlength=count)
        with np.errstate(invalid="ignore"):  # NaN
            np.maximum.at(scores, numbers, values[rows][inside])
    return areas, scores
