"""How a launcher hands its kernel to the device: through Triton, or another way if one is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# (kernel, programs, arguments, keyword arguments) -> whether the kernel was launched.
Way = Callable[[Any, int, tuple, dict], bool]

_way: ContextVar[Way | None] = ContextVar("way", default=None)
_overlapped: ContextVar[bool] = ContextVar("overlapped", default=False)


def launch(kernel, programs: int, *args, **options) -> None:
    """`kernel[(programs,)](*args, **options)`, unless the way that is set has launched it."""
    if _overlapped.get() and "PDL" in kernel.arg_names:
        options |= {"PDL": True, "launch_pdl": True}
    way = _way.get()
    if way is None or not way(kernel, programs, args, options):
        kernel[(programs,)](*args, **options)


@contextmanager
def overlapped() -> Iterator[None]:
    """Kernels with a constant PDL that are launched inside start while the one before still runs.

    Programmatic dependent launch, from sm_90 on: such a kernel waits by `common.wait_for_last`.
    """
    token = _overlapped.set(True)
    try:
        yield
    finally:
        _overlapped.reset(token)


@contextmanager
def by(way: Way) -> Iterator[None]:
    """What is launched inside, in this thread, goes this way first."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)
