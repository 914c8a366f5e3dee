"""What a sink has not sent yet: the verdicts of a store behind the last one that it sent."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from efficientad.service.core import word_of
from efficientad.verdicts.queries import row_of
from efficientad.verdicts.store import Store, Transaction

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS origin (id TEXT NOT NULL)",  # one row: tells stores apart
    "CREATE TABLE IF NOT EXISTS deliveries (sink TEXT PRIMARY KEY, verdict BIGINT NOT NULL)",
)
_KEYS = (
    "id", "time", "model", "name", "score", "is_anomalous", "threshold", "source_size", "boxes",
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """A verdict as it is sent.

    Attributes:
        number: of the verdict. id: of the event, the same for each try and of no other store.
        model, verdict: name of its detector; "anomalous", "normal" or "none". body: JSON, UTF-8.
    """

    number: int
    id: str
    model: str
    verdict: str
    body: bytes


class Outbox:
    """The verdicts behind the last one that a sink has sent, in the store of the verdicts.

    A sink that is new to the store begins with the next verdict.

    Args:
        store: of the verdicts. sink: its name; a place is kept for each.

    Attributes:
        start: number of the last verdict that was sent or passed over. last: of the newest one.
    """

    def __init__(self, store: Store, sink: str) -> None:
        self._store, self._sink = store, sink
        self.origin, self.start, self.last = store.submit(self._opened).result()

    def _opened(self, step: Transaction) -> tuple[str, int, int]:
        for statement in _SCHEMA:
            step.db.execute(statement)
        if step.db.execute("SELECT count(*) FROM origin").fetchone() == (0,):
            step.db.execute("INSERT INTO origin VALUES (?)", (secrets.token_hex(8),))
        last = step.db.newest()
        new = "INSERT INTO deliveries VALUES (?, ?) ON CONFLICT DO NOTHING"
        step.db.execute(new, (self._sink, last))
        place = "SELECT verdict FROM deliveries WHERE sink = ?"
        (start,) = step.db.execute(place, (self._sink,)).fetchone()
        (origin,) = step.db.execute("SELECT id FROM origin").fetchone()
        return origin, start, last

    def after(self, number: int, limit: int) -> list[Event]:
        """The first `limit` verdicts behind a number, in order."""
        query = "SELECT * FROM verdicts WHERE id > ? ORDER BY id LIMIT ?"
        with self._store.reading() as db:
            found = [row_of(row) for row in db.execute(query, (number, limit))]
        events = []
        for row in found:
            verdict = word_of(row["is_anomalous"])
            whole = {key: row[key] for key in _KEYS} | {"verdict": verdict, "store": self.origin}
            body = json.dumps(whole, allow_nan=False).encode()
            event_id = f"{self.origin}-{row['id']}"
            events.append(Event(row["id"], event_id, row["model"], verdict, body))
        return events

    def note(self, number: int) -> None:
        """Keep the number of the last verdict that was sent or passed over; waits for the store."""
        self._store.submit(
            lambda step: step.db.execute(
                "UPDATE deliveries SET verdict = ? WHERE sink = ?", (number, self._sink)
            )
        ).result()
