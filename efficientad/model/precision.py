"""Whether a detector's scores in a low precision can stand in for its float32 scores.

Measured at calibration on the good images behind the threshold (`calibration.calibrating`), kept in
the detector's provenance, and asked by whoever computes. A dtype that was not measured, or moves
the scores by more than a small part of what tells them apart, is never chosen unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from efficientad.model.detector import EfficientAD
from efficientad.utils.checks import is_number

# Largest error of a score as part of the scores' spread and of their distance from the threshold.
# With normally distributed scores and a threshold at their 99 % quantile, an error of this size
# moves at most one verdict in 700 good images (computed).
BOUND = 0.05
FEWEST_IMAGES = 5  # below, their spread says nothing


@dataclass(frozen=True)
class Precision:
    """How far scores in other dtypes lie from float32's on the same good images.

    Attributes:
        images: how many were scored.
        spread: the smaller of the standard deviation and the interquartile range of their float32
            scores: one odd image cannot widen it.
        margin: distance of the median score from the threshold; None without a threshold.
        errors: dtype ("bfloat16") -> largest absolute difference of a score from float32's; NaN
            where a score was not finite.
        device: on which the dtypes were tried.
    """

    images: int
    spread: float
    margin: float | None
    errors: Mapping[str, float]
    device: str

    @property
    def resolution(self) -> float:
        """What an error must be far below: spread or margin, the smaller of them."""
        return self.spread if self.margin is None else min(self.spread, self.margin)

    def doubt(self, dtype: torch.dtype) -> str | None:
        """None if scores in `dtype` can stand in for float32's, else why not, as a sentence."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.errors:
            return f"{name} was not tried when the detector was calibrated, on {self.device}"
        if self.images < FEWEST_IMAGES:
            return (
                f"{name} was tried on {self.images} held-out images; fewer than {FEWEST_IMAGES} "
                "show no spread of the scores"
            )
        error = self.errors[name]
        if error <= BOUND * self.resolution:  # false for NaN
            return None
        what = "spread" if self.resolution == self.spread else "distance from the threshold"
        share = f"{100 * error / self.resolution:.3g} %" if self.resolution > 0 else "more than all"
        return (
            f"{name} moves the scores of the {self.images} held-out images by up to {error:.2g}, "
            f"{share} of their {what} {self.resolution:.2g} (bound {100 * BOUND:g} %)"
        )

    def facts(self) -> dict[str, Any]:
        """As JSON values, for the provenance; `stored_precision` reads them. NaN becomes None."""
        errors = {k: v if np.isfinite(v) else None for k, v in self.errors.items()}
        return asdict(self) | {"errors": errors}


def compare(
    expected: Sequence[float],
    found: Mapping[str, Sequence[float]],
    threshold: float | None,
    device: str,
) -> Precision:
    """`Precision` of scores by dtype beside the float32 scores of the same images."""
    exact = np.asarray(expected, np.float64)
    low, middle, high = np.quantile(exact, (0.25, 0.5, 0.75))
    errors = {
        name: float(np.abs(np.asarray(scores, np.float64) - exact).max())
        for name, scores in found.items()
    }
    margin = None if threshold is None else abs(float(threshold - middle))
    return Precision(len(exact), float(min(exact.std(), high - low)), margin, errors, device)


def stored_precision(detector: EfficientAD) -> Precision | None:
    """What the detector's calibration measured; None for older files and where nothing usable is.

    The provenance comes from a file: what does not fit counts as not measured.
    """
    calibration = detector.provenance.get("calibration")
    facts = calibration.get("precision") if isinstance(calibration, dict) else None
    if not isinstance(facts, dict):
        return None
    images, spread, margin = (facts.get(name) for name in ("images", "spread", "margin"))
    errors = facts.get("errors")
    if not (is_number(images) and is_number(spread) and isinstance(errors, dict)):
        return None
    if not (margin is None or is_number(margin)):
        return None
    return Precision(
        int(images),
        float(spread),
        None if margin is None else float(margin),
        {str(k): float(v) if is_number(v) else float("nan") for k, v in errors.items()},
        str(facts.get("device")),
    )


def doubt(detector: EfficientAD, dtype: torch.dtype) -> str | None:
    """None if the detector earned `dtype` at its calibration, else why not, as a sentence."""
    if dtype in (torch.float32, torch.float64):
        return None
    found = stored_precision(detector)
    if found is None:
        name = str(dtype).removeprefix("torch.")
        return f"the error of {name} was not measured when this detector was calibrated"
    return found.doubt(dtype)
