"""Which files are images, of those named and found in folders; which pictures are not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from efficientad.data.opening import HEIF_INSTALL, reads
from efficientad.utils.folders import files_below

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .tif .tiff .gif .webp .jp2 .j2k "
    ".ppm .pgm .pbm .pnm".split()
)
_HEIC = frozenset((".heic", ".heif", ".hif"))
_AVIF = frozenset((".avif",))
# Pictures by their suffix that are not read; of each kind how to say so.
_NOT_READ = {
    suffix: what
    for what, suffixes in (
        ("arrays", ".npy .npz .mat .h5 .hdf5 .exr .hdr .pfm"),
        (
            "raw files of cameras",
            ".raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .srw .x3f .3fr",
        ),
        (
            "videos",
            ".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .mjpeg .mjpg .flv .3gp",
        ),
        (
            "other kinds",
            ".psd .svg .pdf .eps .tga .ico .icns .pcx .sgi .xcf .jxl .jxr .wdp .dcm .dicom "
            ".fits .fit .czi .nd2 .lif .svs .vsi .ndpi .dds .xpm .xbm .emf .wmf .ecw .sid .mrsid",
        ),
    )
    for suffix in suffixes.split()
}


def is_image(path: Path) -> bool:
    """Whether the suffix is one of those that are read as images."""
    suffix = path.suffix.lower()
    if suffix in _HEIC:
        return reads("HEIC")
    return suffix in SUFFIXES or (suffix in _AVIF and reads("AVIF"))


def find_images(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Image files named by paths and found in folders, in a stable order.

    A named file is taken whatever its suffix. A folder is searched with its subfolders for the
    suffixes of SUFFIXES in any case, and for HEIC and AVIF where they can be read; its files come
    in lexicographic order of their path parts, and hidden files and folders and those of a system
    are skipped (see `utils.folders`). `left_out` says what else is there. FileNotFoundError names a
    path that does not exist, ValueError a folder without an image.
    """
    found: list[Path] = []
    for path in _as_paths(paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        if not path.is_dir():
            found.append(path)
            continue
        inside = [file for file in files_below(path) if is_image(file)]
        if not inside:
            others = "".join(f". {note}" for note in left_out(path))
            raise ValueError(
                f"no image in folder {path} (suffixes: {' '.join(sorted(SUFFIXES))}){others}"
            )
        found.extend(inside)
    return found


def left_out(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """A sentence that counts, by suffix, the pictures in folders that `find_images` passes over.

    Empty where there are none. Pictures are HEIC and AVIF where they cannot be read, arrays, raw
    files of cameras, videos and others that are known to hold pictures.
    """
    counts: Counter[str] = Counter()
    for path in _as_paths(paths):
        if path.is_dir():
            counts.update(
                file.suffix.lower() for file in files_below(path) if _is_unread_picture(file)
            )
    if not counts:
        return []
    listed = ", ".join(
        f"{number} {suffix} ({_why(suffix)})" for suffix, number in sorted(counts.items())
    )
    return [f"Pictures left out because their kind is not read: {listed}."]


def _as_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(p) for p in paths]


def _is_unread_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in _NOT_READ or (suffix in _HEIC | _AVIF and not is_image(path))


def _why(suffix: str) -> str:
    if suffix in _HEIC | _AVIF:
        return HEIF_INSTALL
    return _NOT_READ[suffix]
