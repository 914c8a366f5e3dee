"""Deliveries: each stored verdict once and in order, whatever the receiver does."""

from __future__ import annotations

import json
import math
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from efficientad.service.metrics import Metrics
from efficientad.sinks import delivery
from efficientad.sinks.delivery import Delivery, NotTaken, pause
from efficientad.sinks.outbox import Outbox
from efficientad.verdicts.retention import DAY, Retention
from efficientad.verdicts.store import Record, Store

BOXES = [{"box": [1, 2, 3, 4], "area": 4, "score": 0.7}]


def record(score: float = 0.2, **changes) -> Record:
    values = {
        "model": "screw", "digest": "d1", "score": score, "map_mean": 0.05,
        "threshold": 0.5, "is_anomalous": not score <= 0.5, "size": (40, 60), "boxes": [],
        "picture": b"picture", "suffix": "png",
    }  # fmt: skip
    return Record(**values | changes)


class Recorder:
    """Takes events; before each it asks `answer`, which may raise."""

    name, address = "recorder", "nowhere"

    def __init__(self, answer=lambda event: None) -> None:
        self.answer, self.events, self.tries = answer, [], []
        self.news, self.closed = threading.Condition(), False

    def send(self, event) -> None:
        self.tries.append(event.number)
        self.answer(event)
        with self.news:
            self.events.append(event)
            self.news.notify_all()

    def close(self) -> None:
        self.closed = True

    def wait(self, count: int) -> list[int]:
        """The numbers of the verdicts that came, once there are so many."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.events) >= count, 20)
        return [event.number for event in self.events]


@pytest.fixture
def store(tmp_path, database):
    with Store(tmp_path, durable=False, database=database) as opened:
        yield opened


@pytest.fixture
def started(store, monkeypatch):
    """Starts a delivery from the store; its tries follow each other at once."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.004)
    running = []

    def start(receiver: Recorder, metrics: Metrics | None = None, **options) -> Delivery:
        one = Delivery(receiver, **options)
        one.start(store, metrics or Metrics())
        running.append(one)
        return one

    yield start
    for one in running:
        one.close()
        assert not one._thread.is_alive()


def add(store: Store, sink: Delivery | None = None, count: int = 1, **changes) -> int:
    for _ in range(count):
        number = store.add(record(**changes)).result()
        if sink is not None:
            sink.stored(number)
    return number


def counted(metrics: Metrics, result: str) -> float:
    labels = {"sink": "recorder", "result": result}
    return metrics.registry.get_sample_value("efficientad_deliveries_total", labels)


def backlog(metrics: Metrics) -> float:
    labels = {"sink": "recorder"}
    return metrics.registry.get_sample_value("efficientad_delivery_backlog", labels)


def failing(times: int, **how):
    """Does not take the first events so many times."""
    left = iter(range(times))

    def answer(event) -> None:
        if next(left, None) is not None:
            raise NotTaken("not now", **how)

    return answer


def test_an_event_holds_what_the_answer_held(store, started):
    receiver = Recorder()
    sink = started(receiver)
    add(store, sink, score=0.7, boxes=BOXES, name="päckchen.png", time=1.5)
    add(store, sink, score=math.nan, model="bolt")
    add(store, sink, threshold=None, is_anomalous=None)
    add(store, sink, score=math.inf)
    assert receiver.wait(4) == [1, 2, 3, 4]
    first, second, third, fourth = (json.loads(event.body) for event in receiver.events)
    origin = first.pop("store")
    assert first == {
        "id": 1, "time": "1970-01-01T00:00:01.500+00:00", "model": "screw",
        "name": "päckchen.png", "score": 0.7, "is_anomalous": True, "verdict": "anomalous",
        "threshold": 0.5, "source_size": [40, 60], "boxes": BOXES,
    }  # fmt: skip
    assert (second["model"], second["score"], second["verdict"]) == ("bolt", None, "anomalous")
    assert (third["verdict"], third["is_anomalous"], third["threshold"]) == ("none", None, None)
    assert (fourth["score"], fourth["verdict"]) == (None, "anomalous")
    assert [event.id for event in receiver.events] == [f"{origin}-{n}" for n in (1, 2, 3, 4)]


def test_a_new_sink_begins_with_the_next_verdict_and_goes_on_where_it_stopped(store, started):
    add(store, count=3)
    first = Recorder()
    sink = started(first)
    add(store, sink, count=2)
    sink.close()
    assert first.wait(2) == [4, 5]
    assert first.closed
    add(store, count=250)  # more than are read at once
    again = Recorder()
    started(again)
    assert again.wait(250) == list(range(6, 256))
    other = Recorder()
    other.name = "other"
    sink = started(other)
    add(store, sink)
    assert other.wait(1) == [256]
    assert {event.id.partition("-")[0] for event in first.events + again.events + other.events} == {
        sink._outbox.origin
    }


def test_what_was_sent_and_not_noted_is_sent_again_under_the_same_id(store, started, monkeypatch):
    first, again = Recorder(), Recorder()
    with monkeypatch.context() as killed:
        killed.setattr(Outbox, "note", lambda *_: None)
        sink = started(first)
        add(store, sink, count=3)
        sink.close()
    sink = started(again)
    add(store, sink)
    assert again.wait(4) == [1, 2, 3, 4]
    assert [event.id for event in again.events[:3]] == [event.id for event in first.events]
    assert [event.body for event in again.events[:3]] == [event.body for event in first.events]


def test_the_place_is_noted_while_more_and_more_comes(store, started, monkeypatch):
    monkeypatch.setattr(delivery, "NOTE_SECONDS", 0)
    noted = []
    original = Outbox.note
    monkeypatch.setattr(Outbox, "note", lambda self, n: (noted.append(n), original(self, n))[1])
    add(store, count=1)
    receiver = Recorder()
    sink = started(receiver)
    add(store, sink, count=5)
    receiver.wait(5)
    sink.close()
    assert noted == [2, 3, 4, 5, 6]


def test_a_receiver_that_is_down_gets_all_of_it_later_and_in_order(store, started):
    metrics, receiver = Metrics(), Recorder(failing(7))
    sink = started(receiver, metrics)
    add(store, sink, count=3)
    assert receiver.wait(3) == [1, 2, 3]
    assert receiver.tries == [1] * 8 + [2, 3]
    assert (counted(metrics, "failed"), counted(metrics, "refused")) == (7, 0)


def test_an_event_that_is_refused_for_good_is_passed_over_and_said(store, started, caplog):
    def answer(event) -> None:
        if event.number == 2:
            raise NotTaken("the answer is 422", patience=0)
        if event.number == 3:
            raise NotTaken("the answer is 404", patience=0.05)

    metrics, receiver = Metrics(), Recorder(answer)
    sink = started(receiver, metrics)
    add(store, sink, count=4)
    assert receiver.wait(2) == [1, 4]
    assert receiver.tries.count(2) == 1
    assert receiver.tries.count(3) > 3
    sink.close()
    assert (counted(metrics, "delivered"), counted(metrics, "refused")) == (2, 2)
    assert "recorder nowhere: verdict 2 is not sent: the answer is 422" in caplog.messages
    assert "recorder nowhere: verdict 3 waits: the answer is 404" in caplog.messages
    again = Recorder()
    sink = started(again)
    add(store, sink)
    assert again.wait(1) == [5]


def test_patience_counts_refusals_alone(store, started):
    """A receiver that is down between two refusals starts them anew."""
    answers = iter(["refused", "down", "refused", "taken"])

    def answer(event) -> None:
        word = next(answers)
        if word != "taken":
            time.sleep(0.03)
            raise NotTaken(word, patience=0.05 if word == "refused" else math.inf)

    receiver = Recorder(answer)
    sink = started(receiver)
    add(store, sink)
    assert receiver.wait(1) == [1]


def test_only_rejects_are_sent_where_nothing_else_is_wanted(store, started):
    metrics, receiver = Metrics(), Recorder()
    sink = started(receiver, metrics, only_anomalous=True)
    for score in (0.1, 0.9, 0.2, math.nan, 0.3):
        add(store, sink, score=score)
    assert receiver.wait(2) == [2, 4]
    sink.close()
    assert backlog(metrics) == 0
    assert sink._noted == 5


def test_what_is_deleted_before_is_counted(store, started):
    go = threading.Event()
    metrics, receiver = Metrics(), Recorder(lambda event: go.wait(20))
    now = time.time()
    sink = started(receiver, metrics)
    add(store, sink)
    while not receiver.tries:
        time.sleep(0.001)
    add(store, sink, count=3, time=now - 5 * DAY)
    add(store, sink)
    assert backlog(metrics) == 5
    assert Retention(store, 2, None).apply() == 3
    go.set()
    assert receiver.wait(2) == [1, 5]
    sink.close()
    assert (counted(metrics, "deleted"), backlog(metrics)) == (3, 0)


def test_a_stop_sends_what_is_left(store, started):
    receiver = Recorder()
    sink = started(receiver)
    add(store, count=300)  # nobody has said so
    sink.close()
    assert receiver.wait(300) == list(range(1, 301))


def test_a_stop_does_not_wait_for_a_receiver_that_is_down(store, started, monkeypatch):
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 60)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 60)
    down = Recorder(failing(10**9))
    sink = started(down)
    add(store, sink, count=2)
    while not down.tries:
        time.sleep(0.001)
    before = time.monotonic()
    sink.close()
    assert time.monotonic() - before < 30  # not the pause
    again = Recorder()
    started(again)
    assert again.wait(2) == [1, 2]


def test_a_store_that_cannot_be_read_for_a_while_ends_nothing(store, started, monkeypatch, caplog):
    original, left = Outbox.after, iter(range(2))

    def after(self, *values):
        if next(left, None) is not None:
            raise OSError("the disk is away")
        return original(self, *values)

    monkeypatch.setattr(Outbox, "after", after)
    receiver = Recorder()
    sink = started(receiver)
    add(store, sink)
    assert receiver.wait(1) == [1]
    assert "recorder: deliveries pause: the disk is away" in caplog.messages


@pytest.mark.parametrize(
    ("failures", "retry_after", "low", "high"),
    [
        (1, 0, 0.75, 1.25),
        (2, 0, 1.5, 2.5),
        (5, 0, 12, 20),
        (7, 0, 45, 75),
        (10**6, 0, 45, 75),
        (1, 90, 90, 90),
        (7, 0.1, 45, 75),
    ],
)
def test_pauses_grow_up_to_a_minute_or_to_what_the_receiver_asks(failures, retry_after, low, high):
    assert all(low <= pause(failures, retry_after) <= high for _ in range(50))
