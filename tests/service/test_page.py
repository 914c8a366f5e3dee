"""What the page asks for, without a browser."""

from __future__ import annotations

import http.client
import io
import json
import re
import zipfile
from importlib import resources

import numpy as np
import pytest
from helpers_images import encoded, tiff
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import StubPredictor, part, service

from efficientad.model.trust import Calibration

GOOD, BAD = (encoded(Image.fromarray(part(defect))) for defect in (0.2, 0.8))


@pytest.fixture
def running(tmp_path):
    with service(tmp_path) as found:
        yield found


def send(running, data: bytes = BAD, model: str = "stub") -> int:
    return running.json("POST", f"/predict/{model}", data)[1]["id"]


def test_the_page_and_its_files_ask_no_other_host(running):
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
        status, headers, body = running.call("GET", path)
        assert (status, kind in headers["content-type"]) == (200, True)
        text = body.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?://|url\(|@import|src=[\"']//|href=[\"']//", text)


def test_the_style_and_script_that_the_page_names_are_there():
    folder = resources.files("efficientad.service").joinpath("static")
    page = folder.joinpath("index.html").read_text()
    named = re.findall(r'(?:href|src)="([\w.]+\.\w+)"', page)
    assert sorted(named) == ["page.css", "page.js"]
    assert all(folder.joinpath(name).is_file() for name in named)


def test_a_verdict_can_be_looked_at(running):
    number = send(running)
    status, verdict = running.json("GET", f"/api/verdicts/{number}")
    assert (status, verdict["is_anomalous"], verdict["review"]) == (200, True, None)
    assert verdict["boxes"][0]["box"] == [24, 16, 48, 32]
    status, headers, body = running.call("GET", f"/api/verdicts/{number}/picture")
    assert (status, headers["content-type"], body) == (200, "image/png", BAD)
    status, headers, body = running.call("GET", f"/api/verdicts/{number}/file")
    assert headers["content-disposition"] == f'attachment; filename="{number}.png"'
    assert body == BAD
    body = running.call("GET", f"/api/verdicts/{number}/thumbnail")[2]
    small = Image.open(io.BytesIO(body))
    assert (small.format, small.size) == ("JPEG", (96, 64))
    heat = np.asarray(Image.open(io.BytesIO(running.call("GET", f"/api/verdicts/{number}/map")[2])))
    assert heat.shape == (32, 32, 4)
    assert heat[0, 0, 3] == 0  # nothing there: the picture as it is
    assert heat[12, 12, 3] > 200


def test_pictures_that_no_browser_shows_come_as_png(running):
    deep = np.zeros((40, 50, 3), np.uint16)
    deep[:20, :, 0] = 65535
    number = send(running, tiff(deep))
    status, headers, body = running.call("GET", f"/api/verdicts/{number}/picture")
    assert (status, headers["content-type"]) == (200, "image/png")
    shown = np.asarray(Image.open(io.BytesIO(body)))
    assert shown[0, 0].tolist() == [255, 0, 0]
    assert shown[30, 0].tolist() == [0, 0, 0]


def test_a_large_picture_has_a_small_thumbnail(running):
    number = send(running, encoded(Image.new("RGB", (1200, 700), (9, 99, 9)), "JPEG"))
    small = Image.open(io.BytesIO(running.call("GET", f"/api/verdicts/{number}/thumbnail")[2]))
    assert small.size == (320, 187)


@pytest.mark.parametrize("what", ["", "/picture", "/file", "/thumbnail", "/map"])
def test_what_is_not_there_is_a_404(running, what):
    for number in (99, 0, -1, 2**70):
        status, answer = running.json("GET", f"/api/verdicts/{number}{what}")
        assert (status, answer["error"]) == (404, f"there is no verdict {number}")
    assert running.json("GET", f"/api/verdicts/one{what}")[0] == 400


def test_a_picture_that_is_gone_is_a_404(running):
    number = send(running)
    running.inspection.store.picture_path(number, "png").unlink()
    for what in ("picture", "file", "thumbnail"):
        status, answer = running.json("GET", f"/api/verdicts/{number}/{what}")
        assert (status, "not kept any more" in answer["error"]) == (404, True)


def test_history_by_filters(running):
    numbers = [send(running, data) for data in (GOOD, BAD, GOOD)]

    def found(query: str) -> list[int]:
        status, answer = running.json("GET", f"/api/verdicts?{query}")
        assert status == 200, answer
        return [row["id"] for row in answer["verdicts"]]

    assert found("") == numbers[::-1]
    assert found("verdict=anomalous") == [numbers[1]]
    assert found(f"before={numbers[2]}&limit=1") == [numbers[1]]
    assert found("since=2100-01-01") == []
    assert found("until=2100-01-01T00:00:00Z&model=stub") == numbers[::-1]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("verdict=odd", "verdict is 'odd'; it must be one of anomalous, normal, none"),
        ("review=x", "review is 'x'"),
        ("limit=0", "limit is 0; it must be in 1..500"),
        ("limit=many", "query.limit"),
        ("before=-1", "before is -1"),
        ("before=99999999999999999999", "before is"),
        ("since=yesterday", "since is 'yesterday'; it must be a time as 1970-01-01T00:00:00"),
        ("until=9999-99-99", "until is"),
    ],
)
def test_wrong_filters_are_named(running, query, sentence):
    status, answer = running.json("GET", f"/api/verdicts?{query}")
    assert (status, sentence in answer["error"]) == (400, True), answer


def test_a_review_is_kept_counted_and_taken_back(running):
    number = send(running)
    address = f"/api/verdicts/{number}/review"
    for word in ("good", "unsure", "bad"):
        assert running.json("POST", address, {"review": word}) == (
            200, {"id": number, "review": word}
        )  # fmt: skip
    (model,) = running.json("GET", "/api/models")[1]["models"]
    assert (model["bad"], model["good"], model["open"], model["anomalous"]) == (1, 0, 0, 1)
    assert running.json("POST", address, {"review": None})[0] == 200
    assert running.json("GET", "/api/models")[1]["models"][0]["open"] == 1
    status, answer = running.json("POST", address, {"review": "ugly"})
    assert (status, "it must be one of good, bad, unsure" in answer["error"]) == (400, True)
    assert running.json("POST", "/api/verdicts/99/review", {"review": "good"})[0] == 404
    assert running.json("POST", address, b"no json")[0] == 400


def test_a_threshold_is_changed_used_and_kept_over_a_restart(tmp_path):
    with service(tmp_path) as running:
        assert running.json("POST", "/predict", BAD)[1]["is_anomalous"] is True
        status, model = running.json("PUT", "/api/models/stub/threshold", {"threshold": 0.9})
        assert (status, model["threshold"], model["own_threshold"]) == (200, 0.9, 0.5)
        answer = running.json("POST", "/predict", BAD)[1]
        assert (answer["is_anomalous"], answer["threshold"]) == (False, 0.9)
        for wrong in ({"threshold": "1"}, {"threshold": True}, {}, {"threshold": float("nan")}):
            assert running.json("PUT", "/api/models/stub/threshold", wrong)[0] == 400
        assert running.json("PUT", "/api/models/other/threshold", {"threshold": 1})[0] == 404
    with service(tmp_path) as running:
        assert running.json("POST", "/predict", BAD)[1]["threshold"] == 0.9
        assert running.json("PUT", "/api/models/stub/threshold", {"threshold": None})[0] == 200
        assert running.json("POST", "/predict", BAD)[1]["threshold"] == 0.5


def test_what_if_and_recalibration_answer_in_numbers(running):
    for data in (GOOD, BAD):
        send(running, data)
    path = "/api/models/stub"
    status, found = running.json("GET", f"{path}/what-if?threshold=0.1")
    assert (status, found["rejected"], found["parts"]) == (200, 2, 2)
    assert running.json("GET", f"{path}/what-if?threshold=nan")[0] == 400
    assert running.json("GET", f"{path}/what-if")[0] == 400
    assert sum(running.json("GET", f"{path}/histogram")[1]["counts"]["open"]) == 2
    status, answer = running.json("GET", f"{path}/recalibration")
    assert (status, answer["error"]) == (
        409, "1 good parts are stored; a threshold needs at least 20"
    )  # fmt: skip
    for _ in range(24):
        send(running, GOOD)
    status, found = running.json("GET", f"{path}/recalibration?rate=0.01")
    assert (status, found["good"], found["above"]) == (200, 25, 0)
    assert found["threshold"] == pytest.approx(0.2)
    assert running.json("GET", f"{path}/recalibration?rate=1")[0] == 400


def test_the_course_of_the_scores_and_whether_they_drift(tmp_path):
    calibration = Calibration([0.18 + i / 1000 for i in range(40)], [0.0] * 40)
    with service(tmp_path, calibration=calibration) as running:
        for _ in range(25):
            send(running, GOOD)
        path = "/api/models/stub/course"
        status, found = running.json("GET", path)
        assert (status, found["parts"], len(found["stretches"])) == (200, 25, 2)
        assert found["calibration"]["parts"] == 40
        assert found["drift"]["drifted"] is True  # all scores are the same one
        assert found["drift"]["score"]["since"]["id"] == found["drift"]["since"]["id"] == 1
        assert found["drift"]["map_mean"]["since"] == found["drift"]["since"]
        status, found = running.json("GET", f"{path}?parts=5")
        assert (found["parts"], found["reason"]) == (
            5,
            "5 parts are stored; a comparison needs 20.",
        )
        for wrong in ("0", "100001", "many"):
            assert running.json("GET", f"{path}?parts={wrong}")[0] == 400
        assert running.json("GET", "/api/models/other/course")[0] == 404


def test_reviewed_good_parts_come_as_a_zip_of_the_files_as_sent(running):
    numbers = [send(running, data) for data in (GOOD, BAD, GOOD, GOOD)]
    for number, word in zip(numbers, ("good", "bad", "good", "good"), strict=True):
        running.json("POST", f"/api/verdicts/{number}/review", {"review": word})
    running.inspection.store.picture_path(numbers[3], "png").unlink()
    status, headers, body = running.call("GET", "/api/models/stub/good-parts.zip")
    assert (status, headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{numbers[0]}.png", f"{numbers[2]}.png"]
        assert archive.read(archive.namelist()[0]) == GOOD


def test_events_tell_of_verdicts_reviews_and_thresholds_and_end_with_the_service(tmp_path):
    with service(tmp_path, {"stub": StubPredictor(), "other": StubPredictor()}) as running:
        connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
        connection.request("GET", "/api/events")
        stream = connection.getresponse()
        assert stream.getheader("content-type").startswith("text/event-stream")
        assert stream.readline() == b"retry: 2000\n"
        number = send(running)
        running.json("POST", f"/api/verdicts/{number}/review", {"review": "good"})
        running.json("PUT", "/api/models/other/threshold", {"threshold": 0.7})
        lines = [stream.readline() for _ in range(10)]
        events = [
            (lines[i][7:-1].decode(), json.loads(lines[i + 1][6:]))
            for i in range(len(lines) - 1)
            if lines[i].startswith(b"event: ")
        ]
    assert [name for name, _ in events] == ["verdict", "review", "threshold"]
    assert events[0][1]["id"] == number
    assert events[0][1]["boxes"][0]["box"] == [24, 16, 48, 32]
    assert events[1][1] == {"id": number, "review": "good"}
    assert events[2][1] == {"model": "other", "threshold": 0.7}
    assert stream.read() == b""  # ended by the service, not by a time limit
    connection.close()
