"""The body of a request: whole, in time, not too large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from efficientad.service.limits import Limits, Refused, Share

LONGEST_NAME = 255


async def read_body(request: Request, limits: Limits, share: Share) -> bytes:
    """All bytes of the body.

    Raises:
        Refused: 400 empty, 408 too slow, 413 too large, 415 compressed.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(415, f"Content-Encoding is {encoding[:40]!r}; send the body as it is")
    most = limits.body_bytes
    declared = request.headers.get("content-length", "")
    too_large = Refused(413, f"the body is too large; at most {limits.body_mb:g} MB are taken")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    parts: list[bytes] = []

    async def read() -> None:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            share.take(len(part))
            parts.append(part)

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused(
            408, f"the body did not come within {limits.body_seconds:g} seconds"
        ) from None
    except ClientDisconnect:
        raise Refused(400, "the sender went away before the end of the body") from None
    if not any(parts):
        raise Refused(400, "the body is empty; send a picture: JPEG, PNG or TIFF")
    return b"".join(parts)


async def read_picture(request: Request, limits: Limits, share: Share) -> tuple[bytes, str | None]:
    """The picture that a request sends, and what the sender calls it.

    As the body itself, with its name in the query (`?name=part.png`), or as the one file of a
    multipart form.

    Raises:
        Refused: as `read_body`; 400 for a form without a file, or with more than one.
    """
    body = await read_body(request, limits, share)
    kind = request.headers.get("content-type", "").lower()
    if not kind.startswith("multipart/"):
        return body, clean_name(request.query_params.get("name"))
    if not kind.startswith("multipart/form-data"):
        raise Refused(415, "Content-Type is multipart; of these only multipart/form-data is taken")
    return await _file_of_form(request, body, limits)


async def _file_of_form(request: Request, body: bytes, limits: Limits) -> tuple[bytes, str | None]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        request.headers, whole(), max_files=2, max_fields=8, max_part_size=limits.body_bytes
    )
    parser.spool_max_size = limits.body_bytes  # in memory, where the body is already
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", "") or "no boundary"
        raise Refused(400, f"the form cannot be read: {reason}") from error
    try:
        return await _only_file(form)
    finally:
        await form.close()


async def _only_file(form: FormData) -> tuple[bytes, str | None]:
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refused(400, f"the form holds {len(files) or 'no'} files; send one picture")
    data = await files[0].read()
    if not data:
        raise Refused(400, "the file in the form is empty; send a picture: JPEG, PNG or TIFF")
    return data, clean_name(files[0].filename)


def clean_name(name: str | None) -> str | None:
    """A sender's name as text that can be shown: printable, of limited length; None where empty."""
    if name is None:
        return None
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    shown = shown.encode("utf-8", "replace").decode("utf-8").strip()
    return shown[-LONGEST_NAME:] or None


def body_of_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refused (400) for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "the body is JSON, but not an object")
    return value
