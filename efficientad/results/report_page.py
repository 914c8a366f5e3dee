"""The report's page and style, its tables, its histogram of scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from efficientad.results.score_bins import score_bins, ticks

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
KINDS = ((0, "good"), (1, "defective"), (None, "unlabelled"))
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 230, 40, 34, 22

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --page: #f4f5f7; --paper: #fff; --ink: #1b2230; --soft: #626c7d;
  --line: #dfe3e9; --good: #2d8f86; --defective: #d9622b; --unlabelled: #7b869a; --alarm: #c62b45;
  --alarm-soft: #fbe4e8; --ok-soft: #dff1ee; --bad-soft: #fae6da; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --paper: #1c212a; --ink: #e7ebf1;
  --soft: #98a3b4; --line: #303743; --good: #4db8ad; --defective: #f08a54; --unlabelled: #8e99ad;
  --alarm: #ff7088; --alarm-soft: #47202a; --ok-soft: #1a3a38; --bad-soft: #432b1e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 32px 28px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 18px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 28px 0 10px; }
section h2:first-child { margin-top: 0; }
.quiet { color: var(--soft); margin: 0 0 12px; max-width: 76ch; }
.note { border-left: 4px solid var(--unlabelled); background: var(--paper); margin: 14px 0;
  padding: 10px 16px; border-radius: 0 8px 8px 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 20px; min-width: 130px; flex: 1; }
.tile b { display: block; font-size: 27px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.wrong b { color: var(--alarm); } .tile.fine b { color: var(--good); }
.columns { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; flex: 1 1 260px; min-width: 0; }
section.wide { flex: 3 1 560px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; margin-bottom: 8px;
  max-width: 860px; }
svg text { fill: var(--soft); font-size: 12px; } svg .axis { stroke: var(--line); }
svg .limit { stroke: var(--ink); stroke-dasharray: 5 4; stroke-width: 1.5; }
svg text.mark { fill: var(--ink); font-weight: 600; }
.k-good { fill: var(--good); } .k-defective { fill: var(--defective); }
.k-unlabelled { fill: var(--unlabelled); }
.legend { width: 220px; margin-bottom: 14px; font-size: 12px; color: var(--soft); }
.legend img { display: block; border-radius: 4px; width: 220px; height: 12px; }
.legend div { display: flex; justify-content: space-between; }
.filter > input { position: absolute; opacity: 0; }
.filter > label { display: inline-block; padding: 4px 14px; margin: 0 6px 14px 0; cursor: pointer;
  border: 1px solid var(--line); border-radius: 99px; background: var(--paper); font-size: 14px; }
.filter > label i { color: var(--soft); font-style: normal; font-size: 12.5px; }
.filter > input:checked + label { background: var(--ink); color: var(--page); }
.filter > input:focus-visible + label { outline: 2px solid var(--good); outline-offset: 2px; }
#show-mistake:checked ~ .gallery .card:not(.mistake),
#show-above:checked ~ .gallery .card:not(.above),
#show-below:checked ~ .gallery .card:not(.below) { display: none; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 16px; }
.card { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; min-width: 0; }
.card.mistake { border-color: var(--alarm); box-shadow: 0 0 0 2px var(--alarm); }
.pair { display: flex; gap: 2px; background: var(--line); }
.pair > * { width: 50%; aspect-ratio: 1; object-fit: contain; background: var(--page); }
.nothing { display: grid; place-items: center; color: var(--soft); font-size: 12px; }
figcaption { padding: 8px 12px 10px; font-size: 13px; }
figcaption b { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.line { display: flex; gap: 8px; align-items: center; margin-top: 3px; }
.score { font-size: 16px; font-weight: 600; font-variant-numeric: tabular-nums; }
.kind { color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.place { display: block; color: var(--soft); font-size: 12px;
  font-variant-numeric: tabular-nums; }
.tag { margin-left: auto; padding: 1px 9px; border-radius: 99px; font-size: 12px;
  background: var(--page); color: var(--soft); white-space: nowrap; }
.tag.bad { background: var(--bad-soft); color: var(--defective); }
.tag.ok { background: var(--ok-soft); color: var(--good); }
.tag.wrong { background: var(--alarm-soft); color: var(--alarm); font-weight: 600; }
details { margin-top: 28px; } summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
@media print { body { background: none; } .filter > label { display: none; } }
</style>
</head>
<body>
<h1>{{title}}</h1>
{{body}}
</body>
</html>
"""


def number(value: Any) -> str:
    """A figure for people: counts whole, the rest to 3 decimals, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, (int, np.integer, str)):
        return escape(str(value))
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    digits = f"{value:.3f}" if 0.001 <= abs(value) < 10_000 or not value else f"{value:.3g}"
    return digits.replace("-", MINUS)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def histogram(scores: Sequence[tuple[float, int | None]], threshold: float | None) -> str:
    """SVG histogram of (score, label), stacked by label, with the threshold as a line.

    Scores that are not finite are counted below the picture, not drawn.
    """
    groups = {name: [s for s, own in scores if own == label] for label, name in KINDS}
    found = score_bins(groups, threshold)
    if found is None:
        return '<p class="quiet">There are no scores to draw.</p>'
    low, high, edges, counts = found.low, found.high, found.edges, found.counts
    threshold, bins = found.threshold, len(edges) - 1
    top = int(max(np.sum(list(counts.values()), axis=0).max(), 1))
    plot_width, plot_height = WIDTH - LEFT - 12, HEIGHT - BOTTOM - TOP
    floor = HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * plot_width

    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 12}" y1="{floor}" y2="{floor}"/>']
    base = np.zeros(bins)
    for name, count in counts.items():
        for i in np.flatnonzero(count):
            height = count[i] / top * plot_height
            y = floor - base[i] / top * plot_height - height
            parts.append(
                f'<rect class="k-{name}" x="{x(edges[i]) + 0.7:.1f}" y="{y:.1f}" '
                f'width="{plot_width / bins - 1.4:.1f}" height="{height:.1f}" rx="1">'
                f"<title>{count[i]} {name}, {edges[i]:.3g} to {edges[i + 1]:.3g}</title></rect>"
            )
        base += count
    for value in ticks(low, high):
        parts.append(
            f'<text x="{x(value):.1f}" y="{floor + 17}" text-anchor="middle">{value:.3g}</text>'
        )
    for value in sorted({0, top}):
        y = floor - value / top * plot_height + 4
        parts.append(f'<text x="{LEFT - 8}" y="{y:.1f}" text-anchor="end">{value}</text>')
    if threshold is not None:
        at = x(threshold)
        right = at > LEFT + 0.75 * plot_width
        shift, anchor = (-6, "end") if right else (6, "start")
        parts.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 12}" y2="{floor}"/>'
            f'<text class="mark" x="{at + shift:.1f}" y="{TOP - 6}" text-anchor="{anchor}">'
            f"threshold {threshold:.3g}</text>"
        )
    at = LEFT
    for name, count in counts.items():
        parts.append(
            f'<rect class="k-{name}" x="{at}" y="{HEIGHT - 10}" width="10" height="10" rx="2"/>'
            f'<text x="{at + 15}" y="{HEIGHT - 1}">{name} {count.sum()}</text>'
        )
        at += 150
    text = "".join(parts)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 4}" role="img" aria-label="scores">{text}</svg>'
    notes = []
    if found.beyond:
        notes.append(f"The last bar holds all scores above {high:.3g}: {found.beyond} of them.")
    if found.not_finite:
        notes.append(f"{found.not_finite} scores are not finite and not drawn.")
    return svg + "".join(f'<p class="quiet">{note}</p>' for note in notes)
