"""The project's speed targets as data, judged by results files.

    python -m bench.report.targets [FILE ...]        # default: all of bench/results/

A target names the rows that it reads, the field, and on which machine it holds. It is met, missed,
or not measured: where rows are missing, where their times were withheld because the result was
wrong, or where the file is of another machine (the value is shown beside it then). Nothing is
guessed. Of several rows that fit the worst counts; the best where they are choices of a user.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Row
from bench.report.format import markdown, number
from bench.shapes import network_flop

MET, MISSED, OPEN = "met", "missed", "not measured"
H200, CPU = "NVIDIA H200", "CPU"


@dataclass(frozen=True)
class Read:
    """Rows and their field.

    where: field -> value; with a "~" behind the name the field must contain the value. `device` is
    compared up to its number.
    """

    where: dict[str, Any]
    field: str

    def values(self, rows: Iterable[Row]) -> list[float | None]:
        return [row.get(self.field) for row in rows if fits(row, self.where)]


@dataclass(frozen=True)
class Target:
    """A promise: `read` (over `over`, times `factor`) is at most or at least `limit`.

    over: read from the same row where it has the same `where`, else from the file's best.
    choices: the rows that fit are dtypes to choose from.
    machine: H200 or CPU. needs: rows without which the value does not answer the question, each a
    `where`.
    """

    name: str
    rule: str
    limit: float
    unit: str
    read: Read
    over: Read | None = None
    factor: float = 1.0
    machine: str = H200
    needs: tuple[dict[str, Any], ...] = field(default=())
    choices: bool = False


@dataclass(frozen=True)
class Verdict:
    """status: MET, MISSED or OPEN; `value` is what was read, if anything, `note` why it is OPEN."""

    target: Target
    status: str
    value: float | None = None
    file: str = ""
    note: str = ""


def fits(row: Row, where: dict[str, Any]) -> bool:
    """Whether a row has these values; see `Read`."""
    for name, value in where.items():
        found = row.get(name.removesuffix("~"))
        if name.endswith("~"):
            if not isinstance(found, str) or value not in found:
                return False
        elif name == "device":
            if str(found).partition(":")[0] != value.partition(":")[0]:
                return False
        elif found != value:
            return False
    return True


def _ours(kind: str, name: str, size: str, batch: int, dtype: str = "float16") -> dict[str, Any]:
    return {"kind": kind, "name": name, "size": size, "batch": batch, "dtype": dtype,
            "image_size": [256, 256], "device": "cuda"}  # fmt: skip


def _end_to_end(size: str, batch: int, dtype: str = "float16") -> dict[str, Any]:
    return _ours("end_to_end", "FastPredictor", size, batch, dtype)


def _peers(size: str, batch: int) -> dict[str, Any]:
    return {"kind": "ratio", "size": size, "batch": batch, "dtype": "float16",
            "image_size": [256, 256], "device": "cuda"}  # fmt: skip


def _per_size(size: str) -> list[Target]:
    gflop = sum(network_flop(size).values()) / 1e9
    bf16 = Read({"kind": "ceiling", "dtype": "bfloat16", "name~": "matmul"}, "tflops")
    fastest = tuple({**_peers(size, batch), "against~": "max-autotune"} for batch in (1, 32))
    return [
        Target(
            f"{size}, batch 32, end to end: share of the bfloat16 ceiling", ">=", 0.70, "",
            Read(_end_to_end(size, 32), "images_per_s"), bf16, gflop / 1e3,
        ),
        Target(
            f"{size}, batch 1: times as fast as the fastest peer", ">=", 1.5, "x",
            Read(_peers(size, 1), "ratio"), needs=fastest[:1],
        ),
        Target(
            f"{size}, batch 32: times as fast as the fastest peer", ">=", 1.3, "x",
            Read(_peers(size, 32), "ratio"), needs=fastest[1:],
        ),
        Target(
            f"{size}, batch 1: p99 over p50", "<=", 1.1, "",
            Read(_end_to_end(size, 1), "p99_ms"), Read(_end_to_end(size, 1), "p50_ms"),
        ),
    ]  # fmt: skip


TARGETS: tuple[Target, ...] = (
    Target(
        "S, batch 1: time on the GPU", "<=", 0.150, "ms",
        Read(_ours("stage", "graph", "S", 1), "p50_ms"),
    ),
    Target(
        "S, batch 1: host to host, p50", "<=", 0.250, "ms", Read(_end_to_end("S", 1), "p50_ms")
    ),
    Target(
        "S, batch 16: throughput", ">=", 7000, "images/s",
        Read(_end_to_end("S", 16), "images_per_s"),
    ),
    Target(  # a predictor is built in fp8 only for a detector that passed fp8's own check
        "S, batch 16, fp8: throughput", ">=", 10000, "images/s",
        Read(_end_to_end("S", 16, "float8_e4m3fn"), "images_per_s"),
    ),
    Target(
        "M, batch 1: time on the GPU", "<=", 0.400, "ms",
        Read(_ours("stage", "graph", "M", 1), "p50_ms"),
    ),
    Target(
        "M, batch 16: throughput", ">=", 2300, "images/s",
        Read(_end_to_end("M", 16), "images_per_s"),
    ),
    *_per_size("S"),
    *_per_size("M"),
    Target(
        "CPU, S, batch 1, fastest dtype: times as fast as eager nelson1425 order", ">=", 2.5, "x",
        Read(
            {"kind": "ratio", "size": "S", "batch": 1, "image_size": [256, 256], "device": "cpu",
             "against~": "nelson1425"},
            "ratio",
        ),
        machine=CPU, choices=True,
    ),
)  # fmt: skip


def evaluate(target: Target, files: Sequence[tuple[str, dict[str, Any]]]) -> Verdict:
    """Judge a target by results files, (name, contents): the newest that has an answer."""
    verdict = Verdict(target, OPEN, note="no such row")
    for name, found in sorted(files, key=lambda f: f[1]["about"].get("date", "")):
        verdict = _better(verdict, _by_one(target, name, found))
    return verdict


def _better(old: Verdict, new: Verdict) -> Verdict:
    """The newer one, unless it knows less."""

    def knows(verdict: Verdict) -> int:
        return 2 if verdict.status != OPEN else int(verdict.note != "no such row")

    return new if knows(new) >= knows(old) else old


def _by_one(target: Target, name: str, found: dict[str, Any]) -> Verdict:
    rows = found["rows"]
    fields = target.read.values(rows)
    if not fields:
        return Verdict(target, OPEN, note="no such row")
    values = [v for v in fields if v is not None]
    if len(values) < len(fields):
        reasons = [r["no_time"] for r in rows if fits(r, target.read.where) and r.get("no_time")]
        return Verdict(target, OPEN, file=name, note=(reasons or ["no time in the row"])[0])
    for where in target.needs:
        if not any(fits(row, where) for row in rows):
            missing = ", ".join(str(v) for k, v in where.items() if k.endswith("~"))
            return Verdict(target, OPEN, file=name, note=f"the peer {missing} is missing")
    worst, best = (max, min) if target.rule == "<=" else (min, max)
    over = target.over
    if over is not None:
        fields = over.values(rows)
        under = [v for v in fields if v]
        if not under or len(under) < len(fields):
            return Verdict(target, OPEN, file=name, note=f"no {over.field} to compare with")
        if over.where != target.read.where:
            under = [best(under)] * len(values)
        values = [value / other for value, other in zip(values, under, strict=True)]
    value = (best if target.choices else worst)(values) * target.factor
    device = found["about"]["device"]
    if target.machine == H200 and H200 not in device:
        return Verdict(target, OPEN, value, name, f"that is {device}")
    held = value <= target.limit if target.rule == "<=" else value >= target.limit
    return Verdict(target, MET if held else MISSED, value, name)


def read_results(paths: Iterable[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(name, contents) of the files that hold `about` and `rows`; others are passed over."""
    files = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and {"about", "rows"} <= set(found):
            files.append((path.name, found))
    return files


def all_verdicts(files: Sequence[tuple[str, dict[str, Any]]]) -> list[Verdict]:
    return [evaluate(target, files) for target in TARGETS]


def targets_table(verdicts: Sequence[Verdict]) -> str:
    """A line per target: its limit, what was read, and the file or why it is not measured."""
    lines = []
    for v in verdicts:
        t = v.target
        limit = f"{t.rule} {number(t.limit)} {t.unit}".strip()
        lines.append([t.name, limit, number(v.value), v.status, v.note or v.file])
    return markdown(["target (H200, fp16 unless said)", "", "value", "", "from"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.report.targets", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="*", help="default: bench/results/*.json")
    paths = parser.parse_args(argv).files or sorted(record.RESULTS.glob("*.json"))
    print(targets_table(all_verdicts(read_results(paths))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
