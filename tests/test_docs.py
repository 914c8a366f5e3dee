"""The documentation site: it builds strictly, has every page and every public name, and loads
nothing from elsewhere; files that the documents name are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import efficientad

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
# A path of the repository in code marks; * stands for anything.
NAMED = re.compile(r"`((?:efficientad|kernels|csrc|bench|tests|docs)/[\w./*-]*)`")
LINKED = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
# What a browser fetches when it shows a page: scripts, styles, pictures, fonts.
FETCHED = re.compile(r"""\bsrc=["']?([^"' >]+)|<link\b[^>]*\bhref=["']?([^"' >]+)|url\(([^)]+)\)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `python -m mkdocs build --strict` makes it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def pages(entries: list) -> Iterator[str]:
    """The files of a nav."""
    for entry in entries:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages(target)


def test_the_nav_has_every_page_once():
    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert sorted(nav) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def test_every_page_is_built_and_every_public_name_documented(site):
    for page in (ROOT / "docs").rglob("*.md"):
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert "<article" in built.read_text(encoding="utf-8"), page
    api = (site / "api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="efficientad\.(\w+)"', api))
    assert sorted(set(efficientad.__all__) - anchors) == []
    assert "FastPredictor.stream" in api  # methods, too
    # A section that the parser did not take for one would stand in the text.
    assert not re.search(r"<p>(Args|Returns|Raises|Attributes):", api)


def test_the_site_loads_nothing_from_elsewhere(site):
    found = [
        (file.name, address)
        for file in [*site.rglob("*.html"), *site.rglob("*.css")]
        for address in filter(None, sum(FETCHED.findall(file.read_text(encoding="utf-8")), ()))
        if re.match(r"""["']?(https?:)?//""", address)
    ]
    assert found == []


def test_a_picture_from_elsewhere_would_be_seen():
    for text in ('<img src="https://a.b/c.png">', "<link rel=x href=//a.b/c.css>", "url(http://a)"):
        (address,) = filter(None, FETCHED.search(text).groups())
        assert re.match(r"(https?:)?//", address)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_document_names_are_there(document):
    text = document.read_text(encoding="utf-8")
    missing = [name for name in NAMED.findall(text) if not list(ROOT.glob(name.rstrip("/")))]
    missing += [link for link in LINKED.findall(text) if not (document.parent / link).exists()]
    assert missing == []
