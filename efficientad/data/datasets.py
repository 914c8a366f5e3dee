"""Data sets: which images there are, good and anomalous, and their masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from efficientad.data.decoding import ImageError, Shape, image_shape
from efficientad.data.masks import placement, read_levels, read_mask, united

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


class Truth(NamedTuple):
    """What is known of the pixels of a sample.

    mask: anomalous pixels, bool (H, W), at the mask's own size. regions: those of saturated PRO,
    where there are rules for it. remarks: keys of `efficientad.data.masks.REMARKS`.
    """

    mask: np.ndarray
    regions: tuple[Region, ...]
    remarks: frozenset[str]


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
        """(height, width) of the mask of a sample, upright, from headers.

        A sample without masks gets the size of its image, times the ratio of mask to image in the
        data set's first masked sample that can be read: masks can be larger than (reduced) images.
        Errors as `efficientad.data.decoding.read_image`.
        """
        picture = image_shape(sample.path)
        if sample.masks:
            return _size_on(picture, sample.masks[0])
        height, width = picture.size
        return round(height * self._mask_ratio[0]), round(width * self._mask_ratio[1])

    @cached_property
    def _mask_ratio(self) -> tuple[float, float]:
        for sample in self.test:
            if sample.masks:
                try:
                    picture = image_shape(sample.path)
                    mask = _size_on(picture, sample.masks[0])
                except ImageError:  # it fails on its own, and says so then
                    continue
                return mask[0] / picture.size[0], mask[1] / picture.size[1]
        return 1.0, 1.0

    def read_truth(self, sample: Sample) -> Truth:
        """What is known of the pixels of a sample, by the rules of `efficientad.data.masks`.

        With saturation rules each mask file marks one defect of MVTec LOCO AD, and the value of its
        nonzero pixels chooses the rule. A normal sample has no anomalous pixel, whatever its mask.

        Raises:
            ValueError: an anomalous sample without a mask; masks of several sizes; with saturation
                rules, one with several values or one without a rule.
            ImageError: a file that cannot be read (MissingImage: that is not there), or a mask that
                is turned against its picture.
        """
        if not sample.masks:
            if sample.label:
                raise ValueError(f"the anomalous image {sample.path} has no mask")
            nothing = np.zeros(self.mask_size(sample), dtype=bool)
            return Truth(nothing, (), frozenset())
        picture = image_shape(sample.path)
        if sample.label and self.saturation:
            return self._read_regions(sample, picture)
        mask = read_mask(sample.masks, picture)
        if sample.label:
            return Truth(mask.pixels, (), mask.remarks)
        remarks = frozenset(("good",) if mask.pixels.any() else ())
        return Truth(np.zeros_like(mask.pixels), (), remarks)

    def read_mask(self, sample: Sample) -> np.ndarray:
        """Anomalous pixels of a sample, bool (H, W): the mask of `read_truth`. Errors as there."""
        return self.read_truth(sample).mask

    def _read_regions(self, sample: Sample, picture: Shape) -> Truth:
        regions: list[Region] = []
        remarks: set[str] = set()
        for path in sample.masks:
            levels, _, found = read_levels(path, picture)
            remarks |= found
            marked = levels != 0
            values = np.unique(levels[marked]).tolist()
            if not values:
                continue
            if len(values) != 1 or values[0] not in self.saturation:
                raise ValueError(
                    f"{path} must hold one nonzero value of {sorted(self.saturation)}, has "
                    f"{', '.join(map(str, values[:8]))}{' ...' if len(values) > 8 else ''}"
                )
            area = self.saturation[values[0]].area(int(marked.sum()))
            regions.append(Region(marked, area))
        if not regions:
            remarks.add("empty")
            nothing = np.zeros(_size_on(picture, sample.masks[0]), dtype=bool)
            return Truth(nothing, (), frozenset(remarks))
        mask = united([region.mask for region in regions], remarks, sample.masks)
        return Truth(mask.pixels, tuple(regions), mask.remarks)


def _size_on(picture: Shape, mask: Path) -> tuple[int, int]:
    """(height, width) of a mask once it is turned onto its picture."""
    shape = image_shape(mask)
    turn, _ = placement(shape, picture, str(mask))
    return shape.size[::-1] if turn >= 5 else shape.size


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
