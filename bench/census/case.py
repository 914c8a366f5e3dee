"""One kernel in one shipped configuration, as the compile census sees it; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CensusCase:
    """What `triton.compile` needs to build one kernel for one architecture.

    Attributes:
        kernel: name of the public operation, such as "conv_relu_pool".
        config: the tile and shape in words, such as "S conv2 128x256x64 batch<=8".
        dtype: dtype of the activations: "fp16", "bf16" or "fp8".
        function: the `triton.jit` function.
        signature: argument name -> Triton type ("*fp16", "i32", "i64", "fp32",
            "tensordesc<fp16[256, 64]>"); constexpr arguments are left out.
        constexprs: argument name -> value.
        num_warps, num_stages: launch options.
        divisible_by_16: names of integer arguments whose value is a multiple of 16 at every
            shipped shape; pointers always are.
    """

    kernel: str
    config: str
    dtype: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = field(default=())


def each_once(cases: Iterable[CensusCase]) -> Iterator[CensusCase]:
    """The cases without repeats: shapes that get the same tile compile to the same kernel."""
    seen = set()
    for case in cases:
        key = (case.kernel, case.config, case.dtype)
        if key not in seen:
            seen.add(key)
            yield case
