"""The frame path's benchmark: as many calls of each contender, and no time of what is wrong."""

from __future__ import annotations

import pytest

from bench.predictor import frame_path
from efficientad.ops import native

pytestmark = pytest.mark.skipif(
    not native.available(), reason="there is nothing to measure without the compiled part"
)


@pytest.fixture(autouse=True)
def threads():
    yield
    native.set_threads(0)


def test_a_row_has_as_many_calls_of_each(monkeypatch):
    counted = []
    genuine = frame_path.pillow
    monkeypatch.setattr(frame_path, "pillow", lambda *of: counted.append(1) or genuine(*of))
    row = frame_path.measure(300, 400, 1, 256, seconds=0.01)
    assert (row["height"], row["width"], row["threads"]) == (300, 400, 1)
    assert frame_path.FEWEST <= row["calls"] < len(counted)
    assert row["error"] <= frame_path.LIMIT
    assert row["ratio"] == pytest.approx(row["pillow_ms"] / row["native_ms"], rel=0.1)
    for name in ("pillow", "native", "native_half"):
        assert row[f"{name}_ms"] > 0
        assert row[f"{name}_spread_ms"] >= 0


def test_what_is_wrong_gets_no_time(monkeypatch):
    genuine = frame_path.pillow
    monkeypatch.setattr(frame_path, "pillow", lambda frame, size: genuine(frame, size) + 1)
    with pytest.raises(SystemExit, match="no times"):
        frame_path.measure(300, 400, 1, 256, seconds=0.01)
