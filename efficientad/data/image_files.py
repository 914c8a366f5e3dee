"""Which files are images: those named, and those found in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from efficientad.utils.folders import files_below

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .tif .tiff .gif .webp .jp2 .j2k "
    ".ppm .pgm .pbm .pnm".split()
)


def find_images(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Image files named by paths and found in folders, in a stable order.

    A named file is taken whatever its suffix. A folder is searched with its subfolders for the
    suffixes of SUFFIXES in any case; its files come in lexicographic order of their path parts, and
    hidden files and folders and those of a system are skipped (see `utils.folders`).
    FileNotFoundError names a path that does not exist, ValueError a folder without an image.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        if not path.is_dir():
            found.append(path)
            continue
        inside = [file for file in files_below(path) if is_image(file)]
        if not inside:
            raise ValueError(f"no image in folder {path} (suffixes: {' '.join(sorted(SUFFIXES))})")
        found.extend(inside)
    return found


def is_image(path: Path) -> bool:
    """Whether the suffix is one of those that are read as images."""
    return path.suffix.lower() in SUFFIXES
