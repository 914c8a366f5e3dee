"""How a launcher hands its kernel to the device: through Triton, or another way if one is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# (kernel, programs, arguments, keyword arguments) -> whether the kernel was launched.
Way = Callable[[Any, int, tuple, dict], bool]

_way: ContextVar[Way | None] = ContextVar("way", default=None)


def launch(kernel, programs: int, *args, **options) -> None:
    """`kernel[(programs,)](*args, **options)`, unless the way that is set has launched it."""
    way = _way.get()
    if way is None or not way(kernel, programs, args, options):
        kernel[(programs,)](*args, **options)


@contextmanager
def by(way: Way) -> Iterator[None]:
    """What is launched inside, in this thread, goes this way first."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)
