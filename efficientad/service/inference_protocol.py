"""The Open Inference Protocol, version 2, over HTTP: JSON and binary tensors.

Inputs, one of them: `image`, UINT8 (N, H, W, 3) or (H, W, 3), RGB; or `encoded`, BYTES (N,), of
picture files. Outputs: `score` FP32 (N,), `is_anomalous` BOOL (N,), `anomaly_map` FP32 (N, h, w) at
the network's input size, `id` INT64 (N,) of the stored verdicts.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from efficientad import __version__
from efficientad.service.bodies import LONGEST_NAME, body_of_json, clean_name, read_body
from efficientad.service.core import Inspected, Inspection, Served
from efficientad.service.decoder import Picture, check_pixels, decode, from_pixels
from efficientad.service.limits import Limits, Refused, Share, busy

HEADER = "Inference-Header-Content-Length"
MOST_PICTURES = 64  # in one request
OUTPUTS = {"score": "FP32", "is_anomalous": "BOOL", "anomaly_map": "FP32", "id": "INT64"}
_DTYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?"), "INT64": np.dtype("<i8")}
Maker = Callable[[], Picture]


def add_inference_protocol(app: FastAPI, inspection: Inspection) -> None:
    """Add the protocol's routes."""

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server answers."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """Whether pictures are taken; not any more while the service stops."""
        return JSONResponse({"ready": inspection.ready}, 200 if inspection.ready else 503)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        """Name and version of the server."""
        return {
            "name": "efficientad", "version": __version__, "extensions": ["binary_tensor_data"]
        }  # fmt: skip

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model(name: str, version: str = "1") -> dict[str, Any]:
        """Inputs and outputs of a model."""
        served = _version(inspection.model(name), version)
        shapes = {"anomaly_map": [-1, *served.predictor.image_size]}
        return {
            "name": served.name,
            "versions": ["1"],
            "platform": "efficientad",
            "inputs": [
                {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
                {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
            ],
            "outputs": [
                {"name": output, "datatype": datatype, "shape": shapes.get(output, [-1])}
                for output, datatype in OUTPUTS.items()
            ],
        }

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = "1") -> JSONResponse:
        """Whether pictures are taken for a model."""
        _version(inspection.model(name), version)
        return JSONResponse({"ready": inspection.ready}, 200 if inspection.ready else 503)

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = "1") -> Response:
        """Judge the pictures of one input tensor."""
        served = _version(inspection.model(name), version)
        if not inspection.ready:
            raise busy("the service is stopping")
        with inspection.memory.share() as share:
            body = await read_body(request, inspection.limits, share)
            length = request.headers.get(HEADER)
            share.take(2 * len(body))  # numbers out of JSON
            asked, makers = await inspection.decoder.run(
                lambda: _read(body, length, served, inspection.limits, share)
            )
            label = clean_name(asked.get("id"))
            found = await _all(
                [inspection.inspect(served, maker, share, label) for maker in makers]
            )
            return await inspection.decoder.run(lambda: _answer(served, asked, found))


async def _all(works: list[Coroutine[Any, Any, Inspected]]) -> list[Inspected]:
    """All of them; the first error once every one has ended."""
    found = []
    for one in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found


def _version(served: Served, version: str) -> Served:
    if version != "1":
        raise Refused(404, f"model {served.name} has version 1 only, not {version[:40]!r}")
    return served


# ---- request -------------------------------------------------------------------------------------


def _read(
    body: bytes, length: str | None, served: Served, limits: Limits, share: Share
) -> tuple[dict[str, Any], list[Maker]]:
    """The request's JSON, and what makes its pictures."""
    size = len(body)
    if length is not None:
        if not length.isdecimal() or int(length[:20]) > len(body):
            raise Refused(400, f"{HEADER} is {length[:40]!r}; the body has {len(body)} bytes")
        size = int(length)
    asked, rest = body_of_json(body[:size]), memoryview(body)[size:]
    label = asked.get("id", "")
    if not isinstance(label, str) or len(label) > LONGEST_NAME:
        raise Refused(400, f"id must be a text of at most {LONGEST_NAME} characters")
    _wanted(asked, served)
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, "inputs must be a list of one tensor: image or encoded")
    tensor = inputs[0]
    shape, datatype, name = (tensor.get(key) for key in ("shape", "datatype", "name"))
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise Refused(400, f"the shape of an input is {str(shape)[:80]}; it must be positive sizes")
    if (name, datatype) == ("image", "UINT8"):
        return asked, _pixels(tensor, shape, rest, limits, share)
    if (name, datatype) == ("encoded", "BYTES"):
        return asked, _files(tensor, shape, rest, served, limits, share)
    raise Refused(
        400,
        f"the input is {str(name)[:40]!r} of {str(datatype)[:20]!r}; it must be image of UINT8 or "
        "encoded of BYTES",
    )


def _binary(tensor: dict[str, Any], rest: memoryview) -> memoryview | None:
    """The tensor's bytes behind the JSON; None where its data are in the JSON."""
    parameters = tensor.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        if len(rest):
            raise Refused(400, f"{len(rest)} bytes follow the JSON, and no input claims them")
        return None
    if "data" in tensor:
        raise Refused(400, "the input has both data and binary_data_size; give one of them")
    if type(size) is not int or size != len(rest):
        raise Refused(
            400, f"binary_data_size is {str(size)[:40]}, and {len(rest)} bytes follow the JSON"
        )
    return rest


def _pixels(
    tensor: dict[str, Any], shape: list[int], rest: memoryview, limits: Limits, share: Share
) -> list[Maker]:
    if len(shape) == 3:
        shape = [1, *shape]
    if len(shape) != 4 or shape[3] != 3:
        raise Refused(400, f"image has shape {shape}; it must be (N, H, W, 3) or (H, W, 3)")
    if shape[0] > MOST_PICTURES:
        raise Refused(400, f"image holds {shape[0]} pictures; at most {MOST_PICTURES} are taken")
    check_pixels(shape[1], shape[2], limits)
    count, data = math.prod(shape), _binary(tensor, rest)
    if data is not None:
        values = np.frombuffer(data, np.uint8)
    else:
        values = _numbers(tensor.get("data"))
    if values.size != count:
        raise Refused(400, f"image has shape {shape}, {count} numbers, but {values.size} came")
    return [partial(from_pixels, one, limits, share) for one in values.reshape(shape)]


def _numbers(data: Any) -> np.ndarray:
    """Whole numbers in 0..255 out of JSON lists, flat or nested."""
    try:
        values = np.array(data)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Refused(400, "data of image must be numbers in lists of equal length") from error
    if values.dtype.kind not in "iu" or (
        values.size and not 0 <= values.min() <= values.max() < 256
    ):
        raise Refused(400, "data of image must be whole numbers in 0..255")
    return values.astype(np.uint8).ravel()


def _files(
    tensor: dict[str, Any],
    shape: list[int],
    rest: memoryview,
    served: Served,
    limits: Limits,
    share: Share,
) -> list[Maker]:
    data = _binary(tensor, rest)
    if data is None:
        raise Refused(400, "encoded goes as binary data: JSON holds no bytes")
    if len(shape) != 1 or shape[0] > MOST_PICTURES:
        raise Refused(400, f"encoded has shape {shape}; it must be (N,), N up to {MOST_PICTURES}")
    files: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data) or len(files) == shape[0]:
            raise Refused(400, f"encoded has shape {shape}, and its bytes do not hold that")
        files.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    if len(files) != shape[0] or not all(files):
        raise Refused(400, f"encoded has shape {shape}, and its bytes do not hold that")
    value_range = served.predictor.value_range
    return [partial(decode, one, value_range, limits, share) for one in files]


# ---- answer --------------------------------------------------------------------------------------


def _wanted(asked: dict[str, Any], served: Served) -> list[tuple[str, bool]]:
    """(output, whether as binary data) that a request asks for.

    Without a list of outputs it is all but the map, and no verdict where there is no threshold.
    """
    judged = served.predictor.threshold is not None
    parameters = asked.get("parameters", {})
    every = parameters.get("binary_data_output") if isinstance(parameters, dict) else None
    outputs = asked.get("outputs")
    if outputs is None or outputs == []:
        left_out = ["anomaly_map", *([] if judged else ["is_anomalous"])]
        return [(name, every is True) for name in OUTPUTS if name not in left_out]
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise Refused(400, "outputs must be a list of objects with a name")
    wanted = []
    for one in outputs:
        name, own = one.get("name"), one.get("parameters", {})
        if not isinstance(name, str) or name not in OUTPUTS:
            raise Refused(
                400, f"there is no output {str(name)[:40]!r}; there is {', '.join(OUTPUTS)}"
            )
        if name == "is_anomalous" and not judged:
            raise Refused(400, f"model {served.name} has no threshold to judge by; ask for score")
        binary = own.get("binary_data", every) if isinstance(own, dict) else every
        wanted.append((name, binary is True))
    return wanted


def _answer(served: Served, asked: dict[str, Any], found: list[Inspected]) -> Response:
    values = {
        "score": [one.found.score for one in found],
        "is_anomalous": [bool(one.answer["is_anomalous"]) for one in found],
        "id": [one.answer["id"] for one in found],
    }
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, binary in _wanted(asked, served):
        given: Any = (
            np.stack([one.found.anomaly_map for one in found])
            if name == "anomaly_map"
            else values[name]
        )
        tensor = np.asarray(given, _DTYPES[OUTPUTS[name]])
        output: dict[str, Any] = {
            "name": name,
            "datatype": OUTPUTS[name],
            "shape": list(tensor.shape),
        }
        if binary:
            blobs.append(tensor.tobytes())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            flat = tensor.ravel().tolist()
            if tensor.dtype.kind == "f":
                flat = [value if math.isfinite(value) else None for value in flat]
            output["data"] = flat
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": served.name, "model_version": "1", "outputs": outputs}
    if "id" in asked:
        answer["id"] = asked["id"]
    if not blobs:
        return JSONResponse(answer)
    head = json.dumps(answer).encode()
    return Response(
        b"".join([head, *blobs]),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )
