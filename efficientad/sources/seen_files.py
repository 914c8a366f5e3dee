"""Which files of a watched folder were judged, in the store of their verdicts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from efficientad.utils.files import plain_text
from efficientad.verdicts.store import Store, Transaction

Stamp = tuple[int, int]  # bytes, time of the last change in ns

_SCHEMA = """
CREATE TABLE IF NOT EXISTS watched_files (
    model TEXT NOT NULL, path TEXT NOT NULL,
    bytes BIGINT NOT NULL, modified BIGINT NOT NULL,  -- ns since 1970
    verdict BIGINT,             -- NULL: it cannot be read
    reason TEXT,
    PRIMARY KEY (model, path)
)
"""


def stamp_of(path: Path) -> Stamp | None:
    """Bytes and time of a file; None where there is none (any more)."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class SeenFiles:
    """Files that were judged by a model, by their path, size and time.

    A file is one verdict: it is noted in the transaction that stores the verdict, so a killed
    process judges none twice and forgets none. One that changes is judged again.
    """

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, model
        store.submit(lambda step: step.db.execute(_SCHEMA)).result()
        query = "SELECT path, bytes, modified FROM watched_files WHERE model = ?"
        with store.reading() as db:
            self._stamps: dict[str, Stamp] = {
                row["path"]: (row["bytes"], row["modified"]) for row in db.execute(query, (model,))
            }

    def __len__(self) -> int:
        return len(self._stamps)

    def knows(self, path: Path, stamp: Stamp) -> bool:
        """Whether this file, as it is now, was judged, or found unreadable."""
        return self._stamps.get(_text(path)) == stamp

    def noting(self, path: Path, stamp: Stamp) -> Callable[[Transaction, int], None]:
        """What notes a file with its verdict's number, in that verdict's transaction."""

        def note(step: Transaction, verdict: int) -> None:
            self._note(step, path, stamp, verdict, None)

        return note

    def failed(self, path: Path, stamp: Stamp, reason: str) -> None:
        """Note that a file as it is now cannot be read. Waits for the store."""
        self._store.submit(lambda step: self._note(step, path, stamp, None, reason)).result()

    def _note(
        self, step: Transaction, path: Path, stamp: Stamp, verdict: int | None, reason: str | None
    ) -> None:
        text = _text(path)
        step.db.execute(
            "INSERT INTO watched_files VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (model, path) "
            "DO UPDATE SET bytes = excluded.bytes, modified = excluded.modified, "
            "verdict = excluded.verdict, reason = excluded.reason",
            (self._model, text, *stamp, verdict, reason),
        )
        step.on_commit.append(lambda: self._stamps.__setitem__(text, stamp))


def _text(path: Path) -> str:
    return plain_text(os.path.abspath(path))
