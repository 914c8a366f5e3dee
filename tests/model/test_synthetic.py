"""The images that files and kernels test themselves on."""

from efficientad.model.synthetic import golden_image


def test_golden_image_is_fixed():
    image = golden_image()
    assert image.shape == (1, 3, 256, 256)
    assert (image.min(), image.max()) == (0, 1)
    assert int((image * 255).round().long().sum()) == 25_044_480
    assert image.std() > 0.2
