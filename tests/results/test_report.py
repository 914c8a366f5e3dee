"""The HTML report: self-contained, complete, escaped, and sound for odd inputs."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from efficientad.results.report import ReportItem, choose_pictures, thumbnail, write_report
from efficientad.results.report_page import histogram

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that tags are closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make(path, items, threshold=0.5, **options):
    write_report(path, title="Parts & <b>more</b>", items=items, threshold=threshold, **options)
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def pictures():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return thumbnail(image, np.random.default_rng(1).random((10, 15)), 0.5)


def some(count, **options):
    shown, heat = pictures()
    return [
        ReportItem(f"part/{i:04d}", i / count, i / count > 0.5, int(i % 2), None, shown, heat)
        for i in range(count)
    ]


def test_page_is_self_contained_and_complete(tmp_path):
    items = some(12)
    metrics = {"image AU-ROC": 0.98765, "AU-PRO, FPR 0.05": None, "images": 12}
    source, page = make(
        tmp_path / "deep" / "r.html",
        items,
        metrics=metrics,
        failed=[("bad.png", "truncated")],
        notes=["Only a demonstration."],
    )
    text = " ".join(page.text)
    for wanted in ("0.988", "AU-PRO, FPR 0.05", "bad.png", "truncated", "Only a demonstration."):
        assert wanted in text
    for item in items:
        assert text.count(item.name) == 2  # the card and the list
    assert page.tags.count("figure") == 12
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 25  # two a card and the colour scale
    assert all(value.startswith("data:image/") for value in sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.html"]


def test_counts_and_mistakes(tmp_path):
    items = [
        ReportItem("a", 0.9, True, 1, "stain"),
        ReportItem("b", 0.8, True, 0, "good"),
        ReportItem("c", 0.1, False, 1, "stain"),
        ReportItem("d", 0.2, False, 0, "good"),
        ReportItem("e", 0.3, False, 1, "scratch"),
    ]
    assert [i.mistake for i in items] == [None, "false alarm", "missed", None, "missed"]
    source, _ = make(tmp_path / "r.html", items)
    for value, name in (
        (5, "images"),
        (2, "anomalous"),
        (1, "false alarms"),
        (2, "missed defects"),
    ):
        assert re.search(rf"<b>{value}</b><span>{name}</span>", source)
    assert source.count('class="card above mistake"') == 1
    assert source.count('class="card below mistake"') == 2
    assert "<td>stain</td><td>2</td><td>1 of 2</td>" in source
    order = re.findall(r'<b title="(\w)">', source)
    assert order == ["a", "b", "e", "d", "c"]


def test_names_and_texts_are_escaped(tmp_path):
    name = 'ünï/<script>alert("1")</script>&\'.png'
    items = [ReportItem(name, 0.4, False, 1, "<i>x"), ReportItem("lone \udcff byte", 0.1)]
    source, page = make(
        tmp_path / "r.html",
        items,
        metrics={"<u>": 1.0},
        failed=[("<s>", "<q> & more")],
        notes=["<em>"],
    )
    assert not {"script", "i2", "u", "s", "q", "em"} & set(page.tags)
    assert name in page.text
    assert ("title", name) in page.attributes
    assert "<q> & more" in page.text
    assert page.text.count("Parts & <b>more</b>") == 2
    assert "lone ? byte" in source


@pytest.mark.parametrize("threshold", [None, 0.5, 0.0, -1.0, float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_odd_numbers_of_items_and_thresholds(tmp_path, count, threshold):
    items = [
        ReportItem("one", 0.3, None),
        ReportItem("two", float("nan"), None),
        ReportItem("three", float("inf"), True),
    ][:count]
    source, page = make(tmp_path / "r.html", items, threshold)
    assert page.tags.count("figure") == count
    body = source[source.index("<body>") :]
    assert not re.search(r'="-?(nan|inf)', body)
    assert ("no images in this report" in source) == (count == 0)
    assert ("without a score" in source) == (count == 3)


def test_many_items_are_bounded_and_the_page_says_so(tmp_path):
    items = some(1500)
    source, page = make(tmp_path / "r.html", items, max_pictures=40)
    assert page.tags.count("figure") == 40
    assert "40 of 1500 images have a picture here and 1460 are left out" in source
    text = " ".join(page.text)
    assert all(item.name in text for item in items)
    assert len(source) < 1_500_000
    with pytest.raises(ValueError, match="max_pictures is 0"):
        make(tmp_path / "r.html", items, max_pictures=0)


def test_the_telling_pictures_are_chosen():
    items = [ReportItem(str(i), i / 1000, i > 500, int(i > 500)) for i in range(1000)]
    for i in (100, 300, 498, 502, 900):  # five mistakes
        items[i].label = 1 - items[i].label
    items[7].score = float("nan")
    chosen = choose_pictures(items, 0.5, 20)
    names = [int(item.name) for item in chosen]
    assert len(set(names)) == len(names) == 20
    assert {100, 300, 498, 502, 900} <= set(names)
    assert {999, 500, 0} <= set(names)
    assert names[0] == 7
    scores = [item.score for item in chosen[1:]]
    assert scores == sorted(scores, reverse=True)
    assert choose_pictures(items[:20], 0.5, 20) == sorted(
        items[:20], key=lambda i: (i.score == i.score, -i.score)
    )
    wrong = [ReportItem(str(i), i / 1000, True, 0) for i in range(1000)]
    assert len(choose_pictures(wrong, None, 30)) == 30


def test_histogram_splits_at_the_threshold_and_counts_everything():
    rng = np.random.default_rng(0)
    scores = [(float(s), 0) for s in rng.normal(0.2, 0.05, 300)]
    scores += [(float(s), 1) for s in rng.normal(0.6, 0.2, 200)] + [(500.0, 1), (0.3, None)]
    svg = histogram([*scores, (float("nan"), 0)], 0.35)
    found = re.findall(r"<title>(\d+) (\w+), (\S+) to (\S+)</title>", svg)
    totals = dict.fromkeys(("good", "defective", "unlabelled"), 0)
    for count, kind, low, high in found:
        totals[kind] += int(count)
        assert float(high) <= 0.3501 or float(low) >= 0.3499
    assert totals == {"good": 300, "defective": 201, "unlabelled": 1}
    assert "threshold 0.35" in svg
    assert ": 1 of them" in svg
    assert "1 scores are not finite" in svg


def test_thumbnails_are_small_and_keep_small_peaks():
    image = np.full((1500, 900, 3), 120, np.uint8)
    values = np.full((1500, 900), -1.0, np.float32)
    values[700:703, 400:403] = 5.0
    shown, heat = thumbnail(image, values, 0.5)
    assert len(shown) + len(heat) < 30_000
    a, b = (np.asarray(Image.open(io.BytesIO(x)), dtype=float) for x in (shown, heat))
    assert a.shape == b.shape == (192, 115, 3)
    difference = np.abs(a - b).max(2)
    row, col = np.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() > 60
    assert abs(row - 701 * 192 / 1500) < 4
    assert abs(col - 401 * 192 / 1500) < 4


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3), (20, 30)])
def test_thumbnails_of_odd_shapes_never_grow(shape):
    shown, heat = thumbnail(np.zeros((*shape, 3), np.uint8), np.zeros((5, 9)), None, side=64)
    sizes = {Image.open(io.BytesIO(x)).size for x in (shown, heat)}
    assert len(sizes) == 1
    width, height = sizes.pop()
    assert 1 <= width <= min(64, shape[1])
    assert 1 <= height <= min(64, shape[0])
    with pytest.raises(ValueError, match="side is 0"):
        thumbnail(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), None, side=0)
