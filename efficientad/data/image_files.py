"""Which files are images, which pictures are not read, and what names of folders say of them."""

from __future__ import annotations

import os
import re
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
_PARTS = frozenset(
    ("train", "test", "groundtruth", "testpublic", "testprivate", "testprivatemixed")
)
GOOD_NAMES = frozenset(
    "good ok okay normal io pass passed fine healthy nominal intact flawless gut "
    "nodefect nodefects defectfree nondefective notdefective withoutdefect withoutdefects "
    "noanomaly anomalyfree nonanomalous".split()
)
# Words in the name of a folder by which not all images below it are good.
_NOT_GOOD = frozenset(
    "abnormal anomalies anomalous anomaly bad broken damaged def defect defective defects error "
    "errors fail failed failure fault faults faulty flaw flawed flaws ko mask masks ng nio nok "
    "reject rejected rejects scrap".split()
)
_NEGATIONS = frozenset("no non not nicht un without".split())
_NEARLY = frozenset(("good", "ok", "okay", "normal"))


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


def plain_name(name: str) -> str:
    """A name without case and separators: "groundtruth" of "Ground-Truth" and "ground_truth"."""
    return re.sub(r"[ _.-]+", "", name.casefold())


def words(name: str) -> frozenset[str]:
    """The words of a name, in lower case."""
    return frozenset(re.split(r"[^a-z]+", name.lower())) - {""}


def is_good_name(name: str) -> bool:
    """Whether a folder or label so named stands for good images: "good", "OK", "defect-free"."""
    return plain_name(name) in GOOD_NAMES


def is_nearly_good_name(name: str) -> bool:
    """Whether a name holds a word for good images and more, and could mean either: "ok_front"."""
    found = words(name)
    return not is_good_name(name) and bool(found & _NEARLY) and not found & (_NOT_GOOD | _NEGATIONS)


def says_not_good(name: str) -> bool:
    """Whether a folder so named is a part of a data set, or not all images below it are good."""
    if is_good_name(name):
        return False
    return plain_name(name) in _PARTS or not words(name).isdisjoint(_NOT_GOOD)
