"""How long verdicts are kept: by days, and by the size of the pictures."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from efficientad.utils.checks import check_number
from efficientad.verdicts.store import Store, Transaction

AT_ONCE = 500  # rows in one transaction, so that verdicts do not wait long for their turn
DAY, GIGABYTE = 86_400.0, 1e9


def check_limits(days: float | None, gigabytes: float | None) -> None:
    """Raise ValueError for a limit that is not above 0."""
    for name, limit in (("days", days), ("gigabytes", gigabytes)):
        if limit is not None:
            check_number(name, limit, 0, above=True)


class Retention:
    """Deletes what is older than `days`, then the oldest while there are more than `gigabytes`.

    By size, verdicts that nobody has reviewed go first. Size is that of picture files and maps.

    Args:
        store: to delete from. days, gigabytes: the limits, each None for none.

    Raises:
        ValueError: a limit that is not above 0.
    """

    def __init__(self, store: Store, days: float | None, gigabytes: float | None) -> None:
        check_limits(days, gigabytes)
        self.store, self.days, self.gigabytes = store, days, gigabytes

    def apply(self, now: float | None = None) -> int:
        """Delete what is beyond the limits now; the number of verdicts that went."""
        before = (time.time() if now is None else now) - (self.days or 0) * DAY
        gone = 0
        while True:
            future: Future[int] = self.store.submit(lambda step: self._step(step, before))
            deleted = future.result()
            gone += deleted
            if deleted < AT_ONCE:
                return gone

    def _step(self, transaction: Transaction, before: float) -> int:
        db = transaction.db
        rows: list[Any] = []
        columns = "SELECT id, suffix, bytes FROM verdicts"
        if self.days is not None:
            rows = db.execute(
                f"{columns} WHERE time < ? ORDER BY time LIMIT ?", (before, AT_ONCE)
            ).fetchall()
        if not rows and self.gigabytes is not None:
            (held,) = db.execute(
                "SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM verdicts"
            ).fetchone()
            over = held - self.gigabytes * GIGABYTE
            if over > 0:
                oldest = f"{columns} ORDER BY review IS NOT NULL, id LIMIT ?"
                for row in db.execute(oldest, (AT_ONCE,)).fetchall():
                    if over <= 0:
                        break
                    rows.append(row)
                    over -= row[2]
        for number, suffix, _ in rows:
            db.execute("DELETE FROM maps WHERE id = ?", (number,))
            db.execute("DELETE FROM verdicts WHERE id = ?", (number,))
            if suffix is not None:
                path = self.store.picture_path(number, suffix)
                transaction.on_commit.append(path.unlink)
                transaction.on_commit.append(path.parent.rmdir)  # stays unless it is empty
        return len(rows)
