"""The demonstration: its drawn parts, its detector, its report."""

from __future__ import annotations

import hashlib

import helpers_training
import numpy as np
import pytest
from PIL import Image

from efficientad.demo import walkthrough as demo
from efficientad.demo.parts import DEFECTS, draw_part, write_dataset


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


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(ValueError, match=r"out is .*holds other files \(holiday.txt\)"):
        demo.run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.txt"]


def few_parts(root, *, seed):
    return write_dataset(root, train=5, good=2, per_defect=1, seed=seed)


def test_the_demo_from_parts_to_report_and_again(tmp_path, monkeypatch):
    """With thin networks; an interrupted demo leaves its parts, and the next one goes on."""
    kept = {}
    monkeypatch.setattr(
        "efficientad.training.fitting.new_detector",
        lambda size, padding, image_size, seed, teacher: helpers_training.thin_detector(),
    )
    monkeypatch.setattr(demo, "write_dataset", few_parts)
    monkeypatch.setattr(demo, "save", lambda detector, path: kept.update({str(path): detector}))
    monkeypatch.setattr(demo, "load", lambda path: kept[str(path)])
    few_parts(tmp_path / "parts", seed=0)
    result = demo.run(tmp_path)
    assert result.metrics["images"] == 2 + len(DEFECTS)
    assert {f"image AU-ROC, {defect}" for defect in DEFECTS} <= set(result.metrics)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "no gradient step" in page  # the note about what this is
    training = kept[str(tmp_path / "detector.safetensors")].provenance["training"]
    assert training["schedule"] == "instant"


@pytest.mark.slow
def test_the_demo_makes_a_detector_that_detects(tmp_path):
    """All kinds are found, and in their place."""
    result = demo.run(tmp_path / "demo")
    assert result.metrics["image AU-ROC"] >= 0.98
    for defect in DEFECTS:
        assert result.metrics[f"image AU-ROC, {defect}"] > 0.95, defect
    assert result.metrics["pixel AU-ROC"] > 0.9
