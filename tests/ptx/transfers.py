"""Loads and stores, cp.async, ldmatrix and stmatrix, barriers and fences."""

from __future__ import annotations

import numpy as np

from ptx.machine import SHARED_BASE, UINT, Machine, instruction
from ptx.memory import COPY
from ptx.parse import Fault

U4 = np.dtype("u4")


def _names(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def offsets(m: Machine, address, threads: np.ndarray) -> np.ndarray:
    """In the block's shared memory."""
    return m.address(address, np.uint32)[threads].astype(np.int64) - SHARED_BASE


def _scatter(m: Machine, name: str, threads: np.ndarray, values: np.ndarray) -> None:
    whole = np.zeros(m.lanes, values.dtype)
    whole[threads] = values
    m.write(name, whole)


@instruction(r"ld\.param\.[bsuf](32|64)")
def _load_param(match, instr, kernel):
    dst, address = instr.operands
    size = int(match[1]) // 8
    if address.base not in kernel.params or address.offset + size > kernel.params[address.base]:
        raise Fault("out of bounds", instr.text)

    def step(m: Machine) -> None:
        m.write(dst, m.args[address.base].view(UINT[8 * size])[address.offset // size][None])

    return step


@instruction(r"ld\.global(?:\.v[24])?\.b(8|16|32|64)")
def _load_global(match, instr, kernel):
    names, address = _names(instr.operands[0]), instr.operands[1]
    size = int(match[1]) // 8

    def step(m: Machine) -> None:
        threads = m.active()
        place = m.address(address)[threads]
        if (place % np.uint64(size * len(names))).any():
            raise Fault("misaligned", f"{size * len(names)} bytes")
        m.reach(threads)
        for i, name in enumerate(names):
            values = m.memory.load(place + np.uint64(i * size), size, m.block[threads])
            _scatter(m, name, threads, values)

    return step


@instruction(r"st\.global(?:\.v[24])?\.b(8|16|32|64)")
def _store_global(match, instr, kernel):
    address, names = instr.operands[0], _names(instr.operands[1])
    dtype = UINT[int(match[1])]

    def step(m: Machine) -> None:
        threads = m.active()
        place = m.address(address)[threads]
        if (place % np.uint64(dtype.itemsize * len(names))).any():
            raise Fault("misaligned", f"{dtype.itemsize * len(names)} bytes")
        m.reach(threads)
        for i, name in enumerate(names):
            values = m.full(m.read(name, dtype))[threads]
            m.memory.store(place + np.uint64(i * dtype.itemsize), values, m.block[threads])

    return step


@instruction(r"ld\.shared(?:\.v[24])?\.b(8|16|32|64)")
def _load_shared(match, instr, kernel):
    names, address = _names(instr.operands[0]), instr.operands[1]
    size = int(match[1]) // 8

    def step(m: Machine) -> None:
        threads = m.active()
        place = offsets(m, address, threads)
        if (place % (size * len(names))).any():
            raise Fault("misaligned", f"{size * len(names)} bytes of shared memory")
        for i, name in enumerate(names):
            values = m.shared.load(m.block[threads], m.warp[threads], place + i * size, size)
            _scatter(m, name, threads, values)

    return step


@instruction(r"st\.shared(?:\.v[24])?\.b(8|16|32|64)")
def _store_shared(match, instr, kernel):
    address, names = instr.operands[0], _names(instr.operands[1])
    dtype = UINT[int(match[1])]
    size = dtype.itemsize

    def step(m: Machine) -> None:
        threads = m.active()
        place = offsets(m, address, threads)
        if (place % (size * len(names))).any():
            raise Fault("misaligned", f"{size * len(names)} bytes of shared memory")
        for i, name in enumerate(names):
            values = m.full(m.read(name, dtype))[threads]
            m.shared.store(m.block[threads], m.warp[threads], place + i * size, values)

    return step


# --- cp.async -------------------------------------------------------------------------------------


@instruction(r"cp\.async\.c[ag]\.shared\.global")
def _copy(match, instr, kernel):
    to, source, size, *read = instr.operands

    def step(m: Machine) -> None:
        threads = m.active()
        count = m.full(m.read(read[0], U4))[threads] if read else np.full(len(threads), size)
        place = offsets(m, to, threads)
        start = m.address(source)[threads]
        if (place % size).any() or (start % np.uint64(size)).any():
            raise Fault("misaligned", f"cp.async of {size} bytes")
        m.reach(threads)
        if (count % 4).any() or (count > size).any():
            raise Fault("unknown instruction", instr.text)
        for i in range(0, size, 4):
            values = np.zeros(len(threads), np.uint32)
            some = count > i
            block = m.block[threads]
            if some.any():
                values[some] = m.memory.load(start[some] + np.uint64(i), 4, block[some])
            m.shared.store(block, m.warp[threads], place + i, values, COPY)

    return step


@instruction(r"cp\.async\.commit_group|wgmma\.commit_group\.sync\.aligned")
def _commit(match, instr, kernel):
    def step(m: Machine) -> None:
        warps = m.warps()
        if instr.opcode.startswith("cp"):
            m.shared.copies.commit(*warps)
            return
        m.shared.products.commit(*warps)
        m.path.groups.append(m.path.issued)
        m.path.issued = set()

    return step


@instruction(r"cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned")
def _wait(match, instr, kernel):
    left = instr.operands[0]

    def step(m: Machine) -> None:
        warps = m.warps()
        if instr.opcode.startswith("cp"):
            m.shared.wait(m.shared.copies, left, *warps)
            return
        m.shared.wait(m.shared.products, left, *warps)
        m.path.groups = m.path.groups[-left:] if left else []

    return step


# --- matrices of 8 rows of 16 bytes ---------------------------------------------------------------


def _matrix(match, instr, registers, address, store: bool):
    count = int(match[1])
    if len(registers) != count:
        raise Fault("unknown instruction", instr.text)

    def step(m: Machine) -> None:
        blocks, warps = m.warps()
        rows = m.address(address, np.uint32).reshape(-1, 32)[blocks * (m.threads // 32) + warps]
        rows = rows[:, : 8 * count].astype(np.int64) - SHARED_BASE  # thread 8 i + r: row r of i
        if (rows % 16).any():
            raise Fault("misaligned", "a row of 16 bytes")
        place = rows[:, :, None] + 4 * np.arange(4)  # [warp, row, word]
        block = np.broadcast_to(blocks[:, None, None], place.shape).reshape(-1)
        warp = np.broadcast_to(warps[:, None, None], place.shape).reshape(-1)
        index = (blocks * (m.threads // 32) + warps)[:, None] * 32 + np.arange(32)
        if store:
            parts = np.stack([m.full(m.read(name, U4))[index] for name in registers], 1)
            words = _transposed(parts) if match[2] else parts.reshape(len(blocks), count, 8, 4)
            m.shared.store(block, warp, place.reshape(-1), words.reshape(-1))
            return
        words = m.shared.load(block, warp, place.reshape(-1), 4)
        words = words.reshape(len(blocks), count, 32)
        if match[2]:
            words = _transposed(words).reshape(len(blocks), count, 32)
        for i, name in enumerate(registers):
            _scatter(m, name, index.reshape(-1), words[:, i].reshape(-1))

    return step


def _transposed(words: np.ndarray) -> np.ndarray:
    """8x8 matrices of 16-bit elements, two in a word."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape[:2], 8, 8)
    return np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
def _load_matrix(match, instr, kernel):
    registers, address = instr.operands
    return _matrix(match, instr, registers, address, store=False)


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
def _store_matrix(match, instr, kernel):
    address, registers = instr.operands
    return _matrix(match, instr, registers, address, store=True)


# --- order ----------------------------------------------------------------------------------------


@instruction(r"bar\.sync")
def _barrier(match, instr, kernel):
    if instr.operands != (0,) or instr.guard:
        raise Fault("unknown instruction", instr.text)

    def step(m: Machine):
        m.warps()
        return m.barrier()

    return step


@instruction(r"bar\.warp\.sync")
def _warp_barrier(match, instr, kernel):
    def step(m: Machine) -> None:  # a warp's threads run in step
        m.warps()

    return step


@instruction(r"fence\.proxy\.async\.shared::cta")
def _fence(match, instr, kernel):
    def step(m: Machine) -> None:
        index = np.unique(m.active() // 32)
        m.shared.fence(index // (m.threads // 32), index % (m.threads // 32))

    return step


@instruction(r"griddepcontrol\.(wait|launch_dependents)")
def _grid(match, instr, kernel):
    def step(m: Machine) -> None:  # the launches before have run already: what counts is who waits
        if match[1] == "wait":
            m.released = m.released.copy()
            m.released[m.active()] = True

    return step


@instruction(r"bra(\.uni)?|ret")
def _branch(match, instr, kernel):
    def step(m: Machine) -> None:  # the machine's own
        raise AssertionError

    return step
