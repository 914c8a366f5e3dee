"""What a file is that is not what it should be: told by its first bytes, never by its name."""

from __future__ import annotations

import os

HEAD = 4096  # bytes that `kind_of` looks at

_STARTS = (
    (b"version https://git-lfs", "a git-LFS pointer and not the file itself: run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer and not the file itself: run `git annex get`"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image or a camera's raw file"),
    (b"MM\0*", "a TIFF image or a camera's raw file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"8BPS", "a Photoshop document"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"#?RADIANCE", "a Radiance HDR image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file"),
)
_BRANDS = {
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"crx ": "a camera's raw file",
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC image"
    ),
}
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script")


def kind_of(head: bytes, size: int) -> str | None:
    """What a file of `size` bytes is that begins with `head`: "a web page ..."; None: unknown."""
    if size == 0:
        return "empty (0 bytes)"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head[:4] == b"RIFF":
        return "a WebP image" if head[8:12] == b"WEBP" else "a video"
    if head[128:132] == b"DICM":
        return "a DICOM file"
    if not any(head):
        return "nothing but zeros where it begins: its copy was cut short"
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_HTML) or (start.startswith(b"<?xml") and b"<html" in start):
        return "a web page saved as a file: download the file itself again"
    if b"<svg" in start and start.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        return "an SVG drawing"
    if start.startswith(b"<?xml"):
        return "an XML text, perhaps the error that a server answered"
    if start.startswith((b"{", b"[")):
        return "a JSON text, perhaps the error that a server answered"
    try:
        text = head.decode("utf-8", "strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    printable = all(sign.isprintable() or sign in "\r\n\t" for sign in text)
    return "a text" if printable else None


def kind_of_file(path: str | os.PathLike) -> str | None:
    """`kind_of` a file on the disk. OSError where it cannot be read."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        return kind_of(head, len(head))
