"""Deliveries of a service that is killed, to a receiver that is not always there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers_images import encoded
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")
pytest.importorskip("httpx", reason="a webhook needs the extra efficientad[webhook]")

from helpers_receiver import WebhookReceiver
from helpers_service import commands, part

from efficientad.verdicts.store import Store

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parent.parent
SERVER = """
import sys
from helpers_service import StubPredictor
from efficientad.service.core import Model
from efficientad.service.server import Settings, run
from efficientad.sinks.delivery import Delivery
from efficientad.sinks.webhook import Webhook
settings = Settings(sys.argv[1], port=0, durable=False)
models = {name: Model("d", StubPredictor()) for name in ("left", "right")}
run(models, settings, sinks=[Delivery(Webhook(sys.argv[2]))])
"""


@pytest.fixture
def start(tmp_path):
    """Starts a service that posts to an address; gives its process and its own address."""
    with commands() as served:
        yield lambda url: served(
            [sys.executable, "-c", SERVER, str(tmp_path), url],
            {"PYTHONPATH": str(TESTS)},
            stderr=subprocess.DEVNULL,
            cwd=TESTS.parent,
        )


def test_every_verdict_arrives_in_order_through_five_kills_and_a_receiver_that_goes(
    start, tmp_path
):
    chance = random.Random(0)
    picture = encoded(Image.fromarray(part(0.8, 16, 16)))
    receiver = WebhookReceiver()
    answered = []
    for round_ in range(6):
        process, address = start(receiver.url)
        receiver.answers[:] = [(chance.choice([200, 200, 503]), {}) for _ in range(30)]
        away = round_ % 2  # every other time nobody is there for a while
        if away:
            receiver.close()
        for i in range(chance.randrange(20, 60)):
            request = f"{address}/predict/{('left', 'right')[i % 2]}"
            with urllib.request.urlopen(request, picture, timeout=30) as answer:
                answered.append(json.load(answer)["id"])
        if away:
            receiver = WebhookReceiver(receiver)
        if round_ < 5:
            time.sleep(chance.uniform(0, 3))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    until = time.monotonic() + 120
    taken: list[dict] = []
    while time.monotonic() < until and not (taken and taken[-1]["id"] == answered[-1]):
        time.sleep(0.1)
        taken = [json.loads(body) for _, body, status in receiver.came if status == 200]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    receiver.close()
    first = list(dict.fromkeys(event["id"] for event in taken))
    assert first == sorted(first)
    assert set(answered) <= set(first)
    with Store(tmp_path, durable=False) as store, store.reading() as db:
        assert first == [row["id"] for row in db.execute("SELECT id FROM verdicts ORDER BY id")]
    assert len(first) > 120
    bodies = {event["id"]: event for event in taken}
    assert all(event == bodies[event["id"]] for event in taken)  # a double is the same
    assert {event["model"] for event in taken} == {"left", "right"}
