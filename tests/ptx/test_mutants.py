"""Faults planted in the PTX of kernels that pass: each is found, and called what it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from ptx.launch import replay
from ptx.parse import Fault
from ptx.recordings import compare, recorded
from ptx.test_ptx import SMALL


@dataclass(frozen=True)
class Mutant:
    """An edit: the matches of `pattern` replaced, all or the one that is numbered."""

    kind: str  # of the fault that is to be found
    pattern: str
    replacement: str = ""
    number: int | None = None

    def __call__(self, name: str, ptx: str) -> str:
        found = list(re.finditer(self.pattern, ptx))
        chosen = found if self.number is None else [found[self.number]]
        assert chosen, "nothing to replace"
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        return ptx


def check(recording, mutant: Mutant) -> None:
    def run() -> None:
        compare(recording, replay(recording, mutant))

    with pytest.raises(Fault) as found:
        run()
    assert found.value.kind == mutant.kind


MMA = r"(mma\.sync\S+ \{[^}]*\}, \{) (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}"
SYNC = {  # in the encoder's layer with mma.sync and cp.async
    "unknown instruction": Mutant("unknown instruction", r"\bxor\.b32", "lop3.b32", 0),
    "unknown modifier": Mutant("unknown instruction", r"st\.global\.", "st.volatile.global."),
    "dropped wait for copies": Mutant("unfinished copy", r"cp\.async\.wait_group[^;]*;"),
    "a wait for one copy too few": Mutant("unfinished copy", r"(wait_group\s+)2;", r"\g<1>3;"),
    "dropped commit": Mutant("unfinished copy", r"cp\.async\.commit_group;", "", 1),
    "dropped copy": Mutant("uninitialised", r"cp\.async\.cg[^;]*;", "", 1),
    "dropped barrier before the products": Mutant("race", r"bar\.sync[^;]*;", "", 0),
    "dropped barrier before the next copies": Mutant("race", r"bar\.sync[^;]*;", "", 1),
    "dropped barrier in the epilogue": Mutant("race", r"bar\.sync[^;]*;", "", 3),
    "a barrier that one warp misses": Mutant(
        "barrier", r"ret;", "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__miss; "
        "bar.sync 0; $L__miss: ret;"
    ),
    "a barrier that half a warp misses": Mutant(
        "diverged", r"ret;", "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra $L__miss; "
        "bar.sync 0; $L__miss: ret;"
    ),
    "off-by-one mask of the store": Mutant("out of bounds", r"setp\.lt(.s32\s*%p21)", r"setp.le\1"),
    "dropped mask of the store": Mutant("out of bounds", r"@%p\d+ st\.global", "st.global"),
    "wrong stride of the result": Mutant(
        "out of bounds", r"(mad\.wide\.s32 [^;]*), 64,", r"\1, 128,"
    ),
    "off-by-one image edge": Mutant(
        "out of bounds", r"setp\.gt\.s32([^;]*), -1;", r"setp.gt.s32\1, -2;"
    ),
    "wrong swizzle of a fragment": Mutant("values", r"xor\.b32([^;]*), 64;", r"xor.b32\1, 32;", 0),
    "swapped fragments": Mutant("values", MMA, r"\1 \2, \4, \3, \5 }", 0),
    "swapped halves of a result": Mutant(
        "values", r"(cvt\.rn\.f16x2\.f32 \s*%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;", 0
    ),
    "dropped ReLU": Mutant(
        "values", r"max\.NaN\.f32([^;]*), 0f00000000;", r"max.NaN.f32\1, 0fFF800000;"
    ),
    "one step too few": Mutant("values", r"(setp\.ne\.b64[^;]*), 1024;", r"\1, 768;"),
    "a loop without end": Mutant("deadlock", r"ret;", "$L__on: bra.uni $L__on; ret;"),
}  # fmt: skip


@pytest.mark.parametrize("name", SYNC)
def test_fault_with_mma_sync(name):
    check(recorded(*SMALL)["80:strided"], SYNC[name])


DESCRIPTOR = "4611686293305294848"  # swizzle of 128 bytes, 1024 bytes from eight rows to the next
ASYNC = {  # in a distance with wgmma, cp.async and bulk copies
    "dropped proxy fence": Mutant("missing proxy fence", r"fence\.proxy\.async[^;]*;"),
    "dropped wgmma.fence": Mutant("missing wgmma.fence", r"wgmma\.fence[^;]*;"),
    "sums read before they are there": Mutant(
        "accumulator in flight", r"(wgmma\.mma_async\S+\s+\{(%r\d+),[^;]*;)",
        r"\1 add.f32 \2, \2, \2;", 0
    ),
    "dropped wait for the products": Mutant(
        "race", r"wgmma\.wait_group\.sync\.aligned\s+0;"
    ),
    "a wait for one product too few": Mutant(
        "race", r"(wgmma\.wait_group\.sync\.aligned\s+)1;", r"\g<1>2;"
    ),
    "dropped wait for copies": Mutant("unfinished copy", r"cp\.async\.wait_group[^;]*;"),
    "dropped wait for an mbarrier": Mutant(
        "unfinished copy", r"mbarrier\.try_wait[^;]*;", "mov.pred complete, -1;"
    ),
    "wrong parity": Mutant("deadlock", r"(try_wait[^;]*complete, \[%r\d+\]), %r\d+;", r"\1, 1;"),
    "too few bytes expected": Mutant("deadlock", r"(expect_tx[^;]*), 16384;", r"\1, 16380;", 0),
    "dropped bulk copy": Mutant("deadlock", r"@%p\d+ cp\.async\.bulk[^;]*;", "", 0),
    "dropped initialisation of an mbarrier": Mutant(
        "uninitialised", r"@%p\d+ mbarrier\.init[^;]*;", "", 0
    ),
    "dropped barrier before the products": Mutant(
        "race", r"(cp\.async\.wait_group\s+2;\s+)bar\.sync\s+0;", r"\1"
    ),
    "dropped barrier behind the products": Mutant(
        "race", r"(wgmma\.wait_group\.sync\.aligned\s+1;[\s\S]*?)bar\.sync\s+0;", r"\1"
    ),
    "swapped operands": Mutant(
        "unfinished copy", r"(\}), (%rd\d+), (%rd\d+), (%p\d+, 1)", r"\1, \3, \2, \4"
    ),
    "wrong swizzle": Mutant("values", DESCRIPTOR, str(int(DESCRIPTOR) + (1 << 62))),
    "wrong stride of a descriptor": Mutant("values", DESCRIPTOR, str(int(DESCRIPTOR) - (32 << 32))),
    "wrong step along K": Mutant("values", r"(add\.s32 [^;]*), 2;", r"\1, 4;"),
    "sums that are not kept": Mutant("values", r"mov\.pred (\s*%p\d+), -1;", r"mov.pred \1, 0;"),
}  # fmt: skip


EARLY = {  # in a kernel that starts before the one before has ended
    "dropped wait": Mutant("no wait for the launch before", r"griddepcontrol\.wait ;"),
    "a wait of one warp alone": Mutant(
        "no wait for the launch before", r"(griddepcontrol\.wait ;)",
        r"mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 \1"
    ),
    "a wait behind the first read": Mutant(
        "no wait for the launch before", r"(griddepcontrol\.wait ;)([\s\S]*?cp\.async\.c[^;]*;)",
        r"\2 \1"
    ),
    "a wait for the wrong thing": Mutant(
        "no wait for the launch before", r"griddepcontrol\.wait ;",
        "griddepcontrol.launch_dependents ;"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY)
def test_fault_with_an_early_start(name):
    check(recorded("90:strided, early")["90:strided, early"], EARLY[name])


@pytest.mark.slow
def test_the_half_of_a_pair_that_is_undefined_must_not_be_used():
    """LLVM leaves it so in a kernel with packed arithmetic; it is thrown away there."""
    name = "120:pack of channels first"
    swapped = Mutant("uninitialised", r"mov\.b64(\s+)\{(%r\d+), _\}", r"mov.b64\1{_, \2}")
    check(recorded(name)[name], swapped)


@pytest.mark.parametrize("name", ASYNC)
def test_fault_with_wgmma(name):
    check(recorded(*SMALL)["90:last"], ASYNC[name])
