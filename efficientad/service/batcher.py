"""A queue in front of one predictor: frames of many callers go through it in common batches."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from efficientad.fast.frame_inputs import Frame
from efficientad.results.prediction import Prediction
from efficientad.utils.checks import check_integer, check_number

_SMOOTHING = 0.1  # weight of the newest batch in the mean seconds per frame


class Busy(RuntimeError):
    """The queue is full, or closed; `retry_after` says in how many whole seconds to come again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BatchPredictor(Protocol):
    """What the queue needs of `fast.predictor.FastPredictor`."""

    batch_sizes: tuple[int, ...]

    def predict_frames(
        self, frames: Sequence[Frame], *, map_size: str | None, batched: bool
    ) -> Prediction:
        """Score frames that `frame_inputs.read_frame` gave."""


@dataclass
class _Waiting:
    frame: Frame
    future: Future[Prediction] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


Observer = Callable[
    [int, float, float], object
]  # images, seconds computed, seconds the first waited


class Batcher:
    """Frames of many threads in, each one's own prediction out.

    A batch begins when a frame is there, waits at most `wait_ms` for others and fills up to the
    predictor's largest batch size. A batch that fails is computed again frame by frame, so that
    only those fail that cannot be computed.

    Args:
        predictor: only this queue's thread calls it.
        wait_ms: milliseconds that the first frame of a batch waits for others; 0 waits for none.
        queue: most frames that wait; more are refused.
        map_size: of the maps, as the predictor takes it.
        observer: called after each batch with its size, the seconds that it took and the seconds
            that its first frame had waited.

    Raises:
        ValueError: wait_ms below 0, queue below 1.
    """

    def __init__(
        self,
        predictor: BatchPredictor,
        *,
        wait_ms: float = 2.0,
        queue: int = 64,
        map_size: str | None = "input",
        observer: Observer | None = None,
    ) -> None:
        self._predictor = predictor
        self._wait = check_number("wait_ms", wait_ms, 0) / 1000
        self._most = check_integer("queue", queue, 1)
        self._map_size, self._observer = map_size, observer
        self._largest = max(predictor.batch_sizes)
        self._pending: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.0  # a frame takes
        self._thread = threading.Thread(target=self._run, name="efficientad-batcher", daemon=True)
        self._thread.start()

    def submit(self, frame: Frame) -> Future[Prediction]:
        """Put a frame into the queue; the future gives its prediction with host values.

        Raises:
            Busy: the queue is full or closed.
        """
        with self._changed:
            if self._closed:
                raise Busy("the service is stopping", 1)
            if len(self._pending) >= self._most:
                seconds = max(1, math.ceil(self._most * self._seconds))
                raise Busy(f"{self._most} pictures are waiting already", seconds)
            waiting = _Waiting(frame)
            self._pending.append(waiting)
            self._changed.notify()
        return waiting.future

    def __len__(self) -> int:
        """Frames that wait."""
        return len(self._pending)

    def close(self) -> None:
        """Take no more frames; returns when those that wait are computed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- the queue's thread ------------------------------------------------------------------

    def _run(self) -> None:
        while batch := self._next():
            start = time.monotonic()
            self._answer(batch)
            took = time.monotonic() - start
            each = took / len(batch)
            self._seconds += _SMOOTHING * (each - self._seconds) if self._seconds else each
            if self._observer is not None:
                self._observer(len(batch), took, start - batch[0].since)

    def _next(self) -> list[_Waiting]:
        """The next batch, without frames that nobody waits for any more; empty: closed."""
        with self._changed:
            while True:
                while not self._pending and not self._closed:
                    self._changed.wait()
                if not self._pending:
                    return []
                until = self._pending[0].since + self._wait
                while len(self._pending) < self._largest and not self._closed:
                    left = until - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                count = min(len(self._pending), self._largest)
                batch = [self._pending.popleft() for _ in range(count)]
                batch = [w for w in batch if w.future.set_running_or_notify_cancel()]
                if batch:
                    return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            predictions = list(self._predict([w.frame for w in batch]))
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for waiting in batch:
                self._answer([waiting])
            return
        for waiting, prediction in zip(batch, predictions, strict=True):
            waiting.future.set_result(prediction)

    def _predict(self, frames: list[Frame]) -> Prediction:
        return self._predictor.predict_frames(frames, map_size=self._map_size, batched=True).cpu()
