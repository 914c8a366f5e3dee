"""Histograms over the bits of float32 values.

What pixel metrics count in: bins as fine as the memory allows wherever the values lie, so that a
narrow range of scores beside a few far ones is still resolved to the last bit.
"""

from __future__ import annotations

import numpy as np

from efficientad.utils.quantiles import float_keys, key_values

MAX_BINS = 1 << 21
MIN_BINS = 1 << 18  # with fewer, errors of pixel metrics were seen to pass 1e-4
_PAGE_BITS = 16  # the high half of a key chooses a page, the low half a bin in it
_KEY_HALVES = 1 << _PAGE_BITS


class FloatHistogram:
    """`rows` int64 histograms that share their bins, in bounded memory.

    Pages of bins exist only where there are values. Bins are exact (one per float32) while they fit
    in `max_bins`; when the values take more, all bins are merged in pairs, as often as needed. The
    final resolution depends only on the set of values seen, so the content is the same in every
    order. In the worst case, values spread over all of float32, a bin at the default `max_bins` is
    2**-12 of its value wide. Memory: 8 bytes a bin and row.
    """

    def __init__(self, rows: int, max_bins: int = MAX_BINS) -> None:
        if max_bins < MIN_BINS:
            raise ValueError(f"max_bins must be at least {MIN_BINS}, got {max_bins}")
        self.max_bins = int(max_bins)
        self.dropped_bits = 0  # trailing bits of the float that the bins do not resolve
        self._page_of = np.full(_KEY_HALVES, -1, dtype=np.int32)  # high half of a key -> page
        self._highs: list[int] = []  # page -> high half of its keys
        self._counts = np.zeros((rows, 0, _KEY_HALVES), dtype=np.int64)  # [rows, pages, bins]

    @property
    def counts(self) -> np.ndarray:
        """Counts [rows, places], a view to add to; `places` gives the second index."""
        return self._counts.reshape(len(self._counts), -1)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Second index into `counts` for float32 values of any shape, valid until the next call.

        Makes room for the values. ValueError for NaN and for other dtypes.
        """
        keys = float_keys(values)
        high = keys >> _PAGE_BITS
        self._add_pages(np.flatnonzero(np.bincount(high.ravel(), minlength=_KEY_HALVES)))
        low = (keys & np.uint32(_KEY_HALVES - 1)) >> np.uint32(self.dropped_bits)
        return self._page_of[high] * np.int64(self._counts.shape[2]) + low

    def rank(self, places: np.ndarray) -> np.ndarray:
        """Numbers that sort as the values at these places do."""
        page, low = np.divmod(places, self._counts.shape[2])
        return np.array(self._highs, dtype=np.int64)[page] * self._counts.shape[2] + low

    def merge(self, other: FloatHistogram) -> None:
        """Add the counts of a histogram with as many rows; its max_bins may differ."""
        self._coarsen(other.dropped_bits)
        self._add_pages(np.array(other._highs, dtype=np.intp))
        counts = _halve(other._counts, self.dropped_bits - other.dropped_bits)
        self._counts[:, self._page_of[other._highs]] += counts[:, : len(other._highs)]

    def descending(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts [rows, bins] from high to low values, and the lowest float32 of each bin."""
        order = np.argsort(self._highs).astype(np.intp)
        counts = self._counts[:, order].reshape(len(self._counts), -1)[:, ::-1]
        highs = np.sort(np.array(self._highs, dtype=np.uint32))[:, None]
        low = np.arange(self._counts.shape[2], dtype=np.uint32) << np.uint32(self.dropped_bits)
        values = key_values(highs << np.uint32(_PAGE_BITS) | low).ravel()[::-1]
        used = counts.any(axis=0)
        return counts[:, used], values[used]

    def _add_pages(self, highs: np.ndarray) -> None:
        new = highs[self._page_of[highs] < 0]
        pages = len(self._highs) + new.size
        dropped = self.dropped_bits
        while pages << (_PAGE_BITS - dropped) > self.max_bins:
            dropped += 1
        self._coarsen(dropped)
        bins = self._counts.shape[2]
        if pages > self._counts.shape[1]:
            room = min(max(pages, 2 * self._counts.shape[1]), self.max_bins // bins)
            grown = np.zeros((len(self._counts), room, bins), dtype=np.int64)
            grown[:, : len(self._highs)] = self._counts[:, : len(self._highs)]
            self._counts = grown
        self._page_of[new] = np.arange(len(self._highs), pages)
        self._highs.extend(new.tolist())

    def _coarsen(self, dropped_bits: int) -> None:
        if dropped_bits > self.dropped_bits:
            self._counts = _halve(self._counts, dropped_bits - self.dropped_bits)
            self.dropped_bits = dropped_bits


def _halve(counts: np.ndarray, times: int) -> np.ndarray:
    """Counts [rows, pages, bins] with each 2**times neighbouring bins added up."""
    if times == 0:
        return counts
    return counts.reshape(*counts.shape[:2], counts.shape[2] >> times, 1 << times).sum(axis=3)
