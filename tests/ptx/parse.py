"""PTX text -> instructions. Nothing is skipped: what is not understood is an error."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass


class Fault(Exception):
    """What a kernel does wrong, or what the simulator does not know; `kind` is its name."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, with coordinates where a tensor map is meant."""

    base: str
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Instruction:
    """Operands: register or symbol (str), immediate or its bits (int), vector (tuple), Address."""

    text: str
    guard: str | None
    negated: bool
    opcode: str
    operands: tuple


@dataclass(frozen=True)
class Kernel:
    name: str
    params: dict[str, int]  # name -> bytes, in order
    threads: int
    widths: dict[str, int]  # register's prefix, such as "%rd" -> bits (1 for predicates)
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # -> index of the instruction behind it


ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+[^{]*)?)\{", re.S)
PARAM = re.compile(r"\.param\s+(?:\.align \d+ )?\.(\w+)[^,]*?\s(\w+)(?:\[(\d+)\])?\s*$")
BYTES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "s32": 4, "b8": 1, "u16": 2, "u8": 1}
REG = re.compile(r"\.reg\s+\.(pred|[bufs]\d+)\s+(.*)", re.S)
GUARD = re.compile(r"@(!?)(\S+)\s+(.*)", re.S)
LABEL = re.compile(r"([$\w]+):")
NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?")
DIRECTIVES = (".loc", ".file", "//")


def parse(ptx: str) -> Kernel:
    """The one kernel in `ptx`."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"^\s*(\.loc|\.file)\b.*$", "", ptx, flags=re.M))
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise Fault("unknown instruction", f"{len(entries)} kernels in one text")
    entry = entries[0]
    threads = re.search(r"\.reqntid (\d+)", entry[3])
    if threads is None:
        raise Fault("unknown instruction", "no .reqntid")
    params = {}
    for line in entry[2].split(",\n"):
        match = PARAM.match(line.strip())
        if match is None:
            raise Fault("unknown instruction", f"parameter {line.strip()!r}")
        params[match[2]] = BYTES[match[1]] * int(match[3] or 1)
    return _Body(text[entry.end() :]).kernel(entry[1], params, int(threads[1]))


class _Body:
    """The statements between the braces; names declared in inner braces are made unique."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.scopes: list[dict[str, str]] = [{}]
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.opened = 0

    def kernel(self, name: str, params: dict[str, int], threads: int) -> Kernel:
        while self.scopes:
            rest = self.text[self.place :]
            self.place += len(rest) - len(rest.lstrip())
            self._statement()
        for instruction in self.instructions:
            if instruction.opcode.startswith("bra") and instruction.operands[0] not in self.labels:
                raise Fault("unknown instruction", f"no label for {instruction.text}")
        return Kernel(
            name, params, threads, self.widths, tuple(self.instructions), self.labels
        )  # fmt: skip

    def _statement(self) -> None:
        if self.place >= len(self.text):
            raise Fault("unknown instruction", "the text ends within the kernel")
        if self.text[self.place] == "{":
            self.opened += 1
            self.scopes.append({})
            self.place += 1
        elif self.text[self.place] == "}":
            self.scopes.pop()
            self.place += 1
        elif label := LABEL.match(self.text, self.place):
            self.labels[self._declare(label[1])] = len(self.instructions)
            self.place = label.end()
        else:
            end = self.text.index(";", self.place)
            text = " ".join(self.text[self.place : end].split())
            self.place = end + 1
            if text.startswith(".reg"):
                self._registers(text)
            elif not text.startswith(".pragma"):
                self._instruction(text)

    def _declare(self, name: str) -> str:
        if len(self.scopes) > 1:
            self.scopes[-1][name] = f"{name}#{self.opened}"
        return self._resolve(name)

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _registers(self, text: str) -> None:
        match = REG.match(text)
        assert match is not None
        bits = 1 if match[1] == "pred" else int(match[1][1:])
        for name in match[2].split(","):
            self.widths[self._declare(re.sub(r"<\d+>$", "", name.strip()))] = bits

    def _instruction(self, text: str) -> None:
        guard, negated, rest = None, False, text
        if match := GUARD.match(text):
            guard, negated, rest = self._resolve(match[2]), bool(match[1]), match[3]
        opcode, _, operands = rest.partition(" ")
        self.instructions.append(
            Instruction(text, guard, negated, opcode, tuple(map(self._operand, _split(operands))))
        )

    def _operand(self, text: str):
        text = text.strip()
        if text[0] == "{":
            return tuple(map(self._operand, _split(text[1:-1])))
        if text[0] == "[":
            base, *coordinates = _split(text[1:-1])
            name, sign, offset = re.fullmatch(r"\s*([$%\w]+)\s*([+-]?)\s*(\w*)\s*", base).groups()
            value = int(sign + offset, 0) if offset else 0
            boxes = [self._operand(part) for part in coordinates]
            return Address(self._resolve(name), value, boxes[0] if boxes else ())
        if "|" in text:
            return tuple(self._resolve(part.strip()) for part in text.split("|"))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return int(text[2:], 16)
        if NUMBER.fullmatch(text):
            return int(text.rstrip("U"), 0)
        return self._resolve(text)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def float_bits(value: float) -> int:
    """Those of a float32 argument."""
    return struct.unpack("<I", struct.pack("<f", value))[0]
