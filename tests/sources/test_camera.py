"""A camera: frames are judged, a lost one is opened again, a video ends."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import StubPredictor, part, service

from efficientad.sources import camera as module
from efficientad.sources.camera import Camera


class Capture:
    """Frames of a camera, BGR; then it is lost."""

    def __init__(self, *defects: float, seconds: float = 0) -> None:
        self.left, self.seconds, self.taken, self.released = list(defects), seconds, 0, False

    def grab(self) -> bool:
        time.sleep(self.seconds)
        self.taken += 1
        return len(self.left) >= self.taken

    def retrieve(self):
        return True, part(self.left[self.taken - 1])[..., ::-1]

    def release(self) -> None:
        self.released = True


def scores(running) -> list[float]:
    with running.inspection.store.reading() as db:
        return [
            round(row["score"], 1) for row in db.execute("SELECT score FROM verdicts ORDER BY id")
        ]


def until(running, count: int) -> list[float]:
    end = time.monotonic() + 20
    while len(scores(running)) < count and time.monotonic() < end:
        time.sleep(0.02)
    return scores(running)


def test_each_frame_of_a_video_is_judged(tmp_path, capsys):
    cv2 = pytest.importorskip("cv2", reason="a camera needs the extra efficientad[camera]")
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for defect in (0.2, 0.8, 0.2, 0.8):
        writer.write(np.ascontiguousarray(part(defect)[..., ::-1]))
    writer.release()
    with service(tmp_path / "store", source=Camera(str(path), every=0)) as running:
        found = until(running, 4)
        end = time.monotonic() + 5
        while "has ended" not in (said := capsys.readouterr().out) and time.monotonic() < end:
            time.sleep(0.02)
    assert [score > 0.5 for score in found] == [False, True, False, True]  # red is red, not blue
    assert "has ended" in said


def test_a_lost_camera_is_opened_again(tmp_path, monkeypatch, capsys):
    captures = [Capture(0.2, 0.8), None, Capture(0.4)]
    opened = list(captures)
    monkeypatch.setattr(Camera, "_open", lambda self: opened.pop(0) if opened else None)
    monkeypatch.setattr(module, "_RETRY", (0.01,))
    address = "rtsp://inspector:secret@10.0.0.7/1"
    with service(tmp_path / "store", source=Camera(address, every=0)) as running:
        assert until(running, 3) == [0.2, 0.8, 0.4]
        with running.inspection.store.reading() as db:
            names = [row["name"] for row in db.execute("SELECT name FROM verdicts ORDER BY id")]
    said = capsys.readouterr().out
    assert "camera rtsp://10.0.0.7/1  is lost" in said
    assert "is open again" in said
    assert "secret" not in said + "".join(names)
    assert names == sorted(names)
    assert captures[0].released


def test_between_judged_frames_others_are_thrown_away(tmp_path, monkeypatch):
    capture = Capture(*[0.2] * 40, seconds=0.02)
    monkeypatch.setattr(Camera, "_open", lambda self: capture if not capture.taken else None)
    with service(tmp_path / "store", source=Camera("0", every=0.3)) as running:
        until(running, 2)
        time.sleep(0.4)
        judged = len(scores(running))
    assert 2 <= judged < capture.taken / 3


def test_a_camera_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Camera, "_open", lambda self: None)
    with service(tmp_path / "store") as running, pytest.raises(OSError, match="camera 7 cannot be"):
        asyncio.run(Camera("7")(running.inspection))


def test_a_detector_of_12_bits_judges_no_8_bits(tmp_path):
    stub = StubPredictor()
    stub.value_range = (0, 4095)
    with (
        service(tmp_path / "store", {"stub": stub}) as running,
        pytest.raises(ValueError, match="values of 0 to 4095, and a camera gives 8 bits"),
    ):
        asyncio.run(Camera("0")(running.inspection))
