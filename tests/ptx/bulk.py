"""Bulk copies of tensor-map boxes into shared memory, and the mbarriers that count them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.machine import SHARED_BASE, Machine, Path, instruction
from ptx.parse import Fault
from ptx.transfers import offsets
from ptx.wgmma import swizzled

U4 = np.dtype("u4")


@dataclass(frozen=True)
class TensorMap:
    """A two-dimensional one, as the launcher fills it.

    Attributes:
        address: of the first element; shape: rows and columns; stride: bytes from row to row.
        box: rows and columns; row_bytes: of the swizzle's pattern, 128, 64 or 32.
    """

    address: int
    shape: tuple[int, int]
    stride: int
    box: tuple[int, int]
    itemsize: int
    row_bytes: int


@dataclass
class Mbarrier:
    expected: int  # arrivals of a phase
    slot: int  # its number in the block's shared memory
    phase: int = 0  # the one that is not over
    pending: int = 0
    bytes: int = 0

    def arrive(self, count: int, expect: int) -> None:
        self.pending -= count
        self.bytes += expect
        if self.pending < 0:
            raise Fault("barrier", "more arrivals at an mbarrier than it expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected


def _barriers(m: Machine) -> dict:
    if not hasattr(m, "mbarriers"):
        m.mbarriers = {}  # (block, offset) -> Mbarrier
    return m.mbarriers


def _each(m: Machine, address):
    """(block, warp, offset, thread) of every thread that runs the instruction."""
    threads = m.active()
    places = offsets(m, address, threads)
    for thread, place in zip(threads, places, strict=True):
        if place % 8 or not 0 <= place <= m.shared.size - 8:
            raise Fault("misaligned", "an mbarrier")
        yield int(m.block[thread]), int(m.warp[thread]), int(place), int(thread)


def _find(m: Machine, block: int, place: int) -> Mbarrier:
    found = _barriers(m).get((block, place))
    if found is None:
        raise Fault("uninitialised", "an mbarrier that is not initialised")
    return found


@instruction(r"mbarrier\.init\.shared(?:::cta)?\.b64")
def _init(match, instr, kernel):
    address, count = instr.operands

    def step(m: Machine) -> None:
        for block, _, place, _ in _each(m, address):
            known = _barriers(m)
            if (block, place) in known:
                raise Fault("barrier", "an mbarrier is initialised twice")
            slots = m.shared.seen.shape[2]
            slot = sum(b == block for b, _ in known)
            if slot == slots:
                more = np.zeros((*m.shared.seen.shape[:2], 1), np.int32)
                m.shared.seen = np.concatenate([m.shared.seen, more], axis=2)
            known[block, place] = Mbarrier(count, slot, pending=count)

    return step


@instruction(r"mbarrier\.inval\.shared(?:::cta)?\.b64")
def _invalidate(match, instr, kernel):
    def step(m: Machine) -> None:
        for block, _, place, _ in _each(m, instr.operands[0]):
            if _find(m, block, place).bytes:
                raise Fault("barrier", "an mbarrier ends with bytes under way")
            # Its slot is not used again: copies that it counted keep their phase.
            m.mbarriers[block, place + (1 << 40) + m.steps] = m.mbarriers.pop((block, place))

    return step


@instruction(r"mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64")
def _arrive(match, instr, kernel):
    _, address, size = instr.operands

    def step(m: Machine) -> None:
        for block, _, place, thread in _each(m, address):
            _find(m, block, place).arrive(1, int(m.full(m.read(size, U4))[thread]))

    return step


@instruction(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
def _try_wait(match, instr, kernel):
    done, address, parity = instr.operands

    def step(m: Machine) -> list[Path] | None:
        odd = m.full(m.read(parity, U4)) & 1
        waits = np.zeros(m.lanes, bool)
        for block, warp, place, thread in _each(m, address):
            phase = _find(m, block, place).phase
            slot = m.mbarriers[block, place].slot
            if phase & 1 == odd[thread]:
                waits[thread] = True
            else:
                m.shared.seen[block, warp, slot] = max(m.shared.seen[block, warp, slot], phase)
        m.write(done, np.ones(1, bool))
        if not waits.any():
            return None
        m.steps -= 1  # a look that changed nothing
        paths = []
        for at, threads in ((m.path.at, waits), (m.path.at + 1, m.path.threads & ~waits)):
            if threads.any():
                paths.append(m.path.split(at, threads))
        paths[0].ran = m.steps
        return paths

    return step


@instruction(
    r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes"
)
def _copy(match, instr, kernel):
    # A cluster is one block here: both spaces are its own shared memory.
    to, source, barrier = instr.operands

    def step(m: Machine) -> None:
        for block, warp, place, thread in _each(m, barrier):
            number = int(m.full(m.read(source.base, np.dtype("u8")))[thread])
            tensor = m.maps.get(list(m.kernel.params)[number]) if number < 64 else None
            if not isinstance(tensor, TensorMap):
                raise Fault("unknown instruction", f"no tensor map: {instr.text}")
            column, row = (
                int(m.full(m.read(c, U4))[thread].view(np.int32)) for c in source.coordinates
            )
            start = offsets(m, to, np.array([thread]))[0]
            m.reach(np.array([thread]))
            data = _box(m, tensor, row, column, block)
            counter = _find(m, block, place)
            m.shared.fill(block, warp, _spread(tensor, start).reshape(-1), data.reshape(-1),
                          counter.slot, counter.phase)  # fmt: skip
            counter.arrive(0, -data.size * 4)

    return step


def _box(m: Machine, tensor: TensorMap, row: int, column: int, block: int) -> np.ndarray:
    """[rows, words] of global memory."""
    rows, columns = tensor.box
    if not (0 <= row <= tensor.shape[0] - rows and 0 <= column <= tensor.shape[1] - columns):
        raise Fault("out of bounds", f"a box at row {row}, column {column} of {tensor.shape}")
    width = columns * tensor.itemsize
    first = tensor.address + column * tensor.itemsize
    address = first + (row + np.arange(rows))[:, None] * tensor.stride + np.arange(0, width, 4)
    flat = address.reshape(-1).astype(np.uint64)
    return m.memory.load(flat, 4, np.full(flat.size, block)).reshape(address.shape)


def _spread(tensor: TensorMap, start: int) -> np.ndarray:
    """Byte offsets of a box's words in shared memory."""
    rows, width = tensor.box[0], tensor.box[1] * tensor.itemsize
    if width != tensor.row_bytes:
        raise Fault("unknown instruction", f"a box of {width} bytes in {tensor.row_bytes}")
    at = np.arange(rows)[:, None] * width + np.arange(0, width, 4) + start + SHARED_BASE
    return swizzled(at, tensor.row_bytes) - SHARED_BASE
