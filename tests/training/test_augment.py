"""What happens to images in training, against formulas written out here."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from efficientad.training.pictures import (
    OPERATIONS,
    augmented,
    center_crop,
    gray,
    jitter,
    penalty_photo,
)


def picture(height=32, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_hand(image, operation, factor):
    """torchvision's definitions for float images, pixel by pixel in float64."""
    x = image.astype(np.float64) / 255
    luma = 0.2989 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    other = {
        "brightness": np.zeros_like(x),
        "contrast": np.full_like(x, luma.mean()),
        "saturation": np.repeat(luma[..., None], 3, 2),
    }[operation]
    return np.clip(factor * x + (1 - factor) * other, 0, 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_operations_equal_their_formulas(operation, factor):
    image = picture()
    x = image.astype(np.float32) / 255
    found = jitter(x, operation, factor)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(image, operation, factor), atol=1e-6)
    np.testing.assert_array_equal(x, image.astype(np.float32) / 255)  # the image is left alone


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match="'hue'"):
        jitter(np.zeros((2, 2, 3), np.float32), "hue", 1.0)


def test_exactly_one_operation_with_a_factor_of_the_range():
    """The factor of each operation by least squares; one operation, and only one, fits."""
    image = (picture(seed=1) // 4 + 90).astype(np.uint8)  # nothing is clipped
    x = image.astype(np.float64) / 255
    counts, factors = dict.fromkeys(OPERATIONS, 0), []
    for i in range(300):
        found = augmented(image, np.random.default_rng(i))
        fits = []
        for operation in OPERATIONS:
            other = by_hand(image, operation, 0.0)
            factor = ((found - other) * (x - other)).sum() / ((x - other) ** 2).sum()
            if np.abs(factor * x + (1 - factor) * other - found).max() < 1e-5:
                fits.append((operation, factor))
        assert len(fits) == 1
        counts[fits[0][0]] += 1
        factors.append(fits[0][1])
    assert all(70 <= n <= 130 for n in counts.values()), counts
    assert 0.8 - 1e-4 <= min(factors) < 0.81
    assert 1.19 < max(factors) <= 1.2 + 1e-4
    assert abs(np.mean(factors) - 1) < 0.02


def test_grey_is_pillows():
    image = picture()
    luma = np.asarray(Image.fromarray(image).convert("L"))
    assert np.array_equal(gray(image), np.stack([luma] * 3, 2))


def test_centre_crop():
    image = picture(512, 512)
    assert np.array_equal(center_crop(image, (256, 256)), image[128:384, 128:384])
    assert np.array_equal(center_crop(image[:9, :8], (4, 4)), image[2:6, 2:6])


def test_photo_is_resized_to_512_and_its_middle_taken():
    photo = picture(300, 401, seed=2)
    resized = np.asarray(Image.fromarray(photo).resize((512, 512), Image.Resampling.BILINEAR))
    middle = resized[128:384, 128:384]
    grey = np.asarray(Image.fromarray(resized).convert("L"))[128:384, 128:384]
    kinds = set()
    for i in range(12):
        found = penalty_photo(photo, (256, 256), np.random.default_rng(i))
        assert found.flags.c_contiguous
        is_grey = np.array_equal(found, np.stack([grey] * 3, 2))
        assert is_grey or np.array_equal(found, middle)
        kinds.add(is_grey)
    assert kinds == {True, False}


def test_three_photos_in_ten_are_grey():
    photo = picture(8, 8)
    count = 4000
    grey = 0
    for i in range(count):
        found = penalty_photo(photo, (4, 4), np.random.default_rng(i))
        grey += bool((found[..., 0] == found[..., 1]).all())
    assert abs(grey / count - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
