"""Results files as tables, for people.

    python -m bench.report.tables FILE [--table NAME ...]

Markdown that is aligned, so that it reads as plain text too. `TABLES` has the tables that README.md
may hold, by name; `page` is the one page that `python -m bench.gpu` writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Row
from bench.report.estimates import estimate_table
from bench.report.format import DASH, dtype_name, error, markdown, number, of_kind, percent, source
from bench.report.processes import processes_table
from bench.report.targets import H200, all_verdicts, fits, targets_table
from bench.report.timeline import timeline_table
from bench.shapes import BOTH, network_flop, paper_gflop


def ceilings_table(found: dict[str, Any]) -> str:
    lines = [
        [r["name"], dtype_name(r["dtype"]), number(r.get("tflops"), 4), number(r.get("gb_s"), 4),
         number(r.get("us")), number(r.get("spread_us")), str(r["part"])]
        for r in of_kind(found, "ceiling")
    ]  # fmt: skip
    head = ["ceiling", "dtype", "TFLOP/s", "GB/s", "us", "spread us", "process"]
    return markdown(head, lines)


def end_to_end_table(found: dict[str, Any]) -> str:
    """Predictors from a frame on the host to a map on the host, and frames of other sizes."""
    lines = []
    for r in of_kind(found, "end_to_end", "frame"):
        lines.append([
            r["name"] if r["kind"] == "end_to_end" else f"{r['name']} {_frame(r)}", r["size"],
            _size(r), number(r["batch"]), dtype_name(r["dtype"]), *_times(r),
            number(r["images_per_s"]), *_accuracy(r),
        ])  # fmt: skip
    return markdown(
        ["what", "net", "pixels", "batch", "dtype", *TIMES, "images/s", *ACCURACY], lines
    )


def overview_table(found: dict[str, Any]) -> str:
    """A line per predictor on a GPU: its graph on the device, a call from host to host, and how
    many times longer each peer takes."""
    ratios = of_kind(found, "ratio")
    peers = list(dict.fromkeys(r["against"] for r in ratios))
    lines = []
    for r in of_kind(found, "end_to_end"):
        where = {name: r[name] for name in ("size", "batch", "image_size", "dtype", "device")}
        graph = [x for x in of_kind(found, "stage") if x["name"] == "graph" and fits(x, where)]
        mine = {x["against"]: x for x in ratios if fits(x, where)}
        lines.append([
            f"EfficientAD-{r['size']}", _size(r), number(r["batch"]), dtype_name(r["dtype"]),
            number(graph[0]["p50_ms"] if graph else None), number(r["p50_ms"]),
            number(r["images_per_s"]), *(number(mine.get(p, {}).get("ratio")) for p in peers),
            *_accuracy(r),
        ])  # fmt: skip
    head = ["net", "pixels", "batch", "dtype", "graph ms", "host to host ms", "images/s"]
    return markdown([*head, *(f"x {peer}" for peer in peers), *ACCURACY], lines)


TIMES = ("calls", "p50 ms", "p90", "p99", "max", "spread")
ACCURACY = ("map error", "rank errors")
_FEWEST = {"p90_ms": 10, "p99_ms": 100}  # calls of which a percentile says something
_SHORT = 20  # characters of a reason that fit into the place of a time


def _times(row: Row) -> list[str]:
    reason = row.get("no_time")
    if reason:
        short = reason if len(reason) <= _SHORT else "no time"
        return [DASH, "wrong" if row.get("wrong") else short, *[DASH] * 4]
    names = ("calls", "p50_ms", "p90_ms", "p99_ms", "max_ms", "spread_ms")
    shown = [name for name in names if (row.get("calls") or 0) >= _FEWEST.get(name, 0)]
    return [number(row.get(name)) if name in shown else DASH for name in names]


def _accuracy(row: Row) -> list[str]:
    return [error(row.get("map_error")), number(row.get("rank_errors"))]


def _size(row: Row) -> str:
    return "x".join(map(str, row["image_size"][::-1])) if row.get("image_size") else DASH


def _frame(row: Row) -> str:
    size = row.get("frame_size")
    return "x".join(map(str, size[::-1])) if size else ""


def peers_table(found: dict[str, Any]) -> str:
    """Peers, and how many times longer than ours they take, by our dtype: ratio (its spread)."""
    ratios = of_kind(found, "ratio")
    dtypes = list(dict.fromkeys(r["dtype"] for r in ratios))
    lines = []
    for r in of_kind(found, "peer"):
        where = {name: r[name] for name in ("size", "batch", "image_size", "device")}
        where |= {"against": r["name"], "peer_dtype": r["dtype"]}
        mine = {x["dtype"]: x for x in ratios if fits(x, where)}
        lines.append([
            r["name"], r["size"], _size(r), number(r["batch"]), dtype_name(r["dtype"]), *_times(r),
            number(r["images_per_s"]), *_accuracy(r), *(_ratio(mine.get(d, {})) for d in dtypes),
        ])  # fmt: skip
    head = ["peer", "net", "pixels", "batch", "dtype", *TIMES, "images/s", *ACCURACY]
    return markdown([*head, *(f"x ours {dtype_name(d)}" for d in dtypes)], lines)


def _ratio(row: Row) -> str:
    if row.get("ratio") is None:
        return DASH
    return f"{number(row['ratio'])} ({number(row['ratio_spread'], 2)})"


def stages_table(found: dict[str, Any]) -> str:
    lines = [
        [r["name"], r["size"], _size(r), number(r["batch"]), dtype_name(r["dtype"]),
         number(r.get("p50_ms")), number(r.get("spread_ms")), r.get("timing") or DASH]
        for r in of_kind(found, "stage", "cold_start")
    ]  # fmt: skip
    head = ["stage", "net", "pixels", "batch", "dtype", "p50 ms", "spread", "timed by"]
    return markdown(head, lines)


def kernels_table(found: dict[str, Any]) -> str:
    """A line per layer, batch and dtype: ours, then how many times longer plain torch takes."""
    rows = of_kind(found, "kernel")
    lines = []
    for r in rows:
        if r["backend"] not in ("triton", "torch") or str(r["key"]).startswith("compiled/"):
            continue
        where = {name: r[name] for name in ("size", "layer", "batch", "dtype", "device")}
        ratios = [
            next((x.get("ratio") for x in rows if fits(x, {**where, "backend": backend})), None)
            for backend in ("eager", "channels_last", "compile")
        ]
        lines.append([
            _layer(r), r["size"], number(r["batch"]), dtype_name(r["dtype"]),
            number(r["us"]) if not r["no_time"] else "wrong or failed", number(r.get("spread_us")),
            number(r.get("tflops")), number(r.get("gb_s")), percent(r.get("fraction_of_ceiling")),
            *map(number, ratios), error(r.get("max_error")),
        ])  # fmt: skip
    head = ["layer", "net", "batch", "dtype", "us", "spread", "TFLOP/s", "GB/s", "of ceiling"]
    head += ["eager x", "ch.last x", "compile x", "error"]
    counts = ", ".join(
        f"EfficientAD-{s} {sum(network_flop(s).values()) / 1e9:.1f} GFLOP an image "
        f"(the paper's count: {paper_gflop(s):.1f})"
        for s in "SM"
    )
    return f"{markdown(head, lines)}\n\nWork counted from the needed outputs: {counts}."


def sweeps_table(found: dict[str, Any]) -> str:
    """Per layer and batch: the tile that ships and the fastest one that is right."""
    groups: dict[str, list[Row]] = {}
    for r in of_kind(found, "sweep"):
        groups.setdefault(r["key"], []).append(r)
    lines = []
    for rows in groups.values():
        timed = [r for r in rows if r.get("us")]
        shipped = next((r for r in rows if r["shipped"]), {})
        best = min(timed, key=lambda r: r["us"]) if timed else {}
        broken = sum(r["no_time"] is not None for r in rows)
        lines.append([
            _layer(rows[0]), rows[0]["size"], number(rows[0]["batch"]),
            _tile(shipped), number(shipped.get("us")), _tile(best), number(best.get("us")),
            number(best.get("ratio")), number(best.get("l2_tb_s")), f"{len(rows)}, {broken}",
        ])  # fmt: skip
    head = ["layer", "net", "batch", "ships", "us", "fastest", "us", "over shipped", "L2 TB/s"]
    return markdown([*head, "variants, broken"], lines)


def _layer(row: Row) -> str:
    return f"{row['layer']} ({row['name']}{', small shape' if row['small'] else ''})"


def _tile(row: Row) -> str:
    if not row:
        return DASH
    return (
        row["tile"] if row["warps"] is None else f"{row['tile']} w{row['warps']} s{row['stages']}"
    )


def checks_table(found: dict[str, Any]) -> str:
    """What failed; checks that were passed are counted."""
    checks = of_kind(found, "correctness", "sanitizer")
    lines = [
        [f"{r['name']} {r.get('size') or ''}".strip(), dtype_name(r.get("dtype")), "wrong",
         str(r.get("error") or f"{r.get('errors')} errors")[:160]]
        for r in checks if not r["ok"]
    ]  # fmt: skip
    lines += [
        [r["name"], DASH, r["kind"], str(r.get("error") or r.get("no_time")).splitlines()[0][:160]]
        for r in of_kind(found, "failure", "refused")
    ]
    passed = sum(bool(r["ok"]) for r in checks)
    head = f"{passed} of {len(checks)} checks passed."
    return head if not lines else f"{head}\n\n{markdown(['what', 'dtype', '', 'why'], lines)}"


def _targets(found: dict[str, Any]) -> str:
    verdicts = all_verdicts([("this file", found)])
    if H200 in found["about"]["device"]:
        verdicts = [v for v in verdicts if v.target.machine == H200]
    return targets_table(verdicts)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "targets": _targets,
    "checks": checks_table,
    "ceilings": ceilings_table,
    "overview": overview_table,
    "end-to-end": end_to_end_table,
    "peers": peers_table,
    "processes": processes_table,
    "stages": stages_table,
    "kernels": kernels_table,
    "sweeps": sweeps_table,
    "timeline": timeline_table,
    "estimate": estimate_table,
}
# Kinds of the rows of which a page holds a part.
KINDS = {
    "sweeps": ("sweep",),
    "kernels": ("kernel",),
    "stages": ("stage",),
    "peers": ("peer",),
    "end-to-end": ("end_to_end",),
}


def page(found: dict[str, Any]) -> str:
    """One page of a results file: of the tables what matters most, what is most wanted last."""
    keep: dict[str, Callable[[Row], bool]] = {
        "sweeps": lambda r: r["size"] == "S" or r["layer"] in ("d6", "bottleneck"),
        "kernels": lambda r: r["size"] != BOTH and r["batch"] in (1, 32),
        "stages": lambda r: r["batch"] == 1,
        "peers": lambda r: r["batch"] in (1, 32),
        "end-to-end": lambda r: r["batch"] in (1, 16, 32),
    }
    parts = []
    for name in ("sweeps", "kernels", "stages", "ceilings", "peers", "end-to-end", "checks",
                 "targets"):  # fmt: skip
        wanted = keep.get(name, lambda r: True)
        kinds = KINDS.get(name, ())
        rows = [r for r in found["rows"] if r["kind"] not in kinds or wanted(r)]
        parts.append(f"{name}\n\n{TABLES[name]({**found, 'rows': rows})}")
    left = found["about"].get("left_out", [])
    if left:
        parts.append(f"Left out for lack of time ({len(left)} noted): complete with --resume.")
    parts.append("Whole tables: python -m bench.report.tables results.json")
    return "\n\n".join([source(found), *parts]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report.tables", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES))
    options = parser.parse_args(argv)
    found = record.read(options.file)
    print(source(found))
    for name in options.table:
        print(f"\n{name}\n\n{TABLES[name](found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
