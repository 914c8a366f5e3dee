"""mma.sync: a warp's product of fragments."""

from __future__ import annotations

import numpy as np

from ptx import floats
from ptx.machine import Machine, instruction
from ptx.parse import Fault

U4 = np.dtype("u4")


def values(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [..., n] -> float32 [..., n * elements of a word], the lowest bits first."""
    words = np.ascontiguousarray(words)
    if kind == "e4m3":
        return floats.from_e4m3(words.view(np.uint8))
    halves = words.view(np.uint16)
    return floats.from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype("f4")


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return a @ b


@instruction(
    r"mma\.sync\.aligned\.m16n8k(16|32)\.row\.col(?:\.kind::f8f6f4)?"
    r"\.f32\.(f16|bf16|e4m3)\.(f16|bf16|e4m3)\.f32"
)
def _mma(match, instr, kernel):
    d, a, b, c = instr.operands
    kind = match[2]
    if kind != match[3] or (match[1] == "32") != (kind == "e4m3"):
        raise Fault("unknown instruction", instr.text)
    per_word = 4 if kind == "e4m3" else 2

    def step(m: Machine) -> None:
        blocks, warps = m.warps()
        index = (blocks * (m.threads // 32) + warps)[:, None] * 32 + np.arange(32)

        def fragment(names, dtype):  # [warp, row group g, thread in it t, register]
            parts = [m.full(m.read(name, dtype))[index] for name in names]
            return np.stack(parts, -1).reshape(len(blocks), 8, 4, len(names))

        n = len(blocks)
        # a: registers are (row half, K half); b: K half; a word holds neighbours in K.
        left = fragment(a, U4).reshape(n, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2)  # [n, rh, g, kh, t]
        left = _k_of(left, kind, n, 16, per_word)
        right = fragment(b, U4).transpose(0, 1, 3, 2)  # [n, g, kh, t]
        right = _k_of(right, kind, n, 8, per_word)
        result = product(left, right.swapaxes(1, 2))  # [n, 16, 8]
        base = fragment(c, np.dtype("f4")).reshape(n, 8, 4, 2, 2)  # [n, g, t, row half, column]
        base = base.transpose(0, 3, 1, 2, 4).reshape(n, 16, 8)
        total = (base + result).reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4)
        for i, name in enumerate(d):
            whole = np.zeros(m.lanes, np.float32)
            whole[index.reshape(-1)] = total[:, :, i].reshape(-1)
            m.write(name, whole)

    return step


def _k_of(words: np.ndarray, kind: str, n: int, rows: int, per_word: int) -> np.ndarray:
    """[n, ..., K half, t] words -> [n, rows, K] floats; K = half * 4 words + t's word."""
    return values(words.reshape(n, rows, 8), kind).reshape(n, rows, 8 * per_word)
