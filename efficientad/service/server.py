"""The running service: models loaded, server started, everything answered at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from efficientad.service.app import create_app
from efficientad.service.core import Inspection, Model, ServedPredictor, Sink
from efficientad.service.guard import Guard, check_key, is_loopback
from efficientad.service.limits import Limits
from efficientad.utils.checks import check_number
from efficientad.verdicts.retention import Retention, check_limits
from efficientad.verdicts.store import Store

HEADER_SECONDS = 10.0  # in which a request's head must have come
SECONDS_BETWEEN_RETENTIONS = 60.0
MOST_CONNECTIONS = 512
DRAIN_SECONDS = 60  # for requests at work when the service is stopped
_log = logging.getLogger("efficientad.service")
Source = Callable[[Inspection], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """How a service runs.

    Attributes:
        store: folder of the verdicts. database: see `Store`. host, port: where it listens; port 0
            takes a free one.
        key: the API key, or None. hosts: see `guard.Guard`.
        limits, wait_ms, min_area: see `core.Inspection`. durable: see `Store`.
        keep_days, keep_gb: see `Retention`.

    Raises:
        ValueError: a host that others can reach, and no key; a key that `guard.check_key` refuses;
            a number that is out of its range.
    """

    store: Path
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    wait_ms: float = 2.0
    min_area: float = 0.0
    durable: bool = True
    database: str | None = None
    keep_days: float | None = None
    keep_gb: float | None = None

    def __post_init__(self) -> None:
        check_number("wait_ms", self.wait_ms, 0)
        check_number("min_area", self.min_area, 0)
        check_limits(self.keep_days, self.keep_gb)
        check_key(self.key)
        if self.key is None and not is_loopback(self.host) and "*" not in self.hosts:
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there is no API key; set the "
                "environment variable EFFICIENTAD_API_KEY, or say --without-key"
            )


def run(
    models: Mapping[str, Model],
    settings: Settings,
    source: Source | None = None,
    sinks: Sequence[Sink] = (),
) -> None:
    """Serve models by name until SIGINT or SIGTERM, then drain.

    source: pictures that nobody sends, judged beside those that are sent. sinks: where verdicts
    are sent on.

    Raises:
        StoreError: the store cannot be opened. OSError: the address cannot be bound. What the
        source raises, after what was at work is stored.
    """
    store = Store(settings.store, durable=settings.durable, database=settings.database)
    try:
        retention = Retention(store, settings.keep_days, settings.keep_gb)
        sock = bound_socket(settings.host, settings.port)
    except BaseException:
        store.close()
        raise
    if store.removed or store.missing:
        print(
            f"the store was not closed: {store.removed} pictures without a verdict removed, "
            f"{store.missing} verdicts without a picture"
        )
    asyncio.run(_serve(models, settings, store, retention, sock, source, sinks))


async def _serve(
    models: Mapping[str, Model],
    settings: Settings,
    store: Store,
    retention: Retention,
    sock: socket.socket,
    source: Source | None,
    sinks: Sequence[Sink],
) -> None:
    inspection = Inspection(
        store, settings.limits, wait_ms=settings.wait_ms, min_area=settings.min_area
    )
    for name, model in models.items():
        served, predictor = inspection.serve(name, model), model.predictor
        await asyncio.to_thread(_warm_up, predictor)
        if predictor.threshold != served.own_threshold:
            print(f"{name}: threshold {predictor.threshold}, as set before, from the store")
    for sink in sinks:
        inspection.send_to(sink)
    app = create_app(inspection, key=settings.key, hosts=settings.hosts)
    server = Server(app_config(app), inspection)
    keeping = asyncio.create_task(_keep(retention))
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(models)} on http://{shown}:{port}", flush=True)
    watching = None if source is None else asyncio.create_task(_watch(source, inspection, server))
    try:
        await server.serve([sock])
    finally:
        keeping.cancel()
        if watching is not None:
            watching.cancel()
        await inspection.close()
    if watching is not None:
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    print("stopped; everything that was answered is stored", flush=True)


async def _watch(source: Source, inspection: Inspection, server: Server) -> None:
    """Take the pictures of a source; what it raises stops the service."""
    try:
        await source(inspection)
    except Exception:
        if inspection.draining:  # what it had begun is refused now
            return
        server.handle_exit(signal.SIGTERM, None)
        raise


def app_config(app: Guard) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        proxy_headers=False,
    )


class Server(uvicorn.Server):
    """Takes no new pictures and ends the pages' streams as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, inspection: Inspection) -> None:
        super().__init__(config)
        self._inspection = inspection

    def handle_exit(self, sig: int, frame: Any) -> None:
        # Not passed on: uvicorn would raise the signal again after its end, into the draining.
        self._inspection.draining = True
        self._inspection.hub.close()
        self.force_exit = self.should_exit  # the second one waits for no connection
        self.should_exit = True


class Protocol(H11Protocol):
    """uvicorn's, which closes connections that do not send the head of a request in time."""

    _until: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._until = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._until is None and not self.transport.is_closing():
            self._until = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None


async def _keep(retention: Retention) -> None:
    """Apply the limits of what is kept, now and every minute."""
    while True:
        try:
            gone = await asyncio.to_thread(retention.apply)
        except OSError as error:
            _log.error("verdicts that are too old were not deleted: %s", error)
        else:
            if gone:
                _log.info("%d verdicts deleted, beyond the limits of what is kept", gone)
        await asyncio.sleep(SECONDS_BETWEEN_RETENTIONS)


def _warm_up(predictor: ServedPredictor) -> None:
    """The first call loads libraries: not while somebody waits."""
    frame = np.zeros((*predictor.image_size, 3), np.uint8)
    found = predictor.predict_frames([frame], map_size="input", batched=True).cpu()[0]
    found.regions(threshold=0.0)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises OSError, which names it, where it is taken or not here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay off only where the protocol is named: an answer goes out in two
    # writes, and the second would wait some 40 ms for the client's acknowledgement of the first.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(MOST_CONNECTIONS)  # who comes before the server is up waits
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {host} port {port}: {error}") from error
    return sock
