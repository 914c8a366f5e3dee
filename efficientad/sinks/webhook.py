"""Events to an address over HTTP, signed as https://www.standardwebhooks.com has it."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import math
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from efficientad import __version__
from efficientad.sinks.delivery import NotTaken
from efficientad.sinks.outbox import Event

if TYPE_CHECKING:
    import httpx

SECONDS = 10.0  # for an answer
MOST_RETRY_AFTER = 3600.0
LATER = frozenset({401, 403, 407, 408, 421, 423, 425, 429})  # may be taken, once something is set
ADDRESS = frozenset({404, 405, 410})  # nobody is there: an address that is wrong, or comes back
ADDRESS_PATIENCE, PATIENCE = 600.0, 5.0  # seconds; the second for other answers of 4xx
_MOST_ANSWER = 1 << 16  # bytes of an answer that are read
_SECRET = "whsec_"  # may stand before a secret


class Webhook:
    """POSTs events to an address.

    A 2xx takes an event. No answer, 3xx, 5xx and `LATER` are tried until it is taken; `ADDRESS` for
    ten minutes, any other 4xx for five seconds. Redirects are not followed.

    Args:
        url: http or https. secret: base64 of 24 to 64 bytes, with or without "whsec_" before it;
            with one each request has the headers webhook-id, webhook-timestamp and
            webhook-signature, without one only the first two.

    Raises:
        ImportError: httpx is not installed. ValueError: the URL or the secret is none of the above.
    """

    name = "webhook"

    def __init__(self, url: str, secret: str | None = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                "a webhook needs httpx: pip install 'efficientad[webhook]'"
            ) from error
        self.address = _checked(url)
        try:
            self._url = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"the webhook's URL is {url!r}: {error}") from error
        self._key = None if secret is None else signing_key(secret)
        self._error: type[Exception] = httpx.HTTPError
        self._client = httpx.Client(
            timeout=SECONDS,
            headers={
                "User-Agent": f"efficientad/{__version__}",
                "Content-Type": "application/json",
            },
        )

    def send(self, event: Event) -> None:
        """Send one; see `delivery.Receiver`."""
        moment = int(time.time())
        headers = {"webhook-id": event.id, "webhook-timestamp": str(moment)}
        if self._key is not None:
            headers["webhook-signature"] = signature(self._key, event.id, moment, event.body)
        try:
            with self._client.stream(
                "POST", self._url, content=event.body, headers=headers
            ) as answer:
                self._read_some(answer)
        except self._error as error:
            raise NotTaken(f"no answer: {str(error) or type(error).__name__}") from error
        if not answer.is_success:
            raise NotTaken(
                f"the answer is {answer.status_code} {answer.reason_phrase}",
                retry_after=_seconds(answer.headers.get("Retry-After")),
                patience=_patience(answer.status_code),
            )

    def _read_some(self, answer: httpx.Response) -> None:
        """Read what comes after the status, so that the connection can be used again."""
        read, until = 0, time.monotonic() + SECONDS
        with contextlib.suppress(self._error):
            for piece in answer.iter_raw():
                read += len(piece)
                if read > _MOST_ANSWER or time.monotonic() > until:
                    return

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def signature(key: bytes, event_id: str, moment: int, body: bytes) -> str:
    """The header's value: "v1," and the base64 of HMAC-SHA256 over id, seconds and body."""
    digest = hmac.new(key, f"{event_id}.{moment}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def signing_key(secret: str) -> bytes:
    """The bytes of a secret. Raises ValueError, which does not show it."""
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError(
            "the webhook's secret must be base64 of 24 to 64 bytes, as `openssl rand -base64 32` "
            "makes it"
        )
    return key


def _checked(url: str) -> str:
    """A URL without what may be secret in it. Raises ValueError for one that cannot be used."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise ValueError("the webhook's URL holds a user or password; it must have neither")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or port == 0:
        raise ValueError(
            f"the webhook's URL is {url!r}; it must be http://HOST... or https://HOST..."
        )
    return f"{parts.scheme}://{parts.netloc}"


def _patience(status: int) -> float:
    """Seconds of an answer after which an event will not be taken."""
    if status in ADDRESS:
        return ADDRESS_PATIENCE
    return PATIENCE if 400 <= status < 500 and status not in LATER else math.inf


def _seconds(header: str | None) -> float:
    """What a Retry-After says, in seconds from now; 0 where it says nothing that counts."""
    if header is None:
        return 0.0
    try:
        seconds = float(int(header))
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        seconds = (when - datetime.now(timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), MOST_RETRY_AFTER)
