"""Accuracy of every data set at hand, as a table in docs/training.md and as a picture.

    python -m bench.report.accuracy            # makes the table between the markers and the picture
    python -m bench.report.accuracy --check    # exit 1 if the page says anything else

Made from bench/results/accuracy.json: its yardsticks, and its detectors with the paper's maps and
score, by schedule. Several seeds of a schedule are their median and their range.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import record
from bench.record import Row
from bench.report.format import DASH, markdown
from efficientad.utils.files import write_text

PAGE = Path("docs") / "training.md"
PICTURE = Path("docs") / "pictures" / "accuracy.png"
BLOCK = re.compile(
    r"(?P<head><!-- accuracy: (?P<teacher>.+?) -->\n)(?P<text>.*?)(?P<end><!-- end accuracy -->)",
    re.DOTALL,
)
KINDS = ("nearest neighbour", "instant", "short")
DRAWN = ("drawn_parts",)  # data sets that are no photographs: not in the means
STYLES = {"nearest neighbour": ("D", "0.5"), "instant": ("o", "C0"), "short": ("s", "C1")}
FIGURES = ("image_auroc", "pixel_auroc", "aupro")


def kind_of(row: Row) -> str | None:
    """One of KINDS, or None for a row that is no part of the table."""
    if row["kind"] == "yardstick":
        return KINDS[0]
    whole = row["kind"] == "efficientad" and row.get("normalization") == "quantiles"
    whole = whole and row.get("score", "max") == "max"
    return row.get("schedule") if whole and row.get("schedule") in KINDS else None


def grouped(rows: list[Row], teacher: str) -> dict[str, dict[str, list[Row]]]:
    """data set -> kind -> rows of a teacher (its digest), in the order of the file.

    A seed counts once: a repeat on another machine is no further seed.
    """
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kind = kind_of(row)
        if kind is None or row["teacher"] != teacher:
            continue
        same = found[row["dataset"]][kind]
        if row.get("seed") is None or all(row["seed"] != other.get("seed") for other in same):
            same.append(row)
    return found


def median(rows: list[Row], figure: str) -> float | None:
    """The median of a figure over the seeds; None without rows, or in a set without masks."""
    values = [row[figure] for row in rows if row.get(figure) is not None]
    return statistics.median(values) if values else None


def _cell(rows: list[Row], figure: str) -> str:
    value = median(rows, figure)
    if value is None:
        return DASH
    values = [row[figure] for row in rows]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{value:.3f}{spread}"


def _star(rows: list[Row]) -> str:
    """ " *" where a row is of an earlier recipe, which its "recipe" names."""
    return " *" if any(row.get("recipe") for row in rows) else ""


def accuracy_table(rows: list[Row], teacher: str) -> str:
    """A line per data set and kind, and the means over the real sets that have every kind."""
    sets = grouped(rows, teacher)
    lines = []
    for name, kinds in sets.items():
        for kind in KINDS:
            if kind in kinds:
                found = kinds[kind]
                minutes = statistics.median(row["seconds"] for row in found) / 60
                seeds = str(len(found)) if kind != KINDS[0] else DASH
                figures = [_cell(found, figure) for figure in FIGURES]
                lines.append([f"{name}, {kind}{_star(found)}", *figures, f"{minutes:.1f}", seeds])
    real = [kinds for name, kinds in sets.items() if name not in DRAWN]
    whole = [kinds for kinds in real if all(kind in kinds for kind in KINDS[:2])]
    for kind in KINDS:
        if len(whole) > 1 and all(kind in kinds for kinds in whole):
            values = [median(kinds[kind], "image_auroc") for kinds in whole]
            mean = statistics.fmean(v for v in values if v is not None)
            star = _star([row for kinds in whole for row in kinds[kind]])
            label = f"mean of {len(whole)} real sets, {kind}{star}"
            lines.append([label, f"{mean:.3f}", DASH, DASH, DASH, DASH])
    head = ["", "image AU-ROC", "pixel AU-ROC", "AU-PRO 0.3", "minutes", "seeds"]
    return markdown(head, lines)


def make(text: str, rows: list[Row]) -> str:
    """The page's text with its tables made anew. Raises ValueError without a marker."""
    if not BLOCK.search(text):
        raise ValueError(f"{PAGE} has no `<!-- accuracy: TEACHER -->` with its end")
    return BLOCK.sub(
        lambda match: (
            f"{match['head']}\n{accuracy_table(rows, match['teacher'])}\n\n{match['end']}"
        ),
        text,
    )


def draw(rows: list[Row], teacher: str, path: Path) -> None:
    """Image AU-ROC against minutes, a panel per real data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    sets = {name: kinds for name, kinds in grouped(rows, teacher).items() if name not in DRAWN}
    columns = 3
    lines = -(-len(sets) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 3.1 * lines + 0.5), dpi=110, squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    for axis in grid.flat[len(sets) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis, (name, kinds) in zip(grid.flat, sets.items(), strict=False):
        for kind in KINDS:
            found = kinds.get(kind, [])
            marker, color = STYLES[kind]
            minutes = [row["seconds"] / 60 for row in found]
            values = [row["image_auroc"] for row in found]
            handles[kind] = axis.scatter(minutes, values, marker=marker, color=color, s=42)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.set_axisbelow(True)
    for axis in grid[-1]:
        axis.set_xlabel("minutes (log)")
    for axis in grid[:, 0]:
        axis.set_ylabel("image AU-ROC")
    figure.legend(handles.values(), handles, loc="lower center", ncol=len(KINDS), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    parser.add_argument("--root", type=Path, default=record.ROOT, help="where bench/results is")
    options = parser.parse_args(argv)
    table = options.root / "bench" / "results" / "accuracy.json"
    rows = json.loads(table.read_text(encoding="utf-8"))
    text = (options.root / PAGE).read_text(encoding="utf-8")
    made = make(text, rows)
    if options.check:
        if made != text:
            print(f"{PAGE}: the table is not that of {table.name}", file=sys.stderr)
        return int(made != text)
    write_text(options.root / PAGE, made)
    found = BLOCK.search(made)
    assert found is not None  # `make` has seen to it
    draw(rows, found["teacher"], options.root / PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
