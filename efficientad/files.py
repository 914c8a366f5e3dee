"""Floor 1, imports nothing of the package: files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(
    path: str | os.PathLike, write: Callable[[Path], object], *, durable: bool = False
) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Makes missing folders. If `write` fails, an existing file stays as it was and nothing else is
    left behind. `durable` waits until the contents are on the disk before the old file goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
