"""How numbers and rows of results files are written in tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.record import Row

DASH = "-"
NOTHING = "(nothing measured)"


def number(value: Any, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands with a comma; None is a dash."""
    if value is None:
        return DASH
    if isinstance(value, (str, bool)):
        return str(value)
    size = abs(value)
    if isinstance(value, int) or size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1
    while size and size < 1 and decimals < 6:
        size, decimals = size * 10, decimals + 1
    while size >= 10:
        size, decimals = size / 10, decimals - 1
    return f"{value:.{max(decimals, 0)}f}"


def percent(value: float | None) -> str:
    """A fraction in whole percents."""
    return DASH if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    """Two digits and a power of ten."""
    return DASH if value is None else f"{value:.1e}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """An aligned table; the first column is text, the others are put right."""
    body = [list(line) for line in lines]
    if not body:
        return NOTHING
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([text(head), text(rule), *map(text, body)])


def of_kind(found: dict[str, Any], *kinds: str) -> list[Row]:
    """The rows of a results file of some kinds."""
    return [row for row in found["rows"] if row.get("kind") in kinds]


def dtype_name(name: str | None) -> str:
    """A dtype as tables and pictures name it: "float16" is "fp16"."""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}
    return short.get(name or "", name or DASH)


def source(found: dict[str, Any]) -> str:
    """Device, versions, commit and date of a results file, in one line."""
    about = found["about"]
    versions = about.get("versions", {})
    named = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    drivers = [about.get("driver"), *(part.get("driver") for part in about.get("parts", []))]
    driver = [f"driver {name}" for name in dict.fromkeys(filter(None, drivers))]
    return ", ".join(
        [about["device"], *driver, *named, f"commit {about.get('commit')}", str(about.get("date"))]
    )
