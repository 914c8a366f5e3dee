"""The HTTP application: pictures to verdicts, figures, errors, and what the other files add."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from efficientad import __version__
from efficientad.data.images import resize_image
from efficientad.results.overlay import overlay
from efficientad.results.prediction import Prediction
from efficientad.service.bodies import read_picture
from efficientad.service.core import Inspection
from efficientad.service.guard import COOKIE, Guard
from efficientad.service.inference_protocol import add_inference_protocol
from efficientad.service.limits import Refused
from efficientad.service.metrics import CONTENT_TYPE
from efficientad.service.page import add_page
from efficientad.verdicts.database import StoreError

EXTRAS = ("map", "overlay")
OVERLAY_SIDE = 1024  # pixels at most
_log = logging.getLogger("efficientad.service")


def create_app(
    inspection: Inspection, *, key: str | None = None, hosts: tuple[str, ...] = ()
) -> Guard:
    """The application of a service, behind its guard; see `guard.Guard` for key and hosts."""
    app = FastAPI(
        title="efficientad",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    guard = Guard(app, key, hosts)
    _add_errors(app, inspection)
    _add_predict(app, inspection)
    _add_session(app, guard, key is not None)
    add_inference_protocol(app, inspection)
    add_page(app, inspection)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(inspection.metrics.text(), media_type=CONTENT_TYPE)

    return guard


def _add_predict(app: FastAPI, inspection: Inspection) -> None:
    async def answer(request: Request, model: str | None) -> JSONResponse:
        wanted = _extras(request.query_params.get("include", ""))
        served = inspection.model(model)
        if not inspection.ready:  # before the body is read
            raise Refused(503, "the service is stopping", {"Retry-After": "1"})
        with inspection.memory.share() as share:
            data, name = await read_picture(request, inspection.limits, share)
            inspected = await inspection.inspect(served, data, share, name)
            more: dict[str, str] = {}
            if wanted:
                share.take(4 * inspected.found.image.size)
                more = await inspection.decoder.run(lambda: _drawn(inspected.found, wanted))
            return JSONResponse({**inspected.answer, **more})

    @app.post("/predict/{model}")
    async def predict(request: Request, model: str) -> JSONResponse:
        """The verdict of a picture: the body is the file, or a form with one file.

        Query: `name` of the picture; `include=map,overlay` adds "map" (a .tiff of float32 at the
        network's input size) and "overlay" (a .png), both in base64.
        """
        return await answer(request, model)

    @app.post("/predict")
    async def predict_by_the_only_model(request: Request) -> JSONResponse:
        """As `/predict/MODEL`, where one model is served."""
        return await answer(request, None)


def _extras(text: str) -> list[str]:
    wanted = [word for word in text.split(",") if word]
    unknown = [word for word in wanted if word not in EXTRAS]
    if unknown:
        raise Refused(400, f"include names {unknown[0][:40]!r}; it takes {' and '.join(EXTRAS)}")
    return wanted


def _drawn(found: Prediction, wanted: list[str]) -> dict[str, str]:
    """Map and overlay as files in base64."""
    files: dict[str, bytes] = {}
    values = np.asarray(found.anomaly_map, np.float32)
    if "map" in wanted:
        import tifffile

        stream = io.BytesIO()
        tifffile.imwrite(stream, values)
        files["map"] = stream.getvalue()
    if "overlay" in wanted:
        from PIL import Image

        height, width = found.image.shape[:2]
        ratio = min(1.0, OVERLAY_SIDE / max(height, width))
        size = max(1, round(height * ratio)), max(1, round(width * ratio))
        small = resize_image(np.ascontiguousarray(found.image), size)
        stream = io.BytesIO()
        Image.fromarray(overlay(small, values, found.threshold)).save(stream, "PNG")
        files["overlay"] = stream.getvalue()
    return {name: base64.b64encode(data).decode() for name, data in files.items()}


def _add_session(app: FastAPI, guard: Guard, locked: bool) -> None:
    @app.get("/api/session")
    async def state(request: Request) -> dict[str, bool]:
        """Whether a key is needed. Always open."""
        return {"locked": locked}

    @app.post("/api/session")
    async def open_session(request: Request) -> Response:
        """A cookie for the page, for the key in the X-API-Key header."""
        if not locked:
            return JSONResponse({"locked": False})
        if not guard.is_key(request.headers.get("x-api-key", "")):
            raise Refused(401, "the API key is wrong")
        response = JSONResponse({"locked": False})
        response.set_cookie(COOKIE, guard.cookie, httponly=True, samesite="strict", path="/")
        return response


def _add_errors(app: FastAPI, inspection: Inspection) -> None:
    def answer(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
        inspection.metrics.refused.labels(str(status)).inc()
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(error.status, error.message, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return answer(error.status_code, f"{error.detail}: {request.url.path[:200]}", headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_argument(request: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return answer(400, f"{place}: {first['msg']}")

    @app.exception_handler(StoreError)
    async def not_stored(request: Request, error: StoreError) -> JSONResponse:
        _log.error("%s", error)
        what = "the verdict cannot be stored, so it is not given"
        if request.method == "GET":
            what = "the stored verdicts cannot be read just now"
        return answer(503, what, {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"this failed in the service: {type(error).__name__}; see its log")
