"""Random choices as functions of (seed, step, item), and results computed ahead in threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from efficientad.utils.prefetch import ahead
from efficientad.utils.sampling import evenly, random_numbers, shuffled


def test_numbers_are_a_function_of_the_arguments():
    first = random_numbers(7, "photo-gray", 3, 2).random(5)
    random_numbers(7, "photo-gray", 3, 1).random(1000)
    assert (random_numbers(7, "photo-gray", 3, 2).random(5) == first).all()
    assert random_numbers(0, "a", 1, 2).random() == pytest.approx(0.24350132, abs=1e-8)


def test_every_argument_changes_the_numbers():
    draws = {
        random_numbers(seed, stream, step, item).integers(1 << 62)
        for seed in (-1, 0, 1, 1 << 70)
        for stream in ("a", "b", "1|a")
        for step in (0, 1, 2**40)
        for item in (0, 1, 2)
    }
    assert len(draws) == 4 * 3 * 3 * 3


def test_neighbouring_draws_do_not_overlap():
    """An item's stream does not run into the next item's: a counter-based generator could."""
    long = random_numbers(0, "s", 0, 0).integers(1 << 62, size=10_000)
    other = random_numbers(0, "s", 0, 1).integers(1 << 62, size=10_000)
    assert not np.intersect1d(long, other).size


def test_first_draws_over_steps_are_uniform():
    draws = np.array([random_numbers(5, "u", step).random() for step in range(4000)])
    counts = np.histogram(draws, 10, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 30  # chi-square of 9 degrees: p = 0.0004
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.06


def test_negative_steps_are_refused():
    for step, item in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="step and item must be >= 0"):
            random_numbers(0, "a", step, item)


def test_an_epoch_is_a_permutation_and_epochs_differ():
    epochs = [[shuffled(3, "photo", 50, e * 50 + i) for i in range(50)] for e in range(12)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    backwards = [shuffled(3, "photo", 50, position) for position in range(599, -1, -1)]
    assert backwards[::-1] == [item for epoch in epochs for item in epoch]


def test_shuffle_of_one_and_of_none():
    assert [shuffled(0, "x", 1, position) for position in range(3)] == [0, 0, 0]
    for count, position in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="count must be >= 1 and position >= 0"):
            shuffled(0, "x", count, position)


def _slow_square(step: int) -> int:
    time.sleep(0.002 * (step % 3))
    return step * step


@pytest.mark.parametrize(("workers", "depth"), [(0, 1), (1, 1), (3, 2), (4, 50)])
def test_results_come_in_order(workers, depth):
    assert list(ahead(_slow_square, range(20), workers=workers, depth=depth)) == [
        step * step for step in range(20)
    ]


def test_no_steps_no_results():
    assert list(ahead(_slow_square, [], workers=2, depth=2)) == []


def test_no_more_than_depth_is_under_way():
    started: list[int] = []
    results = ahead(lambda step: started.append(step) or step, range(100), workers=2, depth=5)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(started) <= 6
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_place(workers):
    def load(step: int) -> int:
        if step == 3:
            raise OSError("photo 3")
        return step

    results = ahead(load, range(10), workers=workers, depth=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="photo 3"):
        next(results)


def test_closing_stops_the_threads():
    results = ahead(_slow_square, iter(range(10**9)), workers=2, depth=4)
    next(results)
    results.close()
    alive = [t.name for t in threading.enumerate() if t.name.startswith("efficientad-ahead")]
    assert alive == []


@pytest.mark.parametrize(("workers", "depth"), [(-1, 1), (1, 0)])
def test_impossible_numbers_of_threads_are_refused_at_once(workers, depth):
    with pytest.raises(ValueError, match="workers must be >= 0 and depth >= 1"):
        ahead(_slow_square, range(3), workers=workers, depth=depth)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(0, 5, []), (1, 5, [0]), (4, 5, [0, 1, 2, 3]), (5, 5, [0, 1, 2, 3, 4]), (9, 1, [0]),
     (9, 2, [0, 8]), (9, 3, [0, 4, 8]), (101, 5, [0, 25, 50, 75, 100])],
)  # fmt: skip
def test_evenly_spread_places(count, most, expected):
    assert evenly(count, most).tolist() == expected
