"""Verdicts in an SQLite file, in WAL mode."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efficientad.verdicts.database import PROGRAM, VERSION, StoreError, tables


class SqliteConnection(sqlite3.Connection):
    """See `database.Connection`."""

    whole = "CAST({} AS INTEGER)"

    def insert(self, sql: str, values: Sequence[Any]) -> int:
        number = self.execute(sql, values).lastrowid
        assert number is not None
        return number

    def newest(self) -> int:
        # Not the largest number that is there: the newest verdicts may be deleted.
        query = "SELECT seq FROM sqlite_sequence WHERE name = 'verdicts'"
        (last,) = self.execute(query).fetchone() or (0,)
        return last


class Sqlite:
    """See `database.Database`.

    Args:
        path: of the file, which is made if it is missing. durable: see `store.Store`.

    Raises:
        StoreError: the file is of another program or version. sqlite3.Error.
    """

    def __init__(self, path: Path, durable: bool) -> None:
        self._path = path
        self.db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, factory=SqliteConnection
        )
        try:
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            (program,) = self.db.execute("PRAGMA application_id").fetchone()
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            (count,) = self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not count:
                made = tables("INTEGER PRIMARY KEY AUTOINCREMENT", "BLOB")
                self.db.executescript(
                    f"BEGIN; {made} PRAGMA application_id = {PROGRAM}; "
                    f"PRAGMA user_version = {VERSION}; COMMIT;"
                )
            elif (program, version) != (PROGRAM, VERSION):
                raise StoreError(
                    f"{path} is of another program or version ({version}); "
                    "name another folder for the store"
                )
        except BaseException:
            self.db.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[SqliteConnection]:
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        db = sqlite3.connect(uri, uri=True, timeout=30, factory=SqliteConnection)
        db.row_factory = sqlite3.Row
        try:
            yield db
        finally:
            db.close()

    def begin(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self.db.execute("COMMIT")

    def undo(self) -> bool:
        with contextlib.suppress(sqlite3.Error):  # it may be undone already
            self.db.execute("ROLLBACK")
        return True

    def close(self) -> None:
        self.db.close()
