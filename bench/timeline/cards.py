"""What the estimate knows of a GPU and of the kernels on it: every constant, and where it is from.

"Fitted" ones were chosen so that the estimate meets bench/results/h200.json (kernels alone) and
h200_timeline.json (graphs), one call on one H200 at an older commit. Where the estimate stands
beside these files, it is no check of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Card:
    """A GPU of sm_90.

    Attributes:
        sms: multiprocessors. registers, shared, warps, programs: what one of them holds at once;
            shared in bytes, of which every program takes `reserved` more than it asks for.
        tensor: float16 operations per second on the tensor cores inside a loop, all of them.
        l2: bytes per second from the L2 cache into all multiprocessors.
        l2_bytes: the size of that cache. hbm: bytes per second of a large copy, both ways together.
    """

    name: str
    sms: int = 132  # data sheet, as the next five (CUDA programming guide, compute capability 9.0)
    registers: int = 65536
    shared: int = 228 * 1024
    reserved: int = 1024
    warps: int = 64
    programs: int = 32
    tensor: float = 850e12  # fitted: conv2 of S and M, batch 1 and 32; the data sheet has 989e12
    l2: float = 11.35e12  # fitted: conv3 to conv5 and the pair, batch 1: 86 GB/s a multiprocessor
    l2_bytes: int = 50 * 10**6  # data sheet
    hbm: float = 2.711e12  # measured: "copy 2048 MiB"; the data sheet has 4.8e12


H200 = Card("H200")
# Nothing was measured on it. The same chip but for its memory, whose data sheet has 3.35e12.
H100 = replace(H200, name="H100", hbm=H200.hbm * 3.35 / 4.8)
CARDS = {card.name: card for card in (H200, H100)}

# Microseconds, all fitted but where another source stands.
GAP = 0.45  # measured: the mean between two launches of a stream (h200_timeline.json)
START = 1.0  # of a launch: its first program's start and its last one's end (the score's kernel)
TRIP = 0.7  # a load that a program waits for, and its arithmetic (score, pack, map)
PROGRAM = 1.5  # of a program with products: addresses, the first operands, the last stores (e1, e6)
EPILOGUE = 1.0 / (128 * 128)  # per output of it (conv3 beside conv2)
COPY = 1.1  # a step's cp.async or TMA, shared by the steps that are under way at once (e5)
RESIZE = 0.55  # a step whose operand is computed, waited for at once (d3, d4, d5)
RESIZE_AHEAD = 0.42  # the same with more stages (variant "resize 3 2 1")
GATHER = 1.65 / (128 * 128)  # a multiprocessor's time per output of the first layer (conv1)
BLEND = 0.31 / (32 * 64)  # a multiprocessor's time per value that a fused resize computes (d6)
# With an early start (programmatic dependent launch) the gap is hidden, and this part of START: an
# ASSUMPTION, never measured.
EARLY = 0.5

# Two launches at once. What the branch's gets where both have a program for every multiprocessor,
# the trunk's having the rest: fitted to 32 images of S, and to d6 beside conv3 (M).
PRIORITY = 0.7
# Else the smaller one's time beside one that fills the card, and the larger one's.
BESIDE = 2.2  # fitted: e6 to d6 beside conv2 (M): 1.7 to 3.0 times as long as alone
BESIDE_STRIDED = 3.5  # fitted: e2 to e5 beside conv1 and conv2 (S, M): 3 to 10 times
LARGER = 1.1  # fitted: conv2 and conv3 beside the autoencoder: 1.08 to 1.14 times
