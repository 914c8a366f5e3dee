"""Colour profiles of pictures: applied where they say something, said where they cannot be."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers_images import ADOBE_RGB, SRGB, as_srgb, encoded, icc_profile, tiff
from PIL import Image, ImageCms

from efficientad.data.decoding import read_image
from efficientad.data.remarks import picture_notes
from efficientad.fast.frame_inputs import read_frame

RNG = np.random.default_rng(5)
COLOURS = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
GREY = np.repeat(np.arange(256, dtype=np.uint8)[None], 3, axis=0)
GREY3 = np.repeat(GREY[..., None], 3, axis=2)
ADOBE, GREY_18 = icc_profile(2.2, ADOBE_RGB), icc_profile(1.8)
ALPHA = np.full((40, 30, 1), 90, np.uint8)
LEVELS_OFF = 2  # LittleCMS computes with 8-bit levels in fixed point

COLOUR_SOURCES = {
    "PNG": encoded(Image.fromarray(COLOURS), icc_profile=ADOBE),
    "TIFF": encoded(Image.fromarray(COLOURS), "TIFF", icc_profile=ADOBE),
    "a Pillow image": Image.open(io.BytesIO(encoded(Image.fromarray(COLOURS), icc_profile=ADOBE))),
    "lossless WebP": encoded(Image.fromarray(COLOURS), "WEBP", icc_profile=ADOBE, lossless=True),
    "RGBA": encoded(Image.fromarray(np.dstack([COLOURS, ALPHA])), icc_profile=ADOBE),
    "16-bit TIFF": tiff(COLOURS.astype(np.uint16) * 257, photometric="rgb", iccprofile=ADOBE),
}
GREY_SOURCES = {
    "PNG": encoded(Image.fromarray(GREY), icc_profile=GREY_18),
    "grey and alpha": encoded(Image.fromarray(GREY).convert("LA"), icc_profile=GREY_18),
    "16 bits": encoded(Image.fromarray(GREY.astype(np.uint16) * 257), icc_profile=GREY_18),
    "16-bit TIFF": tiff(GREY.astype(np.uint16) * 257, iccprofile=GREY_18),
}


@pytest.mark.parametrize("kind", COLOUR_SOURCES)
def test_colours_become_srgb(kind: str) -> None:
    found = read_image(COLOUR_SOURCES[kind])
    wanted = as_srgb(COLOURS, 2.2, ADOBE_RGB)
    assert np.abs(found - wanted).max() <= LEVELS_OFF
    assert np.abs(found.astype(int) - COLOURS).max() > 20  # the profile says something
    np.testing.assert_array_equal(read_frame(COLOUR_SOURCES[kind]), found)


@pytest.mark.parametrize("kind", GREY_SOURCES)
def test_grey_becomes_srgb(kind: str) -> None:
    found = read_image(GREY_SOURCES[kind])
    assert np.abs(found - as_srgb(GREY3, 1.8)).max() <= LEVELS_OFF
    assert np.abs(found.astype(int) - GREY3).max() > 15
    assert (found == found[..., :1]).all()


def test_palettes_are_looked_up_first() -> None:
    indexed = Image.fromarray(COLOURS // 64 * 64).quantize(64)
    plain = np.asarray(indexed.convert("RGB"))
    found = read_image(encoded(indexed, icc_profile=ADOBE))
    assert np.abs(found - as_srgb(plain, 2.2, ADOBE_RGB)).max() <= LEVELS_OFF


def test_a_jpeg_is_converted_after_it_is_decoded() -> None:
    picture = Image.fromarray(COLOURS).resize((90, 120))
    plain = read_image(encoded(picture, "JPEG", quality=95))
    found = read_image(encoded(picture, "JPEG", quality=95, icc_profile=ADOBE))
    assert np.abs(found - as_srgb(plain, 2.2, ADOBE_RGB)).max() <= LEVELS_OFF


SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
STORED = {
    "sRGB": (Image.fromarray(COLOURS), SRGB_PROFILE, None),
    "grey with the sRGB of colours": (Image.fromarray(GREY), SRGB_PROFILE, None),
    "colours with a grey profile": (Image.fromarray(COLOURS), GREY_18, "cannot be applied"),
    "grey with a colour profile": (Image.fromarray(GREY), ADOBE, "cannot be applied"),
    "Lab": (Image.fromarray(COLOURS), LAB_PROFILE, "cannot be applied"),
    "damaged": (Image.fromarray(COLOURS), ADOBE[:150], "cannot be applied"),
    "no profile at all": (Image.fromarray(COLOURS), b"profile", "cannot be applied"),
    "applied": (Image.fromarray(COLOURS), ADOBE, "converted to sRGB"),
    "applied to grey": (Image.fromarray(GREY), GREY_18, "converted to sRGB"),
}


@pytest.mark.parametrize("kind", STORED)
def test_what_is_not_applied_stays_and_is_said(kind: str, tmp_path: Path) -> None:
    picture, profile, said = STORED[kind]
    path = tmp_path / "a.png"
    picture.save(path, icc_profile=profile)
    stored = np.asarray(picture.convert("RGB"))
    assert np.array_equal(read_image(path), stored) == ("applied" not in kind)
    notes = picture_notes([path])
    assert len(notes) == (said is not None)
    assert said is None or (said in notes[0] and notes[0].endswith(": a.png."))


def test_primaries_of_srgb_with_gamma_2_2_are_not_srgb() -> None:
    source = encoded(Image.fromarray(GREY3), icc_profile=icc_profile(2.2, SRGB))
    found = read_image(source)
    assert np.abs(found - as_srgb(GREY3, 2.2, SRGB)).max() <= LEVELS_OFF
    assert np.abs(found.astype(int) - GREY3).max() > 2


def test_cmyk_with_a_profile_of_another_kind_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    cmyk = Image.fromarray(COLOURS).convert("CMYK")
    cmyk.save(path, icc_profile=ADOBE)
    np.testing.assert_array_equal(read_image(path), np.asarray(cmyk.convert("RGB")))
    (note,) = picture_notes([path])
    assert "cannot be applied" in note


def test_cmyk_of_16_bits_is_not_taken_for_rgb() -> None:
    cmyk = np.asarray(Image.fromarray(COLOURS).convert("CMYK"))
    found = read_image(tiff(cmyk.astype(np.uint16) * 257, photometric="separated"))
    np.testing.assert_array_equal(found, read_image(tiff(cmyk, photometric="separated")))


def test_a_transform_is_shared_by_threads() -> None:
    sources = list(COLOUR_SOURCES.values())[:2] * 20
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_image, sources))
    for pixels in found[1:]:
        np.testing.assert_array_equal(pixels, found[0])


def test_without_littlecms_numbers_stay_and_it_is_said(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.png"
    profile = icc_profile(2.3, ADOBE_RGB)  # of no other test: transforms are kept
    Image.fromarray(COLOURS).save(path, icc_profile=profile)
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    monkeypatch.delattr("PIL.ImageCms", raising=False)
    np.testing.assert_array_equal(read_image(path), COLOURS)
    (note,) = picture_notes([path])
    assert "cannot be applied" in note
