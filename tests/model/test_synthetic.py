"""The images that files, exports and kernels test themselves on."""

import itertools

import torch

from efficientad.model.synthetic import golden_image, images


def test_golden_image_is_fixed():
    image = golden_image()
    assert image.shape == (1, 3, 256, 256)
    assert (image.min(), image.max()) == (0, 1)
    assert int((image * 255).round().long().sum()) == 25_044_480
    assert image.std() > 0.2


def test_images_have_structure_and_differ():
    pictures = images(8, 256, 300)
    assert pictures.shape == (8, 3, 256, 300)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert pictures.std() > 0.1
    assert min((a - b).abs().max() for a, b in itertools.pairwise(pictures)) > 0.1
    assert torch.equal(pictures, images(8, 256, 300))
