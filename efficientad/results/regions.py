"""What an anomaly map marks: connected regions above the threshold, as boxes and areas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    min_area: float = 0,
) -> list[AnomalousRegion]:
    """The regions of a map above the threshold, the highest score first (NaN before all).

    Pixels that touch at a corner are one region. NaN lies above every threshold, as in the verdict.

    Args:
        anomaly_map: (h, w) float, of the whole frame, at any size.
        source_size: (height, width) of the frame in pixels.
        threshold: in the map's unit.
        min_area: smaller regions, in pixels of the frame, are left out.

    Raises:
        ValueError: min_area is negative or no number.
    """
    from scipy import ndimage

    check_number("min_area", min_area, 0)
    values = np.asarray(anomaly_map, dtype=np.float32)
    above = ~(values <= threshold)
    if not above.any():
        return []
    labels, _ = ndimage.label(above, structure=np.ones((3, 3)))
    (rows, columns), (height, width) = values.shape, source_size
    regions = []
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        inside = values[place][labels[place] == number]
        area = max(1, round(inside.size * (height * width) / (rows * columns)))
        if area < min_area:
            continue
        y, x = place
        box = (
            x.start * width // columns,
            y.start * height // rows,
            -(-x.stop * width // columns),
            -(-y.stop * height // rows),
        )
        regions.append(AnomalousRegion(box, area, float(inside.max())))
    return sorted(regions, key=lambda r: (-math.inf if math.isnan(r.score) else -r.score, r.box))
