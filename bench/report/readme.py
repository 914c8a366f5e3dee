"""The figures in README.md and docs/kernels.md, made from results files and checked against them.

    python -m bench.report            # makes the tables between the markers anew
    python -m bench.report --check    # exit 1 if a page says anything else than the files

A table stands between two markers and is made from one file in bench/results/:

    <!-- figures: peers h200.json -->
    <!-- end figures -->

with a name of `tables.TABLES`. In docs/, whose site holds no results files, tables alone are
checked and name their file without a link. In README.md a speed figure outside of tables and code,
a number with a unit of UNITS, needs a link behind it in the same sentence (or, if none follows,
before it): to the row of a file in bench/results/ that holds the number in a field of that unit, to
the digits that are printed (behind "#" stands the row's `key`; files whose rows have none are
searched whole); or to a source elsewhere, and then the sentence must call the figure published:

    one frame takes 0.21 ms ([H200](bench/results/h200.json#peer/S/256/float16/b1))
    the published figure is 2.2 ms ([paper](https://arxiv.org/abs/2303.14535))
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench import record
from bench.report.format import source
from bench.report.tables import TABLES
from efficientad.utils.files import write_text

PAGES = ("README.md", "docs/kernels.md")
BLOCK = re.compile(
    r"^<!-- figures: (?P<table>\S+) (?P<file>\S+) -->\n(?P<text>.*?)^<!-- end figures -->$",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"^<!-- (?:figures:.*|end figures) -->$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# Unit -> how the fields end that hold such numbers.
UNITS = {
    "ms": ("_ms",),
    "us": ("us",),
    "µs": ("us",),
    "s": ("seconds",),
    "images/s": ("images_per_s",),
    "img/s": ("images_per_s",),
    "frames/s": ("images_per_s",),
    "fps": ("images_per_s",),
    "TFLOP/s": ("tflops",),
    "GB/s": ("gb_s",),
    "x": ("ratio",),
    "times": ("ratio",),
}
FIGURE = re.compile(
    r"(?<![\w.,])(?P<number>\d[\d,]*(?:\.\d+)?)(?:\s|&nbsp;)?(?P<unit>"
    + "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
    + r")(?![\w/])"
)
LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?:#(?P<key>[^)\s]*))?\)")
RESULTS = "bench/results/"
NOT_SPEED = (
    "times",
)  # only where a comparison follows: "three times as fast", not "tried 3 times"
COMPARISON = re.compile(r"\s+(?:as\s+fast|faster|slower|the\s+speed|longer)")


def make(text: str, root: Path, linked: bool = True) -> str:
    """The text with every table made anew; linked: results files are named by a link.

    Raises:
        ValueError: an unknown table, or a marker without its other half.
        FileNotFoundError: a results file that is not there.
    """
    if len(MARKER.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise ValueError("a marker `<!-- figures: TABLE FILE -->` or its end stands alone")

    def filled(match: re.Match) -> str:
        head = f"<!-- figures: {match['table']} {match['file']} -->"
        return f"{head}\n{table(match['table'], match['file'], root, linked)}<!-- end figures -->"

    return BLOCK.sub(filled, text)


def table(name: str, file: str, root: Path, linked: bool = True) -> str:
    """A table of a results file and the line that says where it is from."""
    if name not in TABLES:
        raise ValueError(f"figures {name!r} are asked for; they must be of {', '.join(TABLES)}")
    path = f"{RESULTS}{file}"
    if not (root / path).is_file():
        raise FileNotFoundError(f"figures {name}: {path} is missing")
    found = record.read(root / path)
    named = f"[{file}]({path})" if linked else f"`{path}`"
    return f"\n{TABLES[name](found)}\n\n{named}: {source(found)}\n\n"


def problems(text: str, root: Path, linked: bool = True) -> list[str]:
    """Where the text says something else than the results files; empty if nowhere.

    linked: sentences are checked too, whose figures need links.
    """
    found = []
    if len(MARKER.findall(text)) != 2 * len(BLOCK.findall(text)):
        found.append("a marker `<!-- figures: TABLE FILE -->` or its end stands alone")
    for block in BLOCK.finditer(text):
        where = f"{_line(text, block.start())}: figures {block['table']} {block['file']}"
        try:
            wanted = table(block["table"], block["file"], root, linked)
        except (ValueError, FileNotFoundError) as error:
            found.append(f"{where}: {error}")
            continue
        if block["text"] != wanted:
            found.append(f"{where}: {_difference(block['text'], wanted)}")
    if not linked:
        return found
    outside = _blanked(_blanked(text, BLOCK), CODE)
    for start, sentence in sentences(outside):
        found += [f"{_line(text, start)}: {p}" for p in _sentence_problems(sentence, root)]
    for link in LINK.finditer(outside):
        if link["target"].startswith(RESULTS) and not (root / link["target"]).is_file():
            found.append(f"{_line(text, link.start())}: {link['target']} is missing")
    return found


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """(start, sentence): of paragraphs, list items and table lines."""
    item = re.compile(r"^(?:[-*+]|\d+\.) |^\||^#", re.MULTILINE)
    for paragraph in re.finditer(r"(?:.+(?:\n|\Z))+", text):
        cuts = [0, *(m.start() for m in item.finditer(paragraph[0])), len(paragraph[0])]
        for first, last in itertools.pairwise(cuts):
            part = paragraph[0][first:last]
            at = 0
            for end in re.finditer(r"[.!?:;]\)?\s+(?=[A-Z*\[(`])|\Z", part):
                if part[at : end.end()].strip():
                    yield paragraph.start() + first + at, part[at : end.end()]
                at = end.end()


def _sentence_problems(sentence: str, root: Path) -> Iterator[str]:
    links = list(LINK.finditer(sentence))
    for figure in FIGURE.finditer(sentence):
        unit, shown = figure["unit"], figure[0]
        if unit in NOT_SPEED and not COMPARISON.match(sentence, figure.end()):
            continue
        behind = [link for link in links if link.start() > figure.start()]
        link = next(iter(behind or links[-1:]), None)
        target = "" if link is None else link["target"]
        if link is not None and target.startswith(RESULTS):
            if (root / target).is_file():
                found = json.loads((root / target).read_text(encoding="utf-8"))
                yield from _disagreement(found, figure, link)
        elif not (target.startswith(("https://", "http://")) and "published" in sentence):
            yield f"{shown!r} has neither a link to its results file nor a published source"


def _disagreement(found: Any, figure: re.Match, link: re.Match) -> Iterator[str]:
    """What a figure says and the row that its link names does not."""
    shown, target, key = figure[0], link["target"], link["key"]
    rows = found.get("rows", []) if isinstance(found, dict) else []
    if any("key" in row for row in rows):
        found = [row for row in rows if row.get("key") == key]
        if not found:
            yield f"{shown!r} links {target} and not the key of one of its rows behind #"
            return
    if not holds(found, figure["number"], figure["unit"]):
        yield f"{shown!r} is not in {target}" + (f"#{key}" if key else "")


def holds(value: Any, number: str, unit: str) -> bool:
    """Whether there is this number, to its digits, in a field of that unit."""
    shown = Decimal(number.replace(",", ""))
    step = Decimal(1).scaleb(-len(number.partition(".")[2]))

    def search(value: Any, field: str) -> bool:
        if isinstance(value, dict):
            return any(search(part, key) for key, part in value.items())
        if isinstance(value, list):
            return any(search(part, field) for part in value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return field.endswith(UNITS[unit]) and abs(Decimal(str(value)) - shown) <= step / 2

    return search(value, "")


def _blanked(text: str, pattern: re.Pattern) -> str:
    """The text with matches replaced by blanks, lines kept."""
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _line(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}"


def _difference(have: str, wanted: str) -> str:
    """The first line that differs."""
    lines, other = have.splitlines(), wanted.splitlines()
    for a, b in zip(lines, other, strict=False):
        if a != b:
            return f"says {a.strip()!r}, the file gives {b.strip()!r}"
    return f"has {len(lines)} lines, the file gives {len(other)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    parser.add_argument(
        "--file", type=Path, nargs="+", help=f"in ROOT; default: {' '.join(PAGES)}", default=PAGES
    )
    parser.add_argument("--root", type=Path, default=record.ROOT, help="where bench/results is")
    options = parser.parse_args(argv)
    return max(_page(options.root / file, options.root, options.check) for file in options.file)


def _page(file: Path, root: Path, check: bool) -> int:
    """Make one page's tables anew, unless `check`, and say what is wrong with it: the exit code."""
    text = file.read_text(encoding="utf-8")
    linked = file.parent.resolve() == root.resolve()
    if not check:
        try:
            text = make(text, root, linked)
        except (ValueError, FileNotFoundError) as error:
            print(f"{file.name}: {error}", file=sys.stderr)
            return 1
        write_text(file, text)
    found = problems(text, root, linked)
    for problem in found:
        print(f"{file.name}, {problem}", file=sys.stderr)
    return 1 if found else 0
