"""A watched folder: each picture that is put into it is judged, once it is complete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from efficientad.data.image_files import is_image
from efficientad.service.core import Inspection, Served
from efficientad.service.limits import Refused
from efficientad.sources.judging import judge, say
from efficientad.sources.seen_files import SeenFiles, Stamp, stamp_of
from efficientad.utils.checks import check_number
from efficientad.utils.folders import files_below, is_hidden

_LOOK = 0.05  # seconds between looks at files that are not yet complete
_RESCAN = 60.0  # seconds after which the whole folder is looked through: events can be lost


@dataclass
class WatchedFolder:
    """Judges what lies in a folder and what comes into it, also into folders below it.

    A file is complete when its size and time have not changed for `settle` seconds. The oldest is
    begun first. What was judged before, by the store, is not judged again.

    Args:
        folder: to watch. model: name under which the detector is served; None is the only one.
        settle: seconds.

    Raises:
        ValueError: folder is no folder, or settle is no positive number.
    """

    folder: Path
    model: str | None = None
    settle: float = 0.5
    _waiting: dict[Path, tuple[Stamp | None, float]] = field(default_factory=dict, init=False)
    _new_folder: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not self.folder.is_dir():
            raise ValueError(f"the folder to watch is {str(self.folder)!r}, which is no folder")
        check_number("settle", self.settle, 0, above=True)

    async def __call__(self, inspection: Inspection) -> None:
        """Watch until it is cancelled.

        Raises:
            ValueError: the store lies in the folder. OSError: the folder is gone.
        """
        store, here = os.path.realpath(inspection.store.folder), os.path.realpath(self.folder)
        if os.path.commonpath((store, here)) == here:
            raise ValueError(
                f"the store {store} lies in the watched folder {here}: its own pictures would be "
                "judged again and again; name another folder with --store"
            )
        served = inspection.model(self.model)
        seen = await asyncio.to_thread(SeenFiles, inspection.store, served.name)
        say(str(self.folder), f"is watched; {len(seen)} pictures were judged before")
        tasks = [
            asyncio.create_task(work)
            for work in (self._events(), self._scans(seen), self._judging(inspection, served, seen))
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _events(self) -> None:
        """Note what the system says was written."""
        from watchfiles import Change, awatch

        async for changes in awatch(self.folder, watch_filter=None, step=20, debounce=200):
            for change, name in changes:
                path = Path(name)
                if change == Change.deleted:
                    continue
                if path.is_dir():  # what was put into it at once has no event of its own
                    self._new_folder.set()
                elif self._is_ours(path):
                    self._waiting.setdefault(path, (None, 0.0))

    async def _scans(self, seen: SeenFiles) -> None:
        """Note what lies there and is not known: now, with a new folder, and every minute."""
        while True:
            for path, stamp in await asyncio.to_thread(self._unknown, seen):
                self._waiting.setdefault(path, (stamp, time.monotonic()))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._new_folder.wait(), _RESCAN)
            self._new_folder.clear()

    def _unknown(self, seen: SeenFiles) -> list[tuple[Path, Stamp]]:
        if not self.folder.is_dir():
            raise OSError(f"the watched folder {self.folder} is gone")
        root = Path(os.path.abspath(self.folder))
        stamps = ((path, stamp_of(path)) for path in files_below(root) if is_image(path))
        return [(path, s) for path, s in stamps if s is not None and not seen.knows(path, s)]

    def _is_ours(self, path: Path) -> bool:
        below = os.path.relpath(path, os.path.abspath(self.folder))
        return is_image(path) and not any(is_hidden(part) for part in Path(below).parts)

    def _complete(self, seen: SeenFiles) -> list[tuple[Path, Stamp]]:
        """Files that have not changed for long enough, the oldest first; they no longer wait."""
        now, found = time.monotonic(), []
        for path, (before, since) in list(self._waiting.items()):
            stamp = stamp_of(path)
            if stamp is None or seen.knows(path, stamp):  # gone, or an event of what was judged
                del self._waiting[path]
            elif stamp != before:
                self._waiting[path] = (stamp, now)
            elif now - since >= self.settle and stamp[0]:
                del self._waiting[path]
                found.append((path, stamp))
        return sorted(found, key=lambda item: (item[1][1], item[0]))

    async def _judging(self, inspection: Inspection, served: Served, seen: SeenFiles) -> None:
        """Judge what is complete, as many at a time as the predictor takes."""
        most = max(served.predictor.batch_sizes)
        at_work: set[asyncio.Task[None]] = set()
        try:
            while True:
                for path, stamp in self._complete(seen):
                    while len(at_work) >= most:
                        done, at_work = await asyncio.wait(
                            at_work, return_when=asyncio.FIRST_COMPLETED
                        )
                        for task in done:
                            task.result()
                    one = self._one(inspection, served, seen, path, stamp)
                    at_work.add(asyncio.create_task(one))
                await asyncio.sleep(_LOOK)
                for task in [task for task in at_work if task.done()]:
                    at_work.remove(task)
                    task.result()
        finally:
            for task in at_work:
                task.cancel()
            await asyncio.gather(*at_work, return_exceptions=True)

    async def _one(
        self, inspection: Inspection, served: Served, seen: SeenFiles, path: Path, stamp: Stamp
    ) -> None:
        name = os.path.relpath(path, os.path.abspath(self.folder))
        try:
            data = await asyncio.to_thread(_read, path, inspection.limits.body_bytes)
        except Refused as error:
            await self._fail(seen, path, stamp, name, error.message)
            return
        except OSError as error:  # it may be there again later: nothing is noted
            say(name, f"failed: {error.strerror or error}")
            return
        if stamp_of(path) != stamp:  # somebody writes: not yet
            self._waiting.setdefault(path, (None, 0.0))
            return
        try:
            await judge(inspection, served, data, name, seen.noting(path, stamp))
        except Refused as error:
            if not inspection.draining:
                await self._fail(seen, path, stamp, name, error.message)

    async def _fail(
        self, seen: SeenFiles, path: Path, stamp: Stamp, name: str, reason: str
    ) -> None:
        say(name, f"failed: {reason}")
        await asyncio.to_thread(seen.failed, path, stamp, reason)


def _read(path: Path, most: int) -> bytes:
    """A file's bytes. Raises Refused (413) for more than `most`."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Refused(413, f"the file has more than {most / 1e6:g} MB; see --max-body-mb")
    return data
