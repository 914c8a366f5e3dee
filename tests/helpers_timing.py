"""What the tests of the end-to-end benchmarks share: thin networks, and a clock moved by calls."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from efficientad.benchmark import call_times
from efficientad.checkpoint import contents
from efficientad.model import networks
from efficientad.model.networks import Conv

THIN = {
    "S": (
        Conv(4, 8, 3, relu=True, pool=True),
        Conv(4, 8, 3, relu=True, pool=True),
        Conv(3, 8, 1, relu=True, pool=False),
        Conv(4, None, 0, relu=False, pool=False),
    ),
    "M": (
        Conv(4, 8, 3, relu=True, pool=True),
        Conv(4, 8, 3, relu=True, pool=True),
        Conv(1, 8, 0, relu=True, pool=False),
        Conv(3, 8, 1, relu=True, pool=False),
        Conv(4, None, 0, relu=True, pool=False),
        Conv(1, None, 0, relu=False, pool=False),
    ),
}


@contextmanager
def thin_networks() -> Iterator[None]:
    """PDNs of the same shape with a few channels: what runs, runs several times faster."""
    with pytest.MonkeyPatch.context() as patch:
        for size, layers in THIN.items():
            patch.setitem(networks.PDN_LAYERS, size, layers)
        contents.weight_shapes.cache_clear()
        yield
    contents.weight_shapes.cache_clear()


class Clock:
    """Takes the place of `time` in call_times; `spending(ms)` is a function that takes so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, []
        fake = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(call_times, "time", fake)

    def spending(self, ms: float, name: str = "") -> Callable[[], None]:
        def function() -> None:
            self.now += ms / 1e3
            self.calls.append(name)

        return function
