"""Verdicts in a schema of a PostgreSQL database.

One process writes there at a time, and holds an advisory lock for it. A connection that is lost is
made again for the next transaction. The pictures lie in a folder, and folder and schema know each
other by a token: rows would otherwise lose their pictures, or pictures their rows, where a service
is started with one of them and another's other.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from efficientad.utils.files import write_text
from efficientad.verdicts.database import PICTURES, PROGRAM, TOKEN, VERSION, StoreError, tables

LOCK_SECONDS = 5.0  # in which the server has noticed that a killed process is gone
CONNECT_SECONDS = 10
MOST_READERS = 8
# Of a session whose machine was switched off, the server learns in a minute, not in two hours.
_ALIVE = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}


class Row(tuple):
    """A row, by place or column name."""

    places: dict[str, int]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.places[key] if isinstance(key, str) else key)


def _rows(cursor: psycopg.Cursor[Any]) -> type[Row]:
    names = [column.name for column in cursor.description or ()]
    return type("Row", (Row,), {"places": {name: i for i, name in enumerate(names)}})


class PostgresConnection:
    """See `database.Connection`."""

    whole = "CAST(trunc({}) AS INTEGER)"

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw

    def execute(self, sql: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        words: Any = sql.replace("?", "%s") if values else sql
        return self.raw.execute(words, [_plain(value) for value in values] or None)

    def insert(self, sql: str, values: Sequence[Any]) -> int:
        return self.execute(f"{sql} RETURNING id", values).fetchone()[0]  # type: ignore[index]

    def newest(self) -> int:
        query = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM verdicts_id_seq"
        return self.execute(query).fetchone()[0]  # type: ignore[index]


def _plain(value: Any) -> Any:
    """A value as PostgreSQL takes it: no NUL in a text, and truth as an integer."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    return int(value) if isinstance(value, bool) else value


class Postgres:
    """See `database.Database`.

    Args:
        url: as libpq takes it, "postgresql://user@host/database" or "service=line3"; what it does
            not say comes from libpq's environment variables and password file. The tables lie in
            the first schema of its search path and are made if they are missing.
        folder: of the pictures, which belongs to this schema and no other from then on.
        durable: see `store.Store`.

    Raises:
        StoreError: the database cannot be reached, is in use by another process, is of another
            program or version, or belongs to another folder.
    """

    def __init__(self, url: str, folder: Path, durable: bool) -> None:
        self._token: str | None = None
        try:
            words: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS}
            self._words = {**words, "application_name": "efficientad", **conninfo_to_dict(url)}
        except psycopg.ProgrammingError:  # its message repeats the URL, with the password
            raise StoreError(
                "the URL of the database cannot be read; it must be as "
                "postgresql://user@host/database, or as host=... dbname=... user=..."
            ) from None
        named = {key: str(self._words[key]) for key in ("host", "dbname") if self._words.get(key)}
        self.name = "the database " + ("/".join(named.values()) or "of libpq's defaults")
        self._settings = {**_ALIVE, "synchronous_commit": "on" if durable else "off"}
        self.db = PostgresConnection(self._connected())
        try:
            self._token = self._opened(folder)
            self._readers = ConnectionPool(
                kwargs={**self._words, "autocommit": True, "row_factory": _rows},
                min_size=0,
                max_size=MOST_READERS,
                timeout=CONNECT_SECONDS,
                check=ConnectionPool.check_connection,
                open=True,
            )
        except psycopg.Error as error:
            self.db.raw.close()
            raise StoreError(f"{self.name} cannot be used: {error}") from error
        except BaseException:
            self.db.raw.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[PostgresConnection]:
        try:
            with self._readers.connection() as raw:
                yield PostgresConnection(raw)
        except psycopg.Error as error:
            raise StoreError(f"{self.name} cannot be read: {error}") from error

    def begin(self) -> None:
        try:
            self.db.execute("BEGIN")
        except psycopg.OperationalError:
            if not self.db.raw.closed:
                raise
            self.db.raw = self._connected()  # nothing is lost: nothing was begun
            self.db.execute("BEGIN")

    def commit(self) -> None:
        self.db.execute("COMMIT")

    def undo(self) -> bool:
        try:
            self.db.execute("ROLLBACK")
        except psycopg.Error:
            return False  # the connection is lost, maybe behind a COMMIT that arrived
        return True

    def close(self) -> None:
        self._readers.close()
        self.db.raw.close()

    # ---- start -------------------------------------------------------------------------------

    def _connected(self) -> psycopg.Connection[Any]:
        """A connection that holds the lock of the schema. StoreError: there is none to be had."""
        try:
            raw = psycopg.connect(**self._words, autocommit=True, row_factory=_rows)
        except psycopg.Error as error:
            raise StoreError(f"{self.name} cannot be reached: {error}") from error
        try:
            db = PostgresConnection(raw)
            for name, value in self._settings.items():
                db.execute("SELECT set_config(?, ?, false)", (name, str(value)))
            self._lock(db)
            if self._token is not None and self._found(db) != self._token:
                raise StoreError(f"{self.name} is another one than before")
        except psycopg.Error as error:
            raw.close()
            raise StoreError(f"{self.name} cannot be used: {error}") from error
        except BaseException:
            raw.close()
            raise
        return raw

    def _lock(self, db: PostgresConnection) -> None:
        (schema,) = db.execute("SELECT current_schema()").fetchone()  # type: ignore[misc]
        if schema is None:
            raise StoreError(f"{self.name} has no schema of those in the search path")
        key = int.from_bytes(hashlib.sha256(schema.encode()).digest()[:4], "big", signed=True)
        until = time.monotonic() + LOCK_SECONDS
        while True:
            got = db.execute("SELECT pg_try_advisory_lock(?, ?)", (PROGRAM, key)).fetchone()
            if got == (True,):
                return
            if time.monotonic() > until:
                raise StoreError(f"{self.name} is in use by another process")
            time.sleep(0.1)

    def _found(self, db: PostgresConnection) -> str | None:
        """The token of the schema; None where there are no tables. StoreError: of other tables."""
        query = (
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() "
            "AND tablename IN ('verdicts', 'verdict_store')"
        )
        there = {name for (name,) in db.execute(query)}
        if not there:
            return None
        if there == {"verdicts", "verdict_store"}:
            row = db.execute("SELECT program, version, token FROM verdict_store").fetchone()
            if row is not None and tuple(row[:2]) == (PROGRAM, VERSION):
                return row[2]
        raise StoreError(
            f"{self.name} holds tables of another program or version; name another schema"
        )

    def _opened(self, folder: Path) -> str:
        """The token of the schema, which is the folder's; its tables are made if it has none."""
        path = folder / TOKEN
        token = self._found(self.db)
        if token is None:
            if any((folder / PICTURES).iterdir()):
                raise StoreError(
                    f"{folder} holds pictures, and {self.name} no verdicts yet; "
                    "name their database, or another folder for the store"
                )
            token = secrets.token_hex(16)
            write_text(path, token + "\n")
            self.db.execute("BEGIN")
            made = tables("BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY", "BYTEA")
            self.db.execute(made)
            self.db.execute(
                "CREATE TABLE verdict_store (program INTEGER, version INTEGER, token TEXT)"
            )
            row = (PROGRAM, VERSION, token)
            self.db.execute("INSERT INTO verdict_store VALUES (?, ?, ?)", row)
            self.db.execute("COMMIT")
        elif not path.is_file() or path.read_text(encoding="utf-8").strip() != token:
            raise StoreError(
                f"the pictures of {self.name} lie in another folder than {folder}; name that one. "
                f"If they are lost, write {token} into {path} to go on without them"
            )
        return token
