"""Host times of calls that are made in turn, their percentiles and ratios.

A call is over when it returns: what it starts on a device it must wait for itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ROUNDS = 10
_WARMUP_SHARE = 0.25  # of `seconds`
_SETTLE = 5  # blocks of so many calls begin with one that is not counted
SUMMARY = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "spread_ms", "images_per_s", "calls")


@dataclass
class Times:
    """Times of one function: `rounds` holds the milliseconds of its calls, round by round."""

    rounds: list[list[float]] = field(default_factory=list)
    warmup: int = 0

    def all(self) -> list[float]:
        """Every counted call, in order."""
        return [ms for block in self.rounds for ms in block]


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    calls: int,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
) -> dict[str, Times]:
    """Time functions in turn, a block of calls of each per round, so that a busy machine slows all.

    Every function is warmed up first, and the order changes from round to round. The first call of
    a block of five or more is not counted: it finds the caches full of another function's data.

    Args:
        functions: by name.
        warmup, calls: of each function, before the clock and under it.
        rounds: how many blocks the calls are cut into.
        seconds: per function, warm-up included. Where the calls would take longer there are fewer
            of them, in fewer rounds where even single ones would; at least two rounds of one.

    Raises:
        ValueError: no function, or a number below its least.
    """
    if not functions:
        raise ValueError("functions is empty; give at least one to time")
    check_counts(warmup=warmup, calls=calls, rounds=rounds, seconds=seconds)
    times = {name: Times() for name in functions}
    pace = {}
    for name, function in functions.items():
        taken = _block(function, 1)
        while len(taken) < warmup and sum(taken) < _WARMUP_SHARE * seconds * 1e3:
            taken += _block(function, 1)
        times[name].warmup = len(taken)
        pace[name] = max(1e-6, statistics.median(taken) / 1e3)
    rest = (1 - _WARMUP_SHARE) * seconds
    rounds = min(rounds, calls)
    if rest < math.inf:
        fitting = int(rest * len(functions) / sum(pace.values()))
        rounds = min(rounds, max(2, fitting))
    blocks = {name: _cut(calls, rounds, rest / pace[name]) for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if blocks[name][i] >= _SETTLE:
                functions[name]()
            times[name].rounds.append(_block(functions[name], blocks[name][i]))
    return times


def check_counts(*, warmup: int, calls: int, rounds: int, seconds: float) -> None:
    """ValueError: a number that `in_turn` cannot take."""
    for name, value in (("warmup", warmup), ("calls", calls), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; it must be more than 0")


def _block(function: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def _cut(calls: int, rounds: int, most: float) -> list[int]:
    """Sizes of `rounds` blocks that are `calls` together, or about `most` if that is fewer."""
    if most < calls:
        calls = max(rounds, int(most))
    each, more = divmod(calls, rounds)
    return [each + (i < more) for i in range(rounds)]


def summary(rounds: Sequence[Sequence[float]], images: int) -> dict[str, float]:
    """Percentiles of the calls' milliseconds, all rounds together.

    spread_ms is the distance between the quartiles, images_per_s the images of all calls (`images`
    in each) over the sum of their times.
    """
    ms = np.concatenate([np.asarray(block, np.float64) for block in rounds])
    p25, p50, p75, p90, p99 = np.percentile(ms, [25, 50, 75, 90, 99])
    numbers = (p50, p90, p99, ms.max(), ms.mean(), p75 - p25)
    rate = images * len(ms) / float(ms.sum()) * 1e3
    values = [*(round(float(x), 4) for x in numbers), significant(rate)]
    return dict(zip(SUMMARY, [*values, len(ms)], strict=True))


def significant(value: float, digits: int = 5) -> float:
    """Rounded to so many digits, wherever they begin: rates span many orders of magnitude."""
    return float(f"{value:.{digits}g}")


def ratio(
    slower: Sequence[Sequence[float]], faster: Sequence[Sequence[float]]
) -> dict[str, float | int]:
    """How many times `slower` takes what `faster` takes, from rounds of `in_turn`.

    Each round gives the ratio of the medians of its two blocks: `ratio` is the median of these,
    `ratio_spread` the distance between their quartiles, `rounds` their number.
    """
    pairs = zip(slower, faster, strict=True)
    each = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    low, median, high = np.percentile(each, [25, 50, 75])
    return {
        "ratio": round(float(median), 4),
        "ratio_spread": round(float(high - low), 4),
        "rounds": len(each),
    }
