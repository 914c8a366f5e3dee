"""A service on a free port, in front of a predictor that computes next to nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficientad.model.trust import Calibration
from efficientad.results.prediction import Prediction
from efficientad.service.core import Inspection, Model, Sink
from efficientad.service.limits import Limits
from efficientad.service.server import Server, Source, app_config, create_app
from efficientad.service.server import bound_socket as bound
from efficientad.verdicts.store import Store

DEFECT = (255, 0, 0)  # marks a cell as anomalous
POISON = (1, 2, 3)  # a frame that begins with it cannot be computed
THRESHOLD = 0.5


class StubPredictor:
    """Maps (32, 32) of the share of red, 0..1; the score is their maximum. It can be held."""

    image_size = (32, 32)
    value_range = None

    def __init__(self, batch_sizes: tuple[int, ...] = (1, 4)) -> None:
        self.batch_sizes = batch_sizes
        self.threshold: float | None = THRESHOLD
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []

    def predict_frames(self, frames, *, map_size, batched) -> Prediction:
        assert batched
        assert map_size == "input"
        self.entered.release()
        assert self.go.wait(30)
        if any(tuple(frame[0, 0]) == POISON for frame in frames):
            raise RuntimeError("this frame cannot be computed")
        self.batches.append(len(frames))
        maps = np.stack([_cells(frame) for frame in frames])
        scores = maps.max((1, 2))
        sizes = [frame.shape[:2] for frame in frames]
        return Prediction(range(len(frames)), scores, self.threshold, maps, sizes, frames)


def _cells(frame: np.ndarray) -> np.ndarray:
    rows = np.arange(32) * frame.shape[0] // 32
    columns = np.arange(32) * frame.shape[1] // 32
    cells = frame[rows][:, columns].astype(np.float32)
    return np.maximum(cells[..., 0] - cells[..., 1], 0) / 255


def part(defect: float = 0.0, height: int = 64, width: int = 96) -> np.ndarray:
    """A grey picture; with a patch at rows 16..32, columns 24..48 whose score is `defect`."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    if defect:
        level = round(255 * defect)
        pixels[16:32, 24:48] = (level, 0, 0)
    return pixels


@dataclass
class Running:
    """A service that runs: its address, and what is behind it."""

    host: str
    port: int
    inspection: Inspection
    server: Server

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body) of one request on its own connection."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON) of one request; `value` goes as JSON, bytes as they are."""
        body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
        status, _, answer = self.call(method, path, body, headers)
        return status, json.loads(answer)


@contextmanager
def service(
    folder: Path,
    predictors: dict[str, Any] | None = None,
    *,
    limits: Limits | None = None,
    wait_ms: float = 0,
    source: Source | None = None,
    sinks: tuple[Sink, ...] = (),
    calibration: Calibration | None = None,
    **guard: Any,
) -> Iterator[Running]:
    """A service of stubs, or of the predictors named, with source and sinks; drained at the end."""
    store = Store(folder, durable=False)
    inspection = Inspection(store, limits, wait_ms=wait_ms)
    for name, predictor in (predictors or {"stub": StubPredictor()}).items():
        inspection.serve(name, Model(f"digest of {name}", predictor, calibration))
    for sink in sinks:
        inspection.send_to(sink)
    sock = bound("127.0.0.1", 0)
    server = Server(app_config(create_app(inspection, **guard)), inspection)

    async def run() -> None:
        watching = None if source is None else asyncio.create_task(source(inspection))
        try:
            await server.serve([sock])
        finally:
            if watching is not None:
                watching.cancel()
            await inspection.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    host, port = sock.getsockname()
    try:
        yield Running(host, port, inspection, server)
    finally:
        server.handle_exit(15, None)
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def commands() -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """Starts commands that serve, `start(command, environment, ...)`; they are killed at the end.

    The words behind the environment are those of Popen. It gives a command's process and its
    address, once it serves.
    """
    started: list[subprocess.Popen] = []

    def start(
        command: Sequence[str], environment: dict[str, str], **options: Any
    ) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            **options,
        )
        started.append(process)
        for line in process.stdout:
            if line.startswith("serving "):
                return process, line.split()[-1]
        raise AssertionError("it ended before it served")

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
