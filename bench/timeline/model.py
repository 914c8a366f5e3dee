"""The time of each launch, alone and beside another stream's, and what waits for what: an ESTIMATE.

A program takes a fixed time and its steps; a step takes the longest of a copy's latency, the
tensor cores, the bytes from L2 and what computing an operand costs, of which the last three are
shared by the programs of a multiprocessor. Programs go to the multiprocessor that is free first.
Two launches that both fill the card share it, the branch's with priority; else the smaller one is
slowed where the larger one came first and fills it, and the larger one a little. Constants are in
`cards`. Not in it: clocks, what a launch leaves in the caches for the next one, the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bench.timeline import cards
from bench.timeline.cards import Card
from bench.timeline.work import Group

US = 1e6


@dataclass(frozen=True)
class Facts:
    """What the compiler says of a kernel: registers a thread, bytes of shared memory a program."""

    registers: int
    shared: int
    spills: int = 0


@dataclass(frozen=True)
class Timed:
    """A launch with its time alone, as the two streams take it.

    Attributes:
        us: alone, from its first program's start to its last one's end.
        waits: places of the launches that it waits for. gap: us from their end to its start.
        busy: us of the whole card's work in it. fills: whether every multiprocessor has a program.
        slowed: how many times longer it takes beside a larger launch that fills the card.
        priority: whether its stream has it, which is the branch's.
    """

    us: float
    waits: tuple[int, ...]
    gap: float
    busy: float
    fills: bool
    slowed: float
    priority: bool


@dataclass(frozen=True)
class Alone:
    """A launch's time alone.

    Attributes:
        us: whole. bound: what most of it goes to: "tensor", "L2", "HBM", "latency", or "issue"
            where a multiprocessor is busy with other than products.
        resident: programs on a multiprocessor at once; waves: of all programs over the card.
    """

    us: float
    bound: str
    resident: int
    waves: float


def occupancy(card: Card, facts: Facts, warps: int) -> int:
    """Programs that fit on a multiprocessor at once.

    Raises:
        ValueError: not even one.
    """
    per_warp = -(-max(facts.registers, 1) * 32 // 256) * 256  # registers are given in units of 256
    shared = -(-(facts.shared + card.reserved) // 128) * 128
    fit = min(
        card.programs, card.warps // warps, card.registers // (per_warp * warps),
        card.shared // shared,
    )  # fmt: skip
    if fit < 1:
        raise ValueError(
            f"a program of {warps} warps with {facts.registers} registers a thread and "
            f"{facts.shared} bytes of shared memory does not fit on a multiprocessor"
        )
    return fit


def step_us(card: Card, group: Group, stages: int, resident: int) -> dict[str, float]:
    """What a step of a program takes by cause, with `resident` programs on the multiprocessor."""
    if group.resized:
        latency = cards.RESIZE if stages == 1 else cards.RESIZE_AHEAD
    else:
        latency = cards.COPY / max(stages - 1, 1)
    share = resident * card.sms * US
    return {
        "latency": latency,
        "tensor": share * 2 * group.bm * group.bn * group.bk / card.tensor,
        "L2": share * group.step_bytes / card.l2,
        "issue": resident * group.blends * cards.BLEND,
    }


def program_us(card: Card, group: Group, stages: int, resident: int) -> dict[str, float]:
    """The time of one program by cause; their sum is the whole."""
    causes = dict.fromkeys(("latency", "tensor", "L2", "issue"), 0.0)
    causes["latency"] = group.trips * cards.TRIP
    if group.steps:
        causes["latency"] += cards.PROGRAM + cards.EPILOGUE * group.bm * group.bn
        if group.gathers:  # one step, which is a part of the fixed time
            gather = resident * group.gathers * cards.GATHER
            causes["issue"] = max(gather - causes["latency"], 0.0)
        else:
            step = step_us(card, group, stages, resident)
            cause = max(step, key=lambda name: step[name])
            causes[cause] += group.steps * step[cause]
    own = resident * card.sms * US * group.other_bytes / card.l2
    causes["L2"] += max(own - sum(causes.values()), 0.0)
    return causes


def alone(
    card: Card,
    groups: Sequence[Group],
    facts: Facts,
    *,
    warps: int,
    stages: int,
    tensors: int = 0,
    early: bool = False,
) -> Alone:
    """The time of a launch that has the card for itself.

    Args:
        groups: its programs, in the order in which they start.
        tensors: bytes of its inputs and results; what exceeds the L2 cache comes from memory.
        early: it starts while the one before still runs.
    """
    programs = sum(group.programs for group in groups)
    fit = occupancy(card, facts, warps)
    resident = min(fit, -(-programs // card.sms))
    causes = [program_us(card, group, stages, resident) for group in groups]
    free = [0.0] * (card.sms * resident)
    for group, cause in zip(groups, causes, strict=True):
        us = sum(cause.values())
        for _ in range(group.programs):
            heapq.heapreplace(free, free[0] + us)
    memory = US * tensors / card.hbm if tensors > card.l2_bytes else 0.0
    start = cards.START * (cards.EARLY if early else 1.0)
    totals = {
        name: sum(g.programs * c[name] for g, c in zip(groups, causes, strict=True))
        for name in causes[0]
    }
    bound = max(totals, key=lambda name: totals[name])
    if memory > max(free):
        bound = "HBM"
    return Alone(start + max(*free, memory), bound, resident, programs / (card.sms * resident))


def timed(
    found: Alone,
    card: Card,
    programs: int,
    waits: Sequence[int],
    *,
    early: bool,
    strided: bool,
    priority: bool,
) -> Timed:
    """A launch as `simulate` takes it; strided: it is an encoder's layer."""
    return Timed(
        us=found.us,
        waits=tuple(waits),
        gap=0.0 if early else cards.GAP,
        busy=found.us * min(1.0, programs / card.sms),
        fills=programs >= card.sms,
        slowed=cards.BESIDE_STRIDED if strided else cards.BESIDE,
        priority=priority,
    )


def simulate(launches: Sequence[Timed]) -> list[tuple[float, float]]:
    """(start, end) of every launch in us; the first one starts at 0.

    Of two that start at once the one in front comes first, which is the branch's: its stream has
    priority, and the code launches it first.

    Raises:
        ValueError: launches that wait for each other.
    """
    start: dict[int, float] = {}
    end: dict[int, float] = {}
    left: dict[int, float] = {}  # of those that run, us alone
    now = 0.0
    while len(end) < len(launches):
        ready = {
            i: max((end[w] for w in launch.waits), default=-launch.gap) + launch.gap
            for i, launch in enumerate(launches)
            if i not in start and all(w in end for w in launch.waits)
        }
        if not ready and not left:
            raise ValueError("launches wait for each other")
        rates = _rates({i: launches[i] for i in sorted(left, key=lambda i: (start[i], i))})
        finish = {i: now + us / rates[i] for i, us in left.items()}
        then = min([*ready.values(), *finish.values()])
        for i in left:
            left[i] -= (then - now) * rates[i]
        now = then
        for i, at in finish.items():
            if at <= now:
                end[i] = now
                del left[i]
        for i, at in ready.items():
            if at <= now:
                start[i] = now
                left[i] = launches[i].us
    return [(start[i], end[i]) for i in range(len(launches))]


def _rates(running: dict[int, Timed]) -> dict[int, float]:
    """The part of its speed alone that each of these has while all of them run.

    `running` is in the order of their starts. A launch that was there first has its place.
    """
    if len(running) < 2:
        return dict.fromkeys(running, 1.0)
    if all(launch.fills for launch in running.values()):
        share = {True: cards.PRIORITY, False: 1 - cards.PRIORITY}
        return {i: share[launch.priority] for i, launch in running.items()}
    largest = max(running, key=lambda i: running[i].busy)
    rates, met = {}, False
    for i, launch in running.items():
        met |= i == largest
        slowed = met and running[largest].fills
        rates[i] = 1 / cards.LARGER if i == largest else 1 / launch.slowed if slowed else 1.0
    return rates


def critical_path(launches: Sequence[Timed], ends: Sequence[float]) -> list[int]:
    """Places of the launches that the last one waited for, itself included, in order."""
    path = [max(range(len(ends)), key=lambda i: ends[i])]
    while launches[path[0]].waits:
        path.insert(0, max(launches[path[0]].waits, key=lambda i: ends[i]))
    return path
