"""Floor 4, imports detector and images: scores and anomaly maps of images, through the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from efficientad.detector import EfficientAD
from efficientad.images import ImageError, load_batches

OnError = Callable[[int, Any, ImageError], None]
MAP_SIZES = ("source", "input")


@dataclass(frozen=True)
class Prediction:
    """One image's result.

    Attributes:
        index: its place among the sources.
        score: the image score; NaN if anything in the image's maps is not finite.
        is_anomalous: whether the score exceeds the threshold; a NaN score does (fail safe). None
            without a threshold.
        anomaly_map: (H, W) float32, at the size asked for.
        source_size: (height, width) of the image before resizing.
    """

    index: int
    score: float
    is_anomalous: bool | None
    anomaly_map: np.ndarray
    source_size: tuple[int, int]


class RawMaps(NamedTuple):
    """The distance maps (1, h, w) of one image, and its place and size among the sources."""

    index: int
    source_size: tuple[int, int]
    map_st: Tensor
    map_ae: Tensor


def is_anomalous(score: float, threshold: float | None) -> bool | None:
    """The verdict: not (score <= threshold), so that NaN is anomalous; None without a threshold."""
    return None if threshold is None else not score <= threshold


@torch.no_grad()
def distance_maps(
    detector: EfficientAD,
    sources: Iterable[Any],
    *,
    batch_size: int = 8,
    workers: int = 2,
    on_error: OnError | None = None,
) -> Iterator[RawMaps]:
    """Raw maps of images, in order; arguments as in `predict`."""
    device = detector.affine.device
    for batch in load_batches(
        sources, detector.image_size, batch_size=batch_size, workers=workers, on_error=on_error
    ):
        st, ae = detector.distance_maps(batch.images.to(device))
        for i, (index, size) in enumerate(zip(batch.indices, batch.source_sizes, strict=True)):
            yield RawMaps(index, size, st[i : i + 1], ae[i : i + 1])


@torch.no_grad()
def sized_map(detector: EfficientAD, raw: RawMaps, size: tuple[int, int]) -> np.ndarray:
    """The anomaly map of one image at `size` pixels, (H, W) float32 on the CPU."""
    return detector.anomaly_map(raw.map_st, raw.map_ae, size)[0][0].float().cpu().numpy()


@torch.no_grad()
def image_score(detector: EfficientAD, raw: RawMaps) -> float:
    """The image score: the maximum at the size that the detector's `score_size` names."""
    size = detector.image_size if detector.score_size == "input" else raw.source_size
    return detector.anomaly_map(raw.map_st, raw.map_ae, size)[1].item()


def predict(
    detector: EfficientAD,
    sources: Iterable[Any],
    *,
    map_size: str = "source",
    batch_size: int = 8,
    workers: int = 2,
    on_error: OnError | None = None,
) -> Iterator[Prediction]:
    """Scores and anomaly maps of images, in order, with decoding ahead in threads.

    Args:
        detector: calibrated; it runs on its own device.
        sources: paths, encoded bytes, PIL images or uint8 arrays (H, W, 3).
        map_size: "source" gives each map at its image's own size, "input" at the network's. The
            score does not depend on it.
        batch_size, workers: images per forward pass and decoding threads.
        on_error: called with (index, source, error) for an unreadable image, which is left out;
            without it the error is raised.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: map_size unknown.
    """
    if map_size not in MAP_SIZES:
        raise ValueError(f"map_size is {map_size!r}; it must be 'source' or 'input'")
    if not detector.calibrated:
        detector.raise_uncalibrated()
    raws = distance_maps(
        detector, sources, batch_size=batch_size, workers=workers, on_error=on_error
    )
    return (_prediction(detector, raw, map_size) for raw in raws)


def _prediction(detector: EfficientAD, raw: RawMaps, map_size: str) -> Prediction:
    score = image_score(detector, raw)
    return Prediction(
        raw.index,
        score,
        is_anomalous(score, detector.threshold),
        sized_map(detector, raw, raw.source_size if map_size == "source" else detector.image_size),
        raw.source_size,
    )
