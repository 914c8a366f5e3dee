"""The clock of the kernel benchmarks: samples, graphs on a CUDA device, medians and quartiles."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch

from bench.kernels.device_times import CLOCK, EVENTS, GRAPH, MAX_CALLS, _summary, device_times


def test_callables_are_timed_in_turn():
    order = []

    def slow(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: slow("a", 0.002), "b": lambda: slow("b", 0.006)}
    found = device_times(calls, "cpu", seconds=0, rounds=(4, 4))
    assert order[-8:] == ["a", "b"] * 4
    assert 2000 <= found["a"].us  # no upper bound: the machine may be busy
    assert 6000 <= found["b"].us
    assert (found["a"].samples, found["a"].calls, found["a"].method) == (4, 1, CLOCK)
    row = found["a"].row()
    assert row["us"] == pytest.approx(found["a"].us, abs=1e-3)
    assert row["spread_us"] >= 0


def test_short_calls_fill_a_sample(monkeypatch):
    ticks = itertools.count()  # 0.1 us between two looks at the clock, whatever the machine does
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-7)
    found = device_times({"short": lambda: None}, "cpu", seconds=0, rounds=(2, 2))["short"]
    assert found.calls == MAX_CALLS
    with pytest.raises(ValueError, match="functions are"):
        device_times({}, "cpu")


def test_the_median_and_the_quartiles():
    found = _summary([1.0, 2.0, 3.0, 4.0, 100.0], 1, CLOCK)
    assert (found.us, found.spread_us) == (3.0, 2.0)


class FakeCuda:
    """Just enough of torch.cuda to run a callable of `us` microseconds, eagerly or from a graph."""

    def __init__(self, monkeypatch, us: float, gap: float = 0.0, capturable: bool = True) -> None:
        self.now, self.us, self.gap = 0.0, us, gap
        self.capturing, self.stream_set = None, None
        fake, cuda = self, torch.cuda

        class Stream:
            device = torch.device("cuda", 0)

            def wait_stream(self, other):
                pass

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            calls = 0

            def replay(self):
                fake.now += self.calls * fake.us

        @contextlib.contextmanager
        def capture(graph, pool, stream, capture_error_mode):
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            fake.capturing = graph
            yield
            fake.capturing = None

        default = Stream()
        values = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture}
        values |= {"current_stream": lambda: default, "synchronize": lambda *device: None}
        values |= {name: lambda where: contextlib.nullcontext() for name in ("stream", "device")}
        values |= {"set_stream": lambda s: setattr(fake, "stream_set", s is default)}
        for name, value in values.items():
            monkeypatch.setattr(cuda, name, value)

    def __call__(self) -> None:
        if self.capturing is not None:
            self.capturing.calls += 1
        else:
            self.now += self.us + self.gap


def test_on_cuda_a_sample_is_the_replay_of_a_graph_of_many_calls(monkeypatch):
    fake = FakeCuda(monkeypatch, us=5.0, gap=20.0)
    found = device_times({"kernel": fake}, "cuda", seconds=0, rounds=(3, 3))["kernel"]
    assert (found.us, found.calls, found.method) == (pytest.approx(5), 100, GRAPH)
    slow = FakeCuda(monkeypatch, us=900.0)
    found = device_times({"kernel": slow}, "cuda", seconds=0, rounds=(3, 3))["kernel"]
    assert (found.us, found.calls) == (pytest.approx(900), 1)


def test_what_cannot_be_captured_is_timed_with_its_launch_gaps(monkeypatch):
    fake = FakeCuda(monkeypatch, us=5.0, gap=20.0, capturable=False)
    found = device_times({"kernel": fake}, "cuda", seconds=0, rounds=(3, 3))["kernel"]
    assert (found.us, found.calls, found.method) == (pytest.approx(25), 20, EVENTS)
    assert fake.stream_set
