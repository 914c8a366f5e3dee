"""One HTML file that shows what a detector did."""

from __future__ import annotations

import base64
import io
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from efficientad.results.overlay import check_image, colorbar, map_scale, overlay, shrink_map
from efficientad.results.regions import AnomalousRegion
from efficientad.results.report_page import DASH, PAGE, histogram, number, table
from efficientad.utils.files import write_text

MAX_PICTURES = 200
MAX_ROWS = 5000
MAX_REGIONS = 3  # of an image, beside its picture
JPEG_QUALITY = 85
_OVERSAMPLED = 8  # pixels a thumbnail's pixel is the mean of at least, in a row


@dataclass
class ReportItem:
    """One image of a report.

    Attributes:
        name: shown as it is. score: of the image; NaN where there is none.
        is_anomalous: the verdict, None without a threshold.
        label: 1 defective, 0 good, None unknown. defect: its kind, or None.
        image, heat: encoded thumbnails from `thumbnail`, or None.
        regions: what lies above the threshold, the highest score first; None without a threshold.
    """

    name: str
    score: float
    is_anomalous: bool | None = None
    label: int | None = None
    defect: str | None = None
    image: bytes | None = None
    heat: bytes | None = None
    regions: Sequence[AnomalousRegion] | None = None

    @property
    def mistake(self) -> str | None:
        """ "missed", "false alarm", or None: right, or not known."""
        if self.label is None or self.is_anomalous is None:
            return None
        if bool(self.label) == self.is_anomalous:
            return None
        return "missed" if self.label else "false alarm"


def _encoded(image: np.ndarray, kind: str = "JPEG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=JPEG_QUALITY)
    return file.getvalue()


def thumbnail(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    side: int = 192,
    region: Tensor | None = None,
) -> tuple[bytes, bytes]:
    """Small JPEGs of an image and of its heat map, at most `side` pixels wide and high.

    Args:
        image: uint8 (H, W, 3). anomaly_map: (h, w). threshold: of the detector, or None.
        region: what is inspected, as in `overlay`.

    Returns:
        (image, heat map over the image), a few kilobytes each whatever the image's size.

    Raises:
        ValueError: wrong shape or dtype, or side < 1.
    """
    from PIL import Image

    image = check_image(image)
    if side < 1:
        raise ValueError(f"side is {side}; it must be at least 1 pixel")
    height, width = image.shape[:2]
    ratio = min(1.0, side / max(height, width))
    step = max(height, width) // (_OVERSAMPLED * side)
    if step > 1:  # every step-th pixel: Pillow would hold a second copy of a large picture
        image = image[::step, ::step]
    image = np.ascontiguousarray(image)
    if ratio < 1:
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    values = shrink_map(np.asarray(anomaly_map, np.float32), side)
    return _encoded(image), _encoded(overlay(image, values, threshold, region=region))


def _rank(item: ReportItem) -> tuple[bool, float]:
    """Sort key: highest score first, scores that are no number first of all (they need a look)."""
    unknown = math.isnan(item.score)
    return not unknown, 0.0 if unknown else -item.score


def choose_pictures(
    items: Sequence[ReportItem], threshold: float | None, limit: int = MAX_PICTURES
) -> list[ReportItem]:
    """At most `limit` of the items, the telling ones, sorted by score, highest first.

    When there are more: up to half the places for wrong decisions, the furthest from the threshold
    first; the rest in turn to the highest scores, those next to the threshold, and the lowest.
    """
    ranked = sorted(items, key=_rank)
    if len(ranked) <= limit:
        return ranked
    order = {id(item): i for i, item in enumerate(ranked)}
    middle = ranked[len(ranked) // 2].score
    if threshold is not None and math.isfinite(threshold):
        middle = threshold

    def distance(item: ReportItem) -> float:
        gap = abs(item.score - middle)
        return math.inf if math.isnan(gap) else gap

    near = sorted(ranked, key=distance)
    wrong = [item for item in reversed(near) if item.mistake]
    chosen = {id(item): item for item in wrong[: limit // 2]}
    queues = [iter(ranked), iter(near), iter(reversed(ranked))]
    while len(chosen) < limit:
        for queue in queues:
            item = next((i for i in queue if id(i) not in chosen), None)
            if item is not None and len(chosen) < limit:
                chosen[id(item)] = item
    return sorted(chosen.values(), key=lambda item: order[id(item)])


def _verdict(item: ReportItem) -> str:
    if item.mistake:
        return f'<span class="tag wrong">{item.mistake}</span>'
    if item.is_anomalous is None:
        return '<span class="tag">no verdict</span>'
    kind = ("bad", "anomalous") if item.is_anomalous else ("ok", "normal")
    return f'<span class="tag {kind[0]}">{kind[1]}</span>'


def _kind(item: ReportItem) -> str:
    if item.defect:
        return escape(item.defect)
    return "" if item.label is None else ("defective" if item.label else "good")


def _classes(item: ReportItem) -> str:
    verdict = {None: "undecided", True: "above", False: "below"}[item.is_anomalous]
    return f"{verdict} mistake" if item.mistake else verdict


def _picture(data: bytes | None, text: str) -> str:
    if data is None:
        return '<span class="nothing">no picture</span>'
    source = base64.b64encode(data).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{text}" loading="lazy">'


def _card(item: ReportItem) -> str:
    name = escape(item.name)
    kind = _kind(item)
    return (
        f'<figure class="card {_classes(item)}"><div class="pair">'
        f"{_picture(item.image, 'image')}{_picture(item.heat, 'heat map')}</div>"
        f'<figcaption><b title="{name}">{name}</b><span class="line">'
        f'<span class="score">{number(float(item.score))}</span>'
        f"{f'<span class=kind>{kind}</span>' if kind else ''}{_verdict(item)}</span>"
        f"{_places(item)}</figcaption></figure>"
    )


def _places(item: ReportItem) -> str:
    """A line for each of the first regions, and how many more there are; "" for none."""
    regions = item.regions or ()
    lines = [
        f"{region.area} px at ({region.box[0]}, {region.box[1]}) to "
        f"({region.box[2]}, {region.box[3]}): {number(region.score)}"
        for region in regions[:MAX_REGIONS]
    ]
    left = len(regions) - len(lines)
    lines += [f"and {left} more region{'s' if left > 1 else ''}"] if left else []
    return "".join(f'<span class="place">{line}</span>' for line in lines)


def _summary(items: Sequence[ReportItem], threshold: float | None, failed: int) -> str:
    """The tiles at the top: how many, how many anomalous, how many wrong."""
    tiles = [("images", str(len(items)), "")]
    if any(item.is_anomalous is not None for item in items):
        tiles.append(("anomalous", str(sum(item.is_anomalous is True for item in items)), ""))
    tiles.append(("threshold", "none" if threshold is None else number(float(threshold)), ""))
    if any(i.label is not None and i.is_anomalous is not None for i in items):
        for mistake, text in (("false alarm", "false alarms"), ("missed", "missed defects")):
            count = sum(item.mistake == mistake for item in items)
            tiles.append((text, str(count), "wrong" if count else "fine"))
    unscored = sum(math.isnan(item.score) for item in items)
    if unscored:
        tiles.append(("without a score", str(unscored), "wrong"))
    if failed:
        tiles.append(("unreadable or left out", str(failed), "wrong"))
    cells = "".join(f'<div class="tile {c}"><b>{v}</b><span>{t}</span></div>' for t, v, c in tiles)
    return f'<div class="tiles">{cells}</div>'


def _defects(items: Sequence[ReportItem]) -> str:
    """A row per kind of image: how many, how many called anomalous, lowest and median score."""
    groups: dict[str, list[ReportItem]] = {}
    for item in items:
        if item.label is not None:
            groups.setdefault(_kind(item), []).append(item)
    rows = []
    for kind, group in sorted(groups.items(), key=lambda g: (bool(g[1][0].label), g[0])):
        scores = [item.score for item in group if not math.isnan(item.score)]
        judged = [item for item in group if item.is_anomalous is not None]
        called = f"{sum(bool(i.is_anomalous) for i in judged)} of {len(judged)}" if judged else DASH
        low, high = (min(scores), max(scores)) if scores else (None, None)
        middle = statistics.median(scores) if scores else None
        rows.append([kind, str(len(group)), called, *map(number, (low, middle, high))])
    head = ("kind", "images", "called anomalous", "lowest", "median", "highest")
    return f"<h2>By kind</h2>{table(head, rows)}" if rows else ""


def _legend(threshold: float | None) -> str:
    low, high = map_scale(threshold)
    known = threshold is not None and math.isfinite(threshold)
    middle = "threshold" if known else "q_b of good images"
    marks = number(low), f"{middle} {number((low + high) / 2)}", number(high)
    bar = base64.b64encode(_encoded(colorbar(220, 12), "PNG")).decode()
    return (
        f'<div class="legend"><img alt="colour scale" src="data:image/png;base64,{bar}"><div>'
        f"{''.join(f'<span>{mark}</span>' for mark in marks)}</div></div>"
    )


def _gallery(items: Sequence[ReportItem], threshold: float | None, limit: int) -> str:
    chosen = choose_pictures(items, threshold, limit)
    if not chosen:
        return '<h2>Images</h2><p class="quiet">There are no images in this report.</p>'
    text = "Highest score first."
    if len(chosen) < len(items):
        text += (
            f" {len(chosen)} of {len(items)} images have a picture here and "
            f"{len(items) - len(chosen)} are left out: shown are wrong decisions, the highest and "
            "lowest scores and those next to the threshold."
        )
    filters = [("all", "all", len(chosen))]
    for key, label in (("mistake", "wrong decisions"), ("above", "anomalous"), ("below", "normal")):
        count = sum(key in _classes(item).split() for item in chosen)
        if count:
            filters.append((key, label, count))
    radios = "".join(
        f'<input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""}>'
        f'<label for="show-{key}">{label} <i>{count}</i></label>'
        for key, label, count in filters
    )
    cards = "".join(map(_card, chosen))
    return (
        f'<h2>Images</h2><p class="quiet">{text} Left the image, right its heat map; the outline '
        "is what lies above the threshold. Below, each such region with its area and box (x, y) in "
        f"pixels of the image, and its highest value.</p>{_legend(threshold)}"
        f'<div class="filter">{radios}<div class="gallery">{cards}</div></div>'
    )


def _listing(items: Sequence[ReportItem]) -> str:
    ranked = sorted(items, key=_rank)
    rows = (
        (
            escape(item.name),
            number(float(item.score)),
            _kind(item),
            number(None if item.regions is None else len(item.regions)),
            _verdict(item),
        )
        for item in ranked[:MAX_ROWS]
    )
    left = len(ranked) - MAX_ROWS
    rest = f'<p class="quiet">{left} more, with lower scores, are left out.</p>' if left > 0 else ""
    listing = table(("image", "score", "kind", "regions", "verdict"), rows, "list")
    return f"<details><summary>All {len(ranked)} scores</summary>{listing}{rest}</details>"


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    items: Iterable[ReportItem],
    threshold: float | None,
    metrics: Mapping[str, Any] | None = None,
    failed: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    max_pictures: int = MAX_PICTURES,
) -> None:
    """Write a self-contained HTML page: no script, no link, nothing loaded from anywhere.

    Args:
        path: of the page; written whole or not at all, missing folders are made.
        title: heading. items: the images, in any order; none at all is fine.
        threshold: of the detector, or None.
        metrics: name -> figure, in the order to show; None is shown as a dash.
        failed: (path, reason) of files that could not be read or scored. notes: sentences.
        max_pictures: thumbnails at most; the page says how many are left out, and which.

    Raises:
        ValueError: max_pictures < 1.
    """
    if max_pictures < 1:
        raise ValueError(f"max_pictures is {max_pictures}; it must be at least 1")
    items = list(items)
    parts = [_summary(items, threshold, len(failed))]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    rows = [(escape(str(name)), number(value)) for name, value in (metrics or {}).items()]
    figures = f"<section><h2>Metrics</h2>{table(('figure', 'value'), rows)}</section>"
    chart = histogram([(item.score, item.label) for item in items], threshold)
    plot = f'<section class="wide"><h2>Scores</h2>{chart}{_defects(items)}</section>'
    parts.append(f'<div class="columns">{plot}{figures if rows else ""}</div>')
    if failed:
        listing = table(("file", "reason"), [(escape(str(f)), escape(str(r))) for f, r in failed])
        parts.append(f"<h2>Unreadable or left out: {len(failed)}</h2>{listing}")
    parts.append(_gallery(items, threshold, max_pictures))
    parts.append(_listing(items) if items else "")
    page = PAGE.replace("{{title}}", escape(title)).replace("{{body}}", "\n".join(parts))
    # A file name may hold bytes that are no text (lone surrogates), which UTF-8 cannot write.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
