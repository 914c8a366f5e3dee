"""Choices of the code that the estimate compares: what ships, what was measured, what is off.

A choice is a list of module constants and other values for them; inside `chosen` they are set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from efficientad.fast import backends
from efficientad.kernels import bottleneck, conv, first_conv, resize_conv

Setting = tuple[Any, str, Any]  # module, name, value
TWO, ONE = "two", "one"
TRUNK = "trunk"  # as if the branch took no time: what is left however fast it gets


@dataclass(frozen=True)
class Choice:
    """What it is called, what is set, and how the streams run: TWO, ONE or TRUNK."""

    name: str
    settings: tuple[Setting, ...] = ()
    streams: str = TWO


def _row(table: dict, target: int, rows: tuple) -> dict:
    return {**table, target: rows}


def _stages(rows: tuple, *stages: int) -> tuple:
    """The rows of a tile table with other numbers of stages, the last one for all that follow."""
    numbers = [*stages, *[stages[-1]] * len(rows)]
    return tuple(
        (limit, replace(tile, stages=n)) for (limit, tile), n in zip(rows, numbers, strict=False)
    )


def choices(target: int) -> dict[str, Choice]:
    """By key; "shipped" is the code as it is, "measured" as bench/results/h200_timeline.json ran.

    What was measured is put together from today's tables, whose rows for older architectures are
    those that sm_90 had then.
    """
    fused = resize_conv.TILES[80]
    narrow = first_conv.TILES[100]
    first: Setting = (first_conv, "TILES", _row(first_conv.TILES, target, narrow))
    resize: Setting = (resize_conv, "TILES", _row(resize_conv.TILES, target, fused))
    staged = _row(resize_conv.TILES, target, _stages(fused, 3, 2, 1))
    later: Setting = (backends, "IN_TURN", 0)
    pool = _row(conv.POOL_TILES, target, _stages(conv.POOL_TILES[target], 3))
    return {
        "measured": Choice("as measured (commit 1a011b5)", (first, resize, later)),
        "staged": Choice(
            "as measured, the decoder's fused resize with 3, 2 and 1 stages",
            (first, (resize_conv, "TILES", staged), later),
        ),
        "apart": Choice("as measured, the decoder's resize apart", (first, later)),
        "in turn": Choice("and the distance in two parts", (first,)),
        "shipped": Choice("and the first layer in tiles of 128x256: now"),
        "late": Choice("now, all of the distance after the autoencoder", (later,)),
        "pool": Choice("now, conv2 with 3 stages", ((conv, "POOL_TILES", pool),)),
        "splits": Choice("now, the bottleneck split over 16", ((bottleneck, "SPLITS", 16),)),
        "early": Choice("now, early starts on the branch (PDL)", ((backends, "PDL", True),)),
        "one stream": Choice("now, one stream", streams=ONE),
        "trunk": Choice("now, as if the autoencoder's branch took no time", streams=TRUNK),
    }


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Inside, the choice's constants have its values."""
    before = [(module, name, getattr(module, name)) for module, name, _ in choice.settings]
    try:
        for module, name, value in choice.settings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
