"""Frames on their way to a CUDA device, through pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from efficientad.fast.frame_inputs import Frame
from efficientad.ops import frame_path


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

    def fill_frames(self, frames: Sequence[Frame], *_normalization) -> None:
        """Frames of the network's size: uint8, packed later by the graph."""
        slot = next(self._slots)
        slot.sent.synchronize()
        for i, frame in enumerate(frames):
            if isinstance(frame, Tensor):
                self._frames[i].copy_(frame)
            else:
                np.copyto(slot.frames[i].numpy(), frame)
        self._send(slot, slot.frames, self._frames, frames)

    def fill_packed(self, frames: Sequence[Frame], mean, std, border: int) -> None:
        """Frames of any size: resized, normalised and packed, each where it lies."""
        slot = next(self._slots)
        slot.sent.synchronize()
        height, width = (length - 2 * border for length in self._packed.shape[1:3])
        options = {"border": border, "channels": self._packed.shape[3], "dtype": self._packed.dtype}
        for i, frame in enumerate(frames):
            place = self._packed[i] if isinstance(frame, Tensor) else slot.packed[i]
            frame_path.resize_pack(frame, (height, width), mean, std, **options, out=place)
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
