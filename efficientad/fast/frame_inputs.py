"""What a predictor takes as a frame and as a batch, and what its callers ask of a predictor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from efficientad.data.decoding import ImageError, read_image, source_name
from efficientad.model.image_score import ScoreRule
from efficientad.ops.frame_path import MAX_SIDE
from efficientad.results.prediction import Prediction
from efficientad.utils.checks import ValueRange

Frame = np.ndarray | Tensor  # uint8 (H, W, 3): an array on the host, a tensor on a CUDA device


class FramePredictor(Protocol):
    """What streams and tiles need of `predictor.FastPredictor`; see its attributes."""

    device: torch.device
    batch_sizes: tuple[int, ...]
    image_size: tuple[int, int]
    padding: bool
    map_padding: int
    score: ScoreRule
    threshold: float | None
    value_range: ValueRange | None

    @property
    def region(self) -> Tensor | None: ...

    def predict_frames(
        self, frames: Sequence[Frame], *, map_size: str | None, batched: bool
    ) -> Prediction:
        """Score frames that `read_frame` gave."""


def as_batch(source: Any) -> tuple[list[Any], bool]:
    """The single sources in `source`, and whether it is a batch.

    A batch is a list, a tuple, an iterator, or an array or tensor (N, H, W, C). Everything else is
    one frame; a three-dimensional array is one frame (H, W, C).

    Raises:
        ValueError: an empty batch, or an array that is neither a frame nor a batch of frames.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        if source.ndim in (2, 3):
            return [source], False
        if source.ndim != 4:
            raise ValueError(
                f"the frame has shape {tuple(source.shape)}; it must be (H, W), (H, W, C) or a "
                "batch (N, H, W, C)"
            )
    elif not isinstance(source, (list, tuple, Iterator)):
        return [source], False
    frames = list(source)
    if not frames:
        raise ValueError("the batch is empty; give at least one frame")
    return frames, True


def read_frame(
    source: Any, value_range: ValueRange | None = None, *, in_tiles: bool = False
) -> Frame:
    """One frame as uint8 (H, W, 3) RGB.

    Host sources and their rules are those of `decoding.read_image`: grey is repeated, 16 bit is
    scaled from 0..65535 or value_range, alpha is dropped. An array whose pixels are contiguous is
    not copied, whatever its row pitch. A CUDA tensor stays on its device and must be uint8 (H, W),
    (H, W, 1), (H, W, 3) or (H, W, 4). in_tiles: it is not resized as a whole, which only frames
    with sides of at most `frame_path.MAX_SIDE` are.

    Raises:
        ImageError: whatever cannot be read as a frame; a missing file, too, and a side that is too
            long.
    """
    frame = _read(source, value_range)
    reason = None if in_tiles else too_long(*frame.shape[:2])
    if reason is not None:
        raise ImageError(source_name(source), reason)
    return frame


def _read(source: Any, value_range: ValueRange | None) -> Frame:
    if isinstance(source, Tensor) and source.device.type != "cpu":
        return _device_frame(source)
    if isinstance(source, Tensor):
        source = source.detach().numpy()
    if isinstance(source, np.ndarray) and _is_plain(source):
        return source
    try:
        return read_image(source, value_range)
    except TypeError as error:
        raise ImageError(source_name(source), str(error)) from error


def too_long(height: int, width: int) -> str | None:
    """Why a frame of that size cannot be resized as a whole, or None."""
    if max(height, width) <= MAX_SIDE:
        return None
    return (
        f"it has {width}x{height} pixels, and a side may have at most {MAX_SIDE} where a picture "
        "is looked at as a whole; tiles (--tiles, predict_large) have no such limit"
    )


def _is_plain(frame: np.ndarray) -> bool:
    """uint8 (H, W, 3) with contiguous pixels; rows may lie apart."""
    return (
        frame.dtype == np.uint8
        and frame.ndim == 3
        and frame.shape[2] == 3
        and frame.size > 0
        and frame.strides[1:] == (3, 1)
        and frame.strides[0] > 0
    )


def _device_frame(frame: Tensor) -> Tensor:
    channels = frame.shape[2] if frame.ndim == 3 else 1
    if frame.dtype != torch.uint8 or frame.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            "a tensor",
            f"it is {frame.dtype} {tuple(frame.shape)} on {frame.device}; it must be uint8 (H, W) "
            "or (H, W, 1, 3 or 4)",
        )
    if not frame.numel():
        raise ImageError("a tensor", f"it has shape {tuple(frame.shape)}: no pixels")
    if frame.ndim == 2:
        frame = frame[..., None]
    return frame.expand(-1, -1, 3) if channels == 1 else frame[..., :3]


def read_frames(sources: Iterable[Any], value_range: ValueRange | None = None) -> list[Frame]:
    """Every frame of a batch; an error names the place in the batch."""
    frames = []
    for i, source in enumerate(sources):
        try:
            frames.append(read_frame(source, value_range))
        except ImageError as error:
            raise ImageError(f"frame {i} ({error.name})", error.reason) from error
    return frames
