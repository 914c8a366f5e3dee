"""The global term: distances, what they add, and what it goes with."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import efficientad as ead
from efficientad.model.global_term import GlobalTerm, HiddenTerm, fitted, line_of, student_means

pytestmark = pytest.mark.usefixtures("light_networks")


def some_means(count: int = 40) -> torch.Tensor:
    """(count, 384) with channels of unlike variances that go together."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, 384, generator=generator) * torch.linspace(0.1, 2, 384)
    return mixed + mixed.roll(1, 1) + 3


def ledoit_wolf(x: np.ndarray) -> np.ndarray:
    """The covariance of rows as their paper has it, term by term."""
    y = x - x.mean(0)
    sample = y.T @ y / len(y)
    target = np.trace(sample) / len(sample) * np.eye(len(sample))
    distance = ((sample - target) ** 2).sum()
    noise = sum(((np.outer(row, row) - sample) ** 2).sum() for row in y) / len(y) ** 2
    share = min(noise, distance) / distance
    assert 0.05 < share < 1
    return share * target + (1 - share) * sample


def test_the_distance_is_mahalanobis_of_the_shrunk_covariance():
    means = some_means()
    term, x = fitted(means), means.double().numpy()
    others = some_means(45)[40:]
    away = others.double().numpy() - x.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(ledoit_wolf(x)), away))
    np.testing.assert_allclose(term.distance(others), expected, rtol=1e-4)
    assert not term(others).any()  # no line yet


def test_images_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="good images are all alike"):
        fitted(torch.ones(30, 384))


def test_the_line_makes_deviations_weigh_the_same():
    distances, scores = [10.0, 14.0, 12.0, 16.0], [0.01, 0.05, 0.02, 0.04]
    slope, start = line_of(distances, scores, slope_of_map=0.5)
    assert start == 13
    assert slope * 0.5 * np.std(distances) == pytest.approx(np.std(scores))
    assert line_of([5.0, 5.0], [0.1, 0.2], 0.5) == (0, 0)


@torch.no_grad()
def test_it_raises_the_students_map_of_odd_images_and_no_other():
    detector, images = helpers.detector_with_term(), helpers.images(4)
    images[3] = 1 - images[3]
    term, features = detector.global_term, detector.student(detector.normalize(images))
    distance = term.distance(features[:, :384].mean((2, 3)))
    slope, start = term.line.tolist()
    added = slope * (distance - start).clamp(min=0)
    assert added[3] > added[:3].max() > 0
    found = detector(images)
    detector.set_global_term(None)
    plain = detector(images)
    torch.testing.assert_close(found.map_st, plain.map_st + added[:, None, None])
    assert torch.equal(found.map_ae, plain.map_ae)
    raised = plain.score + detector.affine[0] * added
    torch.testing.assert_close(found.score, raised, rtol=1e-5, atol=1e-6)
    below = helpers.detector_with_term()
    below.global_term.set_line(1.0, 1e6)
    assert torch.equal(below(images).score, plain.score)


@pytest.mark.parametrize("size", ["S", "M"])
@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_from_hidden_features_it_is_the_same(size, padding):
    detector = ead.EfficientAD(size, padding=padding)
    means = some_means()
    term = fitted(means)
    term.set_line(0.7, 1.0)
    detector.set_global_term(term)
    inner = torch.rand(2, detector.student.last.in_channels, 21, 30)
    expected = term(student_means(torch.nn.functional.conv2d(
        inner, detector.student.last.weight, detector.student.last.bias
    )))  # fmt: skip
    whole = HiddenTerm(detector.student, term, torch.device("cpu"))
    found = whole(inner.permute(0, 2, 3, 1))
    assert expected.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    term.set_line(0.35, 1.0)
    whole.reload(detector.student, term)
    torch.testing.assert_close(whole(inner.permute(0, 2, 3, 1)), expected / 2, rtol=1e-4, atol=0)


def test_it_goes_with_no_region():
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[:100] = True
    detector = helpers.detector_with_term()
    with pytest.raises(ValueError, match="a region or a global term, not both"):
        detector.set_region(region)
    detector.set_region(None)
    other = helpers.detector()
    other.set_region(region)
    with pytest.raises(ValueError, match="a region or a global term, not both"):
        other.set_global_term(detector.global_term)
    assert other.global_term is None


def test_another_term_clears_the_threshold():
    detector = helpers.detector()
    detector.threshold = 0.5
    detector.provenance["calibration"] = {}
    detector.set_global_term(GlobalTerm())
    assert detector.threshold is None
    assert "calibration" not in detector.provenance


def test_casts_leave_it_in_float32():
    detector = helpers.detector_with_term()
    assert detector.half().global_term.whitening.dtype == torch.float32
    assert detector.double().global_term.mean.dtype == torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for i, pixels in enumerate(helpers.frames(3, seed=3)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.usefixtures("unmeasured")
def test_calibration_sets_its_line_and_a_threshold_from_scores_with_it(folder):
    detector = helpers.detector_with_term(slope=5.0)
    ead.calibrate(detector, folder)
    plain = helpers.detector_with_term()
    plain.set_global_term(None)
    ead.calibrate(plain, folder)
    assert torch.equal(detector.quantiles, plain.quantiles)
    paths = sorted(folder.iterdir())
    scores = [p.score for p in ead.predict(detector, paths)]
    without = [p.score for p in ead.predict(plain, paths)]
    images = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in paths])
    with torch.no_grad():
        x = detector.normalize(images.permute(0, 3, 1, 2).float() / 255)
        distances = detector.global_term.distance(student_means(detector.student(x))).numpy()
    gain = np.std(without) / np.std(distances) * np.clip(distances - distances.mean(), 0, None)
    np.testing.assert_allclose(scores, without + gain, rtol=1e-3, atol=1e-5)
    assert detector.threshold == pytest.approx(max(scores), rel=1e-5)


@pytest.mark.usefixtures("unmeasured")
def test_a_calibration_that_fails_leaves_its_line(tmp_path):
    detector = helpers.detector_with_term()
    before = detector.global_term.line.clone()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"could be read|cannot be decoded"):
        ead.calibrate(detector, tmp_path, on_error=lambda *_: None)
    assert torch.equal(detector.global_term.line, before)
