"""Bytes that somebody sent to pixels: in threads, of limited size, in limited time."""

from __future__ import annotations

import asyncio
import io
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from efficientad.data.decoding import EncodedImage, ImageError
from efficientad.fast.frame_inputs import Frame, too_long
from efficientad.service.limits import Limits, Refused, Share, busy
from efficientad.utils.checks import ValueRange

T = TypeVar("T")

MOST_ABANDONED = 8  # threads still at work on what has been refused for its time
_SUFFIXES = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "TIFF": "tiff", "BMP": "bmp", "DIB": "bmp",
    "GIF": "gif", "PPM": "ppm", "WEBP": "webp", "JPEG2000": "jp2", "AVIF": "avif", "HEIF": "heic",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture as it came (or as PNG, where pixels came), its suffix, and its frame."""

    data: bytes
    suffix: str
    frame: Frame


class Decoder:
    """Runs work on what was sent in threads, a few at a time.

    A thread cannot be stopped: work that takes longer than its limit is refused, its thread ends
    with it, and another takes its place, up to `MOST_ABANDONED` of them. Belongs to one event loop.
    """

    def __init__(self, limits: Limits, threads: int | None = None) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(threads or max(2, min(8, os.cpu_count() or 2)))
        self._waiting = 0
        self._abandoned = 0
        self._idle: list[_Worker] = []

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, or what it raised.

        Raises:
            Refused: 503 where too many wait, 422 where it takes too long.
        """
        if self._waiting >= self._limits.queue:
            raise busy(f"{self._waiting} pictures are waiting to be decoded already")
        if self._abandoned >= MOST_ABANDONED:
            raise busy(f"{self._abandoned} pictures that take too long are still being decoded", 5)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        worker = self._idle.pop() if self._idle else _Worker()
        future = worker.start(work)
        loop = asyncio.get_running_loop()
        seconds = self._limits.decode_seconds
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), seconds)
        except asyncio.TimeoutError:
            raise Refused(422, f"decoding took longer than {seconds:g} seconds") from None
        finally:
            self._slots.release()
            if future.done():
                self._idle.append(worker)
            else:  # too long, or nobody waits any more
                worker.end()
                self._abandoned += 1
                future.add_done_callback(lambda _: _later(loop, self._back))

    def close(self) -> None:
        """End the threads that wait for work."""
        while self._idle:
            self._idle.pop().end()

    def _back(self) -> None:
        self._abandoned -= 1


class _Worker:
    """A thread that does one work after the other."""

    def __init__(self) -> None:
        self._works: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name="efficientad-decoder", daemon=True).start()

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Do a work, once those before it are done."""
        future: Future[T] = Future()
        self._works.put((work, future))
        return future

    def end(self) -> None:
        """End the thread, once its works are done."""
        self._works.put(None)

    def _run(self) -> None:
        while (one := self._works.get()) is not None:
            _run(*one)
            del one  # its picture


def _run(work: Callable[[], T], future: Future[T]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _later(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)


def decode(data: bytes, value_range: ValueRange | None, limits: Limits, share: Share) -> Picture:
    """A picture file as `predict` reads it.

    Raises:
        Refused: 413 for too many pixels by its header, 422 for what cannot be read.
    """
    try:
        image = EncodedImage(data)
        height, width = image.size
        check_pixels(height, width, limits)
        share.take(3 * height * width)
        return Picture(data, _SUFFIXES.get(image.format, "bin"), image.pixels(value_range))
    except ImageError as error:
        raise Refused(422, f"the picture cannot be read: {error.reason}") from error
    except MemoryError as error:
        raise Refused(413, "the picture cannot be read: there is no memory for it") from error


def from_pixels(pixels: np.ndarray, limits: Limits, share: Share) -> Picture:
    """A picture of uint8 pixels (H, W, 3), kept as PNG."""
    from PIL import Image

    check_pixels(pixels.shape[0], pixels.shape[1], limits)
    share.take(2 * pixels.size)
    frame = np.ascontiguousarray(pixels)
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG", compress_level=1)
    return Picture(stream.getvalue(), "png", frame)


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Refuse (413) more pixels than the limit, or a side that is too long."""
    reason = too_long(height, width)
    if reason is not None:
        raise Refused(413, f"the picture cannot be judged: {reason}")
    if height * width > limits.megapixels * 1e6:
        raise Refused(
            413,
            f"the picture has {width}x{height} pixels, {height * width / 1e6:.3g} megapixels; "
            f"at most {limits.megapixels:g} are read",
        )
