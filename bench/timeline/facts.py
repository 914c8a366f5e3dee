"""Registers and shared memory of recorded launches, from the census' own compilation.

Each launch must be one of the census' cases, with equal constants and types; so what is estimated
is what the census shows, and a kernel that it forgot is found.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.census import compile as census
from bench.census.case import CensusCase
from bench.timeline.model import Facts
from bench.timeline.recording import Recorded

TYPES = {torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32"}
Known = dict[tuple, Facts]  # what was compiled already


def fits(case: CensusCase, launch: Recorded) -> bool:
    """Whether the case is the kernel of the launch."""
    if case.function is not launch.kernel:
        return False
    if (case.num_warps, case.num_stages) != (launch.warps, launch.stages):
        return False
    for name, value in launch.values.items():
        kind = case.signature.get(name)
        if kind is None:
            if case.constexprs.get(name, value) != value:
                return False
        elif value is None or _element(value) not in ("", _element_of(kind)):
            return False
    return bool(case.constexprs.get("PDL", False)) == launch.early


def _element(value: Any) -> str:
    """Triton's name of a tensor's elements, or of a descriptor's; "" for a number."""
    tensor = getattr(value, "base", value)
    return TYPES.get(tensor.dtype, "?") if hasattr(tensor, "dtype") else ""


def _element_of(kind: str) -> str:
    """The same of a type: "*fp16" and "tensordesc<fp16[256, 64]>" are of "fp16"."""
    return kind.removeprefix("*").removeprefix("tensordesc<").partition("[")[0]


def case_of(launch: Recorded, cases: Sequence[CensusCase]) -> CensusCase:
    """The census' case of a launch.

    Raises:
        ValueError: it has none.
    """
    for case in cases:
        if fits(case, launch):
            return case
    raise ValueError(f"the census has no case for {launch.layer} ({launch.name}) as it is launched")


def compiled(
    launches: Sequence[Recorded],
    target: int,
    known: Known,
    compile_case: Callable[[CensusCase, int], tuple[dict[str, Any], bytes]] = census.compile_case,
) -> list[Facts]:
    """The facts of each launch, in the tiles that are set now; new ones are put into `known`.

    Raises:
        ValueError: a launch that the census does not know.
        RuntimeError: TRITON_INTERPRET is set, which leaves nothing to compile.
    """
    if compile_case is census.compile_case and os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is '1', which leaves nothing to compile; unset it")
    cases = census.cases(target)
    found = []
    for launch in launches:
        case = case_of(launch, cases)
        key = (case.kernel, case.config, case.dtype, case.num_warps, case.num_stages, target)
        if key not in known:
            row, _ = compile_case(case, target)
            known[key] = Facts(
                row["registers"], row["shared_bytes"], row["spill_stores"] + row["spill_loads"]
            )
        found.append(known[key])
    return found


@contextmanager
def own_cache() -> Iterator[None]:
    """What is compiled inside does not go into the user's cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
