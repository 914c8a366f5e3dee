"""The service over HTTP: pictures in, stored verdicts out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
import tifffile
from helpers_images import encoded, tiff
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import POISON, THRESHOLD, Running, StubPredictor, part, service

from efficientad.service.limits import Limits
from efficientad.service.server import bound_socket
from efficientad.verdicts.database import StoreError

KEY = "a key of the tests, long enough"


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def form(*files: tuple[str, bytes], field: str = "file") -> tuple[bytes, dict[str, str]]:
    """A multipart form: body and headers."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
        % (field.encode(), name.encode(), data)
        for name, data in files
    ]
    body = b"".join(parts) + b"--limit--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=limit"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with service(tmp_path_factory.mktemp("store")) as found:
        yield found


def stored(running: Running, number: int):
    with running.inspection.store.reading() as db:
        return db.execute("SELECT * FROM verdicts WHERE id = ?", (number,)).fetchone()


@pytest.mark.parametrize(("defect", "anomalous"), [(0.0, False), (0.8, True)])
def test_a_posted_picture_is_judged_stored_and_answered(running, defect, anomalous):
    picture = png(part(defect))
    status, answer = running.json("POST", "/predict/stub?name=part%207.png", picture)
    assert status == 200
    assert answer["score"] == pytest.approx(defect, abs=1 / 255)
    assert (answer["is_anomalous"], answer["threshold"]) == (anomalous, THRESHOLD)
    assert (answer["model"], answer["name"]) == ("stub", "part 7.png")
    assert answer["source_size"] == [64, 96]
    boxes = [{"box": [24, 16, 48, 32], "area": 384, "score": answer["score"]}]
    assert answer["boxes"] == (boxes if anomalous else [])
    row = stored(running, answer["id"])
    assert (row["score"], row["is_anomalous"]) == (answer["score"], anomalous)
    assert json.loads(row["boxes"]) == answer["boxes"]
    path = running.inspection.store.picture_path(answer["id"], row["suffix"])
    assert path.name == f"{answer['id']}.png"
    assert path.read_bytes() == picture


@pytest.mark.parametrize(
    ("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tiff"), ("BMP", "bmp")]
)
def test_kinds_of_pictures_are_told_by_content(running, kind, suffix):
    image = Image.fromarray(part(0.8))
    data = encoded(image, kind)
    status, answer = running.json("POST", "/predict", data, **{"Content-Type": "text/plain"})
    assert (status, answer["is_anomalous"]) == (200, True)
    assert stored(running, answer["id"])["suffix"] == suffix


def test_a_form_with_one_file_is_the_same_as_its_bytes(running):
    picture = png(part(0.7))
    body, headers = form(("ein Teil.png", picture))
    status, _, answer = running.call("POST", "/predict/stub", body, headers)
    assert status == 200
    assert json.loads(answer)["name"] == "ein Teil.png"
    assert json.loads(answer)["score"] == running.json("POST", "/predict", picture)[1]["score"]


def test_map_and_overlay_come_if_they_are_asked_for(running):
    picture = png(part(0.8))
    _, answer = running.json("POST", "/predict?include=map,overlay", picture)
    values = tifffile.imread(io.BytesIO(base64.b64decode(answer["map"])))
    assert (values.shape, values.dtype) == ((32, 32), np.float32)
    assert values.max() == np.float32(answer["score"])
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["overlay"]))))
    assert drawn.shape == (64, 96, 3)
    assert np.array_equal(drawn[:10], part()[:10])
    assert not np.array_equal(drawn[20:30, 28:44], part(0.8)[20:30, 28:44])
    assert set(running.json("POST", "/predict", picture)[1]) & {"map", "overlay"} == set()


def test_one_of_several_models_is_named(tmp_path):
    other = StubPredictor()
    other.threshold = None
    with service(tmp_path, {"one": StubPredictor(), "two": other}) as running:
        picture = png(part(0.8))
        assert running.json("POST", "/predict/one", picture)[1]["is_anomalous"] is True
        answer = running.json("POST", "/predict/two", picture)[1]
        assert (answer["model"], answer["is_anomalous"], answer["boxes"]) == ("two", None, [])
        status, answer = running.json("POST", "/predict", picture)
        assert (status, answer["error"]) == (
            400,
            "several models are served; name one of one, two",
        )
        status, answer = running.json("POST", "/predict/three", picture)
        assert (status, answer["error"]) == (404, "there is no model 'three'; there is one, two")


def test_a_sixteen_bit_tiff_is_read_as_predict_reads_it(tmp_path):
    predictor = StubPredictor()
    predictor.value_range = (0.0, 4095.0)
    deep = np.zeros((40, 40, 3), np.uint16)
    deep[:20, :20, 0] = 4095
    with service(tmp_path, {"camera": predictor}) as running:
        assert running.json("POST", "/predict", tiff(deep))[1]["score"] == 1.0


def test_pictures_sent_at_once_share_batches(tmp_path):
    predictor = StubPredictor((1, 4))
    predictor.go.clear()
    answers = []
    with service(tmp_path, {"stub": predictor}) as running:

        def send(i: int) -> None:
            answers.append((i, running.json("POST", "/predict", png(part(i / 10)))[1]["score"]))

        threads = [threading.Thread(target=send, args=(i,)) for i in range(9)]
        threads[0].start()
        assert predictor.entered.acquire(timeout=20)
        for thread in threads[1:]:
            thread.start()
        queue = running.inspection.models["stub"].batcher
        deadline = time.monotonic() + 20
        while len(queue) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        predictor.go.set()
        for thread in threads:
            thread.join(20)
    assert predictor.batches == [1, 4, 4]
    assert sorted(answers) == [(i, pytest.approx(i / 10, abs=1 / 255)) for i in range(9)]


def test_a_picture_that_cannot_be_computed_fails_alone(running):
    bad = part()
    bad[0, 0] = POISON
    status, answer = running.json("POST", "/predict", png(bad))
    assert status == 500
    assert answer["error"] == "this failed in the service: RuntimeError; see its log"
    assert running.json("POST", "/predict", png(part()))[0] == 200


def test_a_full_queue_is_a_503_with_a_time_and_nothing_of_it_is_stored(tmp_path):
    predictor = StubPredictor((1,))
    predictor.go.clear()
    with service(tmp_path, {"stub": predictor}, limits=Limits(queue=1)) as running:
        statuses = []

        def send() -> None:
            statuses.append(running.call("POST", "/predict", png(part()))[0])

        threads = [threading.Thread(target=send) for _ in range(2)]
        threads[0].start()
        assert predictor.entered.acquire(timeout=20)
        threads[1].start()
        queue = running.inspection.models["stub"].batcher
        deadline = time.monotonic() + 20
        while not len(queue) and time.monotonic() < deadline:
            time.sleep(0.01)
        status, headers, body = running.call("POST", "/predict", png(part()))
        assert (status, int(headers["retry-after"]) >= 1) == (503, True)
        assert json.loads(body)["error"] == "1 pictures are waiting already"
        predictor.go.set()
        for thread in threads:
            thread.join(20)
        assert statuses == [200, 200]
        with running.inspection.store.reading() as db:
            assert db.execute("SELECT count(*) FROM verdicts").fetchone()[0] == 2


def test_memory_is_limited_over_all_requests_and_given_back(tmp_path):
    predictor = StubPredictor((1,))
    predictor.go.clear()
    with service(tmp_path, {"stub": predictor}, limits=Limits(memory_gb=30_000 / 1e9)) as running:
        first = threading.Thread(target=running.call, args=("POST", "/predict", png(part())))
        first.start()
        assert predictor.entered.acquire(timeout=20)
        assert running.inspection.memory.held >= 3 * 64 * 96
        status, headers, body = running.call("POST", "/predict", png(part()))
        assert (status, "retry-after" in headers) == (503, True)
        assert b"other requests hold" in body
        predictor.go.set()
        first.join(20)
        assert running.call("POST", "/predict", png(part()))[0] == 200
        deadline = time.monotonic() + 5
        while running.inspection.memory.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.inspection.memory.held == 0


def test_a_picture_alone_may_need_more_than_all_the_memory(tmp_path):
    with service(tmp_path, limits=Limits(memory_gb=1000 / 1e9)) as running:
        assert running.call("POST", "/predict", png(part()))[0] == 200


def test_a_verdict_that_cannot_be_stored_is_not_answered(running, monkeypatch):
    def fail(record, also):
        raise StoreError("no space left on the device")

    monkeypatch.setattr(running.inspection.store, "add", fail)
    status, headers, body = running.call("POST", "/predict", png(part()))
    assert (status, headers["retry-after"]) == (503, "5")
    assert "score" not in json.loads(body)


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head():
    async def accepted_without_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        sock = bound_socket("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            writer.close()
            return await asyncio.wait_for(found, 10)

    assert asyncio.run(accepted_without_delay())


def test_a_slow_sender_delays_nobody(running):
    picture = png(part())
    slow = socket.create_connection((running.host, running.port))
    slow.sendall(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n\x89PNG"
    )
    for _ in range(3):
        assert running.call("POST", "/predict", picture, timeout=10)[0] == 200
    slow.close()


def test_stopping_answers_what_is_at_work_and_refuses_the_rest(tmp_path):
    predictor = StubPredictor((1,))
    predictor.go.clear()
    statuses = []
    with service(tmp_path, {"stub": predictor}) as running:

        def send() -> None:
            statuses.append(running.call("POST", "/predict", png(part()))[0])

        waiting = [threading.Thread(target=send) for _ in range(3)]
        for thread in waiting:
            thread.start()
        assert predictor.entered.acquire(timeout=20)
        queue = running.inspection.models["stub"].batcher
        deadline = time.monotonic() + 20
        while len(queue) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.call("GET", "/v2/health/ready")[0] == 200
        running.inspection.draining = True
        assert running.call("GET", "/v2/health/ready")[0] == 503
        status, headers, _ = running.call("POST", "/predict", png(part()))
        assert (status, "retry-after" in headers) == (503, True)
        threading.Timer(0.2, predictor.go.set).start()
    for thread in waiting:
        thread.join(20)
    assert statuses == [200, 200, 200]


def test_figures_for_prometheus(running):
    before = running.json("POST", "/predict", png(part(0.9)))[1]
    assert before["is_anomalous"]
    running.call("POST", "/predict", b"no picture")
    status, headers, body = running.call("GET", "/metrics")
    text = body.decode()
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert 'efficientad_verdicts_total{model="stub",verdict="anomalous"}' in text
    assert 'efficientad_refused_total{status="422"}' in text
    assert 'efficientad_request_seconds_bucket{le="0.001",model="stub",part="queue"}' in text
    assert 'efficientad_waiting{model="stub"} 0.0' in text


# ---- who may ask -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with service(tmp_path_factory.mktemp("locked"), key=KEY) as found:
        yield found


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"X-API-Key": KEY}],
    ids=["bearer", "lower case", "own header"],
)
def test_the_key_opens(locked, headers):
    assert locked.call("POST", "/predict", png(part()), headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": KEY + "x"},
        {"X-API-Key": "sch\xf6n"},
        {"Cookie": "efficientad_key=wrong"},
        {"Cookie": f"efficientad_key={KEY}"},
        {"Cookie": "\xff[]=;;;"},
    ],
)
def test_nothing_else_opens(locked, headers):
    for method, path in (("POST", "/predict"), ("GET", "/metrics"), ("GET", "/v2/models/stub")):
        status, found, body = locked.call(method, path, png(part()), headers)
        assert (status, found["www-authenticate"]) == (401, "Bearer")
        assert "API key is missing or wrong" in json.loads(body)["error"]


def test_health_is_open_without_the_key(locked):
    assert locked.call("GET", "/v2/health/live")[0] == 200
    assert locked.call("GET", "/v2/health/ready")[0] == 200


def test_a_page_gets_a_cookie_for_the_key_and_never_the_key(locked):
    assert locked.json("GET", "/api/session") == (200, {"locked": True})
    assert locked.json("POST", "/api/session", **{"X-API-Key": "wrong"})[0] == 401
    status, headers, _ = locked.call("POST", "/api/session", headers={"X-API-Key": KEY})
    cookie = headers["set-cookie"]
    assert status == 200
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert KEY not in cookie
    assert locked.call("GET", "/metrics", headers={"Cookie": cookie.split(";")[0]})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_without_a_key_only_this_machine_is_asked_by_its_name(running, host):
    status, _, body = running.call("GET", "/metrics", headers={"Host": host})
    assert (status, b"not this service" in body) == (403, True)
    for own in ("localhost", "localhost:99", "127.0.0.1", "[::1]:8000"):
        assert running.call("GET", "/metrics", headers={"Host": own})[0] == 200


def test_a_page_of_another_site_changes_nothing(running, locked):
    for one, key in ((running, {}), (locked, {"X-API-Key": KEY})):
        for origin in ("https://evil.example", "null", "http://localhost:1"):
            status, _, body = one.call("POST", "/predict", png(part()), {"Origin": origin, **key})
            assert (status, b"another site" in body) == (403, True)
        own = {"Origin": f"http://{one.host}:{one.port}", **key}
        assert one.call("POST", "/predict", png(part()), own)[0] == 200


def test_every_answer_forbids_what_the_page_does_not_need(running):
    for path in ("/v2/health/live", "/nothing", "/metrics"):
        headers = running.call("GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
