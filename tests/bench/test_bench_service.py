"""The load of the service: what it would find, and a small run with a kill."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from bench.service.load import Run, check, load
from efficientad.verdicts.store import Record, Store

FILES = [b"first", b"second"]


@pytest.fixture
def store(tmp_path):
    """A store of the two files, with scores 0.25 and 0.75, numbers 1 and 2."""
    with Store(tmp_path / "store", durable=False) as opened:
        for data, score in zip(FILES, (0.25, 0.75), strict=True):
            record = Record("load", "d", score, 0.1, 0.5, score > 0.5, (1, 1), [], data, "jpg")
            opened.add(record).result()
    return tmp_path / "store"


def found(store, answered) -> list[str]:
    run = Run(0, FILES, 0, answered=answered)
    return check(run, store, [0.25, 0.75], 1e-4)[0]


def test_a_sound_store_has_no_problems(store):
    assert found(store, {1: (0, 0.25), 2: (1, 0.75)}) == []
    assert found(store, {2: (1, 0.75)}) == []  # stored, and killed before it was answered


@pytest.mark.parametrize(
    ("answered", "problem"),
    [
        ({3: (0, 0.25)}, "1 answered verdicts are lost"),
        ({1: (1, 0.75)}, "1 verdicts have another score or picture"),
        ({1: (0, 0.26)}, "1 verdicts have another score or picture"),
        ({2: (0, 0.75)}, "1 verdicts have another score or picture"),
    ],
)
def test_what_is_lost_or_mixed_up_is_found(store, answered, problem):
    assert found(store, answered) == [problem]


def test_pictures_that_do_not_belong_are_found(store):
    (store / "pictures" / "000000" / "9.jpg").write_bytes(b"")
    assert found(store, {})[0].startswith("1 orphans and 0 lost pictures")


@pytest.mark.slow
def test_a_small_load_with_a_kill_loses_nothing(tmp_path):
    options = argparse.Namespace(
        pictures=120,
        clients=8,
        kills=1,
        calls=30,
        network="stub",
        device="cpu",
        no_fsync=False,
    )
    result = load(options, tmp_path / "store")
    assert result["problems"] == []
    assert result["answered"] == 120
    assert result["stored"] >= 120 + 40 + 20  # two blocks that are timed, and one before
    turns = result["in_turn"]
    assert turns["calls"] == 40
    assert (
        0 < turns["service_with_one_client"]["p50_ms"] <= turns["service_with_one_client"]["p99_ms"]
    )
    assert turns["bare_predictor_with_decoding"]["p50_ms"] > 0
    assert result["pictures_per_second_while_serving"] > 0
    assert 0 < result["service_cpu_ms_per_picture"] < 1000 * result["seconds"]
    assert result["sent_again"] > 0
