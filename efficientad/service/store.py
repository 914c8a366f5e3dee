"""Where verdicts are kept: an SQLite database in WAL mode and the picture files beside it.

A folder holds `verdicts.sqlite3` and `pictures/THOUSANDS/ID.SUFFIX`. One thread writes; whatever
waits for it goes into one transaction, whose files are brought to the disk together. A picture's
file is written inside the transaction of its row, so a process that is killed leaves at most files
without a row, which the next start removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from efficientad.utils.files import DiskSync

T = TypeVar("T")

VERSION = 1
APPLICATION = 0x45414456  # "EADV", in the database's header
MOST_AT_ONCE = 256  # jobs in one transaction
DATABASE, LOCK, PICTURES = "verdicts.sqlite3", "lock.sqlite3", "pictures"
REVIEWS = ("good", "bad", "unsure")
_FOLDER, _FILE = re.compile(r"\d+"), re.compile(r"(\d+)\.[a-z0-9]+")
_SCHEMA = """
CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,         -- seconds since 1970, UTC
    model TEXT NOT NULL,        -- name under which the detector is served
    digest TEXT NOT NULL,       -- SHA-256 of its file: the scores of another mean something else
    name TEXT,                  -- what the sender called the picture
    score REAL,                 -- NULL: not a number
    threshold REAL,             -- by which it was judged; NULL: not judged
    is_anomalous INTEGER,
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    boxes TEXT NOT NULL,        -- JSON
    suffix TEXT,                -- of the picture's file; NULL: there is none (any more)
    bytes INTEGER NOT NULL,     -- of the picture's file and the map
    review TEXT, reviewed REAL  -- good, bad or unsure, and when
);
CREATE INDEX verdicts_by_score ON verdicts (model, digest, score, review, is_anomalous);
CREATE INDEX verdicts_by_time ON verdicts (time);
CREATE TABLE maps (
    id INTEGER PRIMARY KEY REFERENCES verdicts (id),
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    map BLOB NOT NULL           -- float16, little-endian, row by row
);
CREATE TABLE thresholds (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL, threshold REAL, reason TEXT
);
"""


class StoreError(OSError):
    """The store cannot be opened, or no longer be written."""


@dataclass
class Record:
    """What is kept of one picture.

    Attributes:
        model, digest: name of the detector and SHA-256 of its file.
        score: NaN is kept as NULL. threshold, is_anomalous: the verdict, None where none was given.
        size: (height, width) of the picture. boxes: of its defects, as JSON takes them.
        picture, suffix: the file as it was sent, and the suffix to keep it under ("jpg").
        map_size, map_values: (h, w) of a small anomaly map and its values, float16 bytes.
        name: what the sender called it. time: seconds since 1970.
    """

    model: str
    digest: str
    score: float
    threshold: float | None
    is_anomalous: bool | None
    size: tuple[int, int]
    boxes: list[dict[str, Any]]
    picture: bytes
    suffix: str
    map_size: tuple[int, int] | None = None
    map_values: bytes = b""
    name: str | None = None
    time: float = field(default_factory=time.time)


class Transaction:
    """An open transaction: its connection, its new files, and what to do once it stands."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.files: list[Path] = []  # removed if it fails
        self.on_commit: list[Callable[[], object]] = []


Job = Callable[[Transaction], T]


class Store:
    """Verdicts on the disk. Safe to use from several threads; one process at a time.

    Args:
        folder: made if it is missing.
        durable: also wait until everything is on the disk before an answer, so that a power cut
            loses no answered verdict either. Without it only the process may be killed.

    Attributes:
        folder: the store's. removed, missing: files without a row that were removed at the start,
            and rows whose picture was gone.

    Raises:
        StoreError: another process uses the folder, it cannot be written, or its database is of
            another program or version.
    """

    def __init__(self, folder: str | os.PathLike, *, durable: bool = True) -> None:
        self.folder = Path(folder)
        self._disk = DiskSync() if durable else None
        self._new_folder = True  # its name may not be on the disk yet
        try:
            (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            self._db = self._opened(durable)
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store {self.folder} cannot be opened: {error}") from error
        self.removed, self.missing = self._sweep()
        self._jobs: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="efficientad-store", daemon=True)
        self._thread.start()

    # ---- use ---------------------------------------------------------------------------------

    def add(
        self, record: Record, also: Callable[[Transaction, int], object] | None = None
    ) -> Future[int]:
        """Keep a picture and its verdict; the future gives its number once both are stored.

        also: what else belongs to it, in the same transaction, with its number.
        """

        def job(transaction: Transaction) -> int:
            number = self._insert(transaction, record)
            if also is not None:
                also(transaction, number)
            return number

        return self.submit(job)

    def submit(self, job: Job[T]) -> Future[T]:
        """Run a job in the writer's next transaction; the future gives its result when it stands.

        A job that raises is undone alone, and its future raises the same. A transaction that cannot
        be written is undone, and each of its jobs is run again in one of its own.

        Raises:
            StoreError: the store is closed.
        """
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise StoreError(f"the store {self.folder} is closed")
            self._jobs.put((job, future))
        return future

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads what is committed, with rows by column name."""
        path = (self.folder / DATABASE).absolute().as_uri()
        db = sqlite3.connect(f"{path}?mode=ro", uri=True, timeout=30)
        db.row_factory = sqlite3.Row
        try:
            yield db
        finally:
            db.close()

    def picture_path(self, number: int, suffix: str) -> Path:
        """Where the picture of a row lies."""
        return self.folder / PICTURES / f"{number // 1000:06d}" / f"{number}.{suffix}"

    def close(self) -> None:
        """Finish what was submitted, then release the folder."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        self._db.close()
        self._lock.close()
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- start -------------------------------------------------------------------------------

    def _locked(self) -> sqlite3.Connection:
        """A lock that goes with the process, however it ends."""
        lock = sqlite3.connect(self.folder / LOCK, timeout=0, check_same_thread=False)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            lock.close()
            if "locked" not in str(error):
                raise
            raise StoreError(f"the store {self.folder} is in use by another process") from None
        return lock

    def _opened(self, durable: bool) -> sqlite3.Connection:
        db = sqlite3.connect(self.folder / DATABASE, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                db.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION}; "
                    f"PRAGMA user_version = {VERSION}; COMMIT;"
                )
            elif (application, version) != (APPLICATION, VERSION):
                raise StoreError(
                    f"{self.folder / DATABASE} is of another program or version ({version}); "
                    "name another folder for the store"
                )
        except BaseException:
            db.close()
            raise
        return db

    def _sweep(self) -> tuple[int, int]:
        """Remove files that no row names; note of rows whose file is gone that it is."""
        rows = "SELECT id, suffix FROM verdicts WHERE suffix IS NOT NULL"
        named = {f"{number}.{suffix}": number for number, suffix in self._db.execute(rows)}
        removed = 0
        for folder in (self.folder / PICTURES).iterdir():
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir()):
                continue
            for name in os.listdir(folder):
                ours = _FILE.fullmatch(name)
                if ours and int(ours[1]) // 1000 == int(folder.name):
                    if named.pop(name, None) is None:
                        (folder / name).unlink()
                        removed += 1
        gone = [(number,) for number in named.values()]
        if gone:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("UPDATE verdicts SET suffix = NULL, bytes = 0 WHERE id = ?", gone)
            self._db.execute("COMMIT")
        return removed, len(gone)

    # ---- the writer's thread -----------------------------------------------------------------

    def _write(self) -> None:
        while True:
            waiting = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(waiting) < MOST_AT_ONCE and waiting[-1] is not None:
                    waiting.append(self._jobs.get_nowait())
            jobs = [one for one in waiting if one and one[1].set_running_or_notify_cancel()]
            if jobs:
                self._commit(jobs)
            if waiting[-1] is None:
                return

    def _commit(self, jobs: list[tuple[Job, Future]]) -> None:
        """Run jobs in one transaction; their futures learn of it when it stands."""
        whole = Transaction(self._db)
        results: list[tuple[Future, Any]] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for job, future in jobs:
                done, result = self._run(job, future, whole)
                if done:
                    results.append((future, result))
            self._sync(whole.files)
            self._db.execute("COMMIT")
        except Exception as error:  # a full disk: nothing of it stands, and nobody is answered
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            _remove(whole.files)
            waiting = [(job, future) for job, future in jobs if not future.done()]
            if len(jobs) > 1:  # it may be one of them alone
                for one in waiting:
                    self._commit([one])
                return
            failure = StoreError(f"the store {self.folder} cannot be written: {error}")
            for _, future in waiting:
                future.set_exception(failure)
            return
        for function in whole.on_commit:
            with contextlib.suppress(OSError):  # a file that is gone already
                function()
        for future, result in results:
            future.set_result(result)

    def _run(self, job: Job, future: Future, whole: Transaction) -> tuple[bool, Any]:
        """Whether a job ended well, and its result; of one that did not, nothing is left."""
        part = Transaction(self._db)
        self._db.execute("SAVEPOINT job")
        try:
            result = job(part)
        except Exception as error:
            _remove(part.files)
            self._db.execute("ROLLBACK TO job")
            self._db.execute("RELEASE job")
            future.set_exception(error)
            return False, None
        whole.files += part.files
        whole.on_commit += part.on_commit
        self._db.execute("RELEASE job")
        return True, result

    def _insert(self, transaction: Transaction, record: Record) -> int:
        row = (
            record.time, record.model, record.digest, record.name, record.score, record.threshold,
            record.is_anomalous, *record.size, json.dumps(record.boxes), record.suffix,
            len(record.picture) + len(record.map_values),
        )  # fmt: skip
        number = transaction.db.execute(
            "INSERT INTO verdicts (time, model, digest, name, score, threshold, is_anomalous, "
            "height, width, boxes, suffix, bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        ).lastrowid
        assert number is not None
        if record.map_size is not None:
            transaction.db.execute(
                "INSERT INTO maps VALUES (?, ?, ?, ?)",
                (number, *record.map_size, record.map_values),
            )
        path = self.picture_path(number, record.suffix)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()
            self._new_folder = True
        transaction.files.append(path)
        path.write_bytes(record.picture)  # one without a row, from an earlier failure, may be there
        return number

    def _sync(self, files: list[Path]) -> None:
        """Wait until new files and their names are on the disk."""
        if self._disk is None or not files:
            return
        folders = {path.parent for path in files}
        if self._new_folder:
            folders.add(self.folder / PICTURES)
        self._disk.wait(files, list(folders))
        self._new_folder = False


def _remove(files: list[Path]) -> None:
    for path in files:
        with contextlib.suppress(OSError):  # it stays for the next start's sweep
            path.unlink()
