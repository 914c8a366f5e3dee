"""Images larger than the network: one map out of overlapping tiles.

Tiles of the network's input size lie `size - overlap` pixels apart; the last one of an axis is
flush with the image's edge. Each tile's anomaly map is weighted by a window, the weighted maps are
added and divided by the sum of the windows, and the score is the maximum of that blended map, or
the mean of its largest cells, which are as large as those of a tile.

The window is 1 inside the tile and falls linearly over the overlap towards neighbouring tiles; at
the image's own edges it stays 1. Where a tile's map has a frame (see `frame_pixels`), it carries no
evidence there, so the ramp begins behind the frame, as far as the overlap leaves room: otherwise a
defect on a seam would be blended with the frame's constant and fade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from efficientad.data.tiff_parts import tiff_parts
from efficientad.fast.frame_inputs import FramePredictor, read_frame
from efficientad.model.image_score import image_score, pixels_of
from efficientad.model.networks import feature_size
from efficientad.results.prediction import Prediction

# Neighbouring maps' frames are 18 pixels each at 256, which leaves a ramp of 12.
DEFAULT_OVERLAP = 48


def check_tiles(size: tuple[int, int], tile: tuple[int, int], overlap: int) -> None:
    """Raise ValueError unless `tile` fits into `size` (rows, columns) and the overlap into it."""
    if isinstance(overlap, bool) or not isinstance(overlap, int):
        raise ValueError(f"overlap is {overlap!r}; it must be an integer (pixels)")
    most = min(tile) // 2
    if not 0 <= overlap <= most:
        raise ValueError(
            f"overlap is {overlap}; it must be 0 to {most} pixels, half of the {tile[0]}x{tile[1]} "
            "tiles, so that the window is 1 somewhere"
        )
    if size[0] < tile[0] or size[1] < tile[1]:
        raise ValueError(
            f"the image is {size[0]}x{size[1]} and the tiles {tile[0]}x{tile[1]}; an image that is "
            "cut into tiles must be at least as high and as wide as one: use the plain call, which "
            "resizes"
        )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along an axis of `length` pixels; they cover it exactly."""
    return [*range(0, length - tile, tile - overlap), length - tile]


def frame_pixels(length: int, cells: int, padding: int) -> int:
    """Rows of a map of `length` pixels that the cells padded around it reach: 18 at 256.

    Args:
        length: pixels that the padded map is resized to.
        cells: of the map along the axis, before padding.
        padding: cells put on each side.
    """
    scale = length / (cells + 2 * padding)
    return math.ceil(scale * (padding + 0.5) - 0.5) if padding else 0


def axis_window(start: int, tile: int, length: int, overlap: int, frame: int = 0) -> Tensor:
    """The window along an axis, (tile,) float64: 1 inside, a ramp towards neighbouring tiles.

    Within the overlap, `margin` pixels at the tile's edge weigh 0, margin = min(frame, overlap //
    2), and the ramp takes the rest. So every pixel that only one tile covers weighs more than 0.
    """
    margin = min(frame, overlap // 2)
    ramp = overlap - 2 * margin
    from_edge = torch.arange(tile, dtype=torch.float64) + 0.5 - margin
    rising = (from_edge / ramp if ramp else from_edge.sign()).clamp(0, 1)
    window = torch.ones(tile, dtype=torch.float64)
    if start > 0:
        window *= rising
    if start + tile < length:
        window *= rising.flip(0)
    return window


def axis_weights(length: int, tile: int, overlap: int, frame: int = 0) -> tuple[list[int], Tensor]:
    """Starts and windows (tiles, tile) of an axis, divided by their sum at each pixel.

    The sum over both axes is the product of the sums along each, so the windows of rows times those
    of columns are the weights of the blended map, and they add up to 1 at every pixel.
    """
    starts = tile_starts(length, tile, overlap)
    windows = torch.stack([axis_window(s, tile, length, overlap, frame) for s in starts])
    total = torch.zeros(length, dtype=torch.float64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    for start, window in zip(starts, windows, strict=True):
        window /= total[start : start + tile]
    return starts, windows


def tiled_anomaly_map(
    anomaly_map: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: tuple[int, int],
    overlap: int,
    frame: tuple[int, int] = (0, 0),
    pixels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: blended map and score of one image, a tile at a time.

    Args:
        anomaly_map: images (1, C, *tile) -> maps (1, *tile).
        image: (C, H, W), at least as large as a tile.
        tile: rows and columns of a tile, the network's input size.
        overlap: pixels that neighbouring tiles share, 0 to half a tile.
        frame: rows and columns at a tile's edges that carry no evidence, see `frame_pixels`.
        pixels: whose mean the score is, see `image_score.pixels_of`; None: it is the maximum.

    Returns:
        (blended map (H, W), score ()); a NaN in any tile makes the score NaN.

    Raises:
        ValueError: an overlap out of range, or an image smaller than a tile.
    """
    height, width = image.shape[-2:]
    check_tiles((height, width), tile, overlap)
    blended = torch.zeros(height, width, dtype=torch.float64)
    total = torch.zeros_like(blended)
    not_a_number = False
    for top in tile_starts(height, tile[0], overlap):
        rows = axis_window(top, tile[0], height, overlap, frame[0])
        for left in tile_starts(width, tile[1], overlap):
            cols = axis_window(left, tile[1], width, overlap, frame[1])
            place = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
            one = anomaly_map(image[place][None])[0].double()
            weight = rows[:, None] * cols
            blended[place] += weight * one
            total[place] += weight
            not_a_number |= bool(one.isnan().any())
    blended = (blended / total).float()
    return blended, _score(blended, torch.tensor(not_a_number), pixels)


@torch.no_grad()
def predict_large(
    predictor: FramePredictor,
    source: Any,
    *,
    overlap: int = DEFAULT_OVERLAP,
    batch: int | None = None,
) -> Prediction:
    """Score one image at its full resolution, in overlapping tiles of the network's input size.

    What it computes is `tiled_anomaly_map`: the tiles' maps blended without seams, and the score
    of the blended map by the detector's rule. No pixel is resized, so the detector should have been
    trained and calibrated on tiles of the same resolution.

    Memory on the predictor's device beside the predictor's own: the image's map in float32 and the
    maps of `batch` tiles. The pixels of a large TIFF file are read tile by tile, where its kind
    allows (`data.tiff_parts`); other images are held as a whole, 3 bytes a pixel.

    Args:
        predictor: a FastPredictor.
        source: one frame, as `FastPredictor.__call__` takes it, at least as large as a tile.
        overlap: pixels that neighbouring tiles share, 0 to half a tile. Less than twice the map's
            frame (36 at 256 pixels) leaves stripes along the seams without evidence.
        batch: tiles per step; None is the predictor's largest bucket.

    Returns:
        The prediction of one frame: tensors on the predictor's device, `anomaly_map` (H, W) float32
        at the frame's size, `image` the frame, or a `TiffParts` of it. The score is NaN if it is in
        any tile. The predictor's `counters` count tiles.

    Raises:
        ImageError: a frame that cannot be read.
        ValueError: an overlap or a batch out of range, an image smaller than a tile, or a detector
            with a region, which is of whole frames.
    """
    if predictor.region is not None:
        raise ValueError(
            "the detector has a region, which is of whole frames, and tiles are parts of one: use "
            "the plain call, or a detector without a region"
        )
    parts = tiff_parts(source, predictor.value_range)
    frame = read_frame(source, predictor.value_range, in_tiles=True) if parts is None else parts
    size, tile = tuple(frame.shape[:2]), predictor.image_size
    check_tiles(size, tile, overlap)
    if batch is None:
        batch = predictor.batch_sizes[-1]
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; it must be an integer of at least 1 (tiles)")
    device, padding = predictor.device, predictor.map_padding
    axes = []
    for length, own in zip(size, tile, strict=True):
        cells = feature_size(own, predictor.padding)
        starts, weights = axis_weights(length, own, overlap, frame_pixels(own, cells, padding))
        axes.append(list(zip(starts, weights.float().to(device), strict=True)))
    blended = torch.zeros(size, device=device)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for places in _chunks(product(*axes), batch):
        cuts = [_place(top, left, tile) for (top, _), (left, _) in places]
        result = predictor.predict_frames(
            [frame[cut] for cut in cuts], map_size="input", batched=True
        )
        for cut, one, ((_, rows), (_, cols)) in zip(cuts, result.anomaly_map, places, strict=True):
            blended[cut].addcmul_(one, rows[:, None] * cols)
        broken |= torch.isnan(torch.as_tensor(result.score)).any()
        del result  # before the next tiles' maps
    grid = [feature_size(own, predictor.padding) for own in tile]
    score = _score(blended, broken, pixels_of(predictor.score, tile, grid, padding))
    return Prediction(0, score, predictor.threshold, blended, size, frame)


def _score(blended: Tensor, broken: Tensor, pixels: int | None) -> Tensor:
    """The score () of a blended map, NaN where a tile is `broken`."""
    maximum = blended.amax().masked_fill(broken, torch.nan)
    return image_score(blended[None], maximum[None], pixels)[0]


def _place(top: int, left: int, tile: tuple[int, int]) -> tuple[slice, slice]:
    return slice(top, top + tile[0]), slice(left, left + tile[1])


def _chunks(items: Iterator[tuple], most: int) -> Iterator[list[tuple]]:
    while chunk := list(islice(items, most)):
        yield chunk
