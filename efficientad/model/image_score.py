"""How an anomaly map becomes an image's score, and the threshold that judges it.

"max" is the paper's: the largest value (Algorithm 2, line 11). A number k is the mean of the k
largest cells. A cell is what one value of the distance maps covers, so that k cells of a map of any
size are `pixels_of` it; the pixels are those whose maximum is the other score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad.utils.checks import check_integer, is_number

Size = Sequence[int]  # rows, columns
ScoreRule = str | int  # "max", or k
_BLOCK = 2**24  # pixels that are searched at once: on a CPU each takes 16 bytes meanwhile


def check_score(value: object, cells: Size) -> ScoreRule:
    """The rule; ValueError unless it is "max" or a number of cells, at most those of the maps.

    cells: (h, w) of the distance maps.
    """
    if isinstance(value, str) and value == "max":
        return value
    most = cells[0] * cells[1]
    try:
        found = check_integer("score", value, 1)
    except ValueError:
        found = most + 1
    if found > most:
        raise ValueError(
            f"score is {value!r}; it must be 'max' or a number of cells, 1 to {most} "
            f"({cells[0]}x{cells[1]})"
        )
    return found


def described(score: ScoreRule) -> str:
    """In words."""
    if score == "max":
        return "maximum of the map"
    return "mean of the largest cell" if score == 1 else f"mean of the {score} largest cells"


def score_notes(score: ScoreRule) -> list[str]:
    """What a report says of it: nothing of the maximum."""
    return [] if score == "max" else [f"The score of an image is the {described(score)}."]


def pixels_of(score: ScoreRule, size: Size, cells: Size, padding: int) -> int | None:
    """How many pixels of a map of `size` the score is the mean of; None for the maximum.

    cells: (h, w) of the distance maps. padding: cells put around them before the resize.
    """
    if isinstance(score, str):
        return None
    grid = (cells[0] + 2 * padding) * (cells[1] + 2 * padding)
    pixels = size[0] * size[1]
    return min(max((2 * score * pixels + grid) // (2 * grid), 1), pixels)


def image_score(
    anomaly_map: Tensor, maximum: Tensor, pixels: int | None, region: Tensor | None = None
) -> Tensor:
    """Scores (N,) of maps.

    Args:
        anomaly_map: (N, H, W). maximum: (N,), theirs in the region; NaN where anything in it is
            not finite, and so is the score.
        pixels: of `pixels_of`; a region of fewer gives the mean of all it has.
        region: what counts, bool (H, W); None is everything.
    """
    if pixels is None:
        return maximum
    if region is not None:
        anomaly_map = anomaly_map.masked_fill(~region, -torch.inf)
    values = anomaly_map.flatten(1)
    if values.shape[1] > _BLOCK:
        parts = (p.topk(min(pixels, p.shape[1])).values for p in values.split(_BLOCK, dim=1))
        values = torch.cat(list(parts), dim=1)
    largest = values.topk(pixels).values
    counts = largest > -torch.inf
    mean = largest.masked_fill(~counts, 0).sum(1) / counts.sum(1)
    return torch.where(maximum.isnan(), torch.nan, mean)


def scored(
    score: ScoreRule,
    found: tuple[Tensor, Tensor],
    cells: Size,
    padding: int,
    region: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Maps and scores by the rule, of `found`, the maps (N, H, W) of `cells` and their maxima."""
    anomaly_map, maximum = found
    pixels = pixels_of(score, anomaly_map.shape[1:], cells, padding)
    return anomaly_map, image_score(anomaly_map, maximum, pixels, region)


def check_threshold(value: object) -> float | None:
    """A threshold as a float; ValueError unless it is a finite number, or None for no verdicts."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return None
    if not is_number(value):
        raise ValueError(f"threshold is {value!r}; it must be a finite number, or None")
    return float(value)
