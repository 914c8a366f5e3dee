"""The demonstration's drawn parts and its closed-form fit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from efficientad.demo_fit import Ridge, closed_form_detector
from efficientad.demo_parts import DEFECTS, draw_part, write_dataset


def rng(*key):
    return np.random.default_rng(key)


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_layout_and_determinism(tmp_path):
    counts = {"train": 2, "good": 1, "per_defect": 1}
    a = write_dataset(tmp_path / "a", **counts, size=(128, 160))
    b = write_dataset(tmp_path / "b", train=3, good=1, per_defect=1, size=(128, 160))
    c = write_dataset(tmp_path / "c", **counts, size=(128, 160), seed=1)
    first, second, third = digest(a), digest(b), digest(c)
    names = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
    for defect in DEFECTS:
        names |= {f"test/{defect}/000.png", f"ground_truth/{defect}/000_mask.png"}
    assert set(first) == names
    assert first.items() <= second.items()  # other counts change nothing
    assert all(first[name] != third[name] for name in names if "truth" not in name)
    with Image.open(a / "train/good/000.png") as image:
        assert (image.mode, image.size) == ("RGB", (160, 128))


def test_good_parts_vary_a_little_and_have_no_mask():
    pictures = []
    for i in range(3):
        picture, mask = draw_part(rng(1, i))
        assert mask.getbbox() is None
        pictures.append(np.asarray(picture, dtype=np.float32))
    for a, b in ((0, 1), (1, 2)):
        assert 1 < np.abs(pictures[a] - pictures[b]).mean() < 12


@pytest.mark.parametrize("defect", DEFECTS)
def test_masks_cover_the_defect(defect):
    """The same random stream without the defect is not the same part, so compare with many."""
    for i in range(6):
        picture, mask = draw_part(rng(2, i), defect)
        found = np.asarray(mask)
        assert found.shape == (320, 320)
        assert set(np.unique(found)) == {0, 255}
        left, top, right, bottom = mask.getbbox()
        assert 30 <= left < right <= 290
        assert 50 <= top < bottom <= 270
        assert 0.0005 < (found > 0).mean() < 0.04
    good = np.stack([np.asarray(draw_part(rng(3, i))[0], np.float32) for i in range(6)])
    gap = np.abs(np.asarray(picture, np.float32) - good.mean(0)).mean(2)
    assert gap[found > 0].mean() > 2 * gap[found == 0].mean()


def test_size_is_height_then_width():
    picture, mask = draw_part(rng(4), "stain", (96, 200))
    assert picture.size == mask.size == (200, 96)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="defect is 'rust'"):
        draw_part(rng(0), "rust")
    for options in ({"train": -1}, {"seed": -1}, {"size": (8, 64)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            write_dataset(tmp_path, **options)


def test_ridge_is_ridge_regression():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=g) * 2 + 30
    y = x @ torch.randn(12, 3, generator=g) - 7 + 0.1 * torch.randn(500, 3, generator=g)
    ridge = Ridge()
    for part_x, part_y in zip(x.split(130), y.split(130), strict=True):
        ridge.add(part_x, part_y)
    weight, bias = ridge.solve(0.3)
    xc, yc = (v.double() - v.double().mean(0) for v in (x, y))
    gram = xc.T @ xc
    penalty = 0.3 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    wanted = torch.linalg.solve(gram + penalty, xc.T @ yc).T
    torch.testing.assert_close(weight, wanted, atol=1e-5, rtol=1e-5)
    at_mean = weight @ x.double().mean(0) + bias
    torch.testing.assert_close(at_mean, y.double().mean(0), atol=1e-4, rtol=1e-5)


def parts(*keys, defect=None):
    pictures = [np.array(draw_part(rng(*key), defect, (256, 256))[0]) for key in keys]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def fitted():
    return closed_form_detector(parts(*[(10, i) for i in range(5)]).split(2), seed=3)


def test_fit_sets_statistics_and_leaves_calibration_open(fitted):
    assert fitted.has_statistics
    assert not fitted.calibrated
    assert fitted.threshold is None
    assert not fitted.training
    assert "demonstration" in fitted.provenance["fit"]
    features = fitted.teacher(fitted.normalize(parts((10, 0), (10, 1))))
    normalised = (features - fitted.teacher_mean) / fitted.teacher_std
    assert normalised.square().mean().item() == pytest.approx(1, abs=0.2)
    assert (fitted.teacher_std > 0).all()
    assert not torch.allclose(fitted.teacher.conv1.weight, fitted.student.conv1.weight)


@torch.no_grad()
def test_fit_finds_plain_defects_and_not_good_parts(fitted):
    good = fitted.distance_maps(parts((20, 0), (20, 1)))
    hole = fitted.distance_maps(parts((20, 2), (20, 3), defect="missing_hole"))
    swap = fitted.distance_maps(parts((20, 4), (20, 5), defect="wrong_order"))
    stain = fitted.distance_maps(parts((20, 6), (20, 7), defect="stain"))
    for maps in (good, hole, swap, stain):
        assert all(torch.isfinite(m).all() for m in maps)
    ceiling = good[1].amax((1, 2)).max()
    assert (hole[1].amax((1, 2)) > ceiling).all()
    assert (swap[1].amax((1, 2)) > ceiling).all()
    for i, found in enumerate(stain[0]):
        mask = np.asarray(draw_part(rng(20, 6 + i), "stain", (256, 256))[1])
        cells = torch.from_numpy(mask[16:240:4, 16:240:4] > 0)  # a cell's centre is at 4 i + 16
        assert found[cells].mean() > 1.5 * good[0][:, cells].mean()


@torch.no_grad()
def test_student_imitates_the_two_others_on_good_parts(fitted):
    x = fitted.normalize(parts((20, 0)))
    teacher = (fitted.teacher(x) - fitted.teacher_mean) / fitted.teacher_std
    picture = fitted.autoencoder(x)
    first, second = fitted.student(x).chunk(2, 1)
    assert (first - teacher).square().mean() < 0.6 * teacher.square().mean()
    assert (second - picture).square().mean() < 0.3 * picture.square().mean()


def test_fit_is_deterministic_and_takes_a_teacher(fitted):
    """The fitted teacher handed back in gives the same detector: one run shows both."""
    images = parts(*[(10, i) for i in range(5)])
    again = closed_form_detector(images, seed=3, teacher=fitted.teacher.state_dict())
    for name, x in fitted.state_dict().items():
        y = again.state_dict()[name]
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(1, 3, 256, 256), "N >= 2"),
        (torch.zeros(2, 3, 256, 320), "256, 256"),
        ([], "good_images has shape"),
        (torch.zeros(2, 3, 256, 256, dtype=torch.uint8), "good_images has dtype"),
    ],
)
def test_fit_names_bad_images(images, text):
    with pytest.raises(ValueError, match=text):
        closed_form_detector(images)
