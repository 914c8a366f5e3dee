"""The measurement of archives, at a size that shows that it works."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("ray", reason="an archive needs the extra efficientad[archive]")

from bench.archive.throughput import draw, measure


def test_many_pictures_are_few_files(tmp_path):
    names = draw(tmp_path / "a", 40)
    assert len(names) == len(set(names)) == 40
    assert len({(tmp_path / "a" / name).stat().st_ino for name in names}) == 32
    assert draw(tmp_path / "b", 2) == names[:2]


@pytest.mark.slow
def test_both_commands_give_the_same_scores(tmp_path):
    options = argparse.Namespace(pictures=4, device="cpu", workers=None, scorers=None)
    result = measure(options, tmp_path)
    assert result["problems"] == []
    assert result["archive"]["seconds"] > 0
    assert result["predict"]["seconds"] > 0
