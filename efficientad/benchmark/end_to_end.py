"""From a frame to its map, timed.

The protocol is the paper's (appendix E): the clock starts when a frame in host memory is handed
over and stops when its anomaly map is in host memory, so the copies to and from the device, the
normalisation, all networks and the map at input size are inside; batch 1 for latency, batch 16 for
throughput, which is images over the sum of the times; 1000 calls to warm up and 1000 under the
clock. A CPU gets fewer, see `defaults`. A call is over when `Prediction.cpu()` has returned.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.benchmark.call_times import check_counts
from efficientad.benchmark.contenders import (
    Contender,
    Row,
    Run,
    as_images,
    contender,
    race,
    reference,
    row,
)
from efficientad.fast.predictor import FastPredictor
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import frames as random_frames
from efficientad.utils.devices import choose_device

BATCH_SIZES = (1, 16)
IMAGES = 8  # distinct ones, compared with the detector and then timed
DECODES = ("jpeg", "png")
CAMERA = (2048, 2448)
PLAIN_DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
_DISTINCT = 2  # frames of another size than the network's


def defaults(device: torch.device) -> dict[str, Any]:
    """`warmup`, `calls`, `rounds` and `seconds` (of `call_times.in_turn`) for a device.

    The paper's 1000 and 1000 on CUDA. A CPU takes a thousand times as long: 20 calls after 2, and
    fewer where these would take more than 8 seconds.
    """
    if device.type == "cuda":
        return {"warmup": 1000, "calls": 1000, "rounds": 10, "seconds": math.inf}
    return {"warmup": 2, "calls": 20, "rounds": 5, "seconds": 8.0}


def benchmark(
    model: EfficientAD | FastPredictor,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    warmup: int | None = None,
    calls: int | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    frame_size: tuple[int, int] | None = None,
    decode: Sequence[str] = DECODES,
    plain: bool = False,
    detector: EfficientAD | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> list[Row]:
    """Times of calls from a frame on the host to its map on the host, by batch size.

    Args:
        model: a calibrated detector, or a predictor that is timed as it is, buckets included.
        batch_sizes: frames of the network's input size per call.
        warmup, calls, rounds, seconds: as in `call_times.in_turn`; None: `defaults` of the device.
        frame_size: (height, width) of camera frames that are timed, too, one at a time: resizing
            them is inside the clock. None: no such rows.
        decode: camera frames are handed over as uint8 arrays, and as bytes in these formats, "jpeg"
            and "png", whose decoding is inside the clock.
        plain: time the plain detector, too, in turn with the predictor, and give the ratio. It gets
            float32 tensors of the input size, and computes in float32 on a CPU, float16 on CUDA.
        detector: what a given predictor is compared with; without it its accuracy stays None.
        device, dtype: of the predictor that is built from a detector.

    Returns:
        Rows of kind "end_to_end", "frame", "peer" and "ratio"; see `contenders.row`. Accuracy
        is that on arrays of the input size.

    Raises:
        ValueError: an argument that is not as above.
        UncalibratedError: the detector has no statistics or quantiles.
    """
    check_batch_sizes(batch_sizes)
    _check_frames(frame_size, decode)
    if isinstance(model, FastPredictor):
        predictor = model
    else:
        detector = model
        predictor = build_predictor(detector, batch_sizes, device, dtype)
    if plain and detector is None:
        raise ValueError("plain is set and model is a predictor; give its detector, too")
    numbers = {"warmup": warmup, "calls": calls, "rounds": rounds, "seconds": seconds}
    options = defaults(predictor.device) | {k: v for k, v in numbers.items() if v is not None}
    check_counts(**options)
    frames = random_frames(IMAGES, *predictor.image_size)
    expected = None if detector is None else reference(detector, frames)
    known = (predictor, detector, frames, expected)
    rows = []
    for batch in batch_sizes:
        field = [ours(*known, batch)]
        if plain and detector is not None:
            field.append(_plain(predictor, detector, frames, expected, batch))
        rows += race(field, **options)
    if frame_size is not None:
        rows += race(camera(*known, frame_size, decode), **options)
    return rows


def build_predictor(
    detector: EfficientAD, batch_sizes: Sequence[int], device: Any, dtype: Any, **options: Any
) -> FastPredictor:
    """The predictor that a user would build: buckets for these batches, on a CPU its default."""
    device = choose_device(device)
    if device.type == "cuda":
        options["batch_sizes"] = batch_sizes
    return FastPredictor(detector, device=device, dtype=dtype, **options)


def ours(
    predictor: FastPredictor,
    detector: EfficientAD | None,
    frames: np.ndarray,
    expected: tuple[Tensor, Tensor] | None,
    batch: int,
) -> Contender:
    """The predictor as a contender, judged and timed on frames (N, H, W, 3) of its input size.

    One frame is handed over as it is, more of them as an array.
    """
    target = row("end_to_end", "FastPredictor", **facts(predictor, detector, batch))
    return _judged(predictor, frames, expected, target)


def camera(
    predictor: FastPredictor,
    detector: EfficientAD | None,
    frames: np.ndarray,
    expected: tuple[Tensor, Tensor] | None,
    frame_size: tuple[int, int],
    decode: Sequence[str] = DECODES,
) -> list[Contender]:
    """The predictor on camera frames, one at a time: as arrays, as files, on CUDA on the device.

    It is judged on `frames`, which have its input size. The copy to the device is not in the times
    of frames that lie there.
    """
    pixels = random_frames(_DISTINCT, *frame_size)
    sources: dict[tuple[str, str | None], Any] = {("camera frame", None): pixels}
    for kind in decode:
        sources[f"{kind.upper()} file", kind] = encoded(pixels, kind)
    if predictor.device.type == "cuda":
        there = [torch.from_numpy(frame).to(predictor.device) for frame in pixels]
        sources["camera frame on the device", None] = there
    field = []
    for (name, format), frames_of_it in sources.items():
        target = row("frame", name, **facts(predictor, detector, 1))
        target |= {"frame_size": list(frame_size), "decode": format}
        field.append(_judged(predictor, frames, expected, target, frames_of_it))
    return field


def _judged(
    predictor: FastPredictor,
    frames: np.ndarray,
    expected: tuple[Tensor, Tensor] | None,
    target: Row,
    sources: Any = None,
) -> Contender:
    dtype = getattr(torch, predictor.facts["dtype"])
    run = predictor_run(predictor)
    return contender(target, run, frames, expected, dtype, sources=sources)


def facts(predictor: FastPredictor, detector: EfficientAD | None, batch: int) -> dict[str, Any]:
    """What a row says of the predictor that it is about."""
    size = predictor.size if detector is None else detector.size
    image_size = list(predictor.image_size)
    own = {name: predictor.facts[name] for name in ("dtype", "device", "backend")}
    own |= {"buckets": list(predictor.batch_sizes), "map_size": image_size}
    return {"size": size, "batch": batch, "image_size": image_size, **own}


def predictor_run(predictor: FastPredictor) -> Run:
    """A batch of sources -> (scores, maps) on the host."""

    def run(sources: Any) -> tuple[Tensor, Tensor]:
        if len(sources) > 1:
            found = predictor(sources).cpu()
            return torch.from_numpy(found.score), torch.from_numpy(found.anomaly_map)
        found = predictor(sources[0]).cpu()
        return torch.tensor([found.score]), torch.from_numpy(found.anomaly_map)[None]

    return run


def encoded(frames: np.ndarray, format: str) -> list[bytes]:
    """Frames as the bytes of "jpeg" (quality 90) or "png" files."""
    from PIL import Image

    options = {"jpeg": {"quality": 90}, "png": {"compress_level": 1}}[format]
    files = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, format.upper(), **options)
        files.append(file.getvalue())
    return files


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """ValueError: no batch size, or one below 1."""
    if not batch_sizes or any(not isinstance(b, int) or b < 1 for b in batch_sizes):
        raise ValueError(f"batch_sizes is {batch_sizes}; it must name sizes of at least 1")


def _check_frames(frame_size: tuple[int, int] | None, decode: Sequence[str]) -> None:
    if frame_size is not None and (len(frame_size) != 2 or min(frame_size) < 1):
        raise ValueError(f"frame_size is {frame_size}; it must be (height, width), each >= 1")
    if isinstance(decode, str) or not set(decode) <= set(DECODES):
        raise ValueError(f"decode is {decode!r}; it must be a list of {' and '.join(DECODES)}")


def _plain(
    predictor: FastPredictor,
    detector: EfficientAD,
    frames: np.ndarray,
    expected: tuple[Tensor, Tensor] | None,
    batch: int,
) -> Contender:
    """The plain detector in torch eager, without any change, as a contender."""
    device = predictor.device
    dtype = PLAIN_DTYPES[device.type]
    plain = copy.deepcopy(detector).to(device, dtype)

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        out = plain(images.to(device))
        return out.score.cpu(), out.anomaly_map.cpu()

    shared = facts(predictor, detector, batch) | {"backend": "torch eager"}
    target = row("peer", "plain detector", **shared) | {"dtype": str(dtype).split(".")[1]}
    del target["buckets"]
    return contender(target, run, as_images(frames), expected, dtype)
