"""Images larger than the network, in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch

from efficientad.fast.frame_inputs import read_frame
from efficientad.fast.tiles import axis_weights, check_tiles, frame_pixels
from efficientad.model.networks import feature_size
from efficientad.results.prediction import Prediction

if TYPE_CHECKING:
    from efficientad.fast.predictor import FastPredictor

# Neighbouring maps' frames are 18 pixels each at 256, which leaves a ramp of 12.
DEFAULT_OVERLAP = 48


@torch.no_grad()
def predict_large(
    predictor: FastPredictor,
    source: Any,
    *,
    overlap: int = DEFAULT_OVERLAP,
    batch: int | None = None,
) -> Prediction:
    """Score one image at its full resolution, in overlapping tiles of the network's input size.

    What it computes is `tiles.tiled_anomaly_map`: the tiles' maps blended without seams, and the
    maximum of the blended map as the score. No pixel is resized, so the detector should have been
    trained and calibrated on tiles of the same resolution.

    Memory on the predictor's device beside the predictor's own: the image's map in float32 and the
    maps of `batch` tiles.

    Args:
        predictor: a FastPredictor.
        source: one frame, as `FastPredictor.__call__` takes it, at least as large as a tile.
        overlap: pixels that neighbouring tiles share, 0 to half a tile. Less than twice the map's
            frame (36 at 256 pixels) leaves stripes along the seams without evidence.
        batch: tiles per step; None is the predictor's largest bucket.

    Returns:
        The prediction of one frame: tensors on the predictor's device, `anomaly_map` (H, W) float32
        at the frame's size. The score is NaN if it is in any tile. The predictor's `counters` count
        tiles.

    Raises:
        ImageError: a frame that cannot be read.
        ValueError: an overlap or a batch out of range, or an image smaller than a tile.
    """
    frame = read_frame(source)
    size, tile = tuple(frame.shape[:2]), predictor.image_size
    check_tiles(size, tile, overlap)
    if batch is None:
        batch = predictor.batch_sizes[-1]
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; it must be an integer of at least 1 (tiles)")
    device, padding = predictor.device, predictor.map_padding
    axes = []
    for length, own in zip(size, tile, strict=True):
        cells = feature_size(own, predictor._model[1])
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
        broken |= result.score.isnan().any()
        del result  # before the next tiles' maps
    score = blended.amax().masked_fill(broken, torch.nan)
    return Prediction(0, score, predictor.threshold, blended, size, frame)


def _place(top: int, left: int, tile: tuple[int, int]) -> tuple[slice, slice]:
    return slice(top, top + tile[0]), slice(left, left + tile[1])


def _chunks(items: Iterator[tuple], most: int) -> Iterator[list[tuple]]:
    while chunk := list(islice(items, most)):
        yield chunk
