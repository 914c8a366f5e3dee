"""Ctrl-C and SIGTERM: the same to whoever is stopped, and waiting where nothing may be cut."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, as Ctrl-C does, so that what is done is kept.

    Only in the main thread, and only where the signal would end the program.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_back(
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    said: Callable[[], object] | None = None,
) -> Iterator[Callable[[], bool]]:
    """Hold signals back; yields a function that says whether one came.

    The first one is remembered, and `said` called; the second one raises KeyboardInterrupt at once.
    Only in the main thread, and only signals that would end the program: those that somebody
    ignores or handles keep their meaning.
    """
    ends = (signal.default_int_handler, signal.SIG_DFL, _interrupt)
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if main and signal.getsignal(n) in ends}
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        if said is not None:
            said()

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
