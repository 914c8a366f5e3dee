"""What the programs of a launch do: operations and bytes, from its arguments.

A kernel that is not known here is an error; that no launch is left out is what the totals rest on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.timeline.recording import Recorded

V = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Programs of a launch that do the same.

    Attributes:
        programs: how many.
        steps: of the loop, each a product of (bm, bk) and (bk, bn).
        trips: loads outside of the loop that are waited for, one after the other; in programs
            with steps the first operands are not counted.
        other_bytes: that a program reads and writes outside of the loop.
        gathers, blends: values per program, and per step, that cost more than a copy: see `cards`.
        resized: whether an operand of a step is computed from what was loaded.
    """

    programs: int
    steps: int = 0
    bm: int = 0
    bn: int = 0
    bk: int = 0
    trips: int = 0
    other_bytes: int = 0
    gathers: int = 0
    blends: int = 0
    resized: bool = False

    @property
    def flop(self) -> int:
        """Of one program, spare rows included."""
        return 2 * self.steps * self.bm * self.bn * self.bk

    @property
    def step_bytes(self) -> int:
        """From the L2 cache, two bytes a value; four reads of a value that is resized are one."""
        return 2 * self.bk * (self.bm + self.bn)

    @property
    def bytes(self) -> int:
        """Of one program."""
        return self.steps * self.step_bytes + self.other_bytes


def _pack(v: V, programs: int) -> list[Group]:
    pixel = 3 * v["image_ptr"].itemsize + 4 * v["out_ptr"].itemsize
    return [Group(programs, trips=2, other_bytes=v["BLOCK"] * pixel)]


def _first_conv(v: V, programs: int) -> list[Group]:
    outputs = v["BM"] * v["BN"]
    return [Group(programs, 1, v["BM"], v["BN"], 64, other_bytes=outputs // 2, gathers=outputs)]


def _conv(v: V, programs: int) -> list[Group]:
    stored = v["BM"] * v["BN"] // (4 if v["POOL"] else 1)
    steps = v["K"] ** 2 * v["CIN"] // v["BK"]
    return [Group(programs, steps, v["BM"], v["BN"], v["BK"], other_bytes=2 * stored)]


def _pair(v: V, programs: int) -> list[Group]:
    bm, bn, bk = v["BM"], v["BN"] + v["BN_TAIL"], v["BK"]
    taps = v["K"] ** 2
    teacher = taps * (v["CS"] + v["CT"]) // bk
    autoencoder = taps * v["CS"] // bk
    stored = 4 * bm * bn if v["SPLIT"] else 4 * bm
    if not v["SPLIT"]:
        autoencoder += 9 * v["CA"] // v["BK_AE"]
    kinds = [
        Group(programs // 2, teacher, bm, bn, bk, other_bytes=4 * bm),
        Group(programs // 2, autoencoder, bm, bn, bk, other_bytes=stored),
    ]
    st_first = v["SPLIT"] or taps * v["CT"] >= 9 * v["CA"]
    return kinds if st_first else kinds[::-1]


def _last(v: V, programs: int) -> list[Group]:
    bm, bn, bk = v["BM"], v["BN"], v["BK"]
    return [Group(programs, 9 * v["CA"] // bk, bm, bn, bk, trips=1, other_bytes=4 * bm * (bn + 1))]


def _strided(v: V, programs: int) -> list[Group]:
    steps = v["K"] ** 2 * v["CIN"] // v["BK"]
    stored = 2 * v["BM"] * v["BN"]
    return [Group(programs, steps, v["BM"], v["BN"], v["BK"], other_bytes=stored)]


def _encode(v: V, programs: int) -> list[Group]:
    steps = 64 * v["CIN"] // (v["SPLITS"] * v["BK"])
    stored = 4 * v["BM"] * v["BN"]
    return [Group(programs, steps, v["BM"], v["BN"], v["BK"], other_bytes=stored)]


def _decode(v: V, programs: int) -> list[Group]:
    """Nine taps of sixteen at most meet the resized cell; the longest programs decide."""
    parts = 4 * v["SPLITS"] * v["C"] * min(v["BM"], v["n_images"])
    return [Group(programs, 9, v["BM"], v["BN"], v["C"], trips=1, other_bytes=parts)]


def _resize_conv(v: V, programs: int) -> list[Group]:
    bm, bn, bk = v["BM"], v["BN"], v["BK"]
    steps = v["K"] ** 2 * v["CIN"] // bk
    return [
        Group(programs, steps, bm, bn, bk, other_bytes=2 * bm * bn, blends=bm * bk, resized=True)
    ]


def _resize(v: V, programs: int) -> list[Group]:
    return [Group(programs, trips=2, other_bytes=2 * 2 * v["BM"] * v["BC"])]


def _map(v: V, programs: int) -> list[Group]:
    cells = v["PARTS"] * 2 * v["height"] * v["width"] // v["blocks"]
    return [Group(programs, trips=3, other_bytes=4 * (v["BLOCK"] + cells))]


def _score(v: V, programs: int) -> list[Group]:
    return [Group(programs, trips=1, other_bytes=4 * v["blocks"])]


KERNELS: dict[str, Callable[[V, int], list[Group]]] = {
    "_pack_kernel": _pack,
    "_first_conv_kernel": _first_conv,
    "_conv_kernel": _conv,
    "_pair_distance_kernel": _pair,
    "_autoencoder_distance_kernel": _last,
    "_strided_conv_kernel": _strided,
    "_encode_kernel": _encode,
    "_decode_kernel": _decode,
    "_resize_conv_kernel": _resize_conv,
    "_resize_kernel": _resize,
    "_anomaly_map_kernel": _map,
    "_score_kernel": _score,
}


def groups(launch: Recorded) -> list[Group]:
    """The programs of a launch, in the order in which they start.

    Raises:
        ValueError: a kernel of which nothing is known.
    """
    if launch.name not in KERNELS:
        raise ValueError(f"the estimate does not know {launch.name}; add it to bench/timeline/work")
    return KERNELS[launch.name](launch.values, launch.programs)


def tensors(launch: Recorded) -> int:
    """Bytes of what the launch reads and writes, each tensor once.

    The second network's filters lie behind the first's in one buffer, and its activations are as
    large as the first's, at the distance that is an argument of the kernel.
    """
    found = {}
    for name, value in launch.values.items():
        tensor = getattr(value, "base", value)  # of a descriptor
        if hasattr(tensor, "untyped_storage"):
            storage = tensor.untyped_storage()
            networks = 2 if launch.values.get(f"{name.removesuffix('_ptr')}_delta") else 1
            found[storage.data_ptr()] = networks * storage.nbytes()
    return sum(found.values())
