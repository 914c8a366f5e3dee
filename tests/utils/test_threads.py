"""How many threads a piece of work gets."""

from __future__ import annotations

import time

import pytest
import torch

from efficientad.utils.threads import computing_threads, fastest_threads


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({4: 2, 2: 8, 1: 16}, 4),  # all cores are free
        ({4: 16, 2: 4, 1: 8}, 2),
        ({4: 16, 2: 8, 1: 2}, 1),
        ({4: 8, 2: 8, 1: 8}, 4),  # no gain, no change
        ({3: 12, 1: 4}, 1),
        ({1: 4}, 1),
    ],
)
def test_fewer_threads_are_taken_where_they_are_faster(milliseconds, expected):
    most = max(milliseconds)
    torch.set_num_threads(most)
    used = []

    def work() -> None:
        used.append(torch.get_num_threads())
        time.sleep(milliseconds[used[-1]] / 1000)

    assert fastest_threads(work) == expected
    assert torch.get_num_threads() == most
    assert set(used) <= set(milliseconds)


def test_work_that_fails_leaves_the_number_alone():
    torch.set_num_threads(2)

    def work() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fastest_threads(work)
    assert torch.get_num_threads() == 2


def test_a_number_for_a_while():
    torch.set_num_threads(2)
    seen = []

    def fail() -> None:
        with computing_threads(1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 2
