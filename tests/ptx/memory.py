"""Global memory with its bounds, and shared memory that knows who may see what.

Shared memory keeps, per word, who wrote it and when, and when each warp last read it. "When" is the
warp's own clock; a warp knows the others' clocks up to the last barrier at which they met (vector
clocks). An access that is not ordered by what its warp knows is a race, whatever the values. Copies
that are under way have no time yet: a cp.async gets it where its own threads wait for its group, a
bulk copy where a warp sees its mbarrier's phase end, and the reads of a wgmma at its wait_group.
What was written by threads or by cp.async is seen by wgmma only from a proxy fence on.

The threads of one warp are taken to run in step.
"""

from __future__ import annotations

import numpy as np

from ptx.parse import Fault

GENERIC, COPY, BULK = 0, 1, 2  # who wrote a word: threads, cp.async, a bulk copy
WORD = 2  # bytes, the smallest that kernels store
ROOM = 256  # bytes to which buffers keep their alignment


class Global:
    """Buffers at their addresses; nothing else exists."""

    def __init__(self, buffers: list[tuple[int, np.ndarray]]):
        """`buffers`: (address, bytes); they are copied."""
        buffers = sorted(buffers, key=lambda pair: pair[0])
        self.starts = np.array([address for address, _ in buffers], np.uint64)
        self.ends = np.array([address + len(data) for address, data in buffers], np.uint64)
        if (self.starts[1:] < self.ends[:-1]).any():
            raise ValueError("buffers overlap")
        places, place = [], 0
        for address, data in buffers:
            place += (address - place) % ROOM
            places.append(place)
            place += len(data)
        self.places = np.array(places, np.int64)
        self.bytes = np.zeros(-(-place // ROOM) * ROOM, np.uint8)
        for (_, data), start in zip(buffers, places, strict=True):
            self.bytes[start : start + len(data)] = data
        self.first_block = 0
        self.begin_launch()

    def begin_launch(self) -> None:
        self.writer = np.full(len(self.bytes), -1, np.int32)  # block, per first byte of an element
        self.reader = np.full(len(self.bytes), -1, np.int32)  # block, or -2 for several

    def buffer(self, address: int) -> np.ndarray:
        """The bytes of the buffer that starts there."""
        which = int(np.flatnonzero(self.starts == np.uint64(address))[0])
        place = self.places[which]
        return self.bytes[place : place + int(self.ends[which] - self.starts[which])]

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (which >= 0) & (addresses + np.uint64(size) <= self.ends[which])
        if not inside.all():
            raise Fault("out of bounds", f"global address {int(addresses[~inside][0]):#x}")
        return self.places[which] + (addresses - self.starts[which]).astype(np.int64)

    def _elements(self, addresses: np.ndarray, size: int) -> np.ndarray:
        place = self._places(addresses, size)
        if (place % size).any():
            raise Fault("misaligned", f"{size} bytes")
        return place

    def load(self, addresses: np.ndarray, size: int, block: np.ndarray) -> np.ndarray:
        place = self._elements(addresses, size)
        block = block + self.first_block
        writer = self.writer[place]
        if ((writer != -1) & (writer != block)).any():
            raise Fault("race", "a block reads what another one writes")
        reader = self.reader[place]
        self.reader[place] = np.where((reader == -1) | (reader == block), block, -2)
        if not (self.reader[place] == block).all():  # several blocks in one instruction
            several = self.reader[place] != block
            self.reader[place[several]] = -2
        return self.bytes.view(f"u{size}")[place // size]

    def store(self, addresses: np.ndarray, values: np.ndarray, block: np.ndarray) -> None:
        size = values.dtype.itemsize
        place = self._elements(addresses, size)
        block = block + self.first_block
        for owner in (self.writer[place], self.reader[place]):
            if ((owner != -1) & (owner != block)).any():
                raise Fault("race", "a block writes what another one reads or writes")
        self.writer[place] = block
        if (self.writer[place] != block).any():
            raise Fault("race", "two blocks write one element")
        self.bytes.view(f"u{size}")[place // size] = values


class Shared:
    """The shared memory of `blocks` blocks of `warps` warps, addressed from 0."""

    def __init__(self, blocks: int, warps: int, size: int):
        self.size = -(-size // 16) * 16
        self.words = self.size // WORD
        self.warps = warps
        self.bytes = np.zeros(blocks * self.size, np.uint8)
        words = blocks * self.words
        self.writer = np.full(words, -1, np.int16)  # a warp, or a BULK copy's mbarrier
        self.kind = np.zeros(words, np.uint8)
        self.stamp = np.zeros(words, np.int32)  # clock, COPY: group, BULK: the mbarrier's phase
        self.reads = np.zeros((words, warps), np.int32)  # clocks
        self.used = np.zeros((words, -(-warps // 4)), np.int32)  # wgmma group per warpgroup, from 1
        one = np.eye(warps, dtype=np.int32)
        self.knows = np.broadcast_to(one, (blocks, warps, warps)).copy()  # clocks of the others
        self.fenced = np.zeros((blocks, warps, warps), np.int32)  # up to which wgmma sees writes
        self.seen = np.zeros((blocks, warps, 0), np.int32)  # phases of mbarriers that ended
        self.copies = Groups(blocks, warps)
        self.products = Groups(blocks, warps)

    # --- what orders accesses -----------------------------------------------------------------

    def synchronise(self, blocks: np.ndarray) -> None:
        """A barrier of these blocks' threads."""
        for known in (self.knows, self.fenced, self.seen):
            known[blocks] = known[blocks].max(axis=1, keepdims=True, initial=0)
        self._tick(blocks)

    def _tick(self, blocks: np.ndarray, warps=None) -> None:
        if warps is None:
            every = np.arange(self.warps)
            self.knows[blocks[:, None], every, every] += 1
        else:
            self.knows[blocks, warps, warps] += 1

    def fence(self, blocks: np.ndarray, warps: np.ndarray) -> None:
        """fence.proxy.async: wgmma and bulk copies see all that these warps know."""
        known = np.maximum(self.fenced[blocks, warps], self.knows[blocks, warps])
        self.fenced[blocks, warps] = known
        self._tick(blocks, warps)

    def wait(self, groups: Groups, left: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """All but the last `left` groups of these warps are done."""
        groups.wait(left, blocks, warps, self.knows[blocks, warps, warps])
        self._tick(blocks, warps)

    # --- threads and cp.async -----------------------------------------------------------------

    def load(self, block, warp, offset, size: int) -> np.ndarray:
        word, block, warp, place = self._place(block, warp, offset, size)
        self._check(word, block, warp, fenced=False)
        self.reads[word, warp] = self.knows[block, warp, warp]
        return self.bytes.view(f"u{size}")[place // size]

    def store(self, block, warp, offset, values: np.ndarray, kind: int = GENERIC) -> None:
        size = values.dtype.itemsize
        word, block, warp, place = self._place(block, warp, offset, size)
        stamp = self.knows if kind == GENERIC else None
        stamp = self.copies.current[block, warp] if stamp is None else stamp[block, warp, warp]
        self._write(word, block, warp, warp, stamp, kind)
        self._put(place, values)

    # --- the asynchronous proxy ---------------------------------------------------------------

    def use(self, block, warp, offset: np.ndarray) -> np.ndarray:
        """wgmma of the current group reads words at these byte offsets; the words."""
        word, block, warp, place = self._place(block, warp, offset, 4)
        self._check(word, block, warp, fenced=True)
        self.used[word, warp // 4] = self.products.current[block, warp]
        return self.bytes.view("u4")[place // 4]

    def fill(self, block: int, warp: int, offset: np.ndarray, data: np.ndarray, slot: int,
             phase: int) -> None:  # fmt: skip
        """A bulk copy's words, there from the end of this phase of mbarrier `slot` on."""
        block, warp = np.full(len(offset), block), np.full(len(offset), warp)
        word, block, warp, place = self._place(block, warp, offset, 4)
        self._write(word, block, warp, slot, phase, BULK)
        self._put(place, data)

    # --- the rules ----------------------------------------------------------------------------

    def _put(self, place: np.ndarray, values: np.ndarray) -> None:
        view = self.bytes.view(values.dtype)
        view[place // values.itemsize] = values
        if (view[place // values.itemsize] != values).any():
            raise Fault("race", "two warps write this shared memory at once")

    def _place(self, block, warp, offset, size: int) -> tuple[np.ndarray, ...]:
        """The elements' words with the block and warp of each, and the elements' places."""
        if ((offset < 0) | (offset + size > self.size)).any():
            raise Fault("out of bounds", "shared memory")
        if (offset % size).any():
            raise Fault("misaligned", f"{size} bytes of shared memory")
        place = block * self.size + offset
        if size <= WORD:
            return place // WORD, block, warp, place
        parts = size // WORD
        word = (place[:, None] // WORD + np.arange(parts)).reshape(-1)
        return word, np.repeat(block, parts), np.repeat(warp, parts), place

    def _check(self, word, block, warp, fenced: bool, written: bool = True) -> None:
        """What these words hold was written before, as far as `warp` knows."""
        writer, kind, stamp = self.writer[word], self.kind[word], self.stamp[word]
        if written and (writer < 0).any():
            raise Fault("uninitialised", "shared memory that nothing wrote")
        if not written:  # what nobody wrote yet may be overwritten
            some = writer >= 0
            if not some.any():
                return
            word, block, warp = word[some], block[some], warp[some]
            writer, kind, stamp = writer[some], kind[some], stamp[some]
        bulk = kind == BULK
        if bulk.any():
            if (self.seen[block[bulk], warp[bulk], writer[bulk]] <= stamp[bulk]).any():
                raise Fault("unfinished copy", "a bulk copy whose mbarrier was not waited for")
            rest = ~bulk
            block, warp = block[rest], warp[rest]
            writer, kind, stamp = writer[rest], kind[rest], stamp[rest]
        copy = kind == COPY
        if copy.any():
            clock = self.copies.clock(block[copy], writer[copy], stamp[copy])
            if (clock < 0).any():
                raise Fault("unfinished copy", "cp.async that was not waited for")
            stamp[copy] = clock
        if (self.knows[block, warp, writer] < stamp).any():
            raise Fault("race", "no barrier since another warp wrote this shared memory")
        if fenced and (self.fenced[block, warp, writer] < stamp).any():
            raise Fault("missing proxy fence", "wgmma reads what threads or cp.async wrote")

    def _write(self, word, block, warp, writer, stamp, kind: int) -> None:
        self._check(word, block, warp, fenced=False, written=False)
        if (self.reads[word] > self.knows[block, warp]).any():
            raise Fault("race", "no barrier since another warp read this shared memory")
        for group in range(self.used.shape[1]):
            used = self.used[word, group]
            if not (some := used > 0).any():
                continue
            for other in range(4 * group, min(4 * group + 4, self.warps)):
                others = np.full(some.sum(), other)
                clock = self.products.clock(block[some], others, used[some])
                if (clock < 0).any():
                    raise Fault("race", "wgmma still reads this shared memory")
                if (self.knows[block[some], warp[some], other] < clock).any():
                    raise Fault("race", "no barrier since wgmma read this shared memory")
        # Several warps may store the same value in one instruction; the last one counts.
        self.writer[word], self.stamp[word], self.kind[word] = writer, stamp, kind


class Groups:
    """Asynchronous groups of every warp, counted from 1, and the clock at which each was done."""

    def __init__(self, blocks: int, warps: int):
        self.current = np.ones((blocks, warps), np.int32)  # the one that is not committed yet
        self.done = np.full((blocks, warps, 8), -1, np.int32)
        self.ended = np.zeros((blocks, warps), np.int32)

    def commit(self, blocks, warps) -> None:
        self.current[blocks, warps] += 1
        if self.current.max() >= self.done.shape[2]:
            self.done = np.concatenate([self.done, np.full_like(self.done, -1)], axis=2)

    def wait(self, left: int, blocks, warps, clock) -> None:
        last = self.current[blocks, warps] - 1 - left
        first = self.ended[blocks, warps]
        for group in range(first.min(initial=0) + 1, last.max(initial=0) + 1):
            now = (first < group) & (group <= last)
            self.done[blocks[now], warps[now], group] = clock[now]
        self.ended[blocks, warps] = np.maximum(first, last)

    def clock(self, blocks, warps, groups) -> np.ndarray:
        """-1: not done."""
        return self.done[blocks, warps, groups]
