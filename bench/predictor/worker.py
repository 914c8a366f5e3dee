"""One contender in a process of its own; started by `bench.predictor.processes`.

Between its turns it waits in a read. A message is (method of Worker, arguments); the answer is
(True, result) or (False, the reason why there is none).
"""

from __future__ import annotations

import gc
import itertools
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.predictor import peers
from bench.predictor.prepared import read_detector, read_pictures
from efficientad.benchmark.contenders import Run, answers, as_images, groups
from efficientad.benchmark.end_to_end import build_predictor, predictor_run
from efficientad.model.detector import EfficientAD

OURS = "FastPredictor "  # in front of the dtype that is asked for
CPU = torch.device("cpu")


class Built(NamedTuple):
    """What a contender says of itself, and what it gives for the pictures.

    seconds: construction. remark: why this dtype, of ours. scores (N,) and maps (N, 256, 256),
    float32: arrays, since tensors would be passed in shared memory.
    """

    dtype: str
    backend: str
    seconds: float
    remark: str | None
    scores: np.ndarray
    maps: np.ndarray


class Worker:
    """A contender by its name: "FastPredictor auto", ..., or a peer's."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._call: Callable[[], object] | None = None

    def build(self, size: str, batch: int, pictures: int) -> Built:
        """Make it ready for a network and a batch, in the place of what it was before."""
        self._call = None
        gc.collect()
        known, detector = (
            read_pictures(self.folder, size, pictures),
            read_detector(self.folder, size),
        )
        start = time.perf_counter()
        if self.name.startswith(OURS):
            made = self._ours(detector)
        else:
            made = self._peer(detector, batch, known.good)
        seconds = time.perf_counter() - start
        parts = [made.prepare(part) for part in groups(made.inputs(known.frames), batch)]
        scores, maps = answers(made.run, parts, len(known.frames))
        turn = itertools.cycle(parts)
        self._call = lambda: made.run(next(turn))
        return Built(
            made.dtype, made.backend, seconds, made.remark, scores.numpy(), maps.float().numpy()
        )

    def time(self, calls: int, settle: bool) -> list[float]:
        """Milliseconds of each of some calls; settle: after one that is not counted."""
        assert self._call is not None  # built before
        if settle:
            self._call()
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            self._call()
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    def _ours(self, detector: EfficientAD) -> _Made:
        dtype = self.name.removeprefix(OURS)
        predictor = build_predictor(detector, (1,), CPU, dtype)
        facts = predictor.facts
        return _Made(
            predictor_run(predictor), _same, _same, facts["dtype"], facts["backend"],
            facts["precision"],
        )  # fmt: skip

    def _peer(self, detector: EfficientAD, batch: int, good: np.ndarray) -> _Made:
        place = peers.Place(CPU, batch, self.folder, parked=True, good=good)
        peer = peers.build(self.name, detector, place)
        dtype = str(peer.dtype).removeprefix("torch.")
        return _Made(peer.run, as_images, peer.prepare, dtype, self.name, None)


class _Made(NamedTuple):
    """inputs: frames to images; prepare: a batch of them to what `run` takes."""

    run: Run
    inputs: Callable[[np.ndarray], Any]
    prepare: Callable[[Any], Any]
    dtype: str
    backend: str
    remark: str | None


def _same(value: Any) -> Any:
    return value


def serve(connection: Connection, name: str, folder: Path, threads: int) -> None:
    """Answer messages until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes its end
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    worker = Worker(name, folder)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, method)(*arguments)
        except Exception as error:  # of others' software, too: the next one may be fine
            answer = False, peers.reason(error)
        connection.send(answer)
