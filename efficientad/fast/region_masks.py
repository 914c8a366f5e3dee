"""A detector's region on a predictor's device, for maps of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientad.model.detector import EfficientAD
from efficientad.model.region import resized


class RegionMasks:
    """What `reference.anomaly_map` asks for as its region, in tensors that stay where they are.

    Args:
        detector: with a region, which is copied. device: where the masks lie.
    """

    def __init__(self, detector: EfficientAD, device: torch.device) -> None:
        assert detector.region is not None
        assert detector.region_cells is not None
        self.padding = detector.map_padding
        self.pixels, self.cells = (
            mask.to(device, copy=True) for mask in (detector.region, detector.region_cells)
        )

    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's region, in place."""
        assert detector.region is not None
        assert detector.region_cells is not None
        self.pixels.copy_(detector.region)
        self.cells.copy_(detector.region_cells)

    def of(self, size: tuple[int, int], padding: int) -> tuple[Tensor, Tensor]:
        """For a map of `size` with so many cells put around it: the detector's, or 0 for the bare
        cells. bool: of the map, and of the distance maps."""
        whole = self.pixels if padding == self.padding else self.cells
        return resized(whole, size), self.cells


def region_masks(detector: EfficientAD, device: torch.device) -> RegionMasks | None:
    """The masks of a detector with a region; None of one without."""
    return None if detector.region is None else RegionMasks(detector, device)
