"""wgmma: products of operands in shared memory, found by descriptors and their swizzles."""

from __future__ import annotations

import numpy as np

from ptx.machine import SHARED_BASE, Machine, instruction
from ptx.parse import Fault
from ptx.products import product, values

# Descriptor's bits 62 and 63 -> bytes of a row in the pattern.
ROW_BYTES = {1: 128, 2: 64, 3: 32}


def swizzled(address: np.ndarray, row_bytes: int) -> np.ndarray:
    """Bits 4 and up are exchanged by bits 7 and up: three of them at 128 bytes, two, one."""
    bits = {128: 7, 64: 3, 32: 1}[row_bytes]
    return address ^ ((address >> 3) & (bits << 4))


def operand_offsets(descriptor: int, rows: int, depth_bytes: int) -> np.ndarray:
    """[rows, words] byte offsets in the block of an operand that lies along K.

    Raises:
        Fault: a layout without swizzle or with a base offset.
    """
    row_bytes = ROW_BYTES.get(descriptor >> 62)
    if row_bytes is None or (descriptor >> 49) & 7:
        raise Fault("unknown instruction", f"wgmma descriptor {descriptor:#x}")
    start = (descriptor & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4  # from eight rows to the next
    row = np.arange(rows)[:, None]
    word = np.arange(0, depth_bytes, 4)[None, :]
    address = start + row // 8 * stride + row % 8 * row_bytes + word
    return swizzled(address, row_bytes) - SHARED_BASE


@instruction(r"wgmma\.fence\.sync\.aligned")
def _fence(match, instr, kernel):
    def step(m: Machine) -> None:
        m.warps()
        m.path.dirty.clear()

    return step


@instruction(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.f32\.(f16|bf16|e4m3)\.(f16|bf16|e4m3)"
)
def _product(match, instr, kernel):
    registers, a, b, scale, *ones = instr.operands
    columns, kind = int(match[1]), match[3]
    wanted = [1, 1] if kind == "e4m3" else [1, 1, 0, 0]
    if kind != match[4] or (match[2] == "32") != (kind == "e4m3") or ones != wanted:
        raise Fault("unknown instruction", instr.text)
    if len(registers) != columns // 2 or isinstance(a, tuple):
        raise Fault("unknown instruction", instr.text)
    accumulators = set(registers)
    layout = {}  # descriptor -> offsets

    def operand(m: Machine, descriptor: int, rows: int) -> np.ndarray:
        key = descriptor, rows
        if key not in layout:
            layout[key] = operand_offsets(descriptor, rows, 32)
        return layout[key]

    def uniform(m: Machine, name, groups: np.ndarray, dtype) -> np.ndarray:
        """One value a warp group, for every thread must have the same."""
        given = m.full(m.read(name, dtype)).reshape(-1, 128)[groups]
        if (given != given[:, :1]).any():
            raise Fault("diverged", "threads of a warp group have different operands")
        return given[:, 0]

    def step(m: Machine) -> None:
        if m.threads % 128:
            raise Fault("unknown instruction", "wgmma of less than a warp group")
        blocks, warps = m.warps()
        found = blocks * (m.threads // 32) + warps
        groups = np.unique(found // 4)
        if len(found) != 4 * len(groups):
            raise Fault("diverged", "a part of a warp group runs wgmma")
        keep = uniform(m, scale, groups, np.dtype(bool))
        if "" in m.path.dirty or (keep.any() and accumulators & m.path.dirty):
            raise Fault("missing wgmma.fence", "none since the sums were written")
        lefts, rights = (uniform(m, name, groups, np.dtype("u8")) for name in (a, b))
        sums = np.zeros((len(groups), 64, columns), np.float32)
        for i, group in enumerate(groups):
            block, first = divmod(group * 4, m.threads // 32)
            right_at = operand(m, int(rights[i]), columns)
            # Each warp reads its 16 rows of A and all of B.
            left_at = operand(m, int(lefts[i]), 64).reshape(4, 16, -1)
            left = np.empty(left_at.shape, np.uint32)
            for warp in range(4):
                for at in (left_at[warp], right_at):
                    size = at.size
                    words = m.shared.use(
                        np.full(size, block), np.full(size, first + warp), at.reshape(-1)
                    ).reshape(at.shape)
                    if at is right_at:
                        right = words
                    else:
                        left[warp] = words
            sums[i] = product(values(left.reshape(64, -1), kind), values(right, kind).T)
        # Thread 4 g + t of a warp holds rows g and g + 8, columns 8 j + 2 t and the next.
        parts = sums.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
        parts = parts.transpose(0, 1, 3, 5, 4, 2, 6).reshape(len(groups) * 128, columns // 2)
        threads = (groups[:, None] * 128 + np.arange(128)).reshape(-1)
        kept = np.repeat(keep, 128)
        for j, name in enumerate(registers):
            whole = np.zeros(m.lanes, np.float32)
            old = m.full(m.read(name, np.dtype("f4")))[threads] if kept.any() else 0.0
            whole[threads] = parts[:, j] + np.where(kept, old, 0.0)
            m.write(name, whole)
        m.path.issued |= accumulators

    return step
