"""A recorded launch, run: the arguments laid out as the launcher passes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ptx import arithmetic, bulk, products, transfers, wgmma  # noqa: F401 (they register)
from ptx.machine import Machine
from ptx.memory import Global
from ptx.parse import Fault, Kernel, float_bits, parse

LANES = 4096  # threads that are simulated at once, in whole blocks


@dataclass
class Launch:
    """What a launcher hands to the driver.

    Attributes:
        overlapped: whether it starts while the launch before still runs.
        args: (type, value) each: ("ptr", address), ("i32" or "i64", int), ("fp32", float) or
            ("map", TensorMap).
    """

    name: str
    ptx: str
    grid: int
    shared_bytes: int
    args: list[tuple[str, object]]
    overlapped: bool = False


@dataclass
class Recording:
    """Launches in order, and the memory that they find.

    Attributes:
        buffers: (address, bytes) each.
        results: name -> (address, numpy dtype's name or "bf16", "e4m3", wanted values as float32).
    """

    launches: list[Launch] = field(default_factory=list)
    buffers: list[tuple[int, np.ndarray]] = field(default_factory=list)
    results: dict[str, tuple[int, str, np.ndarray]] = field(default_factory=dict)


FORMAT = {"ptr": "<u8", "i64": "<i8", "i32": "<i4"}


def arguments(kernel: Kernel, launch: Launch) -> tuple[dict, dict]:
    """(parameter -> bytes, parameter -> tensor map)."""
    args, maps = {}, {}
    if len(launch.args) != len(kernel.params):
        raise Fault(
            "unknown instruction",
            f"{len(launch.args)} arguments for {len(kernel.params)} parameters",
        )
    for (name, size), (kind, value) in zip(kernel.params.items(), launch.args, strict=True):
        if kind == "map":
            maps[name], data = value, np.zeros(128, np.uint8)
        elif kind == "fp32":
            data = np.array([float_bits(value)], np.uint32).view(np.uint8)
        else:
            data = np.array([value], FORMAT[kind]).view(np.uint8)
        if len(data) != size:
            raise Fault("unknown instruction", f"{kind} for parameter {name} of {size} bytes")
        args[name] = data
    return args, maps


def run(launch: Launch, memory: Global) -> int:
    """Runs every block; the number of instructions."""
    kernel = parse(launch.ptx)
    args, maps = arguments(kernel, launch)
    memory.begin_launch()
    step = max(1, LANES // kernel.threads)
    steps = 0
    for first in range(0, launch.grid, step):
        blocks = min(step, launch.grid - first)
        machine = Machine(kernel, memory, launch.shared_bytes, args, maps, first, blocks)
        machine.released = np.full(machine.lanes, not launch.overlapped)
        machine.run()
        steps += machine.steps
    return steps


def replay(recording: Recording, change=None) -> Global:
    """The memory behind all launches; `change` edits each one's PTX."""
    memory = Global(recording.buffers)
    for launch in recording.launches:
        ptx = change(launch.name, launch.ptx) if change else launch.ptx
        run(replace(launch, ptx=ptx), memory)
    return memory
