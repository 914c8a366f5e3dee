"""Mutations of bytes, and the loop that tries them: the same seed and number, the same input."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

LIMIT = 5.0  # seconds of processor time that one input may take
_HEAD = 200  # bytes in which half of the changes lie: there the formats say what they are
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63)


class Finding(AssertionError):
    """An input was neither read by the rules nor refused as it should be."""


@dataclass
class Outcome:
    """What became of the inputs: counts by "read", "refused" and the like, and the findings."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        said = ", ".join(f"{number} {what}" for what, number in sorted(self.counts.items()))
        return (
            f"{sum(self.counts.values())} inputs in {self.seconds:.0f} s: {said}; slowest "
            f"{self.slowest:.2f} s; {len(self.findings)} findings"
        )


def numbers_of(kind: str, seed: int, number: int) -> random.Random:
    """The random numbers of one input."""
    return random.Random(f"{kind} {seed} {number}")


def attempt(
    outcome: Outcome, name: str, refusals: tuple[type[Exception], ...], work: Callable[[], str]
) -> None:
    """Do `work`, which says what became of an input, and keep what is against the rules.

    refusals: exceptions that say no as promised. `work` raises Finding for a wrong acceptance.
    """
    began = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what = work()
    except refusals as error:
        what = "refused"
        if not str(error):
            outcome.findings.append(f"{name}: {type(error).__name__} without a word")
    except Exception as error:
        what = "failed"
        outcome.findings.append(f"{name}: {type(error).__name__}: {error}")
    took = time.thread_time() - began
    outcome.counts[what] += 1
    outcome.slowest = max(outcome.slowest, took)
    if took > LIMIT:
        outcome.findings.append(f"{name}: {took:.1f} s of processor time")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers, pieces left out, doubled, swapped or cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        data = rng.choice(_CHANGES)(data, rng) if data else rng.randbytes(4)
    return data


def place(length: int, rng: random.Random) -> int:
    """A position among so many bytes, half of the time near the beginning."""
    return rng.randrange(min(length, _HEAD) if rng.random() < 0.5 else length)


def flip(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data), rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _byte(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data), rng)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _edge(data: bytes, rng: random.Random) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(_EDGES) % (1 << 8 * width)
    at = place(len(data), rng)
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _left_out(data: bytes, rng: random.Random) -> bytes:
    at, length = place(len(data), rng), rng.choice((1, 2, 4, 16, 200))
    return data[:at] + data[at + length :]


def _doubled(data: bytes, rng: random.Random) -> bytes:
    at, length = place(len(data), rng), rng.choice((1, 4, 16, 200))
    return data[: at + length] + data[at:]


def _swapped(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((place(len(data), rng), place(len(data), rng)))
    length = min(rng.choice((1, 4, 32)), b - a)
    first, second = data[a : a + length], data[b : b + length]
    return data[:a] + second + data[a + length : b] + first + data[b + length :]


def _random(data: bytes, rng: random.Random) -> bytes:
    at, length = place(len(data), rng), rng.choice((2, 8, 64))
    return data[:at] + rng.randbytes(length) + data[at + length :]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    at, length = place(len(data), rng), rng.choice((2, 8, 64, 1000))
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


_CHANGES = (
    flip,
    flip,
    _byte,
    _edge,
    _edge,
    truncated,
    _left_out,
    _doubled,
    _swapped,
    _random,
    _zeroed,
)
