"""A watched folder: each picture is judged once, when it is complete, across restarts."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from helpers_images import encoded
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")
pytest.importorskip("watchfiles", reason="a watched folder needs the extra efficientad[watch]")

from helpers_service import StubPredictor, part, service

from efficientad.cli.main import main
from efficientad.service.limits import Limits
from efficientad.sources import folder as module
from efficientad.sources.folder import WatchedFolder
from efficientad.sources.seen_files import SeenFiles, stamp_of
from efficientad.verdicts.store import Record, Store

GOOD, BAD = (encoded(Image.fromarray(part(defect))) for defect in (0.2, 0.8))
SETTLE = 0.1


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "line").mkdir()
    return tmp_path / "line"


def watching(folder: Path, **more):
    """A service that watches, with its store beside the folder."""
    return service(
        folder.parent / "store", source=WatchedFolder(folder, settle=SETTLE), wait_ms=0, **more
    )


def verdicts(store: Store) -> list[tuple[str, float]]:
    with store.reading() as db:
        rows = db.execute("SELECT name, score FROM verdicts ORDER BY id").fetchall()
    return [(row["name"], round(row["score"], 2)) for row in rows]


def until(running, count: int, seconds: float = 20) -> list[tuple[str, float]]:
    """The verdicts, once there are so many, and a moment later."""
    end = time.monotonic() + seconds
    while len(verdicts(running.inspection.store)) < count and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(3 * SETTLE)  # none follows that should not
    return verdicts(running.inspection.store)


def put(path: Path, data: bytes, age: float = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if age:
        os.utime(path, (time.time() - age,) * 2)


def test_what_lies_there_and_what_comes_is_judged_once(folder, capsys):
    put(folder / "b.png", GOOD, age=20)
    put(folder / "a.png", BAD, age=10)
    put(folder / ".hidden.png", BAD)
    put(folder / "notes.txt", b"no picture")
    with watching(folder, predictors={"stub": StubPredictor((1,))}) as running:
        assert until(running, 2) == [("b.png", 0.2), ("a.png", 0.8)]  # the oldest first
        put(folder / "shift 2" / "c.png", BAD)
        put(folder / ".trash" / "d.png", BAD)
        assert until(running, 3)[2:] == [(os.path.join("shift 2", "c.png"), 0.8)]
        os.replace(folder / "b.png", folder / "e.png")  # another name is another part
        assert until(running, 4)[3:] == [("e.png", 0.2)]
    said = capsys.readouterr().out
    assert "a.png  0.8  anomalous" in said
    assert "b.png  0.2  normal" in said


def test_a_file_that_grows_is_judged_when_it_is_whole(folder):
    with watching(folder) as running:
        with open(folder / "slow.png", "wb") as file:
            for first in range(0, len(BAD), max(1, len(BAD) // 6)):
                file.write(BAD[first : first + max(1, len(BAD) // 6)])
                file.flush()
                time.sleep(SETTLE / 2)
        assert until(running, 1) == [("slow.png", 0.8)]


def test_a_restart_judges_only_what_is_new_or_changed(folder, capsys):
    put(folder / "a.png", GOOD)
    put(folder / "b.png", GOOD)
    with watching(folder) as running:
        assert len(until(running, 2)) == 2
    put(folder / "b.png", BAD)
    os.utime(folder / "b.png", ns=(5, 5))
    put(folder / "c.png", BAD)
    with watching(folder) as running:
        assert sorted(until(running, 4)[2:]) == [("b.png", 0.8), ("c.png", 0.8)]
    assert "2 pictures were judged before" in capsys.readouterr().out


def test_what_cannot_be_read_is_said_once_and_tried_again_when_it_changes(folder, capsys):
    put(folder / "cut.png", BAD[: len(BAD) // 2])
    put(folder / "large.png", BAD + bytes(20_000))
    put(folder / "z.png", GOOD)
    limits = Limits(body_mb=0.01)
    with watching(folder, limits=limits) as running:
        assert until(running, 1) == [("z.png", 0.2)]
    said = capsys.readouterr().out
    assert "cut.png  failed: the picture cannot be read: " in said
    assert "large.png  failed: the file has more than 0.01 MB; see --max-body-mb" in said
    put(folder / "cut.png", BAD)
    with watching(folder, limits=limits) as running:
        assert until(running, 2)[1:] == [("cut.png", 0.8)]
    assert "failed" not in capsys.readouterr().out


def test_a_full_queue_loses_no_picture(folder):
    stub = StubPredictor((1, 2))
    stub.go.clear()
    for number in range(6):
        put(folder / f"{number}.png", GOOD)
    with watching(folder, predictors={"stub": stub}, limits=Limits(queue=1)) as running:
        time.sleep(0.3)
        stub.go.set()
        assert sorted(name for name, _ in until(running, 6)) == [f"{n}.png" for n in range(6)]


def test_a_verdict_and_its_note_stand_or_fall_together(tmp_path, database):
    with Store(tmp_path / "store", durable=False, database=database) as store:
        seen = SeenFiles(store, "stub")
        put(tmp_path / "a.png", GOOD)
        stamp = stamp_of(tmp_path / "a.png")
        assert stamp is not None
        record = Record("stub", "d", 0.2, 0.1, 0.5, False, (4, 4), [], GOOD, "png")
        note = seen.noting(tmp_path / "a.png", stamp)

        def fail(step, number):
            note(step, number)
            raise RuntimeError("the disk is gone")

        with pytest.raises(RuntimeError):
            store.add(record, fail).result()
        assert verdicts(store) == []
        assert not seen.knows(tmp_path / "a.png", stamp)
        assert not SeenFiles(store, "stub").knows(tmp_path / "a.png", stamp)
        store.add(record, note).result()
        assert seen.knows(tmp_path / "a.png", stamp)
        assert SeenFiles(store, "stub").knows(tmp_path / "a.png", stamp)
        assert not SeenFiles(store, "other").knows(tmp_path / "a.png", stamp)
        changed = (stamp[0] + 2**33, stamp[1] + 1)
        store.add(record, seen.noting(tmp_path / "a.png", changed)).result()
        assert SeenFiles(store, "stub").knows(tmp_path / "a.png", changed)
        seen.failed(tmp_path / "a.png", stamp, "it cannot be read")
        assert SeenFiles(store, "stub").knows(tmp_path / "a.png", stamp)


def test_lost_events_are_made_up_for_by_looking_through_the_folder(folder, monkeypatch):
    async def none(self):
        await asyncio.Event().wait()

    monkeypatch.setattr(WatchedFolder, "_events", none)
    monkeypatch.setattr(module, "_RESCAN", 0.1)
    with watching(folder) as running:
        put(folder / "a.png", BAD)
        assert until(running, 1) == [("a.png", 0.8)]


def test_a_folder_that_holds_the_store_is_refused(folder):
    with service(folder / "store") as running, pytest.raises(ValueError, match="lies in the watch"):
        asyncio.run(WatchedFolder(folder)(running.inspection))


def test_a_folder_that_goes_is_an_error(folder, tmp_path):
    watched = WatchedFolder(folder)
    with Store(tmp_path / "store", durable=False) as store:
        seen = SeenFiles(store, "stub")
        folder.rmdir()
        with pytest.raises(OSError, match="is gone"):
            watched._unknown(seen)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "m"], "the folder to watch is 'nowhere', which is no folder"),
        (["{}", "m", "--settle", "0"], "settle is 0.0; it must be a finite number > 0"),
        (["{}", "m", "--every", "2"], "--every is of a camera"),
        (["0", "m", "--camera", "--settle", "2"], "--settle is of a folder"),
        (["0", "m", "--camera", "--every", "-1"], "every is -1.0"),
    ],
)
def test_wrong_words_are_refused(folder, capsys, words, said):
    assert main(["watch", *(word.format(folder) for word in words)]) == 2
    assert said in capsys.readouterr().err
