"""The global term at training: solved from the training images, refused where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_training import thin_detector, write_pictures

import efficientad as ead
from efficientad.model.global_term import student_means
from efficientad.training import closed_form, whole_images
from efficientad.training.closed_form import GAINS
from efficientad.training.pictures import TrainingImages, to_rgb
from efficientad.utils.sampling import random_numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("good") / "good", 26)


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setattr(
        "efficientad.training.fitting.new_detector",
        lambda size, padding, image_size, seed, teacher: thin_detector(seed=seed),
    )


@torch.no_grad()
def test_it_is_solved_from_images_of_changed_brightness(folder, monkeypatch):
    monkeypatch.setattr(whole_images, "check_images", lambda count: None)
    detector, given = thin_detector(seed=3).eval(), []
    monkeypatch.setattr(whole_images, "fitted", given.append)
    images = TrainingImages(sorted(folder.iterdir())[:3], detector.image_size)
    for _ in range(2):
        whole_images.solve_term(detector, images, seed=5)
    assert torch.equal(given[0], given[1])
    for i, found in enumerate(given[0]):
        gain = float(random_numbers(5, "global term", i).uniform(*GAINS))
        image = (to_rgb(torch.tensor(images[i])[None], torch.device("cpu")) * gain).clamp(0, 1)
        expected = student_means(detector.student(detector.normalize(image)))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("thin", "unmeasured")
def test_fit_keeps_it(folder, monkeypatch):
    """Images unlike the good ones score higher than without it."""
    monkeypatch.setattr(closed_form, "CELLS", 3000)
    options = {"schedule": "instant", "workers": 0, "threads": 1}
    detector, plain = (ead.fit(folder, global_term=term, **options) for term in (True, False))
    assert plain.global_term is None
    assert torch.equal(detector.quantiles, plain.quantiles)
    assert detector.global_term.line[0] > 0
    good = sorted(folder.iterdir())
    odd = np.full((40, 50, 3), (10, 200, 30), dtype=np.uint8)
    scores, without = (
        [p.score for p in ead.predict(d, [*good, odd])] for d in (detector, plain)
    )  # fmt: skip
    gains = np.subtract(scores, without)
    assert gains.min() > -1e-6
    assert gains[-1] > 5 * gains[:-1].max()


def test_what_it_does_not_go_with_is_said_before_the_work(folder, tmp_path):
    few = write_pictures(tmp_path / "few", 12)
    with pytest.raises(ValueError, match="global_term needs at least 20 good images"):
        ead.fit(few, schedule="instant", global_term=True)
    region = np.zeros((40, 50), dtype=bool)
    region[10:30] = True
    with pytest.raises(ValueError, match="a region or a global term, not both"):
        ead.fit(folder, schedule="instant", global_term=True, region=region)
    with pytest.raises(ValueError, match="global_term is 'on'; it must be"):
        ead.fit(folder, schedule="instant", global_term="on")
