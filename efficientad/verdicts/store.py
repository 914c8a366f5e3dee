"""Where verdicts are kept: a database, and the picture files beside it.

A folder holds `pictures/THOUSANDS/ID.SUFFIX` and, unless the rows are in PostgreSQL,
`verdicts.sqlite3`. One thread writes; whatever waits for it goes into one transaction, whose files
are brought to the disk together. A picture's file is written inside the transaction of its row, so
a process that is killed leaves at most files without a row, which the next start removes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from efficientad.utils.files import DiskSync
from efficientad.verdicts.database import PICTURES, TOKEN, Connection, Database, StoreError
from efficientad.verdicts.sqlite import Sqlite

T = TypeVar("T")

MOST_AT_ONCE = 256  # jobs in one transaction
DATABASE, LOCK = "verdicts.sqlite3", "lock.sqlite3"
_FOLDER, _FILE = re.compile(r"\d+"), re.compile(r"(\d+)\.[a-z0-9]+")


@dataclass
class Record:
    """What is kept of one picture.

    Attributes:
        model, digest: name of the detector and SHA-256 of its file.
        score, map_mean: NaN is kept as NULL.
        threshold, is_anomalous: the verdict, None where none was given.
        size: (height, width) of the picture. boxes: of its defects, as JSON takes them.
        picture, suffix: the file as it was sent, and the suffix to keep it under ("jpg").
        map_size, map_values: (h, w) of a small anomaly map and its values, float16 bytes.
        name: what the sender called it. time: seconds since 1970.
    """

    model: str
    digest: str
    score: float
    map_mean: float
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

    def __init__(self, db: Connection) -> None:
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
        database: URL of a PostgreSQL database for the rows, see `postgres.Postgres`; without one
            they are in an SQLite file in the folder.

    Attributes:
        folder: the store's. removed, missing: files without a row that were removed at the start,
            and rows whose picture was gone.

    Raises:
        StoreError: another process uses the folder or the database, one of them cannot be used,
            they do not belong together, or the database is of another program or version.
    """

    def __init__(
        self, folder: str | os.PathLike, *, durable: bool = True, database: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self._disk = DiskSync() if durable else None
        self._new_folder = True  # its name may not be on the disk yet
        try:
            (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                self._lock = self._locked()
                opened.callback(self._lock.close)
                self._database = self._opened(durable, database)
                opened.callback(self._database.close)
                self.removed, self.missing = self._sweep()
                opened.pop_all()
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store {self.folder} cannot be opened: {error}") from error
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

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection that reads what is committed, with rows by column name."""
        return self._database.reading()

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
        self._database.close()
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

    def _opened(self, durable: bool, database: str | None) -> Database:
        path = self.folder / DATABASE
        if database is None:
            if (self.folder / TOKEN).exists():
                raise StoreError(
                    f"the verdicts of {self.folder} are in a PostgreSQL database; name it"
                )
            return Sqlite(path, durable)
        from efficientad.verdicts.postgres import Postgres

        if path.exists():
            raise StoreError(
                f"{path} holds the verdicts of this folder; name another folder for the database"
            )
        return Postgres(database, self.folder, durable)

    def _sweep(self) -> tuple[int, int]:
        """Remove files that no row names; note of rows whose file is gone that it is."""
        rows = "SELECT id, suffix FROM verdicts WHERE suffix IS NOT NULL"
        db = self._database.db
        named = {f"{number}.{suffix}": number for number, suffix in db.execute(rows)}
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
        if named:
            self._database.begin()
            for number in named.values():
                db.execute("UPDATE verdicts SET suffix = NULL, bytes = 0 WHERE id = ?", (number,))
            self._database.commit()
        return removed, len(named)

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
        whole = Transaction(self._database.db)
        results: list[tuple[Future, Any]] = []
        try:
            self._database.begin()
            for job, future in jobs:
                done, result = self._run(job, future, whole)
                if done:
                    results.append((future, result))
            self._sync(whole.files)
            self._database.commit()
        except Exception as error:  # a full disk, a lost connection: nobody is answered
            undone = self._database.undo()
            if undone:
                _remove(whole.files)
            waiting = [(job, future) for job, future in jobs if not future.done()]
            if undone and len(jobs) > 1:  # it may be one of them alone
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
        db = self._database.db
        part = Transaction(db)
        db.execute("SAVEPOINT job")
        try:
            result = job(part)
        except Exception as error:
            _remove(part.files)
            db.execute("ROLLBACK TO job")
            db.execute("RELEASE job")
            future.set_exception(error)
            return False, None
        whole.files += part.files
        whole.on_commit += part.on_commit
        db.execute("RELEASE job")
        return True, result

    def _insert(self, transaction: Transaction, record: Record) -> int:
        row = (
            record.time, record.model, record.digest, record.name,
            *(None if math.isnan(x) else x for x in (record.score, record.map_mean)),
            record.threshold, record.is_anomalous, *record.size, json.dumps(record.boxes),
            record.suffix, len(record.picture) + len(record.map_values),
        )  # fmt: skip
        number = transaction.db.insert(
            "INSERT INTO verdicts (time, model, digest, name, score, map_mean, threshold, "
            "is_anomalous, height, width, boxes, suffix, bytes) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
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
