"""CUDA graphs: captured one at a time in the process, and not let go of while they run."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.RLock()


@contextmanager
def captured(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Capture what runs inside, on `stream` and on those that join it, into `graph`.

    pool: memory that graphs share, as `graph.pool()` gives it.

    Other threads may allocate, pin and compute meanwhile (thread_local). What no mode allows is
    kept out: `torch.cuda.graph` waits for the whole device at its start, which would break another
    thread's capture, so there is a lock; and an old graph that the garbage collector meets would be
    destroyed in the middle of this one, so it waits. Other code must not call
    `torch.cuda.synchronize()` in another thread meanwhile.
    """
    with _lock, torch.cuda.device(stream.device):
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                yield
        finally:
            if collecting:
                gc.enable()


def wait_before_drop(owner: object, stream: torch.cuda.Stream) -> None:
    """Let go of an object's graphs, pinned memory and buffers only when `stream` has run.

    When `owner` is dropped, the host waits for what was submitted on `stream`; then the owner's
    attributes go. Not at the program's end, where the driver may be gone already.
    """
    weakref.finalize(owner, stream.synchronize).atexit = False
