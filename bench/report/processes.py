"""The table of `bench.predictor.processes`."""

from __future__ import annotations

from typing import Any

from bench.record import Row
from bench.report.format import DASH, dtype_name, error, markdown, number, of_kind

HEAD = ("contender", "net", "batch", "dtype", "calls", "p50 ms", "spread", "x auto", "alone ms",
        "busy x", "map error", "score error", "turned")  # fmt: skip


def processes_table(found: dict[str, Any]) -> str:
    """A line per contender, network and batch, and how far times alone and among peers lie apart.

    "x auto": as many times as long as the predictor's own choice of dtype takes (and its spread).
    "busy x": as many times as long with loaded cores. "turned": verdicts other than float32's.
    """
    rows = of_kind(found, "process")
    table = markdown(HEAD, map(_cells, rows))
    ratios = [r["among_ratio"] for r in rows if r.get("among_ratio")]
    if not ratios:
        return table
    near = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
    spread = f"{number(min(ratios))} to {number(max(ratios))}"
    near_ones = f"within 5 % in {near} of {len(ratios)} lines"
    return f"{table}\n\nAmong peers over alone: {spread}, {near_ones}."


def _cells(row: Row) -> list[str]:
    turned = DASH if row["flips"] is None else f"{row['flips']} of {row['pictures']}"
    reason = row["no_time"]
    short = "wrong" if row.get("wrong") else (reason if len(reason or "") <= 20 else "failed")
    ratio = DASH
    if row["ratio"] is not None:
        ratio = f"{number(row['ratio'])} ({number(row['ratio_spread'], 2)})"
    return [
        row["name"], row["size"], number(row["batch"]), dtype_name(row["dtype"]),
        number(row["calls"]), short if reason else number(row["p50_ms"]),
        number(row["spread_ms"]), ratio, number(row["alone_ms"]), number(row["busy_ratio"]),
        error(row["map_error"]), error(row["score_error"]), turned,
    ]  # fmt: skip
