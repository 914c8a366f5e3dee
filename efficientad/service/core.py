"""The service itself: a picture in, a stored verdict out, whoever sends it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from efficientad.model.trust import Calibration
from efficientad.results.overlay import shrink_map
from efficientad.results.prediction import Prediction
from efficientad.service.batcher import Batcher, BatchPredictor, Busy
from efficientad.service.decoder import Decoder, Picture, decode
from efficientad.service.events import Hub
from efficientad.service.limits import Budget, Limits, Refused, Share, busy
from efficientad.service.metrics import Metrics
from efficientad.utils.checks import ValueRange, check_number
from efficientad.verdicts.queries import as_text
from efficientad.verdicts.store import Record, Store, Transaction

MAP_SIDE = 64  # cells of the maps that are kept, about


class ServedPredictor(BatchPredictor, Protocol):
    """What is served: a `fast.predictor.FastPredictor`."""

    threshold: float | None
    value_range: ValueRange | None
    image_size: tuple[int, int]


class Model(NamedTuple):
    """A detector to be served.

    Attributes:
        digest: of its file, see `path_digest`. predictor: computes.
        calibration: what its calibration kept to compare with; None for nothing.
    """

    digest: str
    predictor: ServedPredictor
    calibration: Calibration | None = None


class Sink(Protocol):
    """Where stored verdicts go besides: a `sinks.delivery.Delivery`."""

    def start(self, store: Store, metrics: Metrics) -> None:
        """Begin with what the store has and this sink has not sent."""

    def stored(self, number: int) -> None:
        """Learn that a verdict is stored; returns at once."""

    def close(self) -> None:
        """End within seconds."""


@dataclass
class Served:
    """A detector under the name by which it is served.

    Attributes:
        name: in addresses. digest, predictor, calibration: see `Model`.
        own_threshold: the detector file's. batcher: the queue in front of it.
    """

    name: str
    digest: str
    predictor: ServedPredictor
    calibration: Calibration | None
    own_threshold: float | None
    batcher: Batcher

    @property
    def detector(self) -> tuple[str, str]:
        """Name and digest: what its verdicts are found by."""
        return self.name, self.digest


@dataclass(frozen=True)
class Inspected:
    """A picture's verdict, as it is stored and answered; `found` still has its map."""

    answer: dict[str, Any]
    found: Prediction


class Inspection:
    """Detectors, the queue in front of each, and the store of their verdicts.

    Made and used in one event loop.

    Args:
        store: of the verdicts; the threshold last set for a detector is taken from it.
        limits: of requests. wait_ms: see `Batcher`. min_area: of boxes, in pixels of the picture.

    Attributes:
        models: by name, in the order of `serve`. hub: tells pages. metrics: for Prometheus.
        draining: no new pictures are taken.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits | None = None,
        *,
        wait_ms: float = 2.0,
        min_area: float = 0,
    ) -> None:
        self.store, self.limits = store, limits or Limits()
        self.wait_ms, self.min_area = wait_ms, check_number("min_area", min_area, 0)
        self.models: dict[str, Served] = {}
        self.hub, self.metrics = Hub(), Metrics()
        self.decoder = Decoder(self.limits)
        self.memory = Budget(self.limits.memory_gb * 1e9)
        self.draining = False
        self._sinks: list[Sink] = []
        self._at_work = 0
        self.metrics.gauge("efficientad_held_bytes", "Bytes of requests", lambda: self.memory.held)
        self.metrics.gauge("efficientad_listeners", "Pages that listen", lambda: len(self.hub))

    def serve(self, name: str, model: Model) -> Served:
        """Serve a detector under a name, by the threshold last set for it."""
        digest, predictor, calibration = model
        own = predictor.threshold
        with self.store.reading() as db:
            row = db.execute(
                "SELECT threshold FROM thresholds WHERE model = ? AND digest = ? "
                "ORDER BY id DESC LIMIT 1",
                (name, digest),
            ).fetchone()
        if row is not None:
            predictor.threshold = row["threshold"]

        def observe(images: int, seconds: float, waited: float) -> None:
            self.metrics.batches.labels(name).observe(images)
            self.metrics.seconds.labels(name, "queue").observe(waited)
            self.metrics.seconds.labels(name, "predictor").observe(seconds)

        batcher = Batcher(
            predictor, wait_ms=self.wait_ms, queue=self.limits.queue, observer=observe
        )
        self.models[name] = served = Served(name, digest, predictor, calibration, own, batcher)
        self.metrics.gauge(
            "efficientad_waiting", "Pictures in a queue", lambda: len(batcher), model=name
        )
        return served

    def send_to(self, sink: Sink) -> None:
        """Send verdicts on, from the store, until `close`. Raises StoreError."""
        sink.start(self.store, self.metrics)
        self._sinks.append(sink)

    def model(self, name: str | None) -> Served:
        """The detector of a name; without one, the only detector. Raises Refused (404, 400)."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        names = ", ".join(self.models)
        if name is None:
            raise Refused(400, f"several models are served; name one of {names}")
        if name not in self.models:
            raise Refused(404, f"there is no model {name[:80]!r}; there is {names}")
        return self.models[name]

    @property
    def ready(self) -> bool:
        """Whether pictures are taken."""
        return bool(self.models) and not self.draining

    async def inspect(
        self,
        served: Served,
        picture: bytes | Callable[[], Picture],
        share: Share,
        name: str | None = None,
        also: Callable[[Transaction, int], object] | None = None,
    ) -> Inspected:
        """Judge a picture, store it, then answer.

        Args:
            served: by which detector. picture: the file's bytes, or what makes the picture; it is
                called in a decoder's thread. share: of the memory, which the caller gives back.
            name: what the sender calls it. also: see `Store.add`.

        Raises:
            Refused: what cannot be read, or not now. StoreError: the verdict cannot be stored.
        """
        if not self.ready:
            raise busy("the service is stopping")
        start = time.monotonic()
        self._at_work += 1
        try:
            make = self._decoding(served, picture, share) if isinstance(picture, bytes) else picture
            made = await self.decoder.run(make)
            decoded = time.monotonic()
            try:
                future = served.batcher.submit(made.frame)
            except Busy as error:
                raise busy(str(error), error.retry_after) from error
            found = await asyncio.wrap_future(future)
            computed = time.monotonic()
            record = self._record(served, made, found, name)
            # Not given up where the sender is gone: it is judged, and so it is kept.
            number = await asyncio.shield(asyncio.wrap_future(self.store.add(record, also)))
        finally:
            self._at_work -= 1
        for sink in self._sinks:
            sink.stored(number)
        end = time.monotonic()
        for part, seconds in (
            ("decode", decoded - start), ("store", end - computed), ("all", end - start)
        ):  # fmt: skip
            self.metrics.seconds.labels(served.name, part).observe(seconds)
        self.metrics.verdicts.labels(served.name, word_of(record.is_anomalous)).inc()
        answer = answer_of(number, record)
        self.hub.publish("verdict", {**answer, "review": None})
        return Inspected(answer, found)

    def _decoding(self, served: Served, data: bytes, share: Share) -> Callable[[], Picture]:
        value_range, limits = served.predictor.value_range, self.limits
        return lambda: decode(data, value_range, limits, share)

    def _record(
        self, served: Served, picture: Picture, found: Prediction, name: str | None
    ) -> Record:
        values = shrink_map(np.asarray(found.anomaly_map, np.float32), MAP_SIDE)
        small = np.clip(values, -65504, 65504).astype("<f2")
        regions = [] if found.threshold is None else found.regions(min_area=self.min_area)
        return Record(
            model=served.name,
            digest=served.digest,
            score=found.score,
            map_mean=found.map_mean(),
            threshold=found.threshold,
            is_anomalous=None if found.threshold is None else bool(found.is_anomalous),
            size=(int(found.source_size[0]), int(found.source_size[1])),
            boxes=[r.to_dict() for r in regions],
            picture=picture.data,
            suffix=picture.suffix,
            map_size=(small.shape[0], small.shape[1]),
            map_values=small.tobytes(),
            name=name,
        )

    async def set_threshold(self, served: Served, value: float | None, reason: str) -> None:
        """Judge by another threshold from the next picture on; kept in the store."""
        row = (time.time(), served.name, served.digest, value, reason)
        future: Future[Any] = self.store.submit(
            lambda step: step.db.execute(
                "INSERT INTO thresholds (time, model, digest, threshold, reason) "
                "VALUES (?, ?, ?, ?, ?)",
                row,
            )
        )
        await asyncio.wrap_future(future)
        served.predictor.threshold = value
        self.hub.publish("threshold", {"model": served.name, "threshold": value})

    async def close(self) -> None:
        """Answer what is at work, take nothing new, close queues, sinks and store."""
        self.draining = True
        self.hub.close()
        while self._at_work:
            await asyncio.sleep(0.01)
        self.decoder.close()
        for served in self.models.values():
            await asyncio.to_thread(served.batcher.close)
        await asyncio.gather(*(asyncio.to_thread(sink.close) for sink in self._sinks))
        await asyncio.to_thread(self.store.close)


def answer_of(number: int, record: Record) -> dict[str, Any]:
    """A verdict as JSON takes it; a score that is not a number is null, and anomalous."""
    return {
        "id": number,
        "time": as_text(record.time),
        "model": record.model,
        "name": record.name,
        "score": record.score if math.isfinite(record.score) else None,
        "is_anomalous": record.is_anomalous,
        "threshold": record.threshold,
        "source_size": list(record.size),
        "boxes": record.boxes,
    }


def word_of(is_anomalous: bool | None) -> str:
    """A verdict in a word."""
    return "none" if is_anomalous is None else "anomalous" if is_anomalous else "normal"
