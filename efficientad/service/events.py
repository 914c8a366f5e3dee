"""What happens, told to every page that is open, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

MOST_WAITING = 100  # events for one listener; of a slower one the oldest are dropped
MOST_LISTENERS = 32
HEARTBEAT = 10.0  # seconds


class Hub:
    """Sends events to listeners; one event loop's. A slow listener delays nobody."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[str]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    @property
    def full(self) -> bool:
        return len(self._listeners) >= MOST_LISTENERS

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        """Tell every listener."""
        if not self._listeners:
            return
        text = f"event: {kind}\ndata: {json.dumps(data)}\n\n"
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(text)

    def close(self) -> None:
        """End every listener's stream within a second."""
        self._closed = True

    async def listen(self) -> AsyncIterator[str]:
        """Events as text, from now on until the hub is closed."""
        queue: asyncio.Queue[str] = asyncio.Queue(MOST_WAITING)
        self._listeners.add(queue)
        try:
            yield "retry: 2000\n\n"
            silent = 0.0
            while not self._closed:
                try:
                    yield await asyncio.wait_for(queue.get(), 0.5)
                    silent = 0.0
                except asyncio.TimeoutError:
                    silent += 0.5
                    if silent >= HEARTBEAT:
                        silent = 0.0
                        yield ": still here\n\n"
        finally:
            self._listeners.discard(queue)
