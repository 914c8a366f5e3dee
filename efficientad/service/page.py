"""The page at / and what it asks for."""

from __future__ import annotations

import asyncio
import io
import math
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from efficientad import __version__
from efficientad.data.decoding import ImageError, read_image
from efficientad.results.overlay import colorize, map_scale
from efficientad.service.bodies import body_of_json, read_body
from efficientad.service.core import Inspection, Served
from efficientad.service.decoder import Decoder
from efficientad.service.limits import Refused, busy
from efficientad.utils.checks import is_number
from efficientad.verdicts import queries
from efficientad.verdicts.database import REVIEWS

T = TypeVar("T")

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
SHOWN = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}  # numbers are given once
THUMBNAIL = 320  # pixels
MOST_THUMBNAILS = 2000  # kept in memory
MOST_ROWS = 500
MOST_COURSE = 100_000  # parts


def add_page(app: FastAPI, inspection: Inspection) -> None:
    """Add the page's routes."""
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _file(name, kind), methods=["GET"], include_in_schema=False)
    _add_history(app, inspection)
    _add_pictures(app, inspection)
    _add_thresholds(app, inspection)

    @app.get("/api/events")
    async def events() -> Response:
        """Verdicts, reviews and thresholds as they come: server-sent events."""
        if inspection.hub.full:
            raise busy(f"{len(inspection.hub)} pages listen already", 10)
        return StreamingResponse(
            inspection.hub.listen(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


def _file(name: str, kind: str) -> Callable[[], Any]:
    data = resources.files("efficientad.service").joinpath("static").joinpath(name).read_bytes()

    async def answer() -> Response:
        return Response(
            data, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"}
        )

    return answer


async def _read(inspection: Inspection, query: Callable[..., T], *values: Any, **more: Any) -> T:
    """The result of a query, computed beside the event loop."""

    def run() -> T:
        with inspection.store.reading() as db:
            return query(db, *values, **more)

    return await asyncio.to_thread(run)


# ---- history and reviews -------------------------------------------------------------------------


def _add_history(app: FastAPI, inspection: Inspection) -> None:
    @app.get("/api/verdicts")
    async def verdicts(
        model: str | None = None,
        verdict: str | None = None,
        review: str | None = None,
        since: str | None = None,
        until: str | None = None,
        before: int | None = None,
        limit: int = 60,
    ) -> dict[str, Any]:
        """The newest verdicts that fit, newest first. Times are ISO 8601, UTC if not said."""
        _word("verdict", verdict, tuple(queries.VERDICTS))
        _word("review", review, (*REVIEWS, "open"))
        if not 1 <= limit <= MOST_ROWS:
            raise Refused(400, f"limit is {limit}; it must be in 1..{MOST_ROWS}")
        if before is not None and not 0 <= before < 2**63:
            raise Refused(400, f"before is {before}; it must be the number of a verdict")
        rows = await _read(
            inspection, queries.history, model=model, verdict=verdict, review=review,
            since=_seconds("since", since), until=_seconds("until", until),
            before=before, limit=limit,
        )  # fmt: skip
        return {"verdicts": rows}

    @app.get("/api/verdicts/{number}")
    async def verdict(number: int) -> dict[str, Any]:
        """One verdict."""
        return queries.row_of(await _row(inspection, number))

    @app.post("/api/verdicts/{number}/review")
    async def review(request: Request, number: int) -> dict[str, Any]:
        """Say what a part is: {"review": "good", "bad", "unsure" or null}."""
        word = (await _json(inspection, request)).get("review")
        if word is not None and word not in REVIEWS:
            raise Refused(
                400, f"review is {str(word)[:40]!r}; it must be one of {', '.join(REVIEWS)}"
            )
        await _row(inspection, number)
        now = time.time()
        future = inspection.store.submit(
            lambda step: queries.set_review(step.db, number, word, now)
        )
        if not await asyncio.wrap_future(future):
            raise Refused(404, f"there is no verdict {number}")
        inspection.hub.publish("review", {"id": number, "review": word})
        return {"id": number, "review": word}


def _word(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise Refused(400, f"{name} is {value[:40]!r}; it must be one of {', '.join(known)}")


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError) as error:
        raise Refused(
            400, f"{name} is {text[:40]!r}; it must be a time as {queries.as_text(0)}"
        ) from error


async def _json(inspection: Inspection, request: Request) -> dict[str, Any]:
    with inspection.memory.share() as share:
        return body_of_json(await read_body(request, inspection.limits, share))


async def _row(inspection: Inspection, number: int) -> Any:
    if not 0 < number < 2**63:
        raise Refused(404, f"there is no verdict {number}")
    row = await _read(
        inspection,
        lambda db: db.execute("SELECT * FROM verdicts WHERE id = ?", (number,)).fetchone(),
    )
    if row is None:
        raise Refused(404, f"there is no verdict {number}")
    return row


# ---- pictures ------------------------------------------------------------------------------------


def _add_pictures(app: FastAPI, inspection: Inspection) -> None:
    viewer = Decoder(inspection.limits, threads=2)  # pages never wait before pictures to judge
    thumbnails: OrderedDict[int, bytes] = OrderedDict()

    async def file_of(number: int) -> tuple[Any, bytes]:
        row = await _row(inspection, number)
        if row["suffix"] is None:
            raise Refused(404, f"the picture of verdict {number} is not kept any more")
        path = inspection.store.picture_path(number, row["suffix"])
        try:
            return row, await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            raise Refused(404, f"the picture of verdict {number} is not kept any more") from None

    def range_of(row: Any) -> Any:
        served = inspection.models.get(row["model"])
        return None if served is None else served.predictor.value_range

    @app.get("/api/verdicts/{number}/picture")
    async def picture(number: int) -> Response:
        """The picture as it came, or as PNG where a browser does not show its kind."""
        row, data = await file_of(number)
        kind = SHOWN.get(row["suffix"])
        if kind is None:
            kind = "image/png"
            data = await viewer.run(lambda: _picture(data, range_of(row), None))
        return Response(data, media_type=kind, headers=FOR_EVER)

    @app.get("/api/verdicts/{number}/file")
    async def original(number: int) -> Response:
        """The file as it came, to be saved."""
        row, data = await file_of(number)
        name = f'attachment; filename="{number}.{row["suffix"]}"'
        return Response(
            data, media_type="application/octet-stream", headers={"Content-Disposition": name}
        )

    @app.get("/api/verdicts/{number}/thumbnail")
    async def thumbnail(number: int) -> Response:
        """The picture, small, as JPEG."""
        data = thumbnails.get(number)
        if data is None:
            row, file = await file_of(number)
            data = await viewer.run(lambda: _picture(file, range_of(row), THUMBNAIL))
            thumbnails[number] = data
            while len(thumbnails) > MOST_THUMBNAILS:
                thumbnails.popitem(last=False)
        return Response(data, media_type="image/jpeg", headers=FOR_EVER)

    @app.get("/api/verdicts/{number}/map")
    async def heat(number: int) -> Response:
        """The anomaly map in colours, as PNG with alpha, to be laid over the picture."""
        row = await _row(inspection, number)
        kept = await _read(
            inspection,
            lambda db: db.execute("SELECT * FROM maps WHERE id = ?", (number,)).fetchone(),
        )
        if kept is None:
            raise Refused(404, f"the map of verdict {number} is not kept")
        values = np.frombuffer(kept["map"], "<f2").reshape(kept["height"], kept["width"])
        data = _heat(values.astype(np.float32), row["threshold"])
        return Response(data, media_type="image/png", headers=FOR_EVER)


def _picture(data: bytes, value_range: Any, side: int | None) -> bytes:
    """A picture as PNG, or, at most `side` pixels wide and high, as JPEG."""
    from PIL import Image

    try:
        image = Image.fromarray(read_image(data, value_range))
    except ImageError as error:
        raise Refused(404, f"the picture cannot be shown: {error.reason}") from error
    stream = io.BytesIO()
    if side is None:
        image.save(stream, "PNG", compress_level=1)
    else:
        image.thumbnail((side, side), Image.Resampling.BOX)
        image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _heat(values: np.ndarray, threshold: float | None) -> bytes:
    from PIL import Image

    low, high = map_scale(threshold)
    place = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1), nan=1.0)
    alpha = np.rint(255 * np.sqrt(place)).astype(np.uint8)
    pixels = np.dstack([colorize(values, (low, high)), alpha])
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(stream, "PNG")
    return stream.getvalue()


# ---- thresholds ----------------------------------------------------------------------------------


def _add_thresholds(app: FastAPI, inspection: Inspection) -> None:
    one_at_a_time = asyncio.Lock()  # a long course takes a second of a processor

    async def described(served: Served) -> dict[str, Any]:
        found = await _read(inspection, queries.counts, served.detector)
        return {
            "name": served.name,
            "threshold": served.predictor.threshold,
            "own_threshold": served.own_threshold,
            **found,
        }

    @app.get("/api/models")
    async def models() -> dict[str, Any]:
        """The models, with thresholds and counts of their parts."""
        found = [await described(served) for served in inspection.models.values()]
        return {"models": found, "version": __version__}

    @app.get("/api/models/{name}/histogram")
    async def histogram(name: str) -> dict[str, Any]:
        """The stored scores of a model in bins."""
        served = inspection.model(name)
        threshold = served.predictor.threshold
        return await _read(inspection, queries.histogram, served.detector, threshold)

    @app.get("/api/models/{name}/what-if")
    async def what_if(name: str, threshold: float) -> dict[str, int]:
        """What a threshold would have done to the stored parts."""
        served = inspection.model(name)
        if not math.isfinite(threshold):
            raise Refused(400, f"threshold is {threshold}; it must be a finite number")
        return await _read(inspection, queries.what_if, served.detector, threshold)

    @app.get("/api/models/{name}/course")
    async def course(name: str, parts: int = 10_000) -> dict[str, Any]:
        """How the scores of the newest parts went, and whether they drift."""
        served = inspection.model(name)
        if not 1 <= parts <= MOST_COURSE:
            raise Refused(400, f"parts is {parts}; it must be in 1..{MOST_COURSE}")
        threshold, calibration = served.predictor.threshold, served.calibration
        async with one_at_a_time:
            return await _read(
                inspection, queries.course, served.detector, threshold, calibration, parts
            )

    @app.put("/api/models/{name}/threshold")
    async def set_threshold(request: Request, name: str) -> dict[str, Any]:
        """Judge by another threshold: {"threshold": a number, or null for the file's}."""
        served = inspection.model(name)
        asked = await _json(inspection, request)
        value, reason = asked.get("threshold"), "set on the page"
        if "threshold" not in asked or not (value is None or is_number(value)):
            raise Refused(
                400, f"threshold is {str(value)[:40]!r}; it must be a finite number or null"
            )
        if value is None:
            value, reason = served.own_threshold, "the detector file's"
        await inspection.set_threshold(served, None if value is None else float(value), reason)
        return await described(served)

    @app.get("/api/models/{name}/recalibration")
    async def recalibration(name: str, rate: float = 0.01) -> dict[str, Any]:
        """A threshold from the stored parts that are good; nothing is changed."""
        served = inspection.model(name)
        try:
            return await _read(inspection, queries.proposed_threshold, served.detector, rate)
        except queries.TooFew as error:
            raise Refused(409, str(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error

    @app.get("/api/models/{name}/good-parts.zip")
    async def export(name: str) -> Response:
        """The pictures that were reviewed as good, as they came: for training or calibration."""
        served = inspection.model(name)
        rows = await _read(inspection, queries.reviewed_good, served.name)
        paths = [inspection.store.picture_path(*row) for row in rows]
        attachment = f'attachment; filename="{served.name}-good-parts.zip"'
        return StreamingResponse(
            _archive(paths),
            media_type="application/zip",
            headers={"Content-Disposition": attachment, "Cache-Control": "no-store"},
        )


class _Pieces(io.RawIOBase):
    """A file that is only written to, and gives what was written piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


def _archive(paths: list[Path]) -> Iterator[bytes]:
    """A zip of files, one file in memory at a time; what was deleted meanwhile is left out."""
    pieces = _Pieces()
    with zipfile.ZipFile(pieces, "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            archive.writestr(path.name, data)
            yield pieces.take()
    yield pieces.take()
