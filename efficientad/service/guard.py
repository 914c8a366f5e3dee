"""Who may ask: the API key, the page's cookie, and pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "efficientad_key"
OPEN = ("/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready", "/api/session")
LEAST_KEY = 16  # characters
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; "
        b"form-action 'none'",
    ),
]


def is_loopback(host: str) -> bool:
    """Whether an address, or a Host header's name, is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_key(key: str | None) -> None:
    """Raise ValueError for a key that is short, or has characters that no header takes."""
    if key is not None and (len(key) < LEAST_KEY or not key.isascii() or not key.isprintable()):
        raise ValueError(
            f"the API key has {len(key)} characters; it must have at least {LEAST_KEY}, all of "
            "them printable ASCII"
        )


class Guard:
    """Stands in front of an application and answers 401 or 403 in its place.

    With a key every path but `OPEN` needs it: `Authorization: Bearer KEY`, `X-API-Key: KEY`, or
    the cookie that `POST /api/session` gives a page for it. Without a key only this machine may
    ask, by that name, so that no web page can reach the service through a name of its own. A
    request that changes something and names another site as its origin is refused, always.

    Args:
        app: the application. key: at least 16 characters, or None. hosts: names beside this
            machine's that a request may be addressed to without a key; "*" is any.

    Raises:
        ValueError: see `check_key`.
    """

    def __init__(self, app: App, key: str | None = None, hosts: tuple[str, ...] = ()) -> None:
        check_key(key)
        self._app, self._hosts = app, hosts
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, sending)
            return
        status, sentence = refusal
        body = json.dumps({"error": sentence}).encode()
        answer = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 401:
            answer.append((b"www-authenticate", b"Bearer"))
        await sending({"type": "http.response.start", "status": status, "headers": answer})
        await sending({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = _name_in(host)
        if self._key is None and "*" not in self._hosts:
            if name is None or not (is_loopback(name) or name in self._hosts):
                return 403, f"the request is addressed to {host[:80]!r}, which is not this service"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin is not None:
            if origin == "null" or urlsplit(origin).netloc != host:
                return 403, f"the request comes from a page of {origin[:80]!r}, another site"
        if self._key is None or scope["path"] in OPEN or self._knows(headers):
            return None
        return 401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"

    def _knows(self, headers: dict[str, str]) -> bool:
        bearer = headers.get("authorization", "")
        if bearer[:7].lower() == "bearer " and self.is_key(bearer[7:].strip()):
            return True
        if self.is_key(headers.get("x-api-key", "")):
            return True
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return morsel is not None and _same(morsel.value, self.cookie)

    def is_key(self, given: str) -> bool:
        """Whether it is the key; takes as long whatever is given."""
        return self._key is not None and _same(given, self._key.decode())

    @property
    def cookie(self) -> str:
        """What a page's cookie holds: it follows from the key, and the key not from it."""
        assert self._key is not None
        return hmac.new(self._key, b"efficientad page", hashlib.sha256).hexdigest()


def _same(given: str, right: str) -> bool:
    """Compare in constant time, of digests: the length shows nothing, either."""
    digests = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, right))
    return hmac.compare_digest(*digests)


def _name_in(host: str) -> str | None:
    """The name in a Host header, None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname if parts.port is None or parts.port else None
    except ValueError:
        return None
