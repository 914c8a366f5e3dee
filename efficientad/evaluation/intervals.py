"""How far a figure of so few test images can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_AT_ONCE = 1 << 22  # counts of one block of resamples


def au_roc_interval(
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Bootstrap interval of the image AU-ROC; None unless there are images of both kinds.

    Normal and anomalous images are drawn anew with replacement, each kind as many as there are,
    `resamples` times; the interval holds the middle `level` of the areas (Efron's percentiles). It
    says what another draw of test images of this kind may give, and nothing of another training.
    Where the kinds are apart it is (1, 1), although the next image may lie between them.

    labels: (N,) 0 for normal, 1 for anomalous. scores: (N,), higher is more anomalous, not NaN.
    """
    truth = np.asarray(labels).astype(bool)
    values, places = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    kinds = [np.bincount(places[truth == kind], minlength=len(values)) for kind in (False, True)]
    if not all(kind.any() for kind in kinds):
        return None
    rng = np.random.default_rng(seed)
    areas = []
    block = max(1, _AT_ONCE // len(values))
    for first in range(0, resamples, block):
        count = min(block, resamples - first)
        normal, anomalous = (
            rng.multinomial(kind.sum(), kind / kind.sum(), size=count) / kind.sum()
            for kind in kinds
        )
        below = np.cumsum(normal, axis=1) - 0.5 * normal
        areas.append((below * anomalous).sum(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(areas), (tail, 1 - tail))
    return float(low), float(high)
