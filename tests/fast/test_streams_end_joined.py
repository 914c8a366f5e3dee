"""Streams of the fast path end joined: after an error in a branch, and when a predictor is dropped.

A recorder takes the place of CUDA's streams, so that the order can be told without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import types

import pytest
import torch

from efficientad.fast import backends, engine
from efficientad.utils import cuda_graphs


class Recorder:
    """Streams that note what waits for what, in order; work says on which one it is submitted."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.main, self.side = (Stream(name, self.log) for name in ("main", "side"))
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    @contextlib.contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def work(self, name: str, result=None, error: type[BaseException] | None = None):
        """A function that submits `name` on the current stream, or raises after that."""

        def submit(*args, **options):
            self.log.append(f"{name} on {self.current.name}")
            if error is not None:
                raise error(name)
            return result

        return submit


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def backend():
    """What `distance_maps` uses of a backend, without weights."""
    made = object.__new__(backends.KernelBackend)
    made.device = torch.device("cpu")
    made.plan = made.weights = made._kernels = made.whole = None
    made._workspace = backends.Workspace()
    return made


@pytest.fixture
def recorder(backend, monkeypatch):
    found = Recorder(monkeypatch)
    backend._side = found.side
    for name in ("autoencoder", "trunk", "distance_maps"):
        monkeypatch.setattr(backends, name, found.work(name, ()))
    first, second = found.work("student distance"), found.work("autoencoder distance", ())

    def in_turn(weights, features, decoded, kernels, join):
        first()
        join()
        return second()

    monkeypatch.setattr(backends, "distance_maps_in_turn", in_turn)
    return found


BRANCH = ["side waits for main", "autoencoder on side"]


def run(backend, images: int) -> None:
    backend.distance_maps(torch.zeros(images, 1))


def test_one_image_waits_for_the_autoencoder_as_late_as_it_can(backend, recorder):
    run(backend, backends.IN_TURN)
    assert recorder.log == [
        *BRANCH, "trunk on main", "student distance on main", "main waits for side",
        "autoencoder distance on main",
    ]  # fmt: skip


def test_more_images_wait_before_the_distance(backend, recorder):
    run(backend, backends.IN_TURN + 1)
    assert recorder.log == [
        *BRANCH, "trunk on main", "main waits for side", "distance_maps on main"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "capability", "early"),
    [(True, (9, 0), 1), (True, (12, 0), 1), (True, (8, 9), 0), (False, (9, 0), 0)],
)
def test_the_branch_alone_starts_its_kernels_early(
    wanted, capability, early, backend, recorder, monkeypatch
):
    @contextlib.contextmanager
    def overlapped():
        recorder.log.append("early")
        yield
        recorder.log.append("as usual")

    monkeypatch.setattr(backends, "PDL", wanted)
    monkeypatch.setattr(backends, "overlapped", overlapped)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    run(backend, backends.IN_TURN + 1)
    branch = [BRANCH[0], *["early"] * early, BRANCH[1], *["as usual"] * early]
    assert recorder.log[:-3] == branch


def test_kernels_start_early_only_where_they_are_told_to():
    from efficientad.kernels import launching

    launched = []

    class Kernel:
        def __init__(self, *names):
            self.arg_names = names

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options))

    early = {"PDL": True, "launch_pdl": True}
    launching.launch(Kernel("x", "PDL"), 3, 1, num_warps=4)
    with launching.overlapped():
        launching.launch(Kernel("x", "PDL"), 3, 1, num_warps=4)
        launching.launch(Kernel("x"), 3, 1)
    launching.launch(Kernel("x", "PDL"), 3, 1)
    assert launched == [
        ((3,), (1,), {"num_warps": 4}), ((3,), (1,), {"num_warps": 4} | early), ((3,), (1,), {}),
        ((3,), (1,), {}),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("images", [backends.IN_TURN, backends.IN_TURN + 1])
@pytest.mark.parametrize("where", ["autoencoder", "trunk"])
def test_an_error_after_the_fork_ends_joined(where, images, error, backend, recorder, monkeypatch):
    monkeypatch.setattr(backends, where, recorder.work(where, error=error))
    with pytest.raises(error, match=where):
        run(backend, images)
    assert recorder.log[:2] == BRANCH
    assert recorder.log[-1] == "main waits for side"
    assert recorder.current is recorder.main
    assert not any("distance" in line for line in recorder.log)


def test_the_cause_is_what_is_raised_where_joining_fails_too(backend, recorder, monkeypatch):
    """As in a capture that the error has broken."""

    def fails(other) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(backends, "trunk", recorder.work("trunk", error=ValueError))
    monkeypatch.setattr(recorder.main, "wait_stream", fails, raising=False)
    with pytest.raises(ValueError, match="trunk"):
        run(backend, 1)


def test_an_error_in_the_first_distance_ends_joined(backend, recorder, monkeypatch):
    fails = recorder.work("student distance", error=RuntimeError)
    monkeypatch.setattr(backends, "distance_maps_in_turn", fails)
    with pytest.raises(RuntimeError, match="student distance"):
        run(backend, 1)
    assert recorder.log[-2:] == ["student distance on main", "main waits for side"]


# ---- dropped -------------------------------------------------------------------------------------


class Graph:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __del__(self) -> None:
        self.log.append("graph destroyed")


class Owner:
    pass


@pytest.mark.parametrize("in_a_circle", [False, True])
def test_what_is_dropped_waits_for_its_stream_first(in_a_circle):
    log: list[str] = []
    owner = Owner()
    owner.graph = Graph(log)
    if in_a_circle:
        owner.itself = owner
    cuda_graphs.wait_before_drop(owner, Stream("engine", log))
    assert log == []
    del owner
    gc.collect()
    assert log == ["host waits for engine", "graph destroyed"]


@pytest.fixture
def cuda_engine(monkeypatch):
    """What makes an engine for CUDA, out of parts that only note what happens; and the log."""
    log: list[str] = []
    runner = types.SimpleNamespace(packed=lambda n: None, frames=lambda n: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("engine", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("caller", log))
    monkeypatch.setattr(engine.Engine, "on_device", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(engine.Engine, "_compile_map_sizes", lambda self: None)
    monkeypatch.setattr(engine, "build_backend", lambda *a: (Owner(), None))
    monkeypatch.setattr(engine, "Staging", lambda *a: Owner())

    def graphs(*arguments):
        return types.SimpleNamespace(**vars(runner), graph=Graph(log))

    monkeypatch.setattr(engine, "GraphRunner", graphs)
    one = torch.ones(3)
    model = types.SimpleNamespace(
        image_size=(256, 256), map_padding=4, score_size="input", threshold=None,
        image_mean=one, image_std=one,
    )  # fmt: skip

    def make():
        return engine.Engine(model, torch.device("cuda", 0), torch.float16, (1,))

    return make, log


def test_an_engine_that_is_dropped_waits_before_its_graphs_go(cuda_engine):
    make, log = cuda_engine
    made = make()
    assert log == ["engine waits for caller"]
    del made
    gc.collect()
    assert log[1:] == ["host waits for engine", "graph destroyed"]


def test_an_engine_that_cannot_be_built_waits_too(cuda_engine, monkeypatch):
    make, log = cuda_engine

    def fails(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "Staging", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        make()
    gc.collect()
    assert log[1:] == ["host waits for engine", "graph destroyed"]
