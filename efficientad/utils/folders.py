"""What a folder holds that a person put there: the one place where folders are listed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# What Windows, archives and network drives leave behind; macOS's and Linux's own begin with ".".
_SYSTEM = frozenset(
    (
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    )
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden (".name", "._name") or a system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM


def visible(folder: Path) -> list[Path]:
    """Files and folders in `folder` that are not hidden, by name; none where there is no folder."""
    if not folder.is_dir():
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if not is_hidden(name)]


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, by name."""
    return [path for path in visible(folder) if path.is_dir()]


def files_below(folder: Path) -> list[Path]:
    """Visible files in and below `folder`, in lexicographic order of their path parts.

    Links to folders are followed, each real folder once.
    """
    return sorted(_walk(folder), key=lambda path: path.parts)


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(parent, name) for name in files if not is_hidden(name))
