"""How long a callable takes on its device, as a median with its spread.

Several callables are timed in turn, one sample each per round, so that whatever else the machine
does meets all of them; their ratio is worth more than their times.

On a CUDA device a sample is one replay of a graph with enough calls to last SAMPLE_US, between
two events. A replay in front of it keeps the queue full while the sample is enqueued, so no launch
gap is inside, and leaves the L2 cache as the layer before would in a predictor: warm, as far as the
tensors fit. A callable that cannot be captured is timed with events alone, launch gaps included.
On a CPU a sample is as many calls as last CPU_SAMPLE_US, by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from efficientad.utils.cuda_graphs import captured

SAMPLE_US = 500.0  # of device work in a sample: event times have steps of about half a microsecond
CPU_SAMPLE_US = 1000.0
MAX_CALLS = 200  # in a sample
GRAPH = "CUDA graph, L2 warm"
EVENTS = "CUDA events, launch gaps included, L2 warm"
CLOCK = "clock"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        us: median over the samples.
        spread_us: distance between the quartiles.
        samples, calls: number of samples, and of calls in each.
        method: GRAPH, EVENTS or CLOCK.
    """

    us: float
    spread_us: float
    samples: int
    calls: int
    method: str

    def row(self) -> dict[str, Any]:
        """The timing's part of a row in a results file."""
        return {
            "us": round(self.us, 3),
            "spread_us": round(self.spread_us, 3),
            "samples": self.samples,
            "calls": self.calls,
            "timing": self.method,
        }


class ClockSampler:
    """Samples of a callable on a CPU."""

    method = CLOCK

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.calls = function, 1
        function()
        self.calls = _calls(self.sample(), CPU_SAMPLE_US)

    def sample(self) -> float:
        """Microseconds per call."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self.function()
        return (time.perf_counter() - start) * 1e6 / self.calls


class EventSampler:
    """Samples of a callable on a CUDA device that are launched one by one."""

    method = EVENTS

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.calls = function, 1
        for _ in range(3):
            function()
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.calls = _calls(self.sample(), SAMPLE_US)

    def _work(self) -> None:
        for _ in range(self.calls):
            self.function()

    def sample(self) -> float:
        """Microseconds per call."""
        self._work()
        self._start.record()
        self._work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3 / self.calls


class GraphSampler(EventSampler):
    """Samples of a callable on a CUDA device that are replays of a graph.

    Raises:
        RuntimeError: the callable cannot be captured.
    """

    method = GRAPH

    def __init__(self, function: Callable[[], object]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capture does: whatever is set up per stream is set up
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = _captured(function, 1)
        super().__init__(function)
        self._graph = _captured(function, self.calls)
        self.sample()

    def _work(self) -> None:
        self._graph.replay()


def _captured(function: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with captured(graph, torch.cuda.Stream()):
        for _ in range(calls):
            function()
    return graph


def _calls(us: float, wanted: float) -> int:
    return max(1, min(MAX_CALLS, round(wanted / max(us, 1e-3))))


def sampler(
    function: Callable[[], object], device: str | torch.device
) -> ClockSampler | EventSampler:
    """What takes samples of `function`, which has its first calls behind it then."""
    if torch.device(device).type != "cuda":
        return ClockSampler(function)
    stream = torch.cuda.current_stream()
    try:
        return GraphSampler(function)
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
        torch.cuda.synchronize()  # raises again if the device itself is lost
        return EventSampler(function)


def device_times(
    functions: Mapping[str, Callable[[], object]],
    device: str | torch.device,
    *,
    seconds: float = 0.3,
    rounds: tuple[int, int] = (7, 100),
) -> dict[str, Timing]:
    """Time callables in turn, without gradients.

    Args:
        functions: by name; each is called without arguments and need not wait for the device.
        device: where they run.
        seconds: to spend on the rounds, together.
        rounds: fewest and most samples of each, whatever `seconds` says.

    Raises:
        ValueError: no callable, or fewer than two rounds, which have no spread.
    """
    if not functions or rounds[0] < 2:
        raise ValueError(f"functions are {list(functions)} and rounds {rounds}; need one, and two")
    with torch.inference_mode():
        samplers = {name: sampler(function, device) for name, function in functions.items()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        end = time.perf_counter() + seconds
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() > end:
                break
            for name, one in samplers.items():
                times[name].append(one.sample())
    return {
        name: _summary(values, samplers[name].calls, samplers[name].method)
        for name, values in times.items()
    }


def _summary(values: list[float], calls: int, method: str) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, high - low, len(values), calls, method)
