"""What the store asks of a database, and the tables in it.

There are two kinds, `sqlite` and `postgres`. SQL elsewhere is what both take: `?` for a value,
truth as 1, 0 or NULL, and no function that one of them lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

VERSION = 2
PROGRAM = 0x45414456  # "EADV"
REVIEWS = ("good", "bad", "unsure")
PICTURES = "pictures"  # in the store's folder
TOKEN = "database.txt"  # there where the rows are in PostgreSQL: in which schema
_TABLES = """
CREATE TABLE verdicts (
    id {identity},
    time DOUBLE PRECISION NOT NULL,  -- seconds since 1970, UTC
    model TEXT NOT NULL,             -- name under which the detector is served
    digest TEXT NOT NULL,            -- SHA-256 of its file: scores of another mean something else
    name TEXT,                       -- what the sender called the picture
    score DOUBLE PRECISION,          -- NULL: not a number
    map_mean DOUBLE PRECISION,       -- the same
    threshold DOUBLE PRECISION,      -- by which it was judged; NULL: not judged
    is_anomalous INTEGER,
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    boxes TEXT NOT NULL,             -- JSON
    suffix TEXT,                     -- of the picture's file; NULL: there is none (any more)
    bytes BIGINT NOT NULL,           -- of the picture's file and the map
    review TEXT,                     -- a word of REVIEWS
    reviewed DOUBLE PRECISION        -- when
);
CREATE INDEX verdicts_by_score ON verdicts (model, digest, score, review, is_anomalous);
CREATE INDEX verdicts_by_time ON verdicts (time);
CREATE TABLE maps (
    id BIGINT PRIMARY KEY REFERENCES verdicts (id),
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    map {blob} NOT NULL              -- float16, little-endian, row by row
);
CREATE TABLE thresholds (
    id {identity},
    time DOUBLE PRECISION NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL,
    threshold DOUBLE PRECISION, reason TEXT
);
"""


class StoreError(OSError):
    """The store cannot be opened, or not be used (any more, or just now)."""


def tables(identity: str, blob: str) -> str:
    """The statements that make the tables; by a kind's words for a number that counts and bytes."""
    return _TABLES.format(identity=identity, blob=blob)


class Connection(Protocol):
    """A connection; its rows are found into by place and by column name.

    Attributes:
        whole: `whole.format(x)` is SQL for x without its fraction, as an integer.
    """

    whole: str

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Any:
        """Run a statement; what comes back is a cursor of either kind."""

    def insert(self, sql: str, values: Sequence[Any], /) -> int:
        """Run an INSERT of one row; the number in its column `id`."""

    def newest(self) -> int:
        """The largest number that was ever given to a verdict, 0 for none."""


class Database(Protocol):
    """A database of verdicts, held against other processes until `close`."""

    @property
    def db(self) -> Connection:
        """The connection that writes, in transactions."""

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection that reads what is committed."""

    def begin(self) -> None:
        """Begin a transaction."""

    def commit(self) -> None:
        """End it; it stands when this returns."""

    def undo(self) -> bool:
        """End it after an error; whether it is certain that nothing of it stands."""

    def close(self) -> None:
        """Give the database free."""
