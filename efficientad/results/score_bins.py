"""Where a histogram of scores begins, ends and has its edges, for the report and the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 48


@dataclass(frozen=True)
class ScoreBins:
    """Counts of scores in bins.

    Attributes:
        edges: (n + 1,), ascending; with a threshold one edge lies on it, so that no bin holds both
            verdicts.
        counts: group -> (n,) counts; groups without a finite score are left out. Scores beyond the
            ends are in the first and last bin.
        beyond: how many lie above the last edge. not_finite: how many are in no bin.
        threshold: None where it is not finite.
    """

    edges: np.ndarray
    counts: dict[str, np.ndarray]
    beyond: int
    not_finite: int
    threshold: float | None

    @property
    def low(self) -> float:
        """The left end."""
        return float(self.edges[0])

    @property
    def high(self) -> float:
        """The right end."""
        return float(self.edges[-1])


def score_bins(groups: Mapping[str, Sequence[float]], threshold: float | None) -> ScoreBins | None:
    """Bins over the scores of all groups and the threshold; None where no score is finite."""
    arrays = {name: np.asarray(scores, np.float64) for name, scores in groups.items()}
    finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    finite = {name: values for name, values in finite.items() if values.size}
    if not finite:
        return None
    if threshold is not None and not math.isfinite(threshold):
        threshold = None
    values = np.concatenate(list(finite.values()))
    low, high = _limits(values, threshold)
    bins = BINS
    if threshold is not None:
        step = (high - low) / BINS
        low = threshold - math.ceil((threshold - low) / step - 1e-9) * step
        high = low + (BINS + 1) * step
        bins += 1
    edges = np.linspace(low, high, bins + 1)
    if threshold is not None:
        edges[np.abs(edges - threshold).argmin()] = threshold
    counts = {}
    for name, mine in finite.items():  # a bin has its right edge: a score at the threshold is below
        places = np.clip(np.searchsorted(edges, mine, side="left") - 1, 0, bins - 1)
        counts[name] = np.bincount(places, minlength=bins)
    total = sum(array.size for array in arrays.values())
    beyond = int((values > high).sum())
    return ScoreBins(edges, counts, beyond, total - values.size, threshold)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between low and high."""
    rough = (high - low) / 5
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _limits(values: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """Ends of the axis: all scores and the threshold; a long upper tail goes into the last bar."""
    low, high = float(values.min()), float(values.max())
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
        reach = threshold + 10 * max(threshold - low, 1e-3 * abs(threshold), 1e-9)
        high = reach if high > 1.5 * reach - 0.5 * threshold else high
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = max(abs(low) * 0.1, 0.1)
        return low - pad, high + pad
    return low - 0.02 * (high - low), high + 0.02 * (high - low)
