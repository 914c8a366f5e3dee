"""Instructions on registers: integers, floats, predicates, conversions, shuffles."""

from __future__ import annotations

import numpy as np

from ptx import floats
from ptx.machine import TYPES, Machine, instruction
from ptx.parse import Fault, Instruction

U2, U4, F4 = np.dtype("u2"), np.dtype("u4"), np.dtype("f4")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide,
    "max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum,
    "abs": np.abs, "neg": np.negative,
}  # fmt: skip
INTEGER = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum,
    "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": np.negative, "abs": np.abs,
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def operation(instr: Instruction, kinds: tuple[str, ...], compute):
    """dst = compute(sources of these types)."""
    dst, *sources = instr.operands
    if len(sources) != len(kinds):
        raise Fault("unknown instruction", instr.text)
    dtypes = [TYPES[kind] for kind in kinds]
    pairs = list(zip(sources, dtypes, strict=True))

    def step(m: Machine) -> None:
        with np.errstate(all="ignore"):
            m.write(dst, compute(*[m.read(source, dtype) for source, dtype in pairs]))

    return step


@instruction(r"(add|sub|mul|div\.rn|(?:max|min)(?:\.NaN)?|abs|neg)(?:\.rn)?\.f32")
def _float(match, instr, kernel):
    compute = FLOAT[match[1]]
    if match[1][:3] in ("max", "min") and len(instr.operands) == 4:
        return operation(instr, ("f32",) * 3, lambda x, y, z: compute(compute(x, y), z))
    return operation(instr, ("f32",) * (1 if match[1] in ("abs", "neg") else 2), compute)


@instruction(r"fma\.rn\.f32")
def _fma(match, instr, kernel):
    def compute(a, b, c):  # the product is exact in float64
        return (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype("f4")

    return operation(instr, ("f32",) * 3, compute)


@instruction(r"(add|sub|mul|fma)(?:\.rn)?\.f32x2")
def _two_floats(match, instr, kernel):
    def compute(*sources):
        pairs = [np.ascontiguousarray(x).view("f4") for x in np.broadcast_arrays(*sources)]
        if match[1] != "fma":
            return FLOAT[match[1]](*pairs).view("u8")
        a, b, c = (pair.astype("f8") for pair in pairs)
        return (a * b + c).astype("f4").view("u8")

    return operation(instr, ("b64",) * (3 if match[1] == "fma" else 2), compute)


@instruction(r"(add|sub|mul\.lo|min|max|and|or|xor|not|neg|abs)\.([sub](?:16|32|64)|pred)")
def _integer(match, instr, kernel):
    one = match[1] in ("not", "neg", "abs")
    return operation(instr, (match[2],) * (1 if one else 2), INTEGER[match[1]])


@instruction(r"(div|rem)\.([su](?:32|64))")
def _divide(match, instr, kernel):
    def compute(a, b):
        a, b = np.broadcast_arrays(a, b)
        if match[2][0] == "u":
            return a // b if match[1] == "div" else a % b
        size = np.abs(a) // np.where(b == 0, 1, np.abs(b))
        quotient = np.where((a < 0) != (b < 0), -size, size).astype(a.dtype)
        return quotient if match[1] == "div" else a - quotient * b

    return operation(instr, (match[2],) * 2, compute)


@instruction(r"mul\.(wide|hi)\.([su](?:16|32))")
def _wide(match, instr, kernel):
    wide, bits = TYPES[WIDE[match[2]]], int(match[2][1:])

    def compute(a, b):
        product = a.astype(wide) * b.astype(wide)
        return product if match[1] == "wide" else (product >> bits).astype(a.dtype)

    return operation(instr, (match[2],) * 2, compute)


@instruction(r"mad\.(wide|lo)\.([su](?:16|32|64))")
def _mad(match, instr, kernel):
    kind = match[2]
    result = WIDE[kind] if match[1] == "wide" else kind
    wide = TYPES[result]
    return operation(
        instr, (kind, kind, result), lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    )


@instruction(r"(shl|shr)\.([sub])(16|32|64)")
def _shift(match, instr, kernel):
    kind, bits = match[2] + match[3], int(match[3])

    def compute(a, n):
        inside = np.minimum(n, bits - 1).astype(a.dtype)
        if match[1] == "shl":
            return np.where(n < bits, a << inside, a.dtype.type(0))
        moved = a >> inside
        return moved if match[2] == "s" else np.where(n < bits, moved, a.dtype.type(0))

    return operation(instr, (kind, "u32"), compute)


@instruction(r"bfe\.([su])(32|64)")
def _extract(match, instr, kernel):
    kind, bits = match[1] + match[2], int(match[2])
    dst, source, start, length = instr.operands
    if not (isinstance(start, int) and isinstance(length, int) and start + length <= bits):
        raise Fault("unknown instruction", instr.text)
    up, down = bits - start - length, bits - length

    def compute(a):
        return (a << a.dtype.type(up)) >> a.dtype.type(down)

    return operation(
        Instruction(instr.text, None, False, instr.opcode, (dst, source)), (kind,), compute
    )  # fmt: skip


@instruction(r"selp\.([subf](?:16|32|64))")
def _select(match, instr, kernel):
    return operation(instr, (match[1], match[1], "pred"), lambda a, b, p: np.where(p, a, b))


@instruction(r"setp\.(eq|ne|lt|le|gt|ge)(u?)\.([sub](?:16|32|64)|f32)")
def _compare(match, instr, kernel):
    compare, unordered = COMPARE[match[1]], match[2] == "u"

    def compute(a, b):
        if match[3] != "f32":
            return compare(a, b)
        nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | nan if unordered else compare(a, b) & ~nan

    return operation(instr, (match[3],) * 2, compute)


@instruction(r"setp\.(nan|num)\.f32")
def _is_nan(match, instr, kernel):
    def compute(a, b):
        nan = np.isnan(a) | np.isnan(b)
        return nan if match[1] == "nan" else ~nan

    return operation(instr, ("f32", "f32"), compute)


@instruction(r"mov\.([subf](?:16|32|64)|pred)")
def _move(match, instr, kernel):
    dst, source = instr.operands
    if not isinstance(dst, tuple) and not isinstance(source, tuple):
        return operation(instr, (match[1],), lambda a: a)
    whole = TYPES[match[1]]
    parts = len(dst if isinstance(dst, tuple) else source)
    part = np.dtype(f"u{whole.itemsize // parts}")

    def unpack(m: Machine) -> None:
        undefined = m.undefined.pop(source, set())
        pieces = m.read(source, whole)[:, None].copy().view(part)
        for i, name in enumerate(dst):
            if i in undefined and name != "_":
                raise Fault("uninitialised", f"part {i} of register {source}")
            m.write(name, pieces[:, i])
        if undefined:
            m.undefined[source] = undefined

    def pack(m: Machine) -> None:
        # Of a pair of which one is used LLVM leaves the other undefined: a register never written.
        undefined = {i for i, name in enumerate(source) if _never_written(m, name)}
        values = [np.zeros(1, part) if i in undefined else m.read(name, part)
                  for i, name in enumerate(source)]  # fmt: skip
        m.write(dst, np.stack(np.broadcast_arrays(*values), 1).view(whole)[:, 0])
        if undefined:
            m.undefined[dst] = undefined

    return unpack if isinstance(dst, tuple) else pack


def _never_written(m: Machine, name: object) -> bool:
    known = not isinstance(name, str) or not name.startswith("%")
    return not (known or name in m.regs or name in m.special)


@instruction(r"prmt\.b32")
def _permute(match, instr, kernel):
    def compute(a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, selector)
        pair = a.astype("u8") | (b.astype("u8") << 32)
        result = np.zeros(len(a), "u4")
        for i in range(4):
            pick = (selector >> (4 * i)) & 15
            byte = ((pair >> (8 * (pick & 7)).astype("u8")) & 0xFF).astype("u4")
            byte = np.where(pick & 8, np.where(byte & 0x80, 0xFF, 0), byte)
            result |= byte.astype("u4") << np.uint32(8 * i)
        return result

    return operation(instr, ("b32",) * 3, compute)


# --- conversions ----------------------------------------------------------------------------------

HALF = {"f16x2": lambda x: x.astype("f2").view("u2"), "bf16x2": floats.to_bf16}


@instruction(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _widen(match, instr, kernel):
    to = TYPES[match[1]]
    return operation(instr, (match[2],), lambda a: a.astype(to))


@instruction(r"cvt\.rn\.f32\.([su](?:16|32|64))")
def _to_float(match, instr, kernel):
    return operation(instr, (match[1],), lambda a: a.astype("f4"))


@instruction(r"cvt\.rzi\.s32\.f32")
def _to_integer(match, instr, kernel):
    def compute(a):
        clipped = np.clip(np.nan_to_num(a.astype("f8")), -(2.0**31), 2.0**31 - 1)
        return np.trunc(clipped).astype("i4")

    return operation(instr, ("f32",), compute)


@instruction(r"cvt\.f32\.(f16|bf16)")
def _from_half(match, instr, kernel):
    if match[1] == "bf16":
        return operation(instr, ("b16",), floats.from_bf16)
    return operation(instr, ("f16",), lambda a: a.astype("f4"))


@instruction(r"cvt\.rn\.(f16|bf16)\.f32")
def _to_half(match, instr, kernel):
    return operation(instr, ("f32",), HALF[f"{match[1]}x2"])


@instruction(r"cvt\.rn\.(f16x2|bf16x2)\.f32")
def _to_halves(match, instr, kernel):
    half = HALF[match[1]]

    def compute(high, low):
        high, low = np.broadcast_arrays(high, low)
        return half(low).astype("u4") | (half(high).astype("u4") << 16)

    return operation(instr, ("f32", "f32"), compute)


@instruction(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
def _to_e4m3(match, instr, kernel):
    def compute(high, low):
        high, low = np.broadcast_arrays(high, low)
        return floats.to_e4m3(low).astype("u2") | (floats.to_e4m3(high).astype("u2") << 8)

    return operation(instr, ("f32", "f32"), compute)


# --- within a warp --------------------------------------------------------------------------------


@instruction(r"shfl\.sync\.(bfly|idx)\.b32")
def _shuffle(match, instr, kernel):
    dst, source, lane, clamp, members = instr.operands
    if clamp != 31 or members != -1:
        raise Fault("unknown instruction", instr.text)

    def step(m: Machine) -> None:
        m.warps()
        values = m.full(m.read(source, U4)).reshape(-1, 32)
        own = np.arange(32)
        picked = m.full(m.read(lane, U4)).reshape(-1, 32) & 31
        place = own ^ picked if match[1] == "bfly" else picked
        m.write(dst, np.take_along_axis(values, place.astype(np.int64), 1).reshape(-1))

    return step


@instruction(r"redux\.sync\.(max|min)\.([su]32)")
def _reduce(match, instr, kernel):
    dst, source, _ = instr.operands
    pick = np.max if match[1] == "max" else np.min

    def step(m: Machine) -> None:
        m.warps()
        values = m.full(m.read(source, TYPES[match[2]])).reshape(-1, 32)
        m.write(dst, np.repeat(pick(values, axis=1), 32))

    return step


@instruction(r"elect\.sync")
def _elect(match, instr, kernel):
    (lane, elected), members = instr.operands
    if members != -1:
        raise Fault("unknown instruction", instr.text)

    def step(m: Machine) -> None:
        m.warps()
        m.write(lane, np.zeros(1, np.uint32))
        m.write(elected, m.thread % 32 == 0)

    return step


@instruction(r"cvta\.param\.u64")
def _generic(match, instr, kernel):
    return operation(instr, ("u64",), lambda a: a)
