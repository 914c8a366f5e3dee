"""What one request may cost, and the error that refuses it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from efficientad.utils.checks import check_integer, check_number


class Refused(Exception):
    """A request that is not carried out: the HTTP status, and a sentence that says the rule."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def busy(message: str, retry_after: int = 1) -> Refused:
    """A refusal for now, with the seconds after which to come again."""
    return Refused(503, message, {"Retry-After": str(retry_after)})


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and of all of them together.

    Attributes:
        body_mb: megabytes of a request's body. body_seconds: in which it must have come.
        megapixels: of a picture, by its header, before it is decoded. decode_seconds: for that.
        queue: pictures that wait for a decoder, and again for each predictor.
        memory_gb: gigabytes of bodies and decoded pixels held at once.

    Raises:
        ValueError: a limit that is not above 0; a queue below 1.
    """

    body_mb: float = 64.0
    body_seconds: float = 30.0
    megapixels: float = 64.0
    decode_seconds: float = 20.0
    queue: int = 64
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        for name in ("body_mb", "body_seconds", "megapixels", "decode_seconds", "memory_gb"):
            check_number(name, getattr(self, name), 0, above=True)
        check_integer("queue", self.queue, 1)

    @property
    def body_bytes(self) -> int:
        """Most bytes of a body."""
        return int(self.body_mb * 1e6)


class Budget:
    """Bytes that all requests hold together. A request that is alone may hold more than `most`."""

    def __init__(self, most: float) -> None:
        self._most, self._held = most, 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        return self._held

    def share(self) -> Share:
        """What one request holds, to be used in a `with` statement."""
        return Share(self)

    def _take(self, size: int, own: int) -> None:
        with self._lock:
            others = self._held - own
            if others and self._held + size > self._most:
                raise busy(f"other requests hold {others / 1e6:.3g} MB already")
            self._held += size

    def _give(self, size: int) -> None:
        with self._lock:
            self._held -= size


class Share:
    """One request's part of a budget; all of it goes back at its end."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Hold `size` bytes more. Raises Refused (503) where there is no room for them."""
        self._budget._take(size, self._size)
        self._size += size

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget._give(self._size)
        self._size = 0
