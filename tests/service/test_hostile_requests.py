"""Malformed and malicious requests: each a clear 4xx in time, and the service goes on as before."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
from helpers_images import encoded, tiff
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")

from helpers_service import part, service

from efficientad.data.decoding import EncodedImage
from efficientad.service import server
from efficientad.service.decoder import MOST_ABANDONED, Decoder
from efficientad.service.limits import Limits, Refused

LIMITS = Limits(body_mb=1, body_seconds=1, megapixels=1, decode_seconds=5)
GOOD = encoded(Image.fromarray(part(0.8)))
JPEG = encoded(Image.fromarray(part(0.8)), "JPEG")
TIFF = encoded(Image.fromarray(part(0.8)), "TIFF")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HEADER_SECONDS", 1.0)
        with service(tmp_path_factory.mktemp("store"), limits=LIMITS) as found:
            yield found


@pytest.fixture(autouse=True)
def it_goes_on_as_before(running):
    """After each request a good one gets its verdict, and what the other held is given back."""
    before = _count(running)
    yield
    status, answer = running.json("POST", "/predict", GOOD)
    assert (status, answer["score"]) == (200, pytest.approx(0.8))
    assert _count(running) == before + 1  # of the hostile one nothing is stored
    deadline = time.monotonic() + 5
    while running.inspection.memory.held and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.inspection.memory.held == 0


def _count(running) -> int:
    with running.inspection.store.reading() as db:
        return db.execute("SELECT count(*) FROM verdicts").fetchone()[0]


# ---- files ---------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../../etc/passwd", "root")
    return stream.getvalue()


def tiff_of(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value)."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return head + table + struct.pack("<I", following)


SIZES = ((256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
FILES = {
    "nothing": b"",
    "a byte": b"\0",
    "zeros": bytes(5000),
    "text": b"hello",
    "a page": b"<!DOCTYPE html><html><body>login</body></html>",
    "a pickle": b"cos\nsystem\n(S'touch hacked'\ntR.",
    "a zip": zipped(),
    "a pdf": b"%PDF-1.7\n%\xe2\xe3",
    "an svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
    "a picture behind text": b"x" + GOOD,
    "half a png": GOOD[: len(GOOD) // 2],
    "the head of a png": GOOD[:33],
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "the head of a jpeg": JPEG[:20],
    "half a tiff": TIFF[: len(TIFF) // 2],
    "a png of nothing": png(64, 64),
    "a png of zero width": png(0, 64, chunk(b"IDAT", zlib.compress(b""))),
    "a png of negative width": png(2**31 + 5, 64),
    "a png of an unknown colour": png(64, 64, color=5),
    "a png whose checksum is wrong": GOOD[:29] + b"\0\0\0\0" + GOOD[33:],
    "a png of noise": png(64, 64, chunk(b"IDAT", np.random.default_rng(0).bytes(4000))),
    "a png of 2.5 gigapixels": png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(1000)))),
    "a png of a little too many pixels": encoded(Image.new("L", (1001, 1000))),
    "a png of a side that is too long": encoded(Image.new("L", (32_769, 1))),
    "a png that names a huge chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR",
    "a jpeg of 4 gigapixels": JPEG.replace(
        JPEG[(at := JPEG.index(b"\xff\xc0")) : at + 9], JPEG[at : at + 5] + b"\xff\xff\xff\xff"
    ),
    "a ppm of many pixels": b"P6 100000 100000 255\n" + bytes(100),
    "a ppm of words": b"P6 many many 255\n" + bytes(100),
    "a gif of many pixels": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6),
    "a bmp of many pixels": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "a webp of nothing": b"RIFF\x10\0\0\0WEBPVP8 \4\0\0\0\0\0\0\0",
    "a tiff of nothing": b"II*\0",
    "a tiff whose directory is behind its end": b"II*\0\xff\xff\xff\x7f",
    "a tiff whose directory is itself": tiff_of(*SIZES, following=8),
    "a tiff of a directory of 65535": b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(40),
    "a tiff of a tag of 4 gigabytes": tiff_of(*SIZES, (273, 4, 2**32 - 1, 8)),
    "a tiff of many pixels": tiff_of((256, 4, 1, 10**6), (257, 4, 1, 10**6), *SIZES[2:]),
    "a tiff of five channels": tiff(np.zeros((8, 8, 5), np.uint8), photometric="rgb"),
    "a tiff of numbers without a range": tiff(np.full((8, 8), 7e9, np.float32)),
    "a tiff that is not a number": tiff(np.full((8, 8), np.nan, np.float32)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_picture(running, name):
    status, headers, body = running.call("POST", "/predict", FILES[name], timeout=10)
    assert status in (400, 413, 422), body
    assert headers["content-type"] == "application/json"
    assert len(json.loads(body)["error"]) > 20
    assert b"/tmp" not in body


@pytest.mark.parametrize("keyword", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_png_with_a_bomb_of_text_costs_little(running, keyword):
    bomb = zlib.compress(bytes(80_000_000))  # of 80 KB
    text = {
        b"zTXt": b"a\0\0" + bomb,
        b"iCCP": b"a\0\0" + bomb,
        b"iTXt": b"a\0\1\0\0\0" + bomb,
    }[keyword]
    rows = zlib.compress((b"\0" + bytes(8 * 3)) * 8)
    data = png(8, 8, chunk(keyword, text), chunk(b"IDAT", rows))
    assert len(data) < LIMITS.body_bytes
    start = time.monotonic()
    status, _, body = running.call("POST", "/predict", data, timeout=20)
    assert time.monotonic() - start < 15
    if status == 200:  # it was passed over: a picture of 8x8, judged
        number = json.loads(body)["id"]
        running.inspection.store.submit(
            lambda step: step.db.execute("DELETE FROM verdicts WHERE id = ?", (number,))
        ).result(10)
    else:
        assert status == 422, body


# ---- requests ------------------------------------------------------------------------------------

LONG = "a" * 3000
FORM = "multipart/form-data; boundary=x"


def field(name: str, data: bytes = GOOD, file: str | None = "f.png") -> bytes:
    behind = "" if file is None else f'; filename="{file}"'
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{behind}\r\n\r\n'
    return head.encode() + data + b"\r\n"


REQUESTS = {  # method, path, body, headers, statuses
    "another method": ("PUT", "/predict", GOOD, {}, 405),
    "reading": ("GET", "/predict", None, {}, 405),
    "deleting": ("DELETE", "/v2/models/stub", None, {}, 405),
    "an unknown path": ("POST", "/predikt", GOOD, {}, 404),
    "an unknown model": ("POST", "/predict/other", GOOD, {}, 404),
    "a path upwards": ("POST", "/predict/../../etc/passwd", GOOD, {}, 404),
    "a hidden path upwards": ("POST", "/predict/%2e%2e%2f%2e%2e%2fetc%2fpasswd", GOOD, {}, 404),
    "a path with a zero": ("POST", "/predict/stub%00.png", GOOD, {}, 404),
    "a path of a file": ("GET", "/page.css/../../store.py", None, {}, 404),
    "a double slash": ("GET", "//evil.example/predict", None, {}, 404),
    "a long path": ("POST", f"/predict/{LONG}", GOOD, {}, 404),
    "bytes that are no text": ("POST", "/predict/%ff%fe", GOOD, {}, 404),
    "a model by injection": ("GET", "/v2/models/stub'%20OR%201=1--", None, {}, 404),
    "an unknown extra": ("POST", "/predict?include=map,secrets", GOOD, {}, 400),
    "compressed": ("POST", "/predict", gzip.compress(GOOD), {"Content-Encoding": "gzip"}, 415),
    "a compressed bomb": (
        "POST", "/predict", gzip.compress(bytes(10**7)), {"Content-Encoding": "gzip"}, 415,
    ),
    "too large": ("POST", "/predict", bytes(1_000_001), {}, 413),
    "too large a tensor": ("POST", "/v2/models/stub/infer", bytes(1_000_001), {}, 413),
    "a form without a boundary": (
        "POST", "/predict", GOOD, {"Content-Type": "multipart/form-data"}, 400,
    ),
    "a form that is none": ("POST", "/predict", GOOD, {"Content-Type": FORM}, 400),
    "a form without its end": ("POST", "/predict", field("f"), {"Content-Type": FORM}, 400),
    "a form without a file": (
        "POST", "/predict", field("f", file=None) + b"--x--\r\n", {"Content-Type": FORM}, 400,
    ),
    "a form of two files": (
        "POST", "/predict", field("f") * 2 + b"--x--\r\n", {"Content-Type": FORM}, 400,
    ),
    "a form of many fields": (
        "POST", "/predict", field("f", b"", None) * 999 + b"--x--\r\n", {"Content-Type": FORM}, 400,
    ),
    "a form of an empty file": (
        "POST", "/predict", field("f", b"") + b"--x--\r\n", {"Content-Type": FORM}, 400,
    ),
    "mixed parts": ("POST", "/predict", GOOD, {"Content-Type": "multipart/mixed"}, 415),
    "a cookie of noise": ("POST", "/predikt", GOOD, {"Cookie": "\xff=;;" * 100}, 404),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_ask_for_what_is_not_there(running, name):
    method, path, body, headers, expected = REQUESTS[name]
    status, _, answer = running.call(method, path, body, headers, timeout=10)
    assert status == expected, answer
    assert json.loads(answer)["error"]


def raw(running, *parts: bytes, wait: float = 0.0, timeout: float = 10) -> bytes:
    """What comes back for bytes, sent with pauses; until the service closes."""
    with socket.create_connection((running.host, running.port), timeout=timeout) as sock:
        try:
            for part_ in parts:
                sock.sendall(part_)
                time.sleep(wait)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
RAW = {
    "no http": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "a length of words": HEAD + b"Content-Length: many\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: what\r\n\r\nhello",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a zero in a header": HEAD + b"X: a\0b\r\n\r\n",
    "a header without a colon": HEAD + b"nonsense\r\n\r\n",
    "a header too long": HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "headers without end": HEAD + b"X: a\r\n" * 20_000,
    "no host": b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\n\r\nx",
    "ten gigabytes said": HEAD + b"Content-Length: 10000000000\r\n\r\n",
    "a length of many digits": HEAD + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n",
    "chunks without end": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + (b"10000\r\n" + bytes(65536) + b"\r\n") * 20,
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_sound_request(running, name):
    first = raw(running, RAW[name]).split(b"\r\n", 1)[0]
    assert first.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431")), first


# ---- slow, and gone ------------------------------------------------------------------------------


def test_a_body_that_trickles_is_refused_in_time(running):
    head = HEAD + b"Content-Length: 100000\r\n\r\n"
    start = time.monotonic()
    answer = raw(running, head, *[b"x"] * 30, wait=0.1)
    assert time.monotonic() - start < 8
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come within 1 seconds" in answer


def test_a_head_that_trickles_is_closed_in_time(running):
    start = time.monotonic()
    assert raw(running, b"POST /predict HTTP/1.1\r\n", *[b"X: y\r\n"] * 30, wait=0.1) == b""
    assert time.monotonic() - start < 8


def test_a_second_head_that_stops_is_closed_in_time(running):
    good = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    start = time.monotonic()
    answer = raw(running, good, b"GET /v2/he", wait=0.3)
    assert time.monotonic() - start < 8
    assert answer.count(b"HTTP/1.1 200") == 1


def test_a_sender_that_goes_away_is_forgotten(running):
    for sent in (HEAD, HEAD + b"Content-Length: 90000\r\n\r\n" + bytes(1000)):
        with socket.create_connection((running.host, running.port)) as sock:
            sock.sendall(sent)


def test_many_slow_senders_delay_nobody(running):
    socks = [socket.create_connection((running.host, running.port)) for _ in range(100)]
    for sock in socks:
        sock.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + bytes(100))
    start = time.monotonic()
    status, answer = running.json("GET", "/v2/health/ready")
    assert (status, answer) == (200, {"ready": True})
    assert time.monotonic() - start < 5
    for sock in socks:
        sock.close()


def test_a_picture_that_takes_too_long_is_refused_and_another_is_not(tmp_path, monkeypatch):
    read, go = EncodedImage.pixels, threading.Event()
    slow = encoded(Image.new("RGB", (33, 33)))

    def sleepy(image, value_range):
        if image.size == (33, 33):
            go.wait(20)
        return read(image, value_range)

    monkeypatch.setattr(EncodedImage, "pixels", sleepy)
    with service(tmp_path, limits=Limits(decode_seconds=0.3)) as other:
        status, answer = other.json("POST", "/predict", slow)
        assert (status, answer["error"]) == (422, "decoding took longer than 0.3 seconds")
        assert other.json("POST", "/predict", GOOD)[0] == 200
        go.set()


def test_threads_at_work_on_what_was_refused_are_few_and_come_back():
    async def run() -> None:
        one = Decoder(Limits(decode_seconds=0.05), threads=2)
        go = threading.Event()
        for _ in range(MOST_ABANDONED):
            with pytest.raises(Refused, match="took longer"):
                await one.run(lambda: go.wait(20))
        with pytest.raises(Refused, match="still being decoded") as refused:
            await one.run(lambda: 1)
        assert refused.value.status == 503
        go.set()
        deadline = time.monotonic() + 10
        while one._abandoned and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert await one.run(lambda: 1) == 1

    asyncio.run(run())


def test_a_thread_decodes_one_picture_after_the_other_and_ends_with_the_service():
    async def run() -> threading.Thread:
        one = Decoder(Limits(), threads=2)
        threads = {await one.run(threading.current_thread) for _ in range(5)}
        with pytest.raises(ZeroDivisionError):
            await one.run(lambda: 1 // 0)
        threads.add(await one.run(threading.current_thread))
        assert len(threads) == 1
        one.close()
        return threads.pop()

    thread = asyncio.run(run())
    thread.join(10)
    assert not thread.is_alive()


def test_a_name_is_shown_as_text_and_leads_nowhere(running):
    name = "..%2F..%2Fetc%2Fpasswd%00%0A%1B%5B31m" + "x" * 400
    status, answer = running.json("POST", f"/predict?name={name}", GOOD)
    assert (status, len(answer["name"])) == (200, 255)
    assert answer["name"].isprintable()
    store = running.inspection.store
    assert store.picture_path(answer["id"], "png").read_bytes() == GOOD
    store.submit(
        lambda step: step.db.execute("DELETE FROM verdicts WHERE id = ?", (answer["id"],))
    ).result(10)
