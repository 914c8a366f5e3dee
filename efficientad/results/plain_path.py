"""The plain path: scores and anomaly maps of images by the detector itself, image by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.data.decoding import ImageError
from efficientad.data.images import as_sources, load_batches
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.results.prediction import Prediction, check_map_size
from efficientad.utils.devices import full_float32
from efficientad.utils.processes import computing

OnError = Callable[[int, Any, ImageError], None]
MAP_SIZES = ("source", "input")


@dataclass(frozen=True)
class RawMaps:
    """The distance maps (1, h, w) of one image, and its place and size among the sources."""

    index: int
    source_size: tuple[int, int]
    map_st: Tensor
    map_ae: Tensor


@torch.no_grad()
def distance_maps(
    detector: EfficientAD,
    sources: Iterable[Any],
    *,
    batch_size: int = 8,
    workers: int = 2,
    on_error: OnError | None = None,
) -> Generator[RawMaps, None, None]:
    """Raw maps of images, in order; arguments as in `predict`."""
    device = detector.affine.device
    computing()
    for batch in load_batches(
        sources,
        detector.image_size,
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        value_range=detector.value_range,
    ):
        with full_float32():
            st, ae = detector.distance_maps(batch.images.to(device))
        for i, (index, size) in enumerate(zip(batch.indices, batch.source_sizes, strict=True)):
            yield RawMaps(index, size, st[i : i + 1], ae[i : i + 1])


@torch.no_grad()
def sized_map(detector: EfficientAD, raw: RawMaps, size: tuple[int, int]) -> np.ndarray:
    """The anomaly map of one image at `size` pixels, (H, W) float32 on the CPU."""
    return detector.anomaly_map(raw.map_st, raw.map_ae, size)[0][0].float().cpu().numpy()


@torch.no_grad()
def image_score(detector: EfficientAD, raw: RawMaps) -> float:
    """The image score, of the map at the size that the detector's `score_size` names."""
    size = detector.image_size if detector.score_size == "input" else raw.source_size
    return detector.anomaly_map(raw.map_st, raw.map_ae, size)[1].item()


def predict(
    detector: EfficientAD,
    sources: Iterable[Any] | str | os.PathLike,
    *,
    map_size: str = "source",
    batch_size: int = 8,
    workers: int = 2,
    on_error: OnError | None = None,
) -> Iterator[Prediction]:
    """Scores and anomaly maps of images, in order, with decoding ahead in threads.

    Args:
        detector: calibrated; it runs on its own device.
        sources: paths, encoded bytes, PIL images or uint8 arrays (H, W, 3); or one path, of a
            folder, which is searched with its subfolders, or of a file.
        map_size: "source" gives each map at its image's own size, "input" at the network's. The
            score does not depend on it.
        batch_size, workers: images per forward pass and decoding threads.
        on_error: called with (index, source, error) for an unreadable image, which is left out;
            without it the error is raised.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: map_size unknown, one image where several belong, a folder without an image.
        FileNotFoundError: a folder that does not exist.
    """
    check_detector(detector)
    check_map_size(map_size, MAP_SIZES)
    if not detector.calibrated:
        detector.raise_uncalibrated()
    raws = distance_maps(
        detector, as_sources(sources), batch_size=batch_size, workers=workers, on_error=on_error
    )
    return (_prediction(detector, raw, map_size) for raw in raws)


def _prediction(detector: EfficientAD, raw: RawMaps, map_size: str) -> Prediction:
    score = image_score(detector, raw)
    return Prediction(
        raw.index,
        score,
        detector.threshold,
        sized_map(detector, raw, raw.source_size if map_size == "source" else detector.image_size),
        raw.source_size,
        region=None if detector.region is None else detector.region.cpu(),
    )
