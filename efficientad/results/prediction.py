"""`Prediction`, what is said of one image or of a batch, and the rule of the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.model.image_score import check_threshold
from efficientad.model.region import map_means
from efficientad.results.overlay import overlay
from efficientad.results.regions import AnomalousRegion, anomalous_regions


def is_anomalous(score: Any, threshold: float | None) -> Any:
    """The verdict on a score: not (score <= threshold), so that NaN is anomalous (fail safe).

    bool, or a bool tensor or array where the score is one; None without a threshold.
    """
    if threshold is None:
        return None
    normal = score <= threshold
    return ~normal if isinstance(normal, (Tensor, np.ndarray)) else not normal


class Prediction:
    """The result of one image, or of a batch of N images.

    What a predictor returns holds tensors on its device; `cpu()` gives the same with host values.
    A batch has a length, can be indexed and iterated.

    Attributes:
        index: the image's place among the sources; of a batch, one per image.
        score: the image score; NaN if anything in the image's maps is not finite. A float or a
            tensor (), of a batch (N,).
        anomaly_map: (H, W) float32 at the size asked for, of a batch (N, H, W), or a list of maps
            where sizes differ. None if no map was asked for.
        source_size: (height, width) of the image before resizing; of a batch, one per image.
        threshold: by which `is_anomalous` judges; None judges nothing.
        image: the frame itself, uint8 (H, W, 3), for `overlay`; None where it is not kept.
        region: what is inspected, bool (H, W) at the network's input size; None is everything.
        whole: whether the map covers the frame from edge to edge; "feature" maps may not.
    """

    __slots__ = (
        "_not_numbers",
        "_serial",
        "anomaly_map",
        "image",
        "index",
        "region",
        "score",
        "source_size",
        "threshold",
        "whole",
    )

    # One image's or a batch's: which of the two is known to whoever called for it, not to a type.
    index: Any
    score: Any

    def __init__(
        self,
        index: int | Sequence[int],
        score: float | Tensor,
        threshold: float | None,
        anomaly_map: Any,
        source_size: Any,
        image: Any = None,
        *,
        region: Tensor | None = None,
        whole: bool = True,
        serial: int = 0,
        not_numbers: set[int] | None = None,
    ) -> None:
        self.index, self.score, self.threshold = index, score, threshold
        self.anomaly_map, self.source_size, self.image = anomaly_map, source_size, image
        self.region, self.whole = region, whole
        # Where host values show a NaN score, its serial number goes to the predictor's set.
        self._serial, self._not_numbers = serial, not_numbers

    @property
    def is_anomalous(self) -> Any:
        """Whether the score exceeds the threshold; a NaN score does (fail safe).

        bool, or a bool tensor beside a tensor score, of a batch (N,). None without a threshold.
        """
        return is_anomalous(self.score, self.threshold)

    @property
    def batched(self) -> bool:
        """Whether this is the result of a batch."""
        return not isinstance(self.index, int)

    def __len__(self) -> int:
        if not self.batched:
            raise TypeError("the prediction of one image has no length")
        return len(self.index)

    def __getitem__(self, i: int | slice) -> Prediction:
        """The i-th image's prediction, or that of a batch of neighbouring images; views of this."""
        if isinstance(i, slice):
            return self._part(range(len(self))[i])
        i = range(len(self))[i]
        return Prediction(
            self.index[i],
            self.score[i] if isinstance(self.score, Tensor) else float(self.score[i]),
            self.threshold,
            None if self.anomaly_map is None else self.anomaly_map[i],
            self.source_size[i],
            None if self.image is None else self.image[i],
            region=self.region,
            whole=self.whole,
            serial=self._serial + i,
            not_numbers=self._not_numbers,
        )

    def _part(self, places: range) -> Prediction:
        if places.step != 1:
            raise ValueError(f"the step of the slice is {places.step}; it must be 1, or left out")
        part = slice(places.start, places.stop)
        return Prediction(
            self.index[part],
            self.score[part],
            self.threshold,
            None if self.anomaly_map is None else self.anomaly_map[part],
            self.source_size[part],
            None if self.image is None else self.image[part],
            region=self.region,
            whole=self.whole,
            serial=self._serial + places.start,
            not_numbers=self._not_numbers,
        )

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))

    def cpu(self) -> Prediction:
        """The same with host values: float and numpy arrays. Waits for the device."""
        score = _host(self.score)
        if self._not_numbers is not None:
            where = np.flatnonzero(np.isnan(np.atleast_1d(score)))
            self._not_numbers.update((self._serial + where).tolist())
        maps = self.anomaly_map
        maps = [_host(m) for m in maps] if isinstance(maps, list) else _host(maps)
        if not self.batched:
            score = float(score)
        return Prediction(
            self.index, score, self.threshold, maps, self.source_size, self.image,
            region=self.region, whole=self.whole,
        )  # fmt: skip

    def regions(
        self, *, threshold: float | None = None, min_area: float = 0
    ) -> list[AnomalousRegion]:
        """Where the map lies above the threshold: connected regions, the highest score first.

        Outside the inspected region there is none. They are found at the map's own size and their
        boxes are rounded outwards to pixels of the frame. The verdict is the score's: with a map of
        another size than the score was found at, an image next to the threshold may be anomalous
        and have no region, or the reverse.

        Args:
            threshold: in place of the prediction's own.
            min_area: regions of fewer pixels of the original frame are left out.

        Returns:
            `regions.AnomalousRegion`s, each with box, area and score. Waits for the device.

        Raises:
            ValueError: a batch, no map or one that does not cover the frame, no threshold, or a
                min_area below 0.
        """
        threshold = check_threshold(self.threshold if threshold is None else threshold)
        if self.batched:
            raise ValueError("this is the prediction of a batch; index it for one image's regions")
        if self.anomaly_map is None:
            raise ValueError("the prediction holds no map to find regions in; ask for one")
        if not self.whole:
            raise ValueError(
                "the map is at feature size, without the frame of the image; regions need map_size "
                "'input' or 'source'"
            )
        if threshold is None:
            raise ValueError("the prediction has no threshold, which regions lie above; give one")
        return anomalous_regions(
            _host(self.anomaly_map), self.source_size, threshold,
            region=self.region, min_area=min_area,
        )  # fmt: skip

    def map_mean(self) -> float:
        """The mean of the map over what is inspected, which tells another light from a defect.

        Raises:
            ValueError: a batch, or no map.
        """
        if self.batched or self.anomaly_map is None:
            what = "is of a batch; index it" if self.batched else "holds no map; ask for one"
            raise ValueError(f"the prediction {what} for a map's mean")
        anomaly_map = torch.as_tensor(self.anomaly_map)
        return float(map_means(anomaly_map.float()[None], self.region))

    def overlay(self, **options: Any) -> Any:
        """The frame with the map's colours over it, as a PIL image (see `overlay.overlay`).

        Raises:
            ValueError: a batch, no map, or a frame that is not at hand.
        """
        from PIL import Image

        if self.batched:
            raise ValueError("this is the prediction of a batch; index it to overlay one image")
        if self.anomaly_map is None or self.image is None:
            what = "map" if self.anomaly_map is None else "image"
            raise ValueError(f"the prediction holds no {what} to draw")
        image, anomaly_map = _host(self.image), _host(self.anomaly_map)
        return Image.fromarray(
            overlay(image, anomaly_map, self.threshold, **{"region": self.region, **options})
        )

    def to_dict(self) -> dict[str, Any]:
        """Index, score, verdict, threshold and source size as plain numbers, for JSON."""
        host = self.cpu()
        return {
            "index": host.index if isinstance(host.index, int) else list(host.index),
            "score": host.score if isinstance(host.score, float) else host.score.tolist(),
            "is_anomalous": np.asarray(host.is_anomalous).tolist(),
            "threshold": self.threshold,
            "source_size": [list(s) for s in self.source_size]
            if self.batched
            else list(self.source_size),
        }

    def __repr__(self) -> str:
        what = f"{len(self)} images" if self.batched else f"image {self.index}"
        return f"Prediction({what}, score={self.score}, is_anomalous={self.is_anomalous})"


def _host(value: Any) -> Any:
    """A tensor as a numpy array; anything else as it is."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def check_map_size(map_size: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `map_size` is one of the choices."""
    if map_size not in choices:
        raise ValueError(f"map_size is {map_size!r}; it must be {' or '.join(map(repr, choices))}")
