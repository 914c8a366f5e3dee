"""Choices that are functions of their arguments, random ones of (seed, step, item).

No generator runs along with a training, so nothing has to be stored to resume one, and threads that
load images cannot change what is drawn.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np


def random_numbers(seed: int, stream: str, step: int, item: int = 0) -> np.random.Generator:
    """A generator that is a pure function of its arguments (Philox, a counter-based generator).

    stream: a short name of what is drawn ("photo-gray"); streams are independent of each other.
    step, item: which draw, each >= 0 and below 2**64. Raises ValueError for negative ones.
    """
    if step < 0 or item < 0:
        raise ValueError(f"step and item must be >= 0, got {step}, {item}")
    key = np.frombuffer(_digest(seed, stream), dtype="<u8").astype(np.uint64)
    # The generator itself counts in the first word; the others name the draw.
    counter = np.array([0, item, step, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def shuffled(seed: int, stream: str, count: int, position: int) -> int:
    """Item at `position` of an endless sequence of permutations of range(count), one an epoch.

    Raises ValueError for count < 1 or position < 0.
    """
    if count < 1 or position < 0:
        raise ValueError(f"count must be >= 1 and position >= 0, got {count}, {position}")
    epoch, place = divmod(position, count)
    return int(_permutation(seed, stream, count, epoch)[place])


def evenly(count: int, most: int) -> np.ndarray:
    """Of range(count) at most `most`, evenly spread, ascending, the first and the last among them.

    A single one is the first.
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, stream: str, count: int, epoch: int) -> np.ndarray:
    return random_numbers(seed, f"{stream}:order", epoch).permutation(count)


@functools.lru_cache(maxsize=64)
def _digest(seed: int, stream: str) -> bytes:
    return hashlib.blake2b(f"{int(seed)}|{stream}".encode(), digest_size=16).digest()
