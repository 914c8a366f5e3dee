"""Files that are written whole or not at all, or are on the disk; checksums, names in messages."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SYNC_THREADS = 8


def replace_file(
    path: str | os.PathLike, write: Callable[[Path], object], *, durable: bool = False
) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Makes missing folders. If `write` fails, an existing file stays as it was and nothing else is
    left behind. `durable` waits until the contents are on the disk before the old file goes. The
    file gets the permissions of any new file there, whatever `write` gives it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not made of the file's name, which may have the greatest length already.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # asking for the umask would change it
        temporary.unlink()
        write(temporary)
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def path_digest(path: str | os.PathLike) -> str:
    """SHA-256 in hexadecimal: of a file's bytes, or of names and bytes of the files in a folder."""
    path = Path(path)
    if not path.is_dir():
        return _file_digest(path).hexdigest()
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(_file_digest(file, os.fsencode(file.relative_to(path))).digest())
    return whole.hexdigest()


def _file_digest(path: Path, start: bytes = b"") -> hashlib._Hash:
    digest = hashlib.sha256(start)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def names_below(paths: Sequence[Path], all_paths: Sequence[Path]) -> list[str]:
    """Names of files from the deepest folder on below which all of `all_paths` lie, as text."""
    parents = [os.path.dirname(os.path.abspath(path)) for path in all_paths]
    root = os.path.commonpath(parents) if parents else ""
    return [plain_text(os.path.relpath(os.path.abspath(path), root)) for path in paths]


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, with commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain_text(value: object) -> str:
    """`str(value)` that UTF-8 can hold: bytes of a file name that are no text become "\\udcNN"."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def digest_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256, as hex, of named texts in their order, and of named tensors' bytes on the CPU."""
    import torch  # not before `efficientad --help`, which needs the rest of this file

    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}:{len(text)}:{text}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class DiskSync:
    """Waits until files and folders are on the disk; many at once, so that they share its flushes.

    A disk merges flushes that come at the same time: 32 files one after the other are 32 of them.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_SYNC_THREADS, "efficientad-sync")

    def wait(self, files: Sequence[Path], folders: Sequence[Path]) -> None:
        """Wait for the contents of files, and for the names in folders (not on Windows).

        Raises:
            OSError: of the first that cannot be written, once all have been tried.
        """
        paths = [*files, *(folders if os.name != "nt" else ())]
        if len(files) < 2:
            for path in paths:
                _sync(path)
            return
        futures = [self._threads.submit(_sync, path) for path in paths]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _sync(path: Path) -> None:
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    opened = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
