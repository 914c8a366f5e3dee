"""The store of verdicts: what is answered stays, whatever happens to the process."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import wait

import numpy as np
import pytest

from efficientad.verdicts.database import PICTURES, StoreError
from efficientad.verdicts.retention import DAY, GIGABYTE, Retention
from efficientad.verdicts.store import DATABASE, Record, Store, Transaction


def record(score: float = 0.2, picture: bytes = b"picture", **changes) -> Record:
    values = {
        "model": "screw",
        "digest": "d1",
        "score": score,
        "map_mean": 0.05,
        "threshold": 0.5,
        "is_anomalous": not score <= 0.5,
        "size": (40, 60),
        "boxes": [],
        "picture": picture,
        "suffix": "png",
    }
    return Record(**values | changes)


def rows(store: Store) -> list[sqlite3.Row]:
    with store.reading() as db:
        return db.execute("SELECT * FROM verdicts ORDER BY id").fetchall()


def files(folder) -> set[str]:
    return {path.name for path in (folder / PICTURES).rglob("*.*")}


@pytest.fixture
def store(tmp_path, database):
    with Store(tmp_path / "store", durable=False, database=database) as opened:
        yield opened


def test_a_record_comes_back_with_its_picture_and_map(store):
    values = np.arange(6, dtype="<f2")
    boxes = [{"box": [1, 2, 3, 4], "score": 0.7}]
    number = store.add(
        record(
            0.7,
            b"\x89PNG",
            boxes=boxes,
            name="päckchen/ö.png",
            map_size=(2, 3),
            map_values=values.tobytes(),
        )
    ).result()
    (row,) = rows(store)
    assert (row["id"], row["score"], row["is_anomalous"], row["threshold"]) == (number, 0.7, 1, 0.5)
    assert (row["height"], row["width"], row["name"]) == (40, 60, "päckchen/ö.png")
    assert row["bytes"] == 4 + 12
    assert store.picture_path(number, row["suffix"]).read_bytes() == b"\x89PNG"
    with store.reading() as db:
        height, width, data = db.execute("SELECT height, width, map FROM maps").fetchone()
    assert (height, width) == (2, 3)
    assert np.array_equal(np.frombuffer(data, "<f2"), values)


def test_a_score_that_is_no_number_is_null_and_anomalous(store):
    store.add(record(float("nan"))).result()
    (row,) = rows(store)
    assert row["score"] is None
    assert row["is_anomalous"] == 1


def test_records_of_many_threads_get_numbers_of_their_own(store):
    futures = []

    def send(i: int) -> None:
        for j in range(20):
            futures.append(store.add(record(picture=f"{i} {j}".encode())))

    threads = [threading.Thread(target=send, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(futures)
    assert sorted(f.result() for f in futures) == list(range(1, 161))
    pictures = {store.picture_path(n, "png").read_bytes() for n in range(1, 161)}
    assert len(pictures) == 160


def test_a_record_that_fails_fails_alone(store):
    blocked = threading.Event()
    first = store.submit(lambda step: blocked.wait(10))  # what follows shares the next one
    good = [store.add(record(picture=b"a")), store.add(record(picture=b"b"))]
    bad = store.add(record(suffix="no/such/folder"))
    after = store.add(record(picture=b"c"))
    blocked.set()
    assert first.result()
    with pytest.raises(OSError, match="no/such"):
        bad.result(10)
    stored = [f.result(10) for f in (*good, after)]
    assert [row["id"] for row in rows(store)] == stored
    assert files(store.folder) == {f"{n}.png" for n in stored}


def test_a_transaction_that_fails_leaves_no_file_and_answers_nobody(store, database):
    refuse = (
        "PRAGMA query_only = {}" if database is None else "SET default_transaction_read_only = {}"
    )
    store._database.db.execute(refuse.format(1))  # as a full disk: COMMIT and INSERT fail
    lost = store.add(record())
    with pytest.raises(Exception, match=r"read.?only"):
        lost.result(10)
    assert files(store.folder) == set()
    store._database.db.execute(refuse.format(0))
    assert store.add(record()).result(10) == 1


def test_a_commit_that_fails_takes_the_files_back(store, monkeypatch):
    def refuse() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store._database, "commit", refuse)
        lost = [store.add(record()), store.add(record())]
        for future in lost:
            with pytest.raises(StoreError, match="disk is full"):
                future.result(10)
    assert files(store.folder) == set()
    number = store.add(record()).result(10)
    assert [row["id"] for row in rows(store)] == [number]


@pytest.fixture
def durable(tmp_path, database):
    with Store(tmp_path / "durable", database=database) as opened:
        yield opened


def together(store: Store, records: list[Record]) -> list:
    """Futures of records that come while the writer is at work, and so share a transaction."""
    begun, blocked = threading.Event(), threading.Event()

    def hold(step: Transaction) -> None:
        begun.set()
        assert blocked.wait(10)

    store.submit(hold)
    assert begun.wait(10)
    futures = [store.add(one) for one in records]
    blocked.set()
    return futures


def test_records_that_wait_share_a_transaction_and_their_files_are_synced_before_it_stands(
    durable, monkeypatch
):
    synced: list[set] = []
    wait_for_disk = durable._disk.wait

    def note(paths, folders):
        wait_for_disk(paths, folders)
        assert all(path.read_bytes() == b"picture" for path in paths)
        assert rows(durable) == []  # not committed yet
        synced.append({path.name for path in (*paths, *folders)})

    monkeypatch.setattr(durable._disk, "wait", note)
    numbers = [f.result(10) for f in together(durable, [record() for _ in range(5)])]
    assert numbers == [1, 2, 3, 4, 5]
    assert synced == [{"1.png", "2.png", "3.png", "4.png", "5.png", "000000", PICTURES}]


def test_a_file_that_the_disk_refuses_fails_alone(durable, monkeypatch):
    sync = os.fsync

    def refuse(opened):
        if os.fstat(opened).st_size == len(b"broken"):
            raise OSError(5, "Input/output error")
        sync(opened)

    monkeypatch.setattr(os, "fsync", refuse)
    pictures = [b"a", b"b", b"broken", b"c"]
    futures = together(durable, [record(picture=data) for data in pictures])
    with pytest.raises(StoreError, match=r"cannot be written: .*Input/output"):
        futures.pop(2).result(10)
    numbers = [f.result(10) for f in futures]
    assert numbers == sorted(numbers)
    assert [row["id"] for row in rows(durable)] == numbers
    found = [durable.picture_path(n, "png").read_bytes() for n in numbers]
    assert found == [b"a", b"b", b"c"]
    assert files(durable.folder) == {f"{n}.png" for n in numbers}


def test_a_transaction_that_cannot_be_committed_is_tried_again_one_by_one(store, monkeypatch):
    commit, db = store._database.commit, store._database.db

    def commit_others() -> None:
        """The disk has no room for the second record."""
        (full,) = db.execute("SELECT count(*) FROM verdicts WHERE name = 'no room'").fetchone()
        if full:
            raise sqlite3.OperationalError("database or disk is full")
        commit()

    with monkeypatch.context() as patch:
        patch.setattr(store._database, "commit", commit_others)
        names = ["a", "no room", "b", "c"]
        first, lost, *rest = together(store, [record(name=name) for name in names])
        with pytest.raises(StoreError, match="disk is full"):
            lost.result(10)
        numbers = [f.result(10) for f in (first, *rest)]
    assert numbers == sorted(numbers)
    assert [(row["id"], row["name"]) for row in rows(store)] == [
        (number, name) for number, name in zip(numbers, ["a", "b", "c"], strict=True)
    ]
    assert files(store.folder) == {f"{n}.png" for n in numbers}


def test_a_cancelled_record_is_not_stored_and_stops_nobody(store):
    blocked = threading.Event()
    first = store.submit(lambda step: blocked.wait(10))
    cancelled = store.add(record())
    after = store.add(record())
    assert cancelled.cancel()
    blocked.set()
    assert first.result(10)
    assert after.result(10) == 1
    assert len(rows(store)) == 1


def test_closing_stores_what_was_submitted(tmp_path, database):
    with Store(tmp_path, database=database) as store:
        futures = [store.add(record()) for _ in range(50)]
    assert [f.result(0) for f in futures] == list(range(1, 51))
    with pytest.raises(StoreError, match="is closed"):
        store.add(record())


def test_one_process_at_a_time(tmp_path):
    with Store(tmp_path), pytest.raises(StoreError, match="in use by another process"):
        Store(tmp_path)
    Store(tmp_path).close()


@pytest.mark.parametrize(
    "change", ["PRAGMA user_version = 7", "PRAGMA application_id = 3"], ids=["version", "program"]
)
def test_a_database_of_another_kind_is_refused_and_left_alone(tmp_path, change):
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute(change)
    db.close()
    before = (tmp_path / DATABASE).read_bytes()
    with pytest.raises(StoreError, match="another program or version"):
        Store(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/store cannot be opened"):
        Store(tmp_path / "file" / "store")


def test_the_start_removes_files_without_a_row_and_no_other_file(tmp_path, database):
    with Store(tmp_path, database=database) as store:
        kept = [store.add(record()).result() for _ in range(3)]
    folder = tmp_path / PICTURES / "000000"
    (folder / "99.png").write_bytes(b"killed before its row stood")
    (folder / "1.jpg").write_bytes(b"another suffix than the row's")
    (folder / "notes.txt").write_text("not ours")
    (folder / "5000.png").write_text("not in its folder: not ours")
    (tmp_path / PICTURES / "mine").mkdir()
    (tmp_path / PICTURES / "mine" / "7.png").write_text("not ours")
    (folder / f"{kept[1]}.png").unlink()
    with Store(tmp_path, database=database) as store:
        assert (store.removed, store.missing) == (2, 1)
        assert [row["suffix"] for row in rows(store)] == ["png", None, "png"]
    assert files(tmp_path) == {"1.png", "3.png", "notes.txt", "5000.png", "7.png"}
    assert (tmp_path / PICTURES / "mine" / "7.png").exists()


def test_a_start_that_fails_releases_the_folder(tmp_path, database, monkeypatch):
    with Store(tmp_path, database=database) as store:
        store.add(record()).result()

    def broken(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("efficientad.verdicts.store.os.listdir", broken)
        with pytest.raises(StoreError, match=r"cannot be opened: .*Input/output"):
            Store(tmp_path, database=database)
    with Store(tmp_path, database=database) as store:
        assert len(rows(store)) == 1


STOPS = """
import os, signal, sys, threading
from tests.verdicts.test_store import record, together
from efficientad.verdicts.store import Store
store = Store(sys.argv[1], database=sys.argv[3] or None)
base = store._database
commit = base.commit
def dies():
    last = base.db.execute("SELECT count(*) FROM verdicts").fetchone()[0] == 8
    if last and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    commit()
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
base.commit = dies
for future in together(store, [record(picture=b"%d" % i) for i in range(8)]):
    print(future.result(), flush=True)
"""


@pytest.mark.parametrize(("when", "stored"), [("before", 0), ("after", 8)])
def test_a_kill_around_the_commit_of_a_batch_keeps_all_of_it_or_nothing(
    tmp_path, database, when, stored
):
    words = [sys.executable, "-c", STOPS, str(tmp_path), when, database or ""]
    killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == ""  # nobody was answered
    with Store(tmp_path, durable=False, database=database) as store:
        assert (store.removed, store.missing) == (8 - stored, 0)
        assert [row["id"] for row in rows(store)] == list(range(1, stored + 1))
        assert files(tmp_path) == {f"{n}.png" for n in range(1, stored + 1)}
        pictures = [store.picture_path(n + 1, "png").read_bytes() for n in range(stored)]
        assert pictures == [b"%d" % n for n in range(stored)]


WRITER = """
import sys
from concurrent.futures import wait
from tests.verdicts.test_store import record
from efficientad.verdicts.store import Store
with Store(sys.argv[1], durable=False, database=sys.argv[2] or None) as store:
    while True:
        futures = [store.add(record(picture=b"x" * 3000)) for _ in range(16)]
        for future in futures:
            print(future.result(), flush=True)
"""


def test_a_killed_process_loses_no_answered_verdict(tmp_path, database):
    answered: set[int] = set()
    chance = random.Random(0)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), database or ""],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(chance.randrange(20, 120)):
            answered.add(int(writer.stdout.readline()))
        os.kill(writer.pid, signal.SIGKILL)
        rest = [line for line in writer.stdout.read().split("\n") if line]
        answered.update(map(int, rest))
        writer.wait()
        writer.stdout.close()
        with Store(tmp_path, durable=False, database=database) as store:
            stored = rows(store)
            assert answered <= {row["id"] for row in stored}
            assert store.missing == 0
            assert {f"{row['id']}.png" for row in stored} == files(tmp_path)
            for row in stored:
                assert store.picture_path(row["id"], "png").stat().st_size == 3000
    assert len(answered) > 60


def test_retention_by_days_deletes_rows_maps_and_files(store):
    now = 1e9
    old = store.add(record(time=now - 3 * DAY, map_size=(1, 1), map_values=b"ab")).result()
    new = store.add(record(time=now - DAY)).result()
    assert Retention(store, 2, None).apply(now) == 1
    assert [row["id"] for row in rows(store)] == [new]
    assert files(store.folder) == {f"{new}.png"}
    with store.reading() as db:
        assert db.execute("SELECT count(*) FROM maps WHERE id = ?", (old,)).fetchone()[0] == 0
    assert Retention(store, None, None).apply(now + 1e9) == 0


def test_retention_by_size_spares_reviewed_parts_and_the_newest(store):
    for _ in range(6):
        store.add(record(picture=bytes(1000)))
    store.submit(lambda step: step.db.execute("UPDATE verdicts SET review = 'good' WHERE id = 1"))
    assert Retention(store, None, 3500 / GIGABYTE).apply() == 3
    assert [row["id"] for row in rows(store)] == [1, 5, 6]
    assert Retention(store, None, 1500 / GIGABYTE).apply() == 2
    assert [row["id"] for row in rows(store)] == [1]
    assert Retention(store, None, 500 / GIGABYTE).apply() == 1
    assert files(store.folder) == set()
    assert list((store.folder / PICTURES).iterdir()) == []
    assert store.add(record()).result() == 7  # numbers are not given twice


def test_retention_of_more_than_one_transaction(store, monkeypatch):
    monkeypatch.setattr("efficientad.verdicts.retention.AT_ONCE", 4)
    for i in range(11):
        store.add(record(time=float(i)))
    assert Retention(store, 1, None).apply(10 + DAY) == 10
    assert len(rows(store)) == 1


@pytest.mark.parametrize("limits", [(0, None), (None, -1), (float("nan"), None), ("2", None)])
def test_limits_of_retention_are_checked(store, limits):
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        Retention(store, *limits)
