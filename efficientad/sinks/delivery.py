"""Sends stored verdicts to a receiver, one after the other, until each is taken."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from typing import Protocol

from efficientad.service.metrics import Metrics
from efficientad.sinks.outbox import Event, Outbox
from efficientad.verdicts.store import Store

AT_ONCE = 100  # verdicts that are read together
LOOK_SECONDS = 2.0  # where nobody says that there is a new one
NOTE_SECONDS = 1.0  # what was sent since is sent again after a kill
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries; each is twice the one before
STOP_SECONDS = 5.0  # for what is left when the service stops
_log = logging.getLogger("efficientad.sinks")


class NotTaken(Exception):
    """A receiver did not take an event.

    Attributes:
        reason: a sentence. retry_after: seconds that it asks to be left alone.
        patience: seconds of such refusals after which the event is passed over.
    """

    def __init__(
        self, reason: str, *, retry_after: float = 0.0, patience: float = math.inf
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.patience = reason, retry_after, patience


class Receiver(Protocol):
    """Takes events, one at a time, from one thread.

    Attributes:
        name: of the sink, under which its place is kept. address: without secrets, for messages.
    """

    name: str
    address: str

    def send(self, event: Event) -> None:
        """Return when it is taken, within some 10 seconds. Raises NotTaken."""

    def close(self) -> None:
        """Let connections go."""


class Delivery:
    """A thread that sends what is stored, at least once and in order, and keeps its place there.

    An answer never waits for it. What a receiver does not take is tried again after 1 s, 2 s, 4 s
    and so on up to 60 s, a quarter more or less, or when the receiver says; it holds up what comes
    after it, and is passed over only where `NotTaken.patience` says so. A verdict that the store
    deletes before is not sent.

    Args:
        receiver: of the events. only_anomalous: send no other verdicts.
    """

    def __init__(self, receiver: Receiver, *, only_anomalous: bool = False) -> None:
        self.receiver, self.only_anomalous = receiver, only_anomalous
        self._wake, self._stop = threading.Event(), threading.Event()
        self._until = math.inf  # of the monotonic clock: then it ends, whatever is left
        self._thread: threading.Thread | None = None
        self._place = self._noted = self._last = 0

    def start(self, store: Store, metrics: Metrics) -> None:
        """Begin behind the last verdict that was sent. Raises StoreError."""
        self._outbox = Outbox(store, self.receiver.name)
        self._place = self._noted = self._outbox.start
        self._last = self._outbox.last
        self._counts = {
            result: metrics.deliveries.labels(self.receiver.name, result)
            for result in ("delivered", "failed", "refused", "deleted")
        }
        metrics.gauge(
            "efficientad_delivery_backlog",
            "Verdicts behind the last one that a sink has sent or passed over",
            lambda: self._last - self._place,
            sink=self.receiver.name,
        )
        self._thread = threading.Thread(
            target=self._run, name=f"efficientad-{self.receiver.name}", daemon=True
        )
        self._thread.start()

    def stored(self, number: int) -> None:
        """Say that a verdict is stored; returns at once."""
        self._last = max(self._last, number)
        self._wake.set()

    def close(self) -> None:
        """Send what is left, for some seconds and while it is taken; the rest stays stored."""
        self._until = time.monotonic() + STOP_SECONDS
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(4 * STOP_SECONDS)  # a try may be under way

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._round()
            except Exception as error:  # a store that cannot be read or written just now
                _log.error("%s: deliveries pause: %s", self.receiver.name, error)
                going = not self._stop.wait(LONGEST_PAUSE)
        with contextlib.suppress(Exception):  # it is sent again
            self._note()
        self.receiver.close()

    def _round(self) -> bool:
        """Send what is there, or wait for something; whether to go on."""
        self._wake.clear()
        stopping = self._stop.is_set()  # before what is read below
        events = self._outbox.after(self._place, AT_ONCE)
        if not events:
            self._note()
            if stopping:
                return False
            self._wake.wait(LOOK_SECONDS)
            return True
        noted = time.monotonic()
        for event in events:
            if event.number > self._place + 1:
                self._count("deleted", event.number - self._place - 1)
            wanted = event.verdict == "anomalous" or not self.only_anomalous
            if wanted and not self._deliver(event):
                return False
            self._place = event.number
            self._last = max(self._last, event.number)
            if time.monotonic() >= noted + NOTE_SECONDS:
                self._note()
                noted = time.monotonic()
        return True

    def _deliver(self, event: Event) -> bool:
        """Send an event until it is taken or passed over; False: the service stops before."""
        failures, refused_since, reason = 0, None, None
        while time.monotonic() < self._until:
            try:
                self.receiver.send(event)
            except NotTaken as error:
                failures += 1
                now = time.monotonic()
                if error.patience == math.inf:
                    refused_since = None
                elif refused_since is None:
                    refused_since = now
                if refused_since is not None and now - refused_since >= error.patience:
                    self._count("refused")
                    self._say("verdict %d is not sent: %s", event.number, error.reason)
                    return True
                self._count("failed")
                if error.reason != reason:
                    reason = error.reason
                    self._say("verdict %d waits: %s", event.number, reason)
                if self._stop.wait(pause(failures, error.retry_after)):
                    return False
            else:
                self._count("delivered")
                if failures:
                    self._say("verdict %d is sent, at try %d", event.number, failures + 1)
                return True
        return False

    def _note(self) -> None:
        if self._place > self._noted:
            self._outbox.note(self._place)
            self._noted = self._place

    def _count(self, result: str, number: int = 1) -> None:
        self._counts[result].inc(number)

    def _say(self, text: str, *values: object) -> None:
        _log.warning("%s %s: " + text, self.receiver.name, self.receiver.address, *values)


def pause(failures: int, retry_after: float) -> float:
    """Seconds until the next try, after so many in a row that failed."""
    usual = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 30))
    return max(usual * random.uniform(0.75, 1.25), retry_after)
