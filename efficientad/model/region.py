"""The inspected region: which pixels of a frame count.

A detector keeps it as a mask of its network's input. A map of any other size, the networks' grid
included, has a mask of its own by one rule: a pixel counts where it overlaps an inspected one.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.data.region_files import read_region

Size = tuple[int, int]
RegionLike = str | os.PathLike | np.ndarray | Tensor  # a file of `region_files`, or bool (H, W)


def as_mask(region: RegionLike) -> np.ndarray:
    """A region as bool (H, W), at the size that it was drawn at.

    Raises:
        ValueError: another dtype or shape, or nothing inspected; what `read_region` refuses.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(region, (str, os.PathLike)):
        return read_region(region)
    if not isinstance(region, (np.ndarray, Tensor)):
        raise ValueError(
            f"region is a {type(region).__name__}; it must be a file, or a bool array (H, W)"
        )
    mask = np.asarray(region.detach().cpu() if isinstance(region, Tensor) else region)
    if mask.dtype != bool or mask.ndim != 2:
        raise ValueError(
            f"region is {mask.dtype} {mask.shape}; it must be bool (H, W), True where inspected"
        )
    if not mask.any():
        raise ValueError("region inspects no pixel; it must be True somewhere")
    return mask


def fitted(region: RegionLike, size: Size) -> Tensor:
    """A region as bool of `size`: a pixel counts where at least half of it is inspected.

    Raises what `as_mask` does, and ValueError where no pixel counts.
    """
    from PIL import Image

    mask = as_mask(region)
    drawn = Image.fromarray(mask * np.uint8(255))
    found = np.asarray(drawn.resize(size[::-1], Image.Resampling.BOX)) >= 128
    if not found.any():
        raise ValueError(
            f"region inspects {np.count_nonzero(mask)} of {mask.size} pixels, and no pixel of the "
            f"network's {size[0]}x{size[1]} by half; draw it larger"
        )
    return torch.from_numpy(found)


def resized(region: Tensor, size: Size) -> Tensor:
    """A mask (H, W) for a map of `size`: True where a pixel overlaps an inspected one."""
    for dim in (0, 1):
        length, wanted = region.shape[dim], size[dim]
        if length == wanted:
            continue
        i = torch.arange(wanted, device=region.device)
        first, behind = i * length // wanted, ((i + 1) * length + wanted - 1) // wanted
        if wanted > length:  # it overlaps two at most
            region = region.index_select(dim, first) | region.index_select(dim, behind - 1)
            continue
        sums = region.cumsum(dim)  # of the rows or columns up to each
        sums = torch.cat([torch.zeros_like(sums.narrow(dim, 0, 1)), sums], dim)
        region = sums.index_select(dim, behind) > sums.index_select(dim, first)
    return region


def cells_of(region: Tensor, cells: Size, padding: int) -> Tensor:
    """Which cells (h, w) of a distance map count.

    padding: cells that are put on every side of the map to cover the input.
    """
    height, width = cells
    grid = resized(region, (height + 2 * padding, width + 2 * padding))
    return grid[padding : padding + height, padding : padding + width].contiguous()


def check_cells(region: Tensor, cells: Size, padding: int) -> Tensor:
    """`cells_of`; ValueError where no cell counts."""
    found = cells_of(region, cells, padding)
    if not found.any():
        raise ValueError(
            "region lies in the frame of the map, where the networks see nothing; it must reach "
            "further into the image"
        )
    return found


def masks_of(
    region: Tensor, cells: Tensor, size: Size, grid: Size, padding: int
) -> tuple[Tensor, Tensor]:
    """What `reference.anomaly_map` asks for: the masks of a map of `size` and of distance maps.

    cells: those of distance maps of the detector's own input; used where `grid` is theirs.
    """
    own = tuple(cells.shape) == tuple(grid)
    return resized(region, size), cells if own else cells_of(region, grid, padding)


def index_of(cells: Tensor | None) -> Tensor | None:
    """The places of the cells that count in a flat map, (k,) int64. Waits for the device."""
    return None if cells is None else cells.flatten().nonzero().flatten()


def of_cells(features: Tensor, index: Tensor | None) -> Tensor:
    """Of features (N, C, h, w) the cells of `index_of`, (N, C, 1, k); all of them for None."""
    return features if index is None else features.flatten(2).index_select(2, index).unsqueeze(2)


def map_means(anomaly_map: Tensor, region: Tensor | None) -> Tensor:
    """Means (N,) of maps (N, H, W) over what is inspected.

    The resize of a map keeps its mean, so that maps of other sizes give nearly the same.

    region: bool, of any size; None is everything.
    """
    if region is None:
        return anomaly_map.mean((-2, -1))
    height, width = anomaly_map.shape[-2:]
    counts = resized(region.to(anomaly_map.device), (height, width))
    return anomaly_map.masked_fill(~counts, 0).sum((-2, -1)) / counts.sum()


def share(region: Tensor) -> float:
    """How much of the frame is inspected, 0..1."""
    return round(float(region.float().mean()), 6)


def facts(region: Tensor | None) -> dict[str, float]:
    """What a provenance says of a region: nothing without one."""
    return {} if region is None else {"inspected": share(region)}


def digest(region: Tensor | None) -> str | None:
    """By which two regions of one size are told apart."""
    if region is None:
        return None
    return hashlib.sha256(region.to("cpu", torch.uint8).numpy().tobytes()).hexdigest()


def reaches_beyond(region: Any, other: Tensor | None) -> bool:
    """Whether a region has a pixel that another, at the same size, has not; None is everything."""
    return other is not None and (region is None or bool((region & ~other).any()))
