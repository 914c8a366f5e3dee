"""Data sets: which images there are, good and anomalous, and their masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from efficientad.data.decoding import image_size, read_labels

GOOD = "good"


@dataclass(frozen=True)
class Sample:
    """One image: label 0 normal or 1 anomalous, the name of its defect, its mask files if any."""

    path: Path
    label: int = 0
    defect: str = GOOD
    masks: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Saturation:
    """Area at which a defect of MVTec LOCO AD counts as found: pixels, or a share of its area."""

    defect: str
    threshold: float
    relative: bool

    def area(self, pixels: int) -> int:
        """Saturation area, at least 1, of a region of this many pixels (never more than them)."""
        area = int(self.threshold * pixels) if self.relative else min(int(self.threshold), pixels)
        return max(area, 1)


class Region(NamedTuple):
    """One annotated defect: its mask, bool (H, W), and the area in pixels at which it saturates."""

    mask: np.ndarray
    saturation_area: int


@dataclass(frozen=True)
class DataSet:
    """Images of one object: good ones to train and validate on, good and anomalous ones to test.

    saturation: pixel value of a mask -> rule, from the defects_config.json of MVTec LOCO AD.
    notes: sentences about what was left out.
    """

    root: Path
    layout: str
    name: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    saturation: Mapping[int, Saturation] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def has_masks(self) -> bool:
        """Whether there are anomalous test images and each of them has a mask."""
        return any(sample.label for sample in self.test) and not self.without_masks

    @property
    def without_masks(self) -> tuple[Sample, ...]:
        """The anomalous test images that have no mask."""
        return tuple(sample for sample in self.test if sample.label and not sample.masks)

    def mask_size(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of the mask of a sample, from headers.

        A sample without masks gets the size of its image, times the ratio of mask to image in the
        data set's first masked sample: masks can be larger than (reduced) images. Errors as
        `efficientad.data.decoding.read_image`.
        """
        if sample.masks:
            return image_size(sample.masks[0])
        height, width = image_size(sample.path)
        return round(height * self._mask_ratio[0]), round(width * self._mask_ratio[1])

    @cached_property
    def _mask_ratio(self) -> tuple[float, float]:
        for sample in self.test:
            if sample.masks:
                mask, image = image_size(sample.masks[0]), image_size(sample.path)
                return mask[0] / image[0], mask[1] / image[1]
        return 1.0, 1.0

    def read_mask(self, sample: Sample) -> np.ndarray:
        """Anomalous pixels of a sample, bool (H, W): where any of its masks is not zero.

        All False at `mask_size` for a normal sample. ValueError for an anomalous sample without a
        mask and for masks of several sizes; ImageError and FileNotFoundError for unreadable ones.
        """
        if not sample.masks:
            if sample.label:
                raise ValueError(f"the anomalous image {sample.path} has no mask")
            return np.zeros(self.mask_size(sample), dtype=bool)
        parts = [read_labels(path) != 0 for path in sample.masks]
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"the masks of {sample.path} differ in size")
        return np.logical_or.reduce(parts)

    def read_regions(self, sample: Sample) -> list[Region]:
        """Regions of saturated PRO: one per mask file, which marks one defect of MVTec LOCO AD.

        The value of its nonzero pixels chooses the saturation rule; an empty list for a normal
        sample. ValueError where a mask holds no or several values, or one without a rule.
        """
        if sample.label and not sample.masks:
            raise ValueError(f"the anomalous image {sample.path} has no mask")
        regions = []
        for path in sample.masks:
            labels = read_labels(path)
            mask = labels != 0
            values = np.unique(labels[mask]).tolist()
            if len(values) != 1 or values[0] not in self.saturation:
                raise ValueError(
                    f"{path} must hold one nonzero value of {sorted(self.saturation)}, has {values}"
                )
            regions.append(Region(mask, self.saturation[values[0]].area(int(mask.sum()))))
        return regions


def split_validation(samples: Iterable[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Training and validation part of good images: 90 % and 10 % at random, the same every time.

    The first int(0.9 N) of torch.randperm(N) with a generator of seed 42 train (nelson1425's
    random_split; the paper, section 3.4, asks for unseen normal images of the training set). N =
    2..9 gives one image or two to validation; a single image is in both parts. Both parts keep the
    order given. For VisA and plain folders, of which the paper says nothing, the same rule is an
    assumption.
    """
    samples = tuple(samples)
    if len(samples) == 1:
        return samples, samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(42)).tolist()
    count = int(0.9 * len(samples))
    train, validation = sorted(order[:count]), sorted(order[count:])
    return tuple(samples[i] for i in train), tuple(samples[i] for i in validation)
