"""One picture of a source through the service: judged, stored, said in a line."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from efficientad.service.core import Inspection, Served
from efficientad.service.decoder import Picture
from efficientad.service.limits import Refused, Share
from efficientad.utils.files import plain_text
from efficientad.verdicts.store import Transaction

Kept = Callable[[Transaction, int], object]


def say(name: str, what: str) -> None:
    """A line for who looks at the terminal."""
    print(plain_text(f"{name}  {what}"), flush=True)


async def judge(
    inspection: Inspection,
    served: Served,
    picture: bytes | Callable[[Share], Picture],
    name: str,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """The verdict of a picture, once it is stored; waits where the service is busy.

    Args:
        picture: the file's bytes, or what makes the picture in a decoder's thread. kept: runs in
            the transaction of the verdict, with its number.

    Raises:
        Refused: the picture cannot be read, or the service is stopping.
        StoreError: the verdict cannot be stored.
    """
    while True:
        try:
            with inspection.memory.share() as share:
                if isinstance(picture, bytes):
                    share.take(len(picture))
                    work: bytes | Callable[[], Picture] = picture
                else:
                    work = functools.partial(picture, share)
                found = await inspection.inspect(served, work, share, name, kept)
            break
        except Refused as error:
            if error.status != 503 or inspection.draining:
                raise
            await asyncio.sleep(float(error.headers.get("Retry-After", 1)))
    answer = found.answer
    verdict = {True: "anomalous", False: "normal", None: "not judged"}[answer["is_anomalous"]]
    score = "nan" if answer["score"] is None else f"{answer['score']:.4g}"
    say(name, f"{score}  {verdict}")
    return answer
