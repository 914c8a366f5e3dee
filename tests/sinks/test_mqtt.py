"""Deliveries over MQTT, through a real mosquitto."""

from __future__ import annotations

import json
import math
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")
pytest.importorskip("paho.mqtt.client", reason="MQTT needs the extra efficientad[mqtt]")

import paho.mqtt.client as paho
from helpers_images import encoded
from helpers_service import part, service
from PIL import Image

from efficientad.cli import main as command_line
from efficientad.cli import sinks as options_of_sinks
from efficientad.sinks import delivery, mqtt
from efficientad.sinks.delivery import Delivery, NotTaken
from efficientad.sinks.mqtt import Mqtt
from efficientad.sinks.outbox import Event

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
TOPIC = "line 3/verdicts"
EVENT = Event(7, "a1-7", "screw", "anomalous", b'{"id": 7}')
needs_a_broker = pytest.mark.skipif(
    MOSQUITTO is None, reason="there is no mosquitto: apt install mosquitto"
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Broker:
    """A mosquitto on a free port, which can be killed and started again."""

    def __init__(self, folder, lines: str = "allow_anonymous true") -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"mqtt://127.0.0.1:{self.port}/{TOPIC}"
        # Started by root it would be another user, who cannot read the folder.
        (folder / "mosquitto.conf").write_text(
            f"user root\nlistener {self.port} 127.0.0.1\n{lines}\n"
        )
        self.start()

    def start(self) -> None:
        command = [MOSQUITTO, "-c", str(self.folder / "mosquitto.conf")]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder
        )
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "mosquitto ended"
                assert time.monotonic() < until
                time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def broker(tmp_path):
    folder = tmp_path / "broker"
    folder.mkdir()
    found = Broker(folder)
    yield found
    found.kill()


@pytest.fixture
def listen():
    """Subscribes to the topic at a broker; gives the queue of its messages."""
    clients = []

    def start(broker: Broker) -> queue.SimpleQueue:
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        clients.append(client)
        messages: queue.SimpleQueue = queue.SimpleQueue()
        ready = threading.Event()
        client.on_message = lambda _, __, message: messages.put(message)
        client.on_subscribe = lambda *_: ready.set()
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        client.subscribe(TOPIC, qos=1)
        assert ready.wait(20)
        return messages

    yield start
    for client in clients:
        client.disconnect()
        client.loop_stop()


class Gated(Mqtt):
    """Sends nothing while it is held, and says that it is; counts what failed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go, self.held, self.failed = threading.Event(), threading.Event(), 0
        self.go.set()

    def send(self, event: Event) -> None:
        if not self.go.is_set():
            self.held.set()
            assert self.go.wait(20)
        try:
            super().send(event)
        except NotTaken:
            self.failed += 1
            raise


@needs_a_broker
def test_verdicts_go_to_the_topic_in_order_also_when_the_broker_is_killed(
    broker, listen, tmp_path, monkeypatch
):
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.05)
    picture = encoded(Image.fromarray(part(0.8)))
    sink = Gated(broker.url)
    messages = listen(broker)
    with service(tmp_path / "store", sinks=(Delivery(sink),)) as running:
        answers = [running.json("POST", f"/predict?name=p{i}", picture)[1] for i in range(3)]
        first = [messages.get(timeout=20) for _ in range(3)]
        broker.kill()
        answers += [running.json("POST", f"/predict?name=p{i}", picture)[1] for i in range(3, 6)]
        while sink.failed < 2:
            time.sleep(0.01)
        sink.go.clear()
        assert sink.held.wait(20)
        broker.start()
        later = listen(broker)
        sink.go.set()
        second = [later.get(timeout=20)]
        # The broker may have died before it acknowledged the third: at least once.
        if json.loads(second[0].payload)["id"] == answers[2]["id"]:
            second.pop()
        while len(second) < 3:
            second.append(later.get(timeout=20))
    events = [json.loads(message.payload) for message in first + second]
    for answer, event in zip(answers, events, strict=True):
        assert answer == {key: event[key] for key in answer}
    assert {message.topic for message in first + second} == {TOPIC}
    assert {message.qos for message in first + second} == {1}
    assert later.empty()


@needs_a_broker
def test_a_webhook_and_a_broker_keep_places_of_their_own(broker, listen, tmp_path):
    class Down:
        name, address = "webhook", "nowhere"

        def send(self, event: Event) -> None:
            raise NotTaken("no answer")

        def close(self) -> None:
            pass

    messages = listen(broker)
    picture = encoded(Image.fromarray(part(0.8)))
    sinks = (Delivery(Down()), Delivery(Mqtt(broker.url)))
    with service(tmp_path / "store", sinks=sinks) as running:
        running.json("POST", "/predict", picture)
        assert json.loads(messages.get(timeout=20).payload)["id"] == 1
        until = time.monotonic() + 20
        while 'backlog{sink="mqtt"} 0.0' not in running.call("GET", "/metrics")[2].decode():
            assert time.monotonic() < until
        assert 'backlog{sink="webhook"} 1.0' in running.call("GET", "/metrics")[2].decode()


@needs_a_broker
def test_users_need_their_password_and_a_topic_that_they_may_write(tmp_path):
    passwords = tmp_path / "passwords"
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", passwords, "line3", "hunter2"],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "topics").write_text("user line3\ntopic write mine/#\n")
    broker = Broker(tmp_path, "password_file passwords\nacl_file topics")
    try:
        address = f"127.0.0.1:{broker.port}"
        good = Mqtt(f"mqtt://line3@{address}/mine/verdicts", "hunter2")
        good.send(EVENT)
        good.send(EVENT)
        good.close()
        wrong = Mqtt(f"mqtt://line3@{address}/mine/verdicts", "hunter3")
        with pytest.raises(NotTaken, match="refuses the connection: Not authorized") as caught:
            wrong.send(EVENT)
        assert caught.value.patience == math.inf
        other = Mqtt(f"mqtt://line3@{address}/others", "hunter2")
        with pytest.raises(NotTaken, match="refuses it: Not authorized") as caught:
            other.send(EVENT)
        assert caught.value.patience == math.inf
        other.close()
    finally:
        broker.kill()


def test_no_broker_is_waited_for():
    with pytest.raises(NotTaken, match="no broker") as caught:
        Mqtt(f"mqtt://127.0.0.1:{free_port()}/a").send(EVENT)
    assert caught.value.patience == math.inf


def test_a_broker_that_says_nothing_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(mqtt, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = Mqtt(f"mqtt://127.0.0.1:{silent.getsockname()[1]}/a")
        with pytest.raises(NotTaken, match=r"no answer of the broker within 0\.2 s"):
            one.send(EVENT)
        one.close()


@pytest.mark.parametrize(
    "url",
    ["", "host/a", "http://host/a", "mqtt://host", "mqtt://host/", "mqtt:///a", "mqtt://host/a/#",
     "mqtt://host/+/a", "mqtt://host/a?b", "mqtt://host:0/a", "mqtt://host:99999/a",
     "mqtt://host/" + "a" * 65536],
)  # fmt: skip
def test_what_is_no_topic_of_a_broker_is_refused(url):
    with pytest.raises(ValueError, match="the URL for MQTT is"):
        Mqtt(url)


def test_the_parts_of_an_address():
    assert Mqtt("mqtt://host/a/b").address == "mqtt://host:1883/a/b"
    assert Mqtt("mqtts://me@host/a", "hunter2").address == "mqtts://host:8883/a"
    assert Mqtt("mqtt://[::1]:99/a")._host == "::1"
    with pytest.raises(ValueError, match="holds a password") as caught:
        Mqtt("mqtt://me:hunter2@host/a")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="and no user"):
        Mqtt("mqtt://host/a", "hunter2")


def usage(capsys, *words: str) -> str:
    assert command_line.main(["serve", "not looked at yet", *words]) == 2
    return capsys.readouterr().err


def test_the_options_of_mqtt(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(options_of_sinks.MQTT_PASSWORD, raising=False)
    parser = command_line.build_parser()
    url = ["--mqtt", "mqtt://me@host/a"]
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    words = [*url, "--mqtt-password-file", str(file), "--mqtt-verdicts", "anomalous"]
    (one,) = options_of_sinks.sinks_of(parser.parse_args(["serve", "m.pt", *words]))
    assert (one.receiver._password, one.only_anomalous) == ("hunter2", True)
    (one,) = options_of_sinks.sinks_of(parser.parse_args(["serve", "m.pt", *url]))
    assert (one.receiver._password, one.only_anomalous) == (None, False)
    assert "go with --mqtt URL" in usage(capsys, "--mqtt-password-file", str(file))
    assert "the URL for MQTT is 'host'" in usage(capsys, "--mqtt", "host")
    monkeypatch.setenv(options_of_sinks.MQTT_PASSWORD, "hunter2")
    assert "leave one out" in usage(capsys, *words)


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    assert "pip install 'efficientad[mqtt]'" in usage(capsys, "--mqtt", "mqtt://host/a")
