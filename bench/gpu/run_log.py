"""Measurements under a clock, each kept on disk as soon as it is there.

A measurement is (key, callable that gives rows). Measurements of one kind (`kind_of` its key) take
about as long. In `about` the results file has `keys`, seconds by key, of all that were taken;
`parts`, date, command and driver of every process that added to it; and `left_out`, the keys for
which there was no time. Rows carry their `key` and `part`.

Nothing that failed its correctness check keeps a time, whichever of the two came first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Row

Measurement = tuple[str, Callable[[], list[Row]]]
# Seconds to allow for a kind of which none was taken yet.
FIRST_GUESS = {"compiled": 20.0, "sweep": 20.0, "sanitizer": 120.0, "peer": 60.0,
               "peer-compile": 120.0, "cold_start": 60.0, "frame": 20.0}  # fmt: skip
DEFAULT_GUESS = 10.0
OUR_KERNELS = ("kernel", "compiled", "sweep")  # kinds whose keys go on with the operation
OUR_PREDICTOR = ("end_to_end", "frame", "stage", "cold_start", "ratio")  # kinds of rows
SPEED = ("us", "spread_us", "tflops", "gb_s", "fraction_of_ceiling", "ratio", "ratio_spread",
         "l2_tb_s", "p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "spread_ms",
         "images_per_s")  # fmt: skip
CARD = ("device", "capability")
SAME = ("versions", "commit")  # the driver is noted for each part


def kind_of(key: str) -> str:
    """The first part of a key, up to "/"; what is compiled first is a kind of its own."""
    first, _, rest = key.partition("/")
    return f"{first}-compile" if rest.endswith("/compile") else first


class Budget:
    """Seconds that are left, and the longest that a measurement of each kind took.

    clock: seconds since some moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds
        self._worst: dict[str, float] = {}

    def left(self) -> float:
        return self._end - self.clock()

    def took(self, key: str, seconds: float) -> None:
        kind = kind_of(key)
        self._worst[kind] = max(seconds, self._worst.get(kind, 0.0))

    def allows(self, key: str) -> bool:
        """Whether the longest measurement of the key's kind so far would still fit."""
        kind = kind_of(key)
        guess = FIRST_GUESS.get(kind, DEFAULT_GUESS)
        return self.left() > self._worst.get(kind, guess)


class RunLog:
    """A results file that grows.

    Args:
        path: of the file, written after every measurement, whole or not at all.
        facts: from `record.about`; a date and a command of a part.
        earlier: a results file to go on with, or None. One of another card is left as it is, and
            this one starts without its rows.

    Attributes:
        other_card: the name of the earlier file's card, if it is another one.

    Raises:
        ValueError: the earlier file is of other versions or another commit, no such log, or of
            another card and the very file to write.
    """

    def __init__(self, path: Path, facts: dict[str, Any], earlier: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.about = {**facts, "parts": [], "keys": {}, "left_out": []}
        self.other_card: str | None = None
        if earlier is not None:
            found = record.read(earlier)
            if not {"parts", "keys"} <= set(found["about"]):
                raise ValueError(f"{earlier} is no results file of bench.gpu")
            if any(found["about"].get(name) != facts.get(name) for name in CARD):
                self.other_card = str(found["about"].get("device"))
                if path.exists() and path.samefile(earlier):
                    raise ValueError(
                        f"{earlier} was made on {self.other_card} and this card is "
                        f"{facts.get('device')}; a results file holds one: name another folder"
                    )
            else:
                self._go_on(found, facts, earlier)
        self.about["parts"].append({n: facts.get(n) for n in ("date", "command", "driver")})
        self.write()

    def _go_on(self, found: dict[str, Any], facts: dict[str, Any], earlier: Path) -> None:
        for name in SAME:
            if found["about"].get(name) != facts.get(name):
                raise ValueError(
                    f"{earlier} has {name} {found['about'].get(name)!r} and this run "
                    f"{facts.get(name)!r}; a results file holds one"
                )
        self.about, self.rows = found["about"], found["rows"]
        self.about["left_out"] = []

    @classmethod
    def reopen(cls, path: Path) -> RunLog:
        """The file as it is, to add to its last part."""
        log = cls.__new__(cls)
        found = record.read(path)
        log.path, log.about, log.rows = path, found["about"], found["rows"]
        log.other_card = None
        return log

    @property
    def part(self) -> int:
        return len(self.about["parts"])

    @property
    def keys(self) -> dict[str, float]:
        return self.about["keys"]

    def add(self, key: str, rows: Iterable[Row], seconds: float) -> None:
        """Rows of a measurement that was taken."""
        self.rows += [{**finite(row), "key": key, "part": self.part} for row in rows]
        self.keys[key] = round(seconds, 2)
        wrong = failures(self.rows)
        for row in self.rows:
            withhold(row, wrong)
        self.write()

    def fail(self, key: str, reason: str, seconds: float = 0.0) -> None:
        """A measurement that ended in an error, a crash or not at all."""
        self.add(key, [{"kind": "failure", "name": key, "error": reason[:1000]}], seconds)

    def leave_out(self, key: str) -> None:
        self.about["left_out"].append(key)

    def write(self) -> None:
        record.write(self.path, self.about, self.rows)


def finite(row: Row) -> Row:
    """The row with None for every number that is not finite, which JSON has no word for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def failures(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """(operation, dtype) and ("predictor S", dtype) of what is wrong or could not be checked.

    A failure's key stands for the row that it has not: "correct/OPERATION/DTYPE" or
    "correct-network/WHAT/SIZE/DTYPE". The padded network is another subject, which nobody times.
    """
    wrong = set()
    for row in rows:
        parts = str(row.get("key", "")).split("/")
        if row["kind"] == "correctness" and not row["ok"]:
            size = f"{row['size']}{'-padded' * bool(row.get('padding'))}"
            wrong.add((f"predictor {size}" if row["size"] else row["name"], row["dtype"]))
        elif row["kind"] == "failure" and parts[0] == "correct":
            wrong.add((parts[1], parts[2]))
        elif row["kind"] == "failure" and parts[0] == "correct-network":
            wrong.add((f"predictor {parts[2]}", parts[3]))
    return wrong


def withhold(row: Row, wrong: set[tuple[str, str]]) -> None:
    """Take the times away from a row about something wrong."""
    if row["kind"] in ("kernel", "sweep") and row.get("backend") in ("triton", "torch"):
        subject = row["name"]
    elif row["kind"] in OUR_PREDICTOR:
        subject = f"predictor {row.get('size')}"
    else:
        return
    if (subject, row.get("dtype")) in wrong:
        row.update({name: None for name in SPEED if name in row})
        row["no_time"] = f"{subject} failed its correctness check in {row['dtype']}"


def refused(key: str, wrong: set[tuple[str, str]]) -> str | None:
    """Why a measurement is not even tried, or None.

    Keys are "kernel/OPERATION/.../DTYPE" of our kernels, "end_to_end/SIZE/PIXELS/DTYPE/..." of our
    predictor. Where it runs beside peers, these are measured all the same.
    """
    kind, *rest = key.split("/")
    if kind in OUR_KERNELS:
        subject, dtype = rest[0], rest[-1]
    elif kind in OUR_PREDICTOR and len(rest) > 2:
        subject, dtype = f"predictor {rest[0]}", rest[2]
    else:
        return None
    if (subject, dtype) in wrong:
        return f"{subject} failed its correctness check in {dtype}"
    return None


def run_all(
    measurements: Iterable[Measurement],
    log: RunLog,
    budget: Budget,
    *,
    report: Callable[[str], None] = lambda line: None,
    after_error: Callable[[], None] = lambda: None,
) -> None:
    """Take the measurements that are not in the log and for which there is time, in order.

    Args:
        report: gets "> KEY" before a measurement and "= KEY SECONDS" after it.
        after_error: called after a measurement raised; what it raises ends the run.
    """
    for key, measure in measurements:
        if key in log.keys:
            continue
        reason = refused(key, failures(log.rows))
        if reason is not None:
            log.add(key, [{"kind": "refused", "name": key, "no_time": reason}], 0.0)
            continue
        if not budget.allows(key):
            log.leave_out(key)
            continue
        report(f"> {key}")
        start = budget.clock()
        try:
            rows = measure()
        except Exception as error:  # one measurement that breaks must not cost the others
            text = f"{type(error).__name__}: {error}"
            log.fail(key, text, budget.clock() - start)
            report(f"! {key}: {text.splitlines()[0][:200]}")
            after_error()
        else:
            log.add(key, rows, budget.clock() - start)
        budget.took(key, budget.clock() - start)
        report(f"= {key} {budget.clock() - start:.1f} s")
    log.write()
