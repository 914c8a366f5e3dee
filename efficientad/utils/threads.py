"""How many of torch's threads serve a piece of work on the CPU, as the machine is now.

Threads that share a step wait for each other at its end. Where another program holds a core, or a
container grants fewer than it shows, more threads are slower than fewer, by ten times and more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_ROUNDS = 3
_GAIN = 0.9  # of the time with twice the threads, from which on fewer are taken


def fastest_threads(work: Callable[[], object]) -> int:
    """The number of threads, `torch.get_num_threads()` or a half of it or ..., that suits `work`.

    `work` runs some times with each; half as many are taken where they need less than nine tenths
    of the time. torch's number is as before afterwards.
    """
    before = count = torch.get_num_threads()
    try:
        while count > 1:
            fewer = count // 2
            times: dict[int, list[float]] = {count: [], fewer: []}
            for turn in range(_ROUNDS + 1):
                for threads, seconds in times.items():
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    work()
                    if turn:  # the first one warms up
                        seconds.append(time.perf_counter() - start)
            medians = {threads: sorted(seconds)[_ROUNDS // 2] for threads, seconds in times.items()}
            if medians[fewer] > _GAIN * medians[count]:
                return count
            count = fewer
        return count
    finally:
        torch.set_num_threads(before)


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """torch's number of threads in this process while it lasts, and what it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
