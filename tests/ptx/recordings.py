"""Recordings for the tests, made by one child process at a time, and their comparison."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ptx import floats
from ptx.launch import Recording
from ptx.memory import Global
from ptx.parse import Fault

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"f4": 4, "f2": 2, "bf16": 2, "e4m3": 1}
# Greatest error as a part of the greatest value, by the result's type: one rounding of it, and in
# float32 the order of sums.
TOLERANCE = {"f4": 1e-5, "f2": 1e-3, "bf16": 8e-3, "e4m3": 7e-2}


@functools.cache
def recorded(*names: str) -> dict[str, Recording]:
    """ "ARCH:CASE" -> its recording."""
    return from_child("ptx.record", *names)


def from_child(module: str, *arguments: str, own_cache: bool = False) -> Any:
    """What a module pickles, run without the interpreter as `python -m MODULE FILE ARGUMENTS`.

    own_cache: whether it compiles everything anew, in a cache of Triton's of its own.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        if own_cache:
            env["TRITON_CACHE_DIR"] = folder
        path = Path(folder) / "results"
        command = [sys.executable, "-m", module, str(path), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return pickle.loads(path.read_bytes())


def result(memory: Global, address: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """As float32; partial maps summed."""
    size = int(np.prod(shape)) * SIZES[kind]
    data = memory.buffer(address)
    parts = data.reshape(-1, size)
    if kind == "bf16":
        values = floats.from_bf16(parts.view(np.uint16))
    elif kind == "e4m3":
        values = floats.from_e4m3(parts)
    else:
        values = parts.view(kind).astype(np.float32)
    return values.reshape(-1, *shape).sum(0)


def compare(recording: Recording, memory: Global) -> None:
    """Every result is the definition's.

    Raises:
        Fault: one is not.
    """
    for name, (address, kind, wanted) in recording.results.items():
        got = result(memory, address, kind, wanted.shape)
        scale = np.abs(wanted).max()
        assert scale > 0
        error = np.abs(got - wanted).max() / scale
        if not error <= TOLERANCE[kind]:
            raise Fault("values", f"{name} is off by {error:.1e} of its greatest value")
