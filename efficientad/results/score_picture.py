"""Scores as a picture: a histogram per group over one axis with the threshold, and image cards."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from efficientad.results.overlay import check_image, overlay, shrink_map
from efficientad.results.score_bins import ScoreBins, score_bins, ticks
from efficientad.utils.files import replace_file

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

WIDTH, MARGIN, GUTTER, ROW, GAP = 1600, 56, 190, 150, 22
CARDS_A_ROW, CARD_GAP = 5, 24
PAGE, PAPER, INK, SOFT, LINE = "#f4f5f7", "#ffffff", "#1b2230", "#626c7d", "#dfe3e9"
ALARM, ALARM_SOFT = "#c62b45", "#fcf0f2"
COLORS = {
    "training": "#7b869a",
    "held out": "#2d8f86",
    "calibration": "#2d8f86",
    "production": "#4d6fb3",
    "before": "#7b869a",
    "since": "#d9622b",
    "good": "#2d8f86",
    "defective": "#d9622b",
    "unlabelled": "#7b869a",
}


@dataclass(frozen=True)
class Card:
    """An image below the histogram.

    Attributes:
        name: shown as it is, shortened in its middle if need be. score: of the image.
        image: uint8 (H, W, 3). anomaly_map: (h, w) in the detector's unit, drawn over it.
        remark: a word or two behind the score.
    """

    name: str
    score: float
    image: np.ndarray
    anomaly_map: np.ndarray
    remark: str = ""


def save_picture(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture as PNG, whole or not at all."""
    replace_file(Path(path), lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def score_picture(
    groups: Mapping[str, Sequence[float]],
    threshold: float | None,
    *,
    title: str,
    lines: Sequence[str] = (),
    cards: Sequence[Card] = (),
    cards_title: str = "",
) -> Image.Image:
    """A histogram a group, one above the other over one axis, and cards below.

    Args:
        groups: name -> image scores; those that are not finite are counted, not drawn.
        threshold: drawn through all of them; None draws none.
        title, lines: heading, and sentences below it.
        cards, cards_title: images with their overlays, five a row.

    Raises:
        ValueError: no group has a finite score.
    """
    from PIL import Image, ImageDraw

    bins = score_bins(groups, threshold)
    if bins is None:
        raise ValueError(f"groups is {dict(groups)!r}; at least one score must be finite")
    notes = list(lines)
    if bins.beyond:
        notes.append(f"The last bar holds all scores above {bins.high:.3g}: {bins.beyond} of them.")
    if bins.not_finite:
        notes.append(f"{bins.not_finite} scores are not finite and not drawn.")
    side = (WIDTH - 2 * MARGIN - (CARDS_A_ROW - 1) * CARD_GAP) // CARDS_A_ROW
    shown = [_card_images(card, threshold, side) for card in cards]
    tall = max((image.height for image, _ in shown), default=0)
    card_height = 2 * tall + 8 + 84
    rows = -(-len(cards) // CARDS_A_ROW)
    top = MARGIN + 52 + 32 * len(notes) + 52
    panels = len(bins.counts) * (ROW + GAP) - GAP
    below = top + panels + 84
    height = below + (54 + rows * card_height if cards else 0) + MARGIN - 30

    picture = Image.new("RGB", (WIDTH, height), PAGE)
    draw = ImageDraw.Draw(picture)
    _write(draw, (MARGIN, MARGIN), title, 38, INK, heavy=True)
    for i, line in enumerate(notes):
        _write(draw, (MARGIN, MARGIN + 58 + 32 * i), line, 23, SOFT)
    _draw_panels(draw, bins, groups, top)
    if cards:
        _write(draw, (MARGIN, below), cards_title, 27, INK, heavy=True)
    for i, (card, images) in enumerate(zip(cards, shown, strict=True)):
        left = MARGIN + i % CARDS_A_ROW * (side + CARD_GAP)
        at = below + 54 + i // CARDS_A_ROW * card_height
        _draw_card(picture, draw, card, images, (left, at), (side, tall), threshold)
    return picture


def _draw_panels(
    draw: ImageDraw.ImageDraw, bins: ScoreBins, groups: Mapping[str, Sequence[float]], top: int
) -> None:
    left, right = MARGIN + GUTTER, WIDTH - MARGIN
    bottom = top + len(bins.counts) * (ROW + GAP) - GAP

    def x(value: float) -> float:
        return left + (value - bins.low) / (bins.high - bins.low) * (right - left)

    limit = bins.threshold
    for i, (name, counts) in enumerate(bins.counts.items()):
        above = top + i * (ROW + GAP)
        floor = above + ROW
        draw.rectangle((left, above, right, floor), fill=PAPER)
        if limit is not None:
            draw.rectangle((x(limit), above, right, floor), fill=ALARM_SOFT)
        most = int(counts.max())
        for k in np.flatnonzero(counts):
            tall = max(3, round(counts[k] / most * (ROW - 14)))
            edges = x(bins.edges[k]) + 1.5, x(bins.edges[k + 1]) - 1.5
            box = (round(edges[0]), floor - tall, round(edges[1]), floor)
            draw.rectangle(box, fill=COLORS.get(name, SOFT))
        draw.line((left, floor, right, floor), fill=SOFT, width=2)
        _write(draw, (MARGIN, above + 8), name, 25, COLORS.get(name, SOFT), heavy=True)
        scores = np.asarray(groups[name], np.float64)
        _write(draw, (MARGIN, above + 44), f"{len(scores)} images", 21, SOFT)
        if limit is not None:
            over = int((~(scores <= limit)).sum())
            ink = ALARM if over and name != "defective" else SOFT
            _write(draw, (MARGIN, above + 74), f"{over} above ({over / len(scores):.1%})", 21, ink)
        _write(draw, (left - 12, above + 6), str(most), 18, SOFT, anchor="ra")
    for value in ticks(bins.low, bins.high):
        draw.line((x(value), bottom, x(value), bottom + 7), fill=SOFT, width=2)
        _write(draw, (x(value), bottom + 14), f"{value:.3g}", 20, SOFT, anchor="ma")
    _write(draw, (right, bottom + 42), "image score", 20, SOFT, anchor="ra")
    if limit is not None:
        for y in range(top - 12, bottom, 14):
            draw.line((x(limit), y, x(limit), min(y + 8, bottom)), fill=INK, width=3)
        at, anchor = (x(limit) - 8, "rs") if x(limit) > WIDTH * 0.75 else (x(limit) + 8, "ls")
        _write(
            draw, (at, top - 14), f"threshold {_number(limit)}", 22, INK, heavy=True, anchor=anchor
        )


def _card_images(card: Card, threshold: float | None, side: int) -> tuple[Image.Image, Image.Image]:
    """The image and its overlay, fitted into a square of `side` pixels."""
    from PIL import Image

    image = check_image(card.image)
    ratio = side / max(image.shape[:2])
    size = max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio))
    fitted = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    values = shrink_map(np.asarray(card.anomaly_map, np.float32), side)
    return fitted, Image.fromarray(overlay(np.asarray(fitted), values, threshold))


def _draw_card(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    card: Card,
    images: Sequence[Image.Image],
    place: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None,
) -> None:
    """The image above, its overlay below, then name and score. size: (width, height) of one."""
    (left, top), (side, tall) = place, size
    for k, image in enumerate(images):
        at = left + (side - image.width) // 2, top + k * (tall + 8) + (tall - image.height) // 2
        picture.paste(image, at)
    below = top + 2 * tall + 8
    _write(draw, (left, below + 10), _fitted(draw, card.name, 20, side), 20, INK)
    over = threshold is not None and not card.score <= threshold
    text = _number(card.score) + (f"  {card.remark}" if card.remark else "")
    _write(draw, (left, below + 40), text, 22, ALARM if over else SOFT, heavy=True)


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _plain(text: str) -> str:
    """As the built-in font has it: accents are dropped, what is then not ASCII is a '?'."""
    apart = unicodedata.normalize("NFKD", text.replace("\N{MINUS SIGN}", "-"))
    apart = "".join(c for c in apart if not unicodedata.combining(c))
    return apart.encode("ascii", "replace").decode("ascii")


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    color: str,
    *,
    heavy: bool = False,
    anchor: str = "la",
) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    width = 0.6 if heavy else 0
    draw.text(
        place, _plain(text), color, font, anchor=anchor, stroke_width=width, stroke_fill=color
    )


def _fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text, with dots for its middle where it is longer than `width` pixels."""
    from PIL import ImageFont

    font, text = ImageFont.load_default(size), _plain(text)
    kept = len(text)
    short = text
    while draw.textlength(short, font) > width and kept > 2:
        kept -= 1
        short = f"{text[: math.ceil(kept / 3)]}...{text[len(text) - kept * 2 // 3 :]}"
    return short
