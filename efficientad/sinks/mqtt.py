"""Events to a topic of an MQTT 5 broker, each acknowledged by it (QoS 1)."""

from __future__ import annotations

import contextlib
import math
import queue
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from efficientad.sinks.delivery import NotTaken
from efficientad.sinks.outbox import Event

if TYPE_CHECKING:
    import paho.mqtt.client as paho

SECONDS = 10.0  # for a connection, and for an acknowledgement
PORTS = {"mqtt": 1883, "mqtts": 8883}
PATIENCE = 600.0  # seconds of acknowledgements that refuse
LATER = frozenset({0x87, 0x97})  # not authorised, quota exceeded: may be taken, once that changes
_MOST_TOPIC = 65535  # bytes


class Mqtt:
    """Publishes events on one topic.

    What the broker acknowledges is taken. No broker and no acknowledgement are tried until there is
    one, an acknowledgement that refuses for ten minutes, unless it is one of `LATER`.

    Args:
        url: mqtt://[USER@]HOST[:PORT]/TOPIC, or mqtts for TLS. password: the user's.

    Raises:
        ImportError: paho-mqtt is not installed. ValueError: the URL is none of that form.
    """

    name = "mqtt"

    def __init__(self, url: str, password: str | None = None) -> None:
        try:
            import paho.mqtt.client as paho
        except ImportError as error:
            raise ImportError("MQTT needs paho-mqtt: pip install 'efficientad[mqtt]'") from error
        self._paho = paho
        self._tls, self._user, self._host, self._port, self.topic = _parts(url)
        if password is not None and self._user is None:
            raise ValueError(
                "there is a password for MQTT and no user; it must be mqtt://USER@HOST..."
            )
        self._password = password
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.address = f"mqtt{'s' if self._tls else ''}://{host}:{self._port}/{self.topic}"
        self._client: paho.Client | None = None
        self._said: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def send(self, event: Event) -> None:
        """Send one; see `delivery.Receiver`."""
        try:
            client = self._connected()
            number = client.publish(self.topic, event.body, qos=1).mid
            reason = self._wait(number, "no acknowledgement")
        except NotTaken:
            self._drop()  # or it would be sent again by paho, too
            raise
        if reason.is_failure:
            patience = math.inf if reason.value in LATER else PATIENCE
            raise NotTaken(f"the broker refuses it: {reason}", patience=patience)

    def close(self) -> None:
        """End the connection."""
        self._drop()

    def _connected(self) -> paho.Client:
        """The connection, or a new one. Raises NotTaken."""
        if self._client is not None and self._client.is_connected():
            return self._client
        self._drop()
        paho = self._paho
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        client.connect_timeout = SECONDS / 2
        if self._user is not None:
            client.username_pw_set(self._user, self._password)
        if self._tls:
            client.tls_set()
        said = self._said = queue.SimpleQueue()
        client.on_connect = lambda _, __, ___, reason, ____: said.put(("connected", reason))
        client.on_publish = lambda _, __, number, reason, ____: said.put((number, reason))
        client.on_disconnect = lambda _, __, ___, reason, ____: said.put(("gone", reason))
        try:
            client.connect(self._host, self._port)
        except (OSError, ValueError) as error:  # paho's for a host that is none
            raise NotTaken(f"no broker: {error}") from error
        self._client = client
        client.loop_start()
        reason = self._wait("connected", "no answer of the broker")
        if reason.is_failure:
            raise NotTaken(f"the broker refuses the connection: {reason}")
        return client

    def _wait(self, what: object, otherwise: str) -> Any:
        """The reason code that comes with something. Raises NotTaken."""
        until = time.monotonic() + SECONDS
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                came, reason = self._said.get(timeout=left)
                if came == what:
                    return reason
                if came == "gone":
                    raise NotTaken(f"{otherwise}: the connection ended: {reason}")
        raise NotTaken(f"{otherwise} within {SECONDS:g} s")

    def _drop(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None


def _parts(url: str) -> tuple[bool, str | None, str, int, str]:
    """TLS, user, host, port and topic of a URL. Raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.password is not None:
        raise ValueError("the URL for MQTT holds a password; it must not")
    topic = parts.path[1:]
    if (
        parts.scheme not in PORTS or not parts.hostname or port == 0 or not topic
        or parts.query or "+" in topic or "#" in url or "\0" in topic
        or len(topic.encode()) > _MOST_TOPIC
    ):  # fmt: skip
        raise ValueError(
            f"the URL for MQTT is {url!r}; it must be mqtt://HOST:PORT/TOPIC, or mqtts for TLS, "
            "with no + # or ? in the topic"
        )
    return (
        parts.scheme == "mqtts",
        parts.username,
        parts.hostname,
        port or PORTS[parts.scheme],
        topic,
    )
