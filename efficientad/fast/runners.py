"""The predictor's buffers: packed images to results, eagerly or in CUDA graphs, and the way there.

A runner owns the input buffers; on a GPU it has graphs for every bucket. It is filled with a batch,
runs it and hands out the distance maps and the anomaly map with the scores; all of these are
overwritten by the next run. The predictor serialises runs and copies what it returns. On a GPU
`Staging` fills the input buffers through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from efficientad.fast.backends import Backend, Maps
from efficientad.fast.frame_inputs import Frame
from efficientad.ops import frame_path
from efficientad.utils.cuda_graphs import captured

_SCORES_ALIGNED = 16  # floats; the map behind the scores starts on a 64-byte boundary


class Result(NamedTuple):
    """What a run left in the runner's buffers, for `images` images and padding up to the bucket.

    maps: the distance maps, (P, N, h, w) or (N, h, w). anomaly_map: (N, H, W) at the network's
    input size. score: (N,). joined: one flat tensor that holds scores and maps, or None.
    """

    maps: Maps
    anomaly_map: Tensor
    score: Tensor
    joined: Tensor | None = None

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """(score, anomaly_map) as views of a copy of `joined`."""
        images = len(self.score)
        start = joined.numel() - self.anomaly_map.numel()
        return joined[:images], joined[start:].view(self.anomaly_map.shape)


class EagerRunner:
    """Runs the backend as it is, for exactly the images it is given."""

    def __init__(
        self, backend: Backend, image_size: tuple[int, int], map_padding: int, images: int
    ) -> None:
        self.backend, self.image_size, self.map_padding = backend, image_size, map_padding
        height, width = (length + 2 * backend.border for length in image_size)
        shape = (images, height, width, backend.channels)
        self._packed = torch.zeros(shape, dtype=backend.packed_dtype, device=backend.device)

    def packed(self, bucket: int) -> Tensor:
        """The input buffer of a batch of `bucket` images: (bucket, H, W, channels)."""
        return self._packed[:bucket]

    def run(self, bucket: int) -> Result:
        """Run what lies in `packed(bucket)`."""
        maps = self.backend.distance_maps(self.packed(bucket))
        anomaly_map, score = self.backend.anomaly_map(maps, self.image_size, self.map_padding, None)
        return Result(maps, anomaly_map, score)


class GraphRunner(EagerRunner):
    """One CUDA graph per bucket, from packed images on, and one that packs uint8 frames first.

    Args:
        buckets: the batch sizes, ascending.
        stream: where everything runs.

    Must be built and used under its device and stream. Nothing is allocated after construction.
    """

    def __init__(
        self,
        backend: Backend,
        image_size: tuple[int, int],
        map_padding: int,
        buckets: tuple[int, ...],
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(backend, image_size, map_padding, buckets[-1])
        self._frames = torch.zeros(
            (buckets[-1], *image_size, 3), dtype=torch.uint8, device=backend.device
        )
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Result]] = {}
        for bucket in reversed(buckets):  # the largest batch sizes every buffer
            anomaly_map, score, joined = self._allocate(bucket)
            for from_frames in (False, True):
                graph, maps = self._capture((anomaly_map, score), from_frames)
                result = Result(maps, anomaly_map, score, joined)
                self._captured[bucket, from_frames] = graph, result

    def frames(self, bucket: int) -> Tensor:
        """The input buffer for frames of the network's size: uint8 (bucket, H, W, 3)."""
        return self._frames[:bucket]

    def run(self, bucket: int, *, from_frames: bool = False) -> Result:
        """Replay the graph on what lies in `packed(bucket)` or `frames(bucket)`."""
        graph, result = self._captured[bucket, from_frames]
        graph.replay()
        return result

    def _allocate(self, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output buffers of one bucket: maps, scores, and both as one, the scores in front."""
        scores = -(-bucket // _SCORES_ALIGNED) * _SCORES_ALIGNED
        height, width = self.image_size
        joined = torch.zeros(scores + bucket * height * width, device=self.backend.device)
        anomaly_map = joined[scores:].view(bucket, height, width)
        return anomaly_map, joined[:bucket], joined

    def _step(self, out: tuple[Tensor, Tensor], from_frames: bool) -> Maps:
        """Fill these maps and scores, and give the distance maps."""
        bucket = len(out[1])
        packed = self.packed(bucket)
        if from_frames:
            self.backend.pack(self.frames(bucket), packed, channels_last=True)
        maps = self.backend.distance_maps(packed)
        self.backend.anomaly_map(maps, self.image_size, self.map_padding, out)
        return maps

    def _capture(
        self, out: tuple[Tensor, Tensor], from_frames: bool
    ) -> tuple[torch.cuda.CUDAGraph, Maps]:
        for _ in range(2):  # compiles, loads modules and chooses algorithms outside the capture
            self._step(out, from_frames)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The pool is shared: the graphs never run at once, and what one leaves in its maps is read
        # before another runs.
        with captured(graph, self._stream, self._pool):
            maps = self._step(out, from_frames)
        return graph, maps


class _Slot:
    def __init__(self, packed: Tensor, frames: Tensor) -> None:
        self.packed, self.frames = (
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (packed, frames)
        )
        self.sent = torch.cuda.Event()


class Staging:
    """Fills the device's input buffers from host and device frames, on the current stream.

    Args:
        packed: the device buffer of packed images, (N, H + 2 border, W + 2 border, C).
        frames: the device buffer of frames of the network's size, uint8 (N, H, W, 3).
        slots: pinned copies of both that are used in turn. The host waits only where a slot is
            still being sent, `slots` steps later.
    """

    def __init__(self, packed: Tensor, frames: Tensor, slots: int = 3) -> None:
        self._packed, self._frames = packed, frames
        self._slots = cycle([_Slot(packed, frames) for _ in range(slots)])

    def fill_frames(self, frames: Sequence[Frame], *_normalization: object) -> None:
        """Frames of the network's size: uint8, packed later by the graph."""
        slot = next(self._slots)
        slot.sent.synchronize()
        for i, frame in enumerate(frames):
            if isinstance(frame, Tensor):
                self._frames[i].copy_(frame)
            else:
                np.copyto(slot.frames[i].numpy(), frame)
        self._send(slot, slot.frames, self._frames, frames)

    def fill_packed(
        self, frames: Sequence[Frame], mean: list[float], std: list[float], border: int
    ) -> None:
        """Frames of any size: resized, normalised and packed, each where it lies."""
        slot = next(self._slots)
        slot.sent.synchronize()
        height, width = (length - 2 * border for length in self._packed.shape[1:3])
        for i, frame in enumerate(frames):
            place = self._packed[i] if isinstance(frame, Tensor) else slot.packed[i]
            frame_path.resize_pack(
                frame, (height, width), mean, std, border=border,
                channels=self._packed.shape[3], dtype=self._packed.dtype, out=place,
            )  # fmt: skip
        self._send(slot, slot.packed, self._packed, frames)

    def _send(self, slot: _Slot, source: Tensor, target: Tensor, frames: Sequence[Frame]) -> None:
        """Copy the host frames to the device, neighbours together."""
        start = None
        for i in range(len(frames) + 1):
            on_host = i < len(frames) and not isinstance(frames[i], Tensor)
            if on_host and start is None:
                start = i
            elif not on_host and start is not None:
                target[start:i].copy_(source[start:i], non_blocking=True)
                start = None
        slot.sent.record()
