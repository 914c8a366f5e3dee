"""A short part of the fuzzing; the whole is slow, and by hand it is `python -m tests.fuzz`."""

from __future__ import annotations

import os
from pathlib import Path

import fuzz_checkpoints
import fuzz_common
import fuzz_kills
import fuzz_pictures
import fuzz_tables
import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need fork")
SHORT = {fuzz_pictures: 150, fuzz_checkpoints: 12, fuzz_tables: 150}
WHOLE = {fuzz_pictures: 10_000, fuzz_checkpoints: 10_000, fuzz_tables: 2_000}
SEED = 0


def names(module) -> str:
    return module.__name__


@pytest.mark.parametrize("module", SHORT, ids=names)
def test_some_inputs_are_read_or_refused(module, tmp_path: Path) -> None:
    outcome = module.run(SHORT[module], SEED, tmp_path)
    assert outcome.findings == []
    assert outcome.counts["refused"] > SHORT[module] // 10
    assert sum(outcome.counts.values()) == SHORT[module]


@forks
def test_some_kills_leave_whole_files(tmp_path: Path) -> None:
    outcome = fuzz_kills.run(6, SEED, tmp_path, kinds=("predict", "state"))
    assert outcome.findings == []
    assert sum(number for what, number in outcome.counts.items() if "killed" in what) > 0


@pytest.mark.slow
@pytest.mark.parametrize("module", WHOLE, ids=names)
def test_all_inputs_are_read_or_refused(module, tmp_path: Path) -> None:
    assert module.run(WHOLE[module], SEED, tmp_path).findings == []


@pytest.mark.slow
@forks
def test_all_kills_leave_whole_files(tmp_path: Path) -> None:
    assert fuzz_kills.run(500, SEED, tmp_path).findings == []


def test_the_loop_finds_what_it_looks_for() -> None:
    """An exception of another kind, a wrong acceptance, a refusal without a word, a long one."""

    def stop(error: Exception):
        def work() -> str:
            raise error

        return work

    outcome = fuzz_common.Outcome()
    for error in (KeyError("a"), fuzz_common.Finding("read as something else"), ValueError()):
        fuzz_common.attempt(outcome, "x", (ValueError,), stop(error))
    fuzz_common.attempt(outcome, "x", (ValueError,), stop(ValueError("said")))
    fuzz_common.attempt(outcome, "x", (ValueError,), lambda: "read")
    assert [finding.split(":")[1] for finding in outcome.findings] == [
        " KeyError",
        " Finding",
        " ValueError without a word",
    ]
    assert outcome.counts == {"failed": 2, "refused": 2, "read": 1}


def test_an_input_is_the_same_every_time() -> None:
    seeds = fuzz_pictures.seeds()
    found = [fuzz_pictures.input_of(number, SEED, seeds) for number in range(40)]
    assert found == [fuzz_pictures.input_of(number, SEED, seeds) for number in range(40)]
    assert len({data for _, data in found}) == 40
    assert found != [fuzz_pictures.input_of(number, SEED + 1, seeds) for number in range(40)]
