"""Frames of an iterable to predictions, read ahead."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from efficientad.data.decoding import ImageError
from efficientad.data.images import as_sources
from efficientad.fast.frame_inputs import Frame, FramePredictor, read_frame
from efficientad.results.prediction import Prediction
from efficientad.utils.checks import check_integer

POLICIES = ("all", "latest")
_WAIT = 0.1  # seconds between looks at whether the other side is still there


def stream(
    predictor: FramePredictor,
    sources: Iterable[Any],
    *,
    policy: str = "all",
    map_size: str | None = "input",
    workers: int = 2,
    on_error: Callable[[int, Any, ImageError], None] | None = None,
) -> Iterator[Prediction]:
    """Predictions of frames, one by one, in order, each as soon as it is submitted.

    A thread reads `sources` and `workers` threads decode, so that reading, decoding, copying and
    computing overlap; the predictor is given what is there, up to its largest batch, and never
    waits for a batch to fill. On a GPU a prediction's fields are still being computed when it comes
    out; the next frame is submitted while they are, until a value is read.

    Args:
        predictor: a FastPredictor.
        sources: frames as `FastPredictor.__call__` takes a single one; a camera's iterator may be
            endless. Its own errors are raised where they occur, after all frames before them. Or
            the path of a folder, which is searched with its subfolders.
        policy: "all" answers every frame exactly once. "latest" reads as fast as frames come and
            answers the newest, leaving out those that the device has no time for; `index` tells.
        map_size: as in `FastPredictor.__call__`.
        workers: decoding threads.
        on_error: called with (index, source, error) for a frame that cannot be read, which then has
            no prediction; without it the error is raised at its place.

    Raises:
        ValueError: an unknown policy, no decoding thread, one frame where several belong, or a
            folder without an image. FileNotFoundError: a folder that does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; it must be 'all' or 'latest'")
    check_integer("workers", workers, 1)
    return _stream(predictor, as_sources(sources), policy, map_size, workers, on_error)


def _stream(predictor, sources, policy, map_size, workers, on_error) -> Iterator[Prediction]:
    depth = 2 * workers + predictor.batch_sizes[-1]
    read = partial(read_frame, value_range=predictor.value_range)
    feed = _Feed(sources, policy, workers, depth, _reading_stream(predictor), read)
    try:
        for loaded in feed.batches(predictor.batch_sizes[-1]):
            good: list[tuple[int, Frame]] = []
            failed: list[tuple[int, Any, ImageError]] = []
            for index, source, future in loaded:
                error = future.exception()
                if error is None:
                    good.append((index, future.result()))
                elif isinstance(error, ImageError):
                    failed.append((index, source, error))
                else:
                    raise error
            # An error is raised at its place: after the frames before it, before those behind it.
            stop = failed[0][0] if failed and on_error is None else None
            kept = [pair for pair in good if stop is None or pair[0] < stop]
            if kept:
                indices, frames = zip(*kept, strict=True)
                batch = predictor.predict_frames(frames, map_size=map_size, batched=True)
                for i, index in enumerate(indices):
                    one = batch[i]
                    one.index = index
                    yield one
            for index, source, error in failed:
                if on_error is None:
                    raise error
                on_error(index, source, error)
    finally:
        feed.close()


def _reading_stream(predictor: FramePredictor) -> contextlib.AbstractContextManager:
    """The caller's CUDA stream for the thread that reads: frames that the iterator makes on the
    device are then ordered before the steps, which wait for that stream."""
    if predictor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.current_stream(predictor.device))


class _Feed:
    """Reads an iterable in a thread and decodes in others; holds at most `depth` frames."""

    def __init__(
        self,
        sources: Iterable[Any],
        policy: str,
        workers: int,
        depth: int,
        reading: contextlib.AbstractContextManager,
        read: Callable[[Any], Frame],
    ) -> None:
        self._reading, self._read_frame = reading, read
        self._latest = policy == "latest"
        self._queue: queue.Queue = queue.Queue(1 if self._latest else depth)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="efficientad-decode")
        # A daemon: a camera's iterator that never returns must not keep the process alive.
        self._reader = threading.Thread(
            target=self._read, args=(sources,), name="efficientad-reader", daemon=True
        )
        self._reader.start()

    def batches(self, most: int) -> Iterator[list[tuple[int, Any, Future]]]:
        """Lists of up to `most` items that are there, at least one; raises what the reader did."""
        while True:
            items, end = [self._queue.get()], None
            while len(items) < most and items[-1][1] is not _END:
                try:
                    items.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            if items[-1][1] is _END:
                end = items.pop()
            if items:
                yield items
            if end is not None:
                if end[2] is not None:
                    raise end[2]
                return

    def close(self) -> None:
        """Stop reading and decoding; the reader ends with the item it is waiting for."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, sources: Iterable[Any]) -> None:
        error = None
        try:
            with self._reading:
                for index, source in enumerate(sources):
                    if self._closed.is_set():
                        return
                    self._put((index, source, self._pool.submit(self._read_frame, source)))
        except BaseException as raised:  # it belongs to whoever reads the stream
            error = raised
        if not self._closed.is_set():
            self._put((-1, _END, error), last=True)

    def _put(self, item: tuple, last: bool = False) -> None:
        while not self._closed.is_set():
            try:
                if self._latest and not last:
                    self._replace(item)
                else:
                    self._queue.put(item, timeout=_WAIT)
                return
            except queue.Full:
                continue

    def _replace(self, item: tuple) -> None:
        """Put the item in the place of one that nobody has taken yet."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            try:
                self._queue.get_nowait()[2].cancel()
            except queue.Empty:
                pass
            self._queue.put_nowait(item)


_END = object()
