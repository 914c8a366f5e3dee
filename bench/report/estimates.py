"""Estimated timelines of a predictor's CUDA graph as tables; see `bench.timeline`.

Rows of kind "estimate": per size, batch, card and choice the total in microseconds, and for the
code as it is now and as it was measured each launch.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.record import Row
from bench.report.format import DASH, NOTHING, markdown, number, of_kind

AIM = {("S", 1): 140.0, ("M", 1): 380.0}  # us of a replay, float16, on an H200


def estimate_table(found: dict[str, Any]) -> str:
    """All of a file: the launches as they are now, the choices, and what was measured beside."""
    rows = of_kind(found, "estimate")
    parts = [_launches(row) for row in rows if row["choice"] == "shipped"]
    if rows:
        parts.append(_choices(rows))
    parts += [_beside(row) for row in rows if row.get("measured_us") is not None]
    return "\n\n".join(parts) or NOTHING


def _images(row: Row) -> str:
    images = "one image" if row["batch"] == 1 else f"{row['batch']} images"
    return f"EfficientAD-{row['size']}, {images}, {row['card']}"


def _launches(row: Row) -> str:
    launches = row["launches"]
    waited = [x for x in launches if x["waited"]]
    lines = [
        [x["layer"], "waited for" if x["waited"] else "", str(x["stream"]), number(x["start_us"]),
         number(x["us"]), number(x["alone_us"]), x["bound"], number(x["programs"]),
         number(x["resident"]), f"{x['waves']:.2f}", number(x["registers"]),
         f"{x['shared'] / 1024:.0f}", f"{x['flop'] / 1e9:.2f}", f"{x['l2_bytes'] / 1e6:.1f}",
         f"{x['tensor_bytes'] / 1e6:.1f}"]
        for x in sorted(launches, key=lambda x: x["start_us"])
    ]  # fmt: skip
    head = ["launch", "", "stream", "start us", "us", "alone us", "bound by", "programs",
            "on an SM", "waves", "registers", "shared KiB", "GFLOP", "L2 MB",
            "tensors MB"]  # fmt: skip
    busy = sum(x["us"] for x in waited)
    return (
        f"Estimate, {_images(row)}: {number(row['us'])} us, of which {len(waited)} launches that "
        f"are waited for take {number(busy)} us.{_aim(row)}\n\n{markdown(head, lines)}"
    )


def _aim(row: Row) -> str:
    aim = AIM.get((row["size"], row["batch"]))
    if aim is None or row["card"] != "H200":
        return ""
    more = row["us"] - aim
    return f" The aim of {aim:.0f} us is " + (
        f"missed by {number(more)} us." if more > 0 else "met."
    )


def _choices(rows: list[Row]) -> str:
    """A line per choice, the total of every network, batch and card in a column."""
    columns = list(dict.fromkeys(_images(row) for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    us = {(row["name"], _images(row)): row["us"] for row in rows}
    lines = [[name, *(number(us.get((name, column))) for column in columns)] for name in names]
    head = ["estimate of a replay, us", *(c.removeprefix("EfficientAD-") for c in columns)]
    return markdown(head, lines)


def _beside(row: Row) -> str:
    """The launches as they were measured, and how far off the estimate is."""
    lines = []
    for x in sorted(row["launches"], key=lambda x: x["start_us"]):
        lines.append([
            x["layer"], number(x["us"]), number(x["measured_us"]), _ratio(x, "us", "measured_us"),
            number(x["alone_us"]), number(x["measured_alone_us"]),
            _ratio(x, "alone_us", "measured_alone_us"),
        ])  # fmt: skip
    head = ["launch", "estimate us", "measured us", "ratio", "alone, estimate", "alone, measured",
            "ratio"]  # fmt: skip
    ratios = [x["us"] / x["measured_us"] for x in row["launches"] if x["measured_us"]]
    said = f"Estimate beside what was measured, {_images(row)}: {number(row['us'])} us estimated"
    said += f", {number(row['measured_us'])} us measured"
    if ratios:
        said += (
            f"; of the launches, estimate over measurement {number(min(ratios))} to "
            f"{number(max(ratios))}, median {number(median(ratios))}"
        )
    return f"{said}.\n\n{markdown(head, lines)}"


def _ratio(x: Row, mine: str, theirs: str) -> str:
    return DASH if not x[theirs] else number(x[mine] / x[theirs])
