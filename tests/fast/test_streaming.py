"""Streams: order, count, errors by index, the newest frame only, ends and closing."""

from __future__ import annotations

import threading
import time

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from efficientad.data.decoding import ImageError
from efficientad.fast.streaming import stream
from efficientad.results.prediction import Prediction


class Stub:
    """A predictor whose score is the first pixel; remembers its batches."""

    batch_sizes = (1, 4)
    device = torch.device("cpu")
    value_range = None

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.batches = seconds, []

    def predict_frames(self, frames, *, map_size, batched):
        time.sleep(self.seconds)
        self.batches.append(len(frames))
        score = torch.tensor([float(frame[0, 0, 0]) for frame in frames])
        sizes = [frame.shape[:2] for frame in frames]
        return Prediction(range(len(frames)), score, None, None, sizes, frames)


def frame(value: int) -> np.ndarray:
    return np.full((4, 5, 3), value, np.uint8)


def test_every_frame_is_answered_once_and_in_order():
    stub = Stub()
    found = list(stream(stub, (frame(i % 251) for i in range(300))))
    assert [p.index for p in found] == list(range(300))
    assert [float(p.score) for p in found] == [float(i % 251) for i in range(300)]
    assert sum(stub.batches) == 300
    assert max(stub.batches) <= 4


def test_frames_that_wait_are_batched():
    stub = Stub(seconds=0.02)
    list(stream(stub, (frame(i) for i in range(40))))
    assert 4 in stub.batches
    assert len(stub.batches) < 40


def test_a_frame_is_answered_before_the_next_one_comes():
    """A slow camera must not delay an answer until a batch is full."""
    asked = threading.Semaphore(0)

    def camera():
        for i in range(3):
            assert asked.acquire(timeout=10)
            yield frame(i)

    answers = stream(Stub(), camera())
    for i in range(3):
        asked.release()
        assert next(answers).index == i
    assert list(answers) == []


def test_bad_frames_are_reported_by_index():
    bad = []
    sources = [frame(i) if i % 7 else b"no image" for i in range(30)]
    found = list(stream(Stub(), sources, on_error=lambda i, source, error: bad.append((i, error))))
    assert [i for i, _ in bad] == [0, 7, 14, 21, 28]
    assert all(isinstance(error, ImageError) for _, error in bad)
    assert [p.index for p in found] == [i for i in range(30) if i % 7]


def test_an_error_is_raised_at_its_place():
    sources = [frame(0), frame(1), b"no image", frame(3)]
    answers = stream(Stub(), sources)
    assert [next(answers).index, next(answers).index] == [0, 1]
    with pytest.raises(ImageError, match="not an image file"):
        next(answers)


def test_the_sources_own_error_comes_after_the_frames_before_it():
    def camera():
        yield frame(0)
        yield frame(1)
        raise ConnectionError("cable out")

    answers = stream(Stub(), camera())
    assert [next(answers).index, next(answers).index] == [0, 1]
    with pytest.raises(ConnectionError, match="cable out"):
        next(answers)


def test_latest_answers_the_newest_frame():
    sent = []

    def camera():
        for i in range(60):
            sent.append(i)
            yield frame(i)
            time.sleep(0.005)

    found = []
    for prediction in stream(Stub(seconds=0.03), camera(), policy="latest"):
        found.append(prediction.index)
        assert prediction.index >= sent[-1] - 12  # what is answered was read just now
    assert found == sorted(set(found))
    assert len(found) < 60
    assert found[-1] == 59


def test_closing_stops_the_threads():
    read = []

    def camera():
        for i in range(100_000):
            read.append(i)
            yield frame(i % 200)

    answers = stream(Stub(), camera())
    next(answers)
    answers.close()
    time.sleep(0.3)
    seen = len(read)
    time.sleep(0.2)
    assert len(read) == seen < 1000
    assert not [t for t in threading.enumerate() if t.name.startswith("efficientad-")]


def test_a_folder_is_searched(tmp_path):
    for i in range(3):
        Image.fromarray(frame(i + 1)).save(tmp_path / f"{i}.png")
    for source in (tmp_path, str(tmp_path)):
        assert [float(p.score) for p in stream(Stub(), source)] == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        stream(Stub(), str(tmp_path / "nowhere"))
    answers = stream(Stub(), [tmp_path / "0.png", tmp_path])
    assert next(answers).index == 0
    with pytest.raises(ImageError, match="it is a folder, not an image file"):
        next(answers)


@pytest.mark.parametrize("source", [frame(0), torch.tensor(frame(0)), b"bytes", 3, None])
def test_one_frame_is_no_stream(source):
    with pytest.raises(ValueError, match=r"sources is .*; it must be an iterable of images"):
        stream(Stub(), source)
    batch = np.stack([frame(1), frame(2)])
    assert [float(p.score) for p in stream(Stub(), batch)] == [1, 2]


def test_an_empty_stream_ends():
    assert list(stream(Stub(), [])) == []


def test_bad_arguments():
    for options, message in (
        ({"policy": "some"}, "policy is 'some'"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1.5}, r"workers is 1\.5; it must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(Stub(), [], **options)


def test_the_real_predictor_streams():
    from efficientad.fast.predictor import FastPredictor

    predictor = FastPredictor(helpers.detector(), device="cpu", dtype="float32")
    frames = helpers.frames(3)
    found = list(predictor.stream(iter(frames), map_size=None))
    assert [p.index for p in found] == [0, 1, 2]
    assert [float(p.score) for p in found] == predictor(frames).score.tolist()
