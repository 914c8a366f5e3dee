"""Results of a function, in order, computed ahead."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    load: Callable[[S], T], steps: Iterable[S], *, workers: int, depth: int
) -> Generator[T, None, None]:
    """load(step) for every step, in order, with up to `depth` of them computed ahead in threads.

    workers: threads; 0 computes in the caller when asked. What `load` raises is raised at its
    place. `steps` is read no further ahead. Closing the iterator stops the threads. Raises
    ValueError for workers < 0 or depth < 1.
    """
    if workers < 0 or depth < 1:
        raise ValueError(f"workers must be >= 0 and depth >= 1, got {workers}, {depth}")
    return _ahead(load, steps, workers, depth)


def _ahead(
    load: Callable[[S], T], steps: Iterable[S], workers: int, depth: int
) -> Generator[T, None, None]:
    if workers == 0:
        yield from map(load, steps)
        return
    remaining = iter(steps)
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="efficientad-ahead")
    try:
        while True:
            for step in itertools.islice(remaining, depth - len(waiting)):
                waiting.append(pool.submit(load, step))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
