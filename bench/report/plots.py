"""Results files as pictures.

    python -m bench.report.plots FILE --out DIR

latency.png: percentiles against batch. floor.png: fraction of the floor per layer. speed_error.png:
speed against map error. A picture for which a file has no rows is not drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Row
from bench.report.format import dtype_name, of_kind, source
from efficientad.utils.files import replace_file

NAMES = {"triton": "ours", "torch": "ours (torch backend)", "eager": "torch eager",
         "channels_last": "torch channels_last", "compile": "torch.compile"}  # fmt: skip
COLORS = {"triton": "C0", "torch": "C0", "eager": "C1", "channels_last": "C2", "compile": "C3"}
PERCENTILES = (("p50_ms", "o-"), ("p90_ms", "s--"), ("p99_ms", "^:"))


def _series(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(size, dtype, pixels) -> rows with times, one per batch."""
    series: dict[tuple[str, str, str], dict[int, Row]] = {}
    for r in rows:
        if r.get("p50_ms"):
            pixels = "x".join(map(str, r["image_size"][::-1]))
            key = (r["size"], dtype_name(r["dtype"]), pixels)
            series.setdefault(key, {})[r["batch"]] = r
    return {key: [by[b] for b in sorted(by)] for key, by in series.items()}


def latency(found: dict[str, Any], plt: Any) -> Any | None:
    """Percentiles of a call against its batch; a panel per network, one colour per dtype."""
    series = _series(of_kind(found, "end_to_end"))
    sizes = sorted({size for size, *_ in series}, key="SM".find)
    if not sizes:
        return None
    from matplotlib.ticker import LogLocator

    figure, grid = plt.subplots(1, len(sizes), figsize=(6.5 * len(sizes), 5), squeeze=False)
    for axes, size in zip(grid.flat, sizes, strict=True):
        here = {key[1:]: rows for key, rows in series.items() if key[0] == size}
        for i, ((dtype, pixels), rows) in enumerate(here.items()):
            batches = [r["batch"] for r in rows]
            for name, style in PERCENTILES:
                label = f"{dtype} {pixels}" if name == "p50_ms" else None
                axes.plot(batches, [r[name] for r in rows], style, color=f"C{i % 10}", label=label,
                          markersize=5)  # fmt: skip
        batches = sorted({r["batch"] for rows in here.values() for r in rows})
        axes.set(xscale="log", yscale="log", xlabel="images a call", ylabel="ms, host to host")
        axes.set_xticks(batches, [str(b) for b in batches], minor=False)
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_title(f"EfficientAD-{size}: p50 (circles), p90 (squares), p99 (triangles)",
                       fontsize="medium")  # fmt: skip
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def floor(found: dict[str, Any], plt: Any) -> Any | None:
    """Per layer: the floor over the time, of ours and of plain torch; a panel per net and batch."""
    rows = [r for r in of_kind(found, "kernel") if r.get("fraction_of_ceiling")]
    rows = [r for r in rows if dtype_name(r["dtype"]) != "fp8"]
    panels = [(size, batch) for size in ("S", "M") for batch in sorted({r["batch"] for r in rows})]
    panels = [p for p in panels if any(r["size"] == p[0] and r["batch"] == p[1] for r in rows)]
    if not panels:
        return None
    columns = min(len(panels), 2 if len(panels) < 5 else 3)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.5 * columns, 3.6 * lines), squeeze=False)
    backends = [b for b in NAMES if any(r["backend"] == b for r in rows)]
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (size, batch) in zip(grid.flat, panels, strict=False):
        here = [r for r in rows if size in r["size"] and r["batch"] == batch]
        layers = list(dict.fromkeys(r["layer"] for r in here if r["size"] == size))
        layers += list(dict.fromkeys(r["layer"] for r in here if r["size"] != size))
        width = 0.8 / len(backends)
        for i, backend in enumerate(backends):
            values = {r["layer"]: r["fraction_of_ceiling"] for r in here if r["backend"] == backend}
            places = [
                layers.index(layer) + (i - (len(backends) - 1) / 2) * width for layer in values
            ]
            axes.bar(places, list(values.values()), width, label=NAMES[backend],
                     color=COLORS[backend])  # fmt: skip
        axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize="small")
        small = ", small shapes" if any(r["small"] for r in here) else ""
        axes.set_title(f"EfficientAD-{size}, batch {batch}{small}", fontsize="medium")
        axes.set_ylabel("floor / time")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
        axes.grid(alpha=0.3, axis="y")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.6 * lines)))
    return figure


def speed_error(found: dict[str, Any], plt: Any) -> Any | None:
    """Images a second against the largest map error; a panel per net and batch with peers."""
    rows = [r for r in of_kind(found, "end_to_end", "peer") if r.get("images_per_s")]
    rows = [r for r in rows if r.get("map_error") is not None and r["image_size"] == [256, 256]]
    places = sorted({("SM".find(r["size"]), r["batch"]) for r in rows if r["kind"] == "peer"})
    places = places or sorted({("SM".find(r["size"]), r["batch"]) for r in rows})
    if not places:
        return None
    names = list(dict.fromkeys(_contender(r) for r in sorted(rows, key=lambda r: r["kind"])))
    colors = plt.get_cmap("tab20").colors
    columns = min(len(places), 3)
    lines = -(-len(places) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.5 * columns, 4.3 * lines + 1.2),
                                squeeze=False)  # fmt: skip
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    handles = {}
    for axes, (size, batch) in zip(grid.flat, places, strict=False):
        here = [r for r in rows if ("SM".find(r["size"]), r["batch"]) == (size, batch)]
        for r in here:
            name, ours = _contender(r), r["kind"] == "end_to_end"
            color = colors[2 * names.index(name) % 20 + names.index(name) // 10 % 2]
            (handles[name],) = axes.plot(
                max(r["map_error"], 1e-8), r["images_per_s"], "*" if ours else "o", color=color,
                markersize=15 if ours else 8, linestyle="none",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="largest map error, part of the map's scale")
        axes.set(ylabel="images/s", ylim=(0, 1.1 * max(r["images_per_s"] for r in here)))
        axes.set_title(
            f"EfficientAD-{'SM'[size]}, batch {batch}: stars are ours", fontsize="medium"
        )
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    share = 1.2 / (4.3 * lines + 1.2)
    figure.tight_layout(rect=(0, share, 1, 1))
    figure.legend(handles.values(), handles, loc="lower center", ncols=min(3, columns + 1),
                  fontsize="small", bbox_to_anchor=(0.5, 0.02))  # fmt: skip
    return figure


def _contender(row: Row) -> str:
    return f"{row['name']}, {dtype_name(row['dtype'])}"


PICTURES: dict[str, Callable[[dict[str, Any], Any], Any | None]] = {
    "latency.png": latency,
    "floor.png": floor,
    "speed_error.png": speed_error,
}


def render(found: dict[str, Any], out: Path) -> list[Path]:
    """Draw what the results have rows for; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    for name, draw in PICTURES.items():
        figure = draw(found, plt)
        if figure is None:
            continue
        figure.text(0.005, 0.003, source(found), fontsize=6, color="0.4")
        path = out / name

        def save(temporary: Path, figure: Any = figure) -> None:
            figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")

        replace_file(path, save)
        plt.close(figure)
        files.append(path)
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report.plots", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(argv)
    for path in render(record.read(options.file), options.out):
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
