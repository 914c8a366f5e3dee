"""Which files are images, what is said of the others, and files that are something else."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from efficientad.data import opening
from efficientad.data.decoding import ImageError, image_shape, read_image
from efficientad.data.image_files import find_images, left_out
from efficientad.data.images import LeftOutWarning, as_sources
from efficientad.data.layouts import open_dataset

PICTURE = Image.fromarray(np.tile(np.arange(0, 240, 5, np.uint8), (30, 1)))


def test_find_images(tmp_path: Path) -> None:
    names = [
        "b/2.png",
        "b/10.JPG",
        "a.tiff",
        "b/.hidden.png",
        "b/._2.png",
        "b/Thumbs.db",
        ".git/x.png",
        "__MACOSX/b/2.png",
        "b/@eaDir/2.png",
        "$RECYCLE.BIN/$R1.png",
        "notes.txt",
        "b-c/1.bmp",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.tiff", "b/10.JPG", "b/2.png", "b-c/1.bmp"]
    named = [tmp_path / "notes.txt", str(tmp_path / "b")]
    assert [path.name for path in find_images(named)] == ["notes.txt", "10.JPG", "2.png"]
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_images(tmp_path)) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        find_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([tmp_path, tmp_path / "nowhere"])


@pytest.fixture
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither AVIF nor HEIC can be read."""
    for module in ("opening", "image_files"):
        monkeypatch.setattr(f"efficientad.data.{module}.reads", lambda kind: False)
    monkeypatch.setattr(opening, "formats", lambda: opening.FORMATS)


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_pictures_of_kinds_that_are_not_read_are_counted(tmp_path: Path, without_plugins) -> None:
    names = ("a.png", "b.HEIC", "c/d.heic", "e.avif", "f.npy", "g.CR2", "h.mp4", "i.dcm", "j.txt")
    root = folder(tmp_path / "x", *names, ".hidden.heic", "Thumbs.db")
    assert [path.name for path in find_images(root)] == ["a.png"]
    (note,) = left_out([root, root / "c"])
    install = "pip install 'efficientad[heif]' reads it"
    assert note == (
        f"Pictures left out because their kind is not read: 1 .avif ({install}), 1 .cr2 (raw files "
        f"of cameras), 1 .dcm (other kinds), 3 .heic ({install}), 1 .mp4 (videos), 1 .npy (arrays)."
    )
    assert left_out(root / "b.HEIC") == []  # named, so it is tried
    with pytest.raises(ValueError, match=r"no image in folder .*1 \.heic \(pip install"):
        find_images(root / "c")
    with pytest.warns(LeftOutWarning, match=r"2 \.heic"):
        assert len(list(as_sources(root))) == 1
    (root / "c" / "good.png").touch()
    assert left_out(root)[0] in open_dataset(root, "folder").notes


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", "a.png", "b.txt", "c.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(as_sources(root))) == 1
    assert open_dataset(root).notes == ()


def saved(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    PICTURE.convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_avif(tmp_path: Path, orientation: int) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "x" / "picture.avif"
    path.parent.mkdir()
    path.write_bytes(saved("AVIF", exif=exif, quality=100))
    assert find_images(path.parent) == [path]
    assert left_out(path.parent) == []
    turned = np.rot90(np.asarray(PICTURE), {1: 0, 3: 2, 6: -1}[orientation])
    pixels = read_image(path)
    assert pixels.shape[:2] == turned.shape == image_shape(path).size
    assert np.abs(pixels[..., 0].astype(int) - turned).max() <= 8


def test_heic_under_any_name(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif: pip install -e '.[heif]'")
    assert opening.reads("HEIC")
    data = saved("HEIF", quality=95)
    for name in ("x/a.heic", "x/b.jpg", "x/c.HIF"):
        folder(tmp_path, name).joinpath(name).write_bytes(data)
    paths = find_images(tmp_path / "x")
    assert [path.name for path in paths] == ["a.heic", "b.jpg", "c.HIF"]
    for path in paths:
        error = read_image(path)[..., 0].astype(int) - np.asarray(PICTURE)
        assert np.abs(error).max() <= 8


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"/annex/objects/MD5E-s3--0.jpg\n", "git annex get"),
        (b"<!DOCTYPE html><title>Virus scan warning</title>", "a web page saved as a file"),
        (b"\xef\xbb\xbf\r\n<HTML><body>404</body>", "a web page saved as a file"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text"),
        (HEIC, "it is a HEIC image; pip install 'efficientad[heif]' reads it"),
        (HEIC.replace(b"heic", b"avif"), "it is an AVIF image; pip install"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "it is a video"),
        (bytes(5000), "nothing but zeros where it begins"),
        (b"PK\x03\x04" + bytes(40), "it is a zip archive"),
        (b"%PDF-1.7\n", "it is a PDF document"),
        (b"\x93NUMPY\x01\0", "it is a NumPy file"),
        (b"\x89PNG\n\x1a\n" + bytes(40), "it is a PNG image"),  # sent as a text
        (b"\x01\x02\x03\x04", "not an image file we know"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, without_plugins, data: bytes, reason: str
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError) as caught:
            read_image(source)
        assert reason in caught.value.reason
