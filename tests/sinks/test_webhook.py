"""The webhook, against a real HTTP server: what is sent, and what each answer means."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import socket
import sys
import time

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")
pytest.importorskip("httpx", reason="a webhook needs the extra efficientad[webhook]")

from helpers_images import encoded
from helpers_receiver import WebhookReceiver
from helpers_service import part, service
from PIL import Image

from efficientad.cli import main as command_line
from efficientad.cli import sinks as options_of_sinks
from efficientad.sinks import delivery
from efficientad.sinks.delivery import Delivery, NotTaken
from efficientad.sinks.outbox import Event
from efficientad.sinks.webhook import Webhook

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
EVENT = Event(7, "a1-7", "screw", "anomalous", b'{"id": 7}')


@pytest.fixture
def receiver():
    found = WebhookReceiver()
    yield found
    found.close()


@pytest.fixture
def webhook(receiver):
    found = Webhook(receiver.url)
    yield found
    found.close()


def test_a_request_holds_the_event_its_id_and_the_moment(receiver, webhook):
    webhook.send(EVENT)
    webhook.send(EVENT)
    (headers, body, _), _ = receiver.came
    assert body == EVENT.body
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == "a1-7"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert "webhook-signature" not in headers
    assert headers["user-agent"].startswith("efficientad/")
    assert len(receiver.clients) == 1  # one connection for all


@pytest.mark.parametrize("secret", [SECRET, SECRET.removeprefix("whsec_")])
def test_a_request_is_signed_as_standard_webhooks_has_it(receiver, secret):
    webhook = Webhook(receiver.url, secret)
    webhook.send(EVENT)
    webhook.close()
    ((headers, body, _),) = receiver.came
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}".encode()
    digest = hmac.new(KEY, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_2xx_takes_an_event(receiver, webhook, status):
    receiver.answers.append((status, {}))
    webhook.send(EVENT)


@pytest.mark.parametrize(
    ("status", "patience"),
    [
        *((status, math.inf) for status in (301, 307, 401, 403, 408, 425, 429, 500, 502, 503)),
        *((status, 600) for status in (404, 405, 410)),
        *((status, 5) for status in (400, 409, 413, 415, 422)),
    ],
)
def test_each_other_answer_has_its_patience(receiver, webhook, status, patience):
    receiver.answers.append((status, {"Location": "/elsewhere"} if status < 400 else {}))
    with pytest.raises(NotTaken, match=f"the answer is {status} ") as caught:
        webhook.send(EVENT)
    assert (caught.value.patience, caught.value.retry_after) == (patience, 0)
    assert len(receiver.came) == 1  # no redirect is followed


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("17", 17),
        ("-3", 0),
        ("1000000", 3600),
        ("soon", 0),
        ("Sat, 01 Jan 2000 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 3600),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(receiver, webhook, header, seconds):
    receiver.answers.append((503, {"Retry-After": header}))
    with pytest.raises(NotTaken) as caught:
        webhook.send(EVENT)
    assert caught.value.retry_after == seconds


def test_nobody_there_is_not_an_answer():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        webhook = Webhook(f"http://127.0.0.1:{taken.getsockname()[1]}/")
        with pytest.raises(NotTaken, match="no answer") as caught:
            webhook.send(EVENT)
        webhook.close()
    assert caught.value.patience == math.inf


def test_an_answer_that_does_not_end_is_not_read_to_its_end(receiver, webhook):
    receiver.body = bytes(1 << 22)
    webhook.send(EVENT)
    receiver.body = b""
    webhook.send(EVENT)
    assert len(receiver.came) == 2


@pytest.mark.parametrize(
    "url", ["", "verdicts", "ftp://host/", "http://", "http://host/#place", "http://host:99999/"]
)
def test_what_is_no_address_of_a_webhook_is_refused(url):
    with pytest.raises(ValueError, match="the webhook's URL is"):
        Webhook(url)


def test_secrets_are_not_shown():
    with pytest.raises(ValueError, match="holds a user or password") as caught:
        Webhook("http://me:hunter2@host/")
    assert "hunter2" not in str(caught.value)
    for secret in ("hunter2", "whsec_" + base64.b64encode(bytes(23)).decode(), "a" * 100):
        with pytest.raises(ValueError, match="must be base64 of 24 to 64 bytes") as caught:
            Webhook("http://host/", secret)
        assert secret not in str(caught.value)
    webhook = Webhook("https://host:8443/hooks/token-in-the-path?key=hunter2")
    assert webhook.address == "https://host:8443"


def test_an_answer_never_waits_for_the_receiver_and_no_verdict_is_lost(
    receiver, tmp_path, monkeypatch
):
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.001)
    receiver.go.clear()
    receiver.answers += [(503, {"Retry-After": "0"}), (200, {}), (400, {})]
    picture = encoded(Image.fromarray(part(0.8)))
    with service(tmp_path, sinks=(Delivery(Webhook(receiver.url)),)) as running:
        answers = [running.json("POST", f"/predict?name=p{i}", picture)[1] for i in range(6)]
        assert receiver.came == []
        figures = running.call("GET", "/metrics")[2].decode()
        assert 'efficientad_delivery_backlog{sink="webhook"} 6.0' in figures
        receiver.go.set()
    came = [json.loads(body) for _, body, _ in receiver.came]
    assert [event["id"] for event in came] == [1, 1, 2, 2, 3, 4, 5, 6]
    for event in came:
        answer = answers[event["id"] - 1]
        assert answer == {key: event[key] for key in answer}
        assert event.keys() - answer.keys() == {"verdict", "store"}


def usage(capsys, *words: str) -> str:
    assert command_line.main(["serve", "not looked at yet", *words]) == 2
    return capsys.readouterr().err


def test_the_options_of_a_webhook(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(options_of_sinks.WEBHOOK_SECRET, raising=False)
    parser = command_line.build_parser()

    def found(*words: str) -> Delivery:
        (one,) = options_of_sinks.sinks_of(parser.parse_args(["serve", "m.pt", *words]))
        return one

    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    url = ["--webhook", "http://host/verdicts"]
    assert options_of_sinks.sinks_of(parser.parse_args(["serve", "m.pt"])) == []
    plain = found(*url)
    assert (plain.receiver._key, plain.only_anomalous) == (None, False)
    signed = found(*url, "--webhook-secret-file", str(file), "--webhook-verdicts", "anomalous")
    assert (signed.receiver._key, signed.only_anomalous) == (KEY, True)
    monkeypatch.setenv(options_of_sinks.WEBHOOK_SECRET, SECRET)
    assert found(*url).receiver._key == KEY
    assert "leave one out" in usage(capsys, *url, "--webhook-secret-file", str(file))
    assert "go with --webhook URL" in usage(capsys, "--webhook-verdicts", "all")
    monkeypatch.delenv(options_of_sinks.WEBHOOK_SECRET)
    file.write_text("\n")
    assert "which is empty" in usage(capsys, *url, "--webhook-secret-file", str(file))
    assert "the webhook's URL is 'host'" in usage(capsys, "--webhook", "host")


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert "webhook needs httpx: pip install 'efficientad[webhook]'" in usage(
        capsys, "--webhook", "http://host/"
    )
