"""The Open Inference Protocol: with Triton's own client, and byte by byte."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from helpers_images import encoded
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import THRESHOLD, StubPredictor, part, service

HEADER = "Inference-Header-Content-Length"
PARTS = np.stack([part(), part(0.8), part(0.3)])
SCORES = [0.0, 204 / 255, 76 / 255]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    unjudged = StubPredictor()
    unjudged.threshold = None
    predictors = {"stub": StubPredictor(), "unjudged": unjudged}
    with service(tmp_path_factory.mktemp("store"), predictors) as found:
        yield found


@pytest.fixture(scope="module")
def triton():
    """tritonclient's HTTP module."""
    return pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


@pytest.fixture
def client(triton, running):
    with triton.InferenceServerClient(f"{running.host}:{running.port}") as found:
        yield found


def rows(running) -> int:
    with running.inspection.store.reading() as db:
        return db.execute("SELECT count(*) FROM verdicts").fetchone()[0]


def test_tritons_client_reads_health_and_models(client, triton):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("stub")
    assert client.is_model_ready("stub", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("stub")
    assert [one["name"] for one in metadata["inputs"]] == ["image", "encoded"]
    assert metadata["outputs"][2] == {
        "name": "anomaly_map",
        "datatype": "FP32",
        "shape": [-1, 32, 32],
    }


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_tritons_client_sends_pixels(client, triton, running, binary):
    before = rows(running)
    image = triton.InferInput("image", list(PARTS.shape), "UINT8")
    image.set_data_from_numpy(PARTS, binary_data=binary)
    names = ("score", "is_anomalous", "anomaly_map", "id")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = client.infer("stub", [image], outputs=outputs, request_id="shift 3")
    assert result.get_response()["id"] == "shift 3"
    assert result.as_numpy("score").tolist() == pytest.approx(SCORES)
    assert result.as_numpy("is_anomalous").tolist() == [score > THRESHOLD for score in SCORES]
    maps = result.as_numpy("anomaly_map")
    assert (maps.shape, maps.dtype) == ((3, 32, 32), np.float32)
    assert maps.reshape(3, -1).max(1).tolist() == pytest.approx(SCORES)
    assert rows(running) == before + 3
    store = running.inspection.store
    for number, pixels in zip(result.as_numpy("id").tolist(), PARTS, strict=True):
        with Image.open(store.picture_path(number, "png")) as kept:
            assert np.array_equal(np.asarray(kept), pixels)


def test_tritons_client_sends_files(client, triton, running):
    files = np.array([encoded(Image.fromarray(p), "PNG") for p in PARTS], object)
    tensor = triton.InferInput("encoded", [3], "BYTES")
    tensor.set_data_from_numpy(files)
    result = client.infer("stub", [tensor])
    assert result.as_numpy("score").tolist() == pytest.approx(SCORES)
    assert result.as_numpy("anomaly_map") is None  # large: only if it is asked for
    for number, data in zip(result.as_numpy("id").tolist(), files, strict=True):
        assert running.inspection.store.picture_path(number, "png").read_bytes() == data


def test_tritons_client_shows_errors(client, triton):
    image = triton.InferInput("image", [1, 4, 4, 1], "UINT8")
    image.set_data_from_numpy(np.zeros((1, 4, 4, 1), np.uint8))
    with pytest.raises(Exception, match=r"must be \(N, H, W, 3\)"):
        client.infer("stub", [image])
    with pytest.raises(Exception, match="there is no model 'other'"):
        client.infer("other", [image])


def test_a_model_without_a_threshold_gives_no_verdict_and_says_so(running):
    image = {"name": "image", "shape": [2, 2, 3], "datatype": "UINT8", "data": [9] * 12}
    status, answer = running.json("POST", "/v2/models/unjudged/infer", {"inputs": [image]})
    assert status == 200
    assert [one["name"] for one in answer["outputs"]] == ["score", "id"]
    asked = {"inputs": [image], "outputs": [{"name": "is_anomalous"}]}
    status, answer = running.json("POST", "/v2/models/unjudged/infer", asked)
    assert (status, "no threshold to judge by" in answer["error"]) == (400, True)


def test_one_output_in_json_and_one_in_binary(running):
    image = {"name": "image", "shape": [1, 64, 96, 3], "datatype": "UINT8"}
    image["parameters"] = {"binary_data_size": PARTS[1].size}
    binary = {"name": "is_anomalous", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [image], "outputs": [{"name": "score"}, binary]}).encode()
    status, headers, body = running.call(
        "POST", "/v2/models/stub/infer", head + PARTS[1].tobytes(), {HEADER: str(len(head))}
    )
    assert status == 200
    size = int(headers[HEADER.lower()])
    score, verdict = json.loads(body[:size])["outputs"]
    assert score["data"] == pytest.approx([204 / 255])
    assert verdict == {
        "name": "is_anomalous",
        "datatype": "BOOL",
        "shape": [1],
        "parameters": {"binary_data_size": 1},
    }
    assert body[size:] == b"\1"


IMAGE = {"name": "image", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [0] * 12}
BAD = {
    "no JSON": (b"\x89PNG", "the body is not JSON"),
    "a list": ([1], "not an object"),
    "deep": (b'{"inputs": ' + b"[" * 100_000, "the body is not JSON"),
    "no inputs": ({}, "inputs must be a list of one tensor"),
    "two inputs": ({"inputs": [IMAGE, IMAGE]}, "inputs must be a list of one tensor"),
    "a number": ({"inputs": [3]}, "inputs must be a list of one tensor"),
    "another name": ({"inputs": [IMAGE | {"name": "x"}]}, "it must be image of UINT8"),
    "another type": ({"inputs": [IMAGE | {"datatype": "FP32"}]}, "it must be image of UINT8"),
    "no shape": ({"inputs": [{**IMAGE, "shape": None}]}, "it must be positive sizes"),
    "a negative size": ({"inputs": [IMAGE | {"shape": [1, -2, 2, 3]}]}, "positive sizes"),
    "a true size": ({"inputs": [IMAGE | {"shape": [True, 2, 2, 3]}]}, "positive sizes"),
    "four channels": ({"inputs": [IMAGE | {"shape": [1, 2, 2, 4]}]}, r"it must be (N, H, W, 3)"),
    "too few numbers": ({"inputs": [IMAGE | {"data": [0] * 11}]}, "12 numbers, but 11 came"),
    "fractions": ({"inputs": [IMAGE | {"data": [0.5] * 12}]}, "whole numbers in 0..255"),
    "256": ({"inputs": [IMAGE | {"data": [256] * 12}]}, "whole numbers in 0..255"),
    "huge": ({"inputs": [IMAGE | {"data": [10**400] * 12}]}, "data of image must be"),
    "words": ({"inputs": [IMAGE | {"data": ["a"] * 12}]}, "data of image must be"),
    "ragged": ({"inputs": [IMAGE | {"data": [[0], [0, 1]]}]}, "data of image must be"),
    "a picture too large": (
        {"inputs": [IMAGE | {"shape": [1, 2**14, 2**14, 3]}]},
        "megapixels; at most 64",
    ),
    "a side too long": (
        {"inputs": [IMAGE | {"shape": [1, 2**30, 2**30, 3]}]},
        "a side may have at most 32768",
    ),
    "too many": ({"inputs": [IMAGE | {"shape": [65, 2, 2, 3]}]}, "at most 64 are taken"),
    "files in JSON": (
        {"inputs": [{"name": "encoded", "shape": [1], "datatype": "BYTES", "data": ["x"]}]},
        "JSON holds no bytes",
    ),
    "an unknown output": (
        {"inputs": [IMAGE], "outputs": [{"name": "y"}]},
        "there is no output 'y'",
    ),
    "outputs of words": ({"inputs": [IMAGE], "outputs": ["score"]}, "outputs must be a list"),
    "an id of another type": ({"inputs": [IMAGE], "id": {"a": 1}}, "id must be a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(running, case):
    value, sentence = BAD[case]
    before = rows(running)
    status, answer = running.json("POST", "/v2/models/stub/infer", value)
    assert (status in (400, 413), sentence in answer["error"]) == (True, True), answer
    assert rows(running) == before


ENCODED = {"name": "encoded", "shape": [1], "datatype": "BYTES"}


@pytest.mark.parametrize(
    ("tensor", "data", "length", "sentence"),
    [
        (IMAGE, b"x", None, "1 bytes follow the JSON, and no input claims them"),
        (IMAGE | {"parameters": {"binary_data_size": 12}}, bytes(12), None, "both data and"),
        (ENCODED | {"parameters": {"binary_data_size": 9}}, bytes(8), None, "8 bytes follow"),
        (ENCODED, struct.pack("<I", 100) + b"x", None, "do not hold that"),
        (ENCODED, struct.pack("<I", 0), None, "do not hold that"),
        (ENCODED, b"\1\0", None, "do not hold that"),
        (ENCODED, b"", None, "do not hold that"),
        (ENCODED | {"shape": [2]}, struct.pack("<I", 1) + b"x", None, "do not hold that"),
        (ENCODED, (struct.pack("<I", 1) + b"x") * 2, None, "do not hold that"),
        (ENCODED | {"shape": [10**9]}, b"", None, "N up to 64"),
        (ENCODED, b"", "-1", "the body has"),
        (ENCODED, b"", "9" * 50, "the body has"),
        (ENCODED, b"", "abc", "the body has"),
    ],
)
def test_binary_data_that_do_not_fit_are_named(running, tensor, data, length, sentence):
    if tensor is not IMAGE and "parameters" not in tensor:
        tensor = tensor | {"parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {HEADER: length or str(len(head))}
    status, _, body = running.call("POST", "/v2/models/stub/infer", head + data, headers)
    assert (status, sentence in json.loads(body)["error"]) == (400, True), body


def test_another_version_does_not_exist(running):
    for method, path in (("GET", ""), ("GET", "/ready"), ("POST", "/infer")):
        address = f"/v2/models/stub/versions/2{path}"
        assert running.json(method, address, {"inputs": [IMAGE]})[0] == 404
        assert running.json(method, address.replace("/2", "/1"), {"inputs": [IMAGE]})[0] == 200
