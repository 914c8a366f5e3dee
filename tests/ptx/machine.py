"""Blocks in lockstep: registers, predicates, control flow and barriers.

A register is a numpy array with an element per thread of every block that runs, or with one element
where all have the same value. Threads whose branches differ go on apart, those furthest back first,
and join where they meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx.memory import Global, Shared
from ptx.parse import Address, Fault, Instruction, Kernel

UINT = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"),
        64: np.dtype("u8")}  # fmt: skip
TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (8, 16, 32, 64)
}
TYPES |= {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "pred": np.dtype(bool)}
MOST_STEPS = 50_000
SHARED_BASE = 1024  # where a block's shared memory starts; the system has what lies before

Step = Callable[["Machine"], None]
_TABLE: list[tuple[re.Pattern, Callable]] = []


def instruction(pattern: str):
    """Registers how opcodes that match are decoded: (match, instruction, kernel) -> step."""

    def register(decode: Callable) -> Callable:
        _TABLE.append((re.compile(pattern), decode))
        return decode

    return register


def decode(instr: Instruction, kernel: Kernel) -> Step:
    for pattern, make in _TABLE:
        if match := pattern.fullmatch(instr.opcode):
            return make(match, instr, kernel)
    raise Fault("unknown instruction", instr.text)


@dataclass
class Path:
    """Threads that are at the same instruction, and the wgmma registers in flight on it."""

    at: int
    threads: np.ndarray  # bool per thread
    groups: list[set[str]] = field(default_factory=list)  # committed, oldest first
    issued: set[str] = field(default_factory=set)  # since the last commit
    # written since the last wgmma.fence; "" stands for no fence at all
    dirty: set[str] = field(default_factory=lambda: {""})
    ran: int = 0  # of other steps when these began to wait for an mbarrier

    def split(self, at: int, threads: np.ndarray) -> Path:
        groups = [set(group) for group in self.groups]
        return Path(at, threads, groups, set(self.issued), set(self.dirty))

    def join(self, other: Path) -> None:
        self.threads = self.threads | other.threads
        self.issued |= other.issued
        self.dirty |= other.dirty
        short, long = sorted((self.groups, other.groups), key=len)
        offset = len(long) - len(short)
        self.groups = [
            group | (short[i - offset] if i >= offset else set()) for i, group in enumerate(long)
        ]


class Machine:
    """Blocks `first` to `first + blocks - 1` of a launch.

    Attributes:
        regs: name -> values.
        undefined: name -> which of a register's parts hold nothing, see `arithmetic._move`.
        mask: threads that run the current instruction, its guard included; None: all.
        block, thread: of each simulated thread, counted from 0.
        released: threads that may touch global memory: the launches before have ended for them.
    """

    def __init__(
        self, kernel: Kernel, memory: Global, shared_bytes: int, args: dict[str, np.ndarray],
        maps: dict[str, object], first: int, blocks: int,
    ):  # fmt: skip
        self.kernel, self.memory, self.args, self.maps = kernel, memory, args, maps
        self.blocks, self.threads = blocks, kernel.threads
        self.lanes = blocks * kernel.threads
        self.block = np.repeat(np.arange(blocks), kernel.threads)
        self.thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), blocks)
        self.warp = self.thread // 32  # in its block
        self.shared = Shared(blocks, kernel.threads // 32, shared_bytes)
        self.special = {
            "%tid.x": self.thread,
            "%ctaid.x": (self.block + first).astype(np.uint32),
            "%laneid": self.thread % 32,
        }
        self.regs: dict[str, np.ndarray] = {}
        self.undefined: dict[str, set[int]] = {}
        self.mask: np.ndarray | None = None
        self.everyone = np.ones(self.lanes, bool)
        self.path = Path(0, self.everyone)
        self.parked: dict[int, np.ndarray] = {}  # barrier's instruction -> threads that wait there
        self.finished = np.zeros(self.lanes, bool)
        self.released = self.everyone
        self.steps = 0
        self.memory.first_block = first

    # --- operands -----------------------------------------------------------------------------

    def read(self, operand, dtype: np.dtype) -> np.ndarray:
        if isinstance(operand, int):
            bits = operand & ((1 << 8 * dtype.itemsize) - 1)
            if dtype.kind == "b":
                return np.array([bool(operand)])
            return np.array([bits], UINT[8 * dtype.itemsize]).view(dtype)
        value = self.regs.get(operand)
        if value is None:
            value = self._symbol(operand)
        if operand in self.undefined:
            raise Fault("uninitialised", f"a part of register {operand}")
        if dtype.kind == "b" or value.dtype == dtype:
            return value
        if value.dtype.itemsize > dtype.itemsize:
            value = value.astype(UINT[8 * dtype.itemsize])
        if value.dtype.itemsize != dtype.itemsize:
            raise Fault("unknown instruction", f"{operand} read as {dtype}")
        return value.view(dtype)

    def _symbol(self, name: str) -> np.ndarray:
        if name in self.special:
            return self.special[name]
        if name == "global_smem":
            return np.array([SHARED_BASE], np.uint32)
        if name in self.maps:  # the address of a tensor map in the parameters
            return np.array([list(self.kernel.params).index(name)], np.uint64)
        if name.startswith("%"):
            raise Fault("uninitialised", f"register {name}")
        raise Fault("unknown instruction", f"symbol {name}")

    def write(self, name: str, value: np.ndarray) -> None:
        if name == "_":
            return
        prefix = name if name in self.kernel.widths else name.rstrip("0123456789")
        dtype = UINT[self.kernel.widths[prefix]]
        if value.dtype != dtype:
            same = value.dtype.itemsize == dtype.itemsize
            value = value.view(dtype) if same else value.astype(dtype)
        if self.mask is not None:
            old = self.regs.get(name)
            value = np.where(self.mask, value, np.zeros(1, dtype) if old is None else old)
        self.regs[name] = value
        self.undefined.pop(name, None)

    def address(self, operand: Address, dtype=np.uint64) -> np.ndarray:
        value = self.full(self.read(operand.base, np.dtype(dtype)))
        return value + dtype(operand.offset % 2 ** (8 * np.dtype(dtype).itemsize))

    def reach(self, threads: np.ndarray) -> None:
        """Before threads, by index, touch global memory.

        Raises:
            Fault: the launch before may still run, and they have not waited for it.
        """
        if not self.released[threads].all():
            raise Fault("no wait for the launch before", "global memory")

    def full(self, value: np.ndarray) -> np.ndarray:
        return value if len(value) == self.lanes else np.broadcast_to(value, (self.lanes,))

    def active(self) -> np.ndarray:
        """The threads that run the instruction, as indices."""
        if self.mask is None:
            return np.arange(self.lanes)
        return np.flatnonzero(self.full(self.mask))

    def warps(self) -> tuple[np.ndarray, np.ndarray]:
        """(block, warp in it) of those warps that run the instruction, whole.

        Raises:
            Fault: a warp of which a part runs it.
        """
        if self.mask is None:
            count = self.full(np.ones(1, np.int64)).reshape(-1, 32).sum(1)
        else:
            count = self.full(self.mask).reshape(-1, 32).sum(1)
        if ((count != 0) & (count != 32)).any():
            raise Fault("diverged", "a part of a warp runs what the warp must run together")
        index = np.flatnonzero(count)
        per_block = self.threads // 32
        return index // per_block, index % per_block

    # --- control ------------------------------------------------------------------------------

    def run(self) -> None:
        program = [decode(instr, self.kernel) for instr in self.kernel.instructions]
        uses = [_uses(instr) for instr in self.kernel.instructions]
        waiting = [self.path]
        while waiting:
            self.path = path = min(waiting, key=lambda p: (p.ran > 0, p.at))
            waiting.remove(path)
            if path.ran:
                if path.ran == self.steps:
                    raise Fault("deadlock", self.kernel.instructions[path.at].text)
                path.ran = 0
            for other in [p for p in waiting if p.at == path.at and not p.ran]:
                path.join(other)
                waiting.remove(other)
            stops = {p.at for p in waiting}
            waiting += self._follow(path, program, uses, stops)
        if self.parked:
            at = min(self.parked)
            raise Fault("barrier", f"not all threads come to {self.kernel.instructions[at].text}")

    def _follow(self, path: Path, program, uses, stops: set[int]) -> list[Path]:
        """Runs until the path ends, splits or meets another one; what goes on from there."""
        whole = bool(path.threads.all())
        while True:
            at = path.at
            instr = self.kernel.instructions[at]
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Fault("deadlock", f"no end after {MOST_STEPS} instructions")
            mask = None if whole else path.threads
            if instr.guard is not None:
                guard = self.regs.get(instr.guard)
                if guard is None:
                    raise Fault("uninitialised", f"{instr.guard} in {instr.text}")
                guard = ~guard if instr.negated else guard
                if len(guard) == 1:
                    if not guard[0]:
                        path.at += 1
                        if path.at in stops:
                            return [path]
                        continue
                else:
                    mask = guard if mask is None else guard & mask
            self.mask = mask
            self._registers(instr, *uses[at])
            if instr.opcode in ("bra", "bra.uni", "ret"):
                return self._branch(path, instr)
            try:
                wait = program[at](self)
            except Fault as fault:
                if not getattr(fault, "at", None):
                    fault.at = at
                    fault.args = (f"{fault.args[0]} in `{instr.text[:120]}`",)
                raise
            if wait is not None:  # threads that stay where they are
                return wait
            path.at += 1
            if path.at in stops:
                return [path]

    def _branch(self, path: Path, instr: Instruction) -> list[Path]:
        taken = path.threads if self.mask is None else self.full(self.mask) & path.threads
        stay = path.threads & ~taken
        paths = [path.split(path.at + 1, stay)] if stay.any() else []
        if instr.opcode == "ret":
            self.finished |= taken
        elif taken.any():
            paths.append(path.split(self.kernel.labels[instr.operands[0]], taken))
        return paths

    def barrier(self) -> list[Path] | None:
        """bar.sync 0: every thread of the block comes to this one instruction."""
        path = self.path
        threads = path.threads if self.mask is None else self.full(self.mask)
        come = threads | self.parked.pop(path.at, np.zeros(self.lanes, bool))
        whole = np.repeat(come.reshape(self.blocks, -1).all(1), self.threads)
        if (self.finished & np.repeat(come.reshape(self.blocks, -1).any(1), self.threads)).any():
            raise Fault("barrier", "threads of the block have ended")
        self.shared.synchronise(np.flatnonzero(whole[:: self.threads]))
        if whole.all():
            path.threads = self.everyone
            return None
        if (come & ~whole).any():
            self.parked[path.at] = come & ~whole
        if not (come & whole).any():
            return []
        return [path.split(path.at + 1, come & whole)]

    def _registers(self, instr: Instruction, reads: set[str], writes: set[str]) -> None:
        """No register of a wgmma that is in flight is touched by another instruction."""
        path = self.path
        if instr.opcode.startswith("wgmma.mma_async"):
            return
        if path.issued or path.groups:
            for group in (path.issued, *path.groups):
                if not group.isdisjoint(reads) or not group.isdisjoint(writes):
                    raise Fault("accumulator in flight", instr.text)
        if not instr.opcode.startswith("mov"):  # where a move happens is the assembler's choice
            path.dirty |= writes


def _uses(instr: Instruction) -> tuple[set[str], set[str]]:
    """Registers that an instruction reads and writes."""
    stores = instr.opcode.startswith(
        ("st", "cp.async", "mbarrier.init", "mbarrier.inval", "bar", "bra", "ret", "fence", "wgmma")
    )
    names = [_names(operand) for operand in instr.operands]
    reads, writes = set(), set()
    for i, found in enumerate(names):
        (writes if i == 0 and not stores else reads).update(found)
    return reads, {name for name in writes if name.startswith("%")}


def _names(operand) -> list[str]:
    if isinstance(operand, str):
        return [operand]
    if isinstance(operand, Address):
        return [operand.base, *(n for part in operand.coordinates for n in _names(part))]
    return [n for part in operand for n in _names(part)] if isinstance(operand, tuple) else []
