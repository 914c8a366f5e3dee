"""Exact quantiles of streams of float32 values in bounded memory.

`torch.quantile` refuses more than 2**24 values and sorts a copy of them; a random subset (what
others take instead) changes the calibration from run to run. Here the order statistics are found by
radix selection in two passes, each with histograms of 2**16 counts, whatever the number of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

SIGN = np.uint32(0x80000000)
HALF = 16  # bits decided per pass


def float_keys(values: np.ndarray) -> np.ndarray:
    """uint32 keys that sort as the float32 values do; -0.0 and 0.0 get the same key.

    `values` is float32 or float16 of any shape, the keys have its shape. Any other dtype and NaN
    are refused with a ValueError: rounding float64 to float32 unasked could move a value.
    """
    values = np.asarray(values)
    if values.dtype not in (np.float32, np.float16):
        raise ValueError(f"values must be float32 or float16, got {values.dtype}")
    values = values.astype(np.float32, copy=True)  # a copy: the keys are computed in place
    values += np.float32(0)  # -0.0 becomes 0.0
    if np.isnan(values).any():
        raise ValueError("values must not contain NaN")
    bits = values.view(np.uint32)
    bits ^= (values.view(np.int32) >> 31).view(np.uint32) | SIGN
    return bits


def key_values(keys: np.ndarray) -> np.ndarray:
    """The float32 values of keys made by `float_keys`."""
    keys = np.asarray(keys, dtype=np.uint32)
    return (keys ^ np.where(keys & SIGN, SIGN, np.uint32(0xFFFFFFFF))).view(np.float32)


class ExactQuantiles:
    """Quantiles of values that are shown twice, in any order and in chunks of any size.

    Show every value with `first`, then every value again with `second`, then read `result()`.
    Several streams that come from one expensive source can be driven side by side.

    levels: quantile levels in 0..1. Memory: at most 1 + 2 len(levels) histograms of 2**16 counts.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = [float(level) for level in levels]
        for level in self.levels:
            if not 0 <= level <= 1:
                raise ValueError(f"levels must lie in 0..1, got {level}")
        self.count = 0
        self._high = np.zeros(1 << HALF, dtype=np.int64)
        self._low: dict[int, np.ndarray] | None = None

    def first(self, values: np.ndarray) -> None:
        """Count a chunk in the first pass: float32 or float16, any shape. ValueError for NaN."""
        if self._low is not None:
            raise ValueError("first() was called after second(): the passes must not overlap")
        keys = float_keys(values).ravel()
        self._high += np.bincount(keys >> HALF, minlength=1 << HALF)
        self.count += keys.size

    def second(self, values: np.ndarray) -> None:
        """Count the same values again in the second pass, in any order and any chunks."""
        if self._low is None:
            buckets = {
                self._bucket(rank)[0] for level in self.levels for rank in self._ranks(level)
            }
            self._low = {bucket: np.zeros(1 << HALF, dtype=np.int64) for bucket in sorted(buckets)}
        keys = float_keys(values).ravel()
        high = (keys >> HALF).astype(np.uint16)
        for bucket, counts in self._low.items():
            chosen = keys[high == bucket] & np.uint32(0xFFFF)
            counts += np.bincount(chosen, minlength=1 << HALF)

    def result(self) -> list[float]:
        """One value per level, linearly interpolated as `numpy.quantile` does in float64.

        ValueError when there was no value, or when the second pass saw other values than the first.
        """
        if self._low is None or any(
            counts.sum() != self._high[bucket] for bucket, counts in self._low.items()
        ):
            self._check_not_empty()
            raise ValueError("the second pass did not see the values of the first pass again")
        return [self._quantile(level) for level in self.levels]

    def _check_not_empty(self) -> None:
        if self.count == 0:
            raise ValueError("quantiles need at least one value, got none")

    def _ranks(self, level: float) -> tuple[int, int]:
        self._check_not_empty()
        below = min(math.floor(level * (self.count - 1)), self.count - 1)
        return below, min(below + 1, self.count - 1)

    def _bucket(self, rank: int) -> tuple[int, int]:
        """The bucket of high bits that holds a rank, and the rank inside that bucket."""
        ends = np.cumsum(self._high)
        bucket = int(np.searchsorted(ends, rank, side="right"))
        return bucket, rank - int(ends[bucket] - self._high[bucket])

    def _order_statistic(self, rank: int) -> float:
        assert self._low is not None
        bucket, inside = self._bucket(rank)
        low = int(np.searchsorted(np.cumsum(self._low[bucket]), inside, side="right"))
        return float(key_values(np.array([bucket << HALF | low], dtype=np.uint32))[0])

    def _quantile(self, level: float) -> float:
        below, above = self._ranks(level)
        a, b = self._order_statistic(below), self._order_statistic(above)
        weight = level * (self.count - 1) - below
        if a == b or weight == 0:  # also keeps infinities out of the subtraction
            return a
        return a + (b - a) * weight if weight < 0.5 else b - (b - a) * (1 - weight)


def streaming_quantiles(
    chunks: Callable[[], Iterable[np.ndarray]], levels: Sequence[float]
) -> list[float]:
    """Quantiles of all values of a stream that can be produced twice, in bounded memory.

    chunks: called twice; each call gives the same values as float32 or float16 arrays of any shape,
    in any order. levels: quantile levels in 0..1. Returns one float per level, equal to
    `numpy.quantile(all_values.astype(float64), level)`. Deterministic, independent of the order,
    and without a limit on the number of values. ValueError for NaN, for no values, and for a second
    call that gives other values.
    """
    quantiles = ExactQuantiles(levels)
    for chunk in chunks():
        quantiles.first(chunk)
    for chunk in chunks():
        quantiles.second(chunk)
    return quantiles.result()
