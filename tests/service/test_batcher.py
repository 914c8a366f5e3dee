"""The queue in front of a predictor: batches, refusals, failures, and its end."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from efficientad.results.prediction import Prediction
from efficientad.service.batcher import Batcher, Busy


def frame(value: int) -> np.ndarray:
    return np.full((4, 6, 3), value, np.uint8)


class Stub:
    """A predictor whose score is the frame's first value; it fails on 255 and can be held."""

    def __init__(self, batch_sizes=(1, 4)):
        self.batch_sizes = batch_sizes
        self.batches: list[list[int]] = []
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        self.go.set()

    def predict_frames(self, frames, *, map_size, batched):
        assert batched
        self.entered.release()
        assert self.go.wait(10)
        values = [int(f[0, 0, 0]) for f in frames]
        self.batches.append(values)
        if 255 in values:
            raise RuntimeError("a frame of 255 cannot be computed")
        scores = np.array(values, np.float32)
        maps = (
            None if map_size is None else np.stack([np.full((2, 2), v, np.float32) for v in values])
        )
        sizes = [f.shape[:2] for f in frames]
        return Prediction(range(len(values)), scores, 9.0, maps, sizes, frames)


@pytest.fixture
def held():
    """A stub that computes its first batch for as long as the test wants."""
    stub = Stub()
    stub.go.clear()
    yield stub
    stub.go.set()


def test_each_caller_gets_its_own_prediction():
    stub = Stub((1, 4))
    batcher = Batcher(stub, wait_ms=1)
    found: dict[int, Prediction] = {}

    def call(value: int) -> None:
        found[value] = batcher.submit(frame(value)).result(10)

    threads = [threading.Thread(target=call, args=(v,)) for v in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    assert {value: p.score for value, p in found.items()} == {v: float(v) for v in range(40)}
    assert all(p.is_anomalous == (v > 9) for v, p in found.items())
    assert all(np.array_equal(p.anomaly_map, np.full((2, 2), v)) for v, p in found.items())
    assert sorted(v for batch in stub.batches for v in batch) == list(range(40))


def test_frames_that_wait_fill_the_largest_batch_and_no_more(held):
    batcher = Batcher(held, wait_ms=0)
    first = batcher.submit(frame(0))
    assert held.entered.acquire(timeout=10)
    rest = [batcher.submit(frame(v)) for v in range(1, 10)]
    assert len(batcher) == 9
    held.go.set()
    assert [f.result(10).score for f in (first, *rest)] == list(range(10))
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    batcher.close()


def test_a_full_batch_does_not_wait():
    stub = Stub((2,))
    batcher = Batcher(stub, wait_ms=3_600_000)
    futures = [batcher.submit(frame(v)) for v in (1, 2)]
    assert [f.result(10).score for f in futures] == [1, 2]
    batcher.close()


def test_the_first_frame_of_a_batch_waits_for_others_no_longer_than_asked():
    stub = Stub((1, 64))
    batcher = Batcher(stub, wait_ms=20)
    assert batcher.submit(frame(3)).result(10).score == 3  # alone, after 20 ms
    assert stub.batches == [[3]]
    batcher.close()


def test_a_frame_that_fails_fails_alone(held):
    batcher = Batcher(held, wait_ms=0)
    first = batcher.submit(frame(0))
    assert held.entered.acquire(timeout=10)
    good, bad, other = (batcher.submit(frame(v)) for v in (1, 255, 2))
    held.go.set()
    assert [f.result(10).score for f in (first, good, other)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="255 cannot"):
        bad.result(10)
    assert held.batches == [[0], [1, 255, 2], [1], [255], [2]]
    assert batcher.submit(frame(5)).result(10).score == 5
    batcher.close()


def test_a_full_queue_refuses_and_says_when_to_come_again(held):
    batcher = Batcher(held, wait_ms=0, queue=3)
    first = batcher.submit(frame(0))
    assert held.entered.acquire(timeout=10)
    waiting = [batcher.submit(frame(v)) for v in (1, 2, 3)]
    with pytest.raises(Busy, match="3 pictures are waiting") as refused:
        batcher.submit(frame(4))
    assert refused.value.retry_after >= 1
    held.go.set()
    assert [f.result(10).score for f in (first, *waiting)] == [0, 1, 2, 3]
    assert batcher.submit(frame(4)).result(10).score == 4
    batcher.close()


def test_a_frame_that_nobody_waits_for_is_not_computed(held):
    batcher = Batcher(held, wait_ms=0)
    first = batcher.submit(frame(0))
    assert held.entered.acquire(timeout=10)
    gone, kept = batcher.submit(frame(1)), batcher.submit(frame(2))
    assert gone.cancel()
    held.go.set()
    assert kept.result(10).score == 2
    assert first.result(10).score == 0
    batcher.close()
    assert held.batches == [[0], [2]]


def test_closing_answers_what_waits_and_takes_no_more(held):
    batcher = Batcher(held, wait_ms=3_600_000)
    futures = [batcher.submit(frame(v)) for v in range(4)]
    assert held.entered.acquire(timeout=10)
    futures += [batcher.submit(frame(v)) for v in (4, 5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    held.go.set()
    closing.join(10)
    assert not closing.is_alive()
    assert [f.result(0).score for f in futures] == list(range(6))
    with pytest.raises(Busy, match="stopping"):
        batcher.submit(frame(9))


def test_batches_are_reported():
    seen = []
    batcher = Batcher(Stub((2,)), wait_ms=3_600_000, observer=lambda *facts: seen.append(facts))
    for future in [batcher.submit(frame(v)) for v in (1, 2)]:
        future.result(10)
    batcher.close()
    ((images, took, waited),) = seen
    assert images == 2
    assert took >= 0
    assert waited >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"wait_ms": -1}, "wait_ms is -1"), ({"queue": 0}, "queue is 0"), ({"queue": 1.5}, "integer")],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Batcher(Stub(), **options)
