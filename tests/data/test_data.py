"""Layouts of data sets, the validation split and masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientad.data.datasets import DataSet, Sample, Saturation, split_validation
from efficientad.data.decoding import image_size
from efficientad.data.images import load_batches
from efficientad.data.layouts import open_dataset


def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 8), mark: int = 0) -> Path:
    """A grey image of (height, width); `mark` fills its top left 2 x 3 pixels."""
    pixels = np.full(size, value, np.uint8)
    if mark:
        pixels[:2, :3] = mark
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def mvtec(root: Path, train: int = 20) -> Path:
    for i in range(train):
        write(root / f"train/good/{i:03}.png")
    for i in range(2):
        write(root / f"test/good/{i:03}.png")
        write(root / f"test/scratch/{i:03}.png")
        write(root / f"ground_truth/scratch/{i:03}_mask.png", size=(12, 16), mark=255)
    return root


def loco(root: Path) -> Path:
    for part in ("train", "validation", "test"):
        write(root / part / "good/000.png")
    write(root / "test/logical_anomalies/000.png")
    write(root / "ground_truth/logical_anomalies/000/000.png", mark=255)
    write(root / "ground_truth/logical_anomalies/000/001.png", size=(6, 8), mark=0)
    second = np.zeros((6, 8), np.uint8)
    second[4:, 2:] = 254
    Image.fromarray(second).save(root / "ground_truth/logical_anomalies/000/001.png")
    rules = [("missing", 255, 4, False), ("extra", 254, 0.25, True)]
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    config = [dict(zip(keys, rule, strict=True)) for rule in rules]
    (root / "defects_config.json").write_text(json.dumps(config))
    return root


def visa(root: Path) -> Path:
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        for i in range(12):
            image = write(root / name / f"Data/Images/Normal/{i:04}.JPG").relative_to(root)
            rows.append(f"{name},{'train' if i < 10 else 'test'},normal,{image.as_posix()},")
        image = write(root / name / "Data/Images/Anomaly/000.JPG").relative_to(root)
        mask = write(root / name / "Data/Masks/Anomaly/000.png", mark=3).relative_to(root)
        rows.append(f"{name},test,anomaly,{image.as_posix()},{mask.as_posix()}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.path.name for sample in samples]


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 209, 320])
def test_split_is_the_published_one(n: int) -> None:
    samples = [Sample(Path(f"{i:03}")) for i in range(n)]
    train, validation = split_validation(samples)
    assert validation
    if n == 1:
        assert train == validation == tuple(samples)
        return
    # nelson1425: random_split of int(0.9 N) and the rest, generator seed 42.
    count = int(0.9 * n)
    generator = torch.Generator().manual_seed(42)
    parts = torch.utils.data.random_split(samples, [count, n - count], generator)
    assert set(train) == set(parts[0])
    assert set(validation) == set(parts[1])
    assert len(train) == count
    assert list(train) == sorted(train, key=lambda sample: sample.path)


def test_mvtec(tmp_path: Path) -> None:
    data = open_dataset(mvtec(tmp_path / "screw"))
    assert (data.layout, data.name) == ("mvtec", "screw")
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert not set(data.train) & set(data.validation)
    assert [(s.defect, s.label, len(s.masks)) for s in data.test] == [
        ("good", 0, 0),
        ("good", 0, 0),
        ("scratch", 1, 1),
        ("scratch", 1, 1),
    ]
    assert data.has_masks
    good, bad = data.test[0], data.test[2]
    assert data.mask_size(bad) == data.mask_size(good) == (12, 16)
    assert data.read_mask(good).shape == (12, 16)
    assert not data.read_mask(good).any()
    mask = data.read_mask(bad)
    assert mask.dtype == bool
    assert (mask.sum(), mask[:2, :3].all()) == (6, True)
    by_category = open_dataset(tmp_path, category="screw")
    assert (by_category.train, by_category.test) == (data.train, data.test)


def test_mvtec_without_masks_or_tests(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "screw")
    (root / "ground_truth/scratch/001_mask.png").unlink()
    data = open_dataset(root)
    assert not data.has_masks
    with pytest.raises(ValueError, match=r"scratch.001\.png has no mask"):
        data.read_mask(data.test[-1])
    write(tmp_path / "new/train/good/0.png")
    data = open_dataset(tmp_path / "new")
    assert (data.test, data.has_masks) == ((), False)
    assert data.train == data.validation
    assert data.mask_size(data.train[0]) == (6, 8)


def test_loco(tmp_path: Path) -> None:
    data = open_dataset(loco(tmp_path / "pushpins"))
    assert data.layout == "loco"
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1, 1, 2]
    assert data.validation[0].path.parent.parent.name == "validation"
    good, bad = data.test
    assert data.has_masks
    assert data.read_mask(bad).sum() == 6 + 12
    assert data.read_truth(good).regions == ()
    first, second = data.read_truth(bad).regions
    assert (first.mask.sum(), first.saturation_area) == (6, 4)
    assert (second.mask.sum(), second.saturation_area) == (12, 3)
    assert data.saturation[254] == Saturation("extra", 0.25, True)
    write(tmp_path / "pushpins/ground_truth/logical_anomalies/000/001.png", mark=7)
    with pytest.raises(ValueError, match=r"one nonzero value of \[254, 255\], has 7"):
        data.read_truth(bad)
    assert open_dataset(tmp_path / "pushpins", "mvtec").layout == "mvtec"


def test_loco_rules(tmp_path: Path) -> None:
    assert Saturation("a", 100, False).area(40) == 40
    assert Saturation("a", 10, False).area(40) == 10
    assert Saturation("a", 0.5, True).area(5) == 2
    assert Saturation("a", 0.5, True).area(1) == 1
    root = loco(tmp_path / "pushpins")
    for text in (
        '[{"pixel_value": 255}]',
        "[" * 100_000,
        '[{"pixel_value": 1e999, "relative_saturation": false, "saturation_threshold": 1}]',
    ):
        (root / "defects_config.json").write_text(text)
        with pytest.raises(ValueError, match="defects_config"):
            open_dataset(root)
    (root / "defects_config.json").unlink()
    data = open_dataset(root)
    assert data.saturation == {}
    assert data.read_truth(data.test[1]).regions == ()


def test_visa(tmp_path: Path) -> None:
    root = visa(tmp_path / "visa")
    data = open_dataset(root, category="pcb1")
    assert (data.layout, data.name) == ("visa", "pcb1")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 1, 3]
    assert [sample.label for sample in data.test] == [1, 0, 0]
    assert all("pcb1" in sample.path.parts for sample in data.train + data.validation)
    assert data.read_mask(data.test[0]).sum() == 6
    inside = open_dataset(root / "pcb1")
    assert (inside.layout, inside.train) == ("visa", data.train)
    for category in (None, "soap"):
        with pytest.raises(ValueError, match="candle, pcb1"):
            open_dataset(root, category=category)
    data.test[0].masks[0].unlink()
    data.test[1].path.unlink()
    data = open_dataset(root, category="pcb1")  # each fails alone
    with pytest.raises(FileNotFoundError, match="Masks"):
        data.read_truth(data.test[0])
    for sample in (*data.train, *data.validation, *data.test):
        sample.path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="lists 13 images of pcb1, none of which exists"):
        open_dataset(root, category="pcb1")


def test_folder(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / "photos" / f"shift{i % 2}" / f"{i}.png")
    data = open_dataset(tmp_path / "photos", "folder")
    assert (data.layout, data.test, data.has_masks) == ("folder", (), False)
    assert (len(data.train), len(data.validation)) == (27, 3)
    assert all(sample.label == 0 for sample in data.train)


def test_unclear_folders_are_refused(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "mvtec" / "screw").parent
    with pytest.raises(ValueError, match="name a category: screw"):
        open_dataset(root)
    with pytest.raises(ValueError, match="looked for"):  # good images beside defects
        open_dataset(root / "screw/test")
    assert len(open_dataset(root / "screw/test", "folder").train) == 3
    with pytest.raises(ValueError, match="not the layout loco"):
        open_dataset(root / "screw", "loco")
    with pytest.raises(ValueError, match="not the layout visa"):
        open_dataset(root / "screw", "visa")
    with pytest.raises(ValueError, match="layout must be"):
        open_dataset(root / "screw", "coco")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="bolt"):
        open_dataset(root, category="bolt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        open_dataset(tmp_path / "empty")
    both = mvtec(visa(tmp_path / "both"))
    with pytest.raises(ValueError, match="both visa and mvtec"):
        open_dataset(both)
    assert open_dataset(both, "mvtec").layout == "mvtec"


@pytest.mark.parametrize(
    ("files", "held"),
    [
        (("NG/0.png",), "NG"),
        (("0.png", "scratch/0.png"), "images, scratch"),
        (("ok/0.png", "stain/0.png"), "ok, stain"),
        (("part/good/0.png", "part/dent/0.png"), "good, part, part/dent"),
        (("Defective/0.png",), "Defective"),
        (("0.png", "bad_parts/0.png"), "bad_parts"),
        (("rejects-2024/0.png",), "rejects-2024"),
        (("a/Abnormal/0.png",), "a/Abnormal"),
        (("Good/0.png", "masks/readme.txt"), "Good, masks"),
        (("shift0/0.png", "shift1/0.png"), "shift0, shift1"),
    ],
)
def test_folders_that_may_hold_defects_are_refused(tmp_path: Path, files, held) -> None:
    for name in files:
        path = tmp_path / "root" / name
        if path.suffix == ".png":
            write(path)
        else:
            path.parent.mkdir(parents=True)
            path.touch()
    with pytest.raises(ValueError, match=r"--layout folder .*layout='folder'") as refused:
        open_dataset(tmp_path / "root")
    assert held in str(refused.value)
    count = sum(name.endswith(".png") for name in files)
    data = open_dataset(tmp_path / "root", "folder")
    assert len({*data.train, *data.validation}) == count


@pytest.mark.parametrize("name", ["0.png", "good/0.png", "OK/0.png", "part7/Good/0.png"])
def test_images_of_one_folder_are_good(tmp_path: Path, name: str) -> None:
    write(tmp_path / "root" / name)
    (tmp_path / "root/.cache/ng").mkdir(parents=True)
    assert open_dataset(tmp_path / "root").layout == "folder"


@pytest.mark.parametrize("make", [mvtec, loco])
def test_good_in_capitals_and_empty_test_folders(tmp_path: Path, make) -> None:
    root = make(tmp_path / "screw")
    expected = [(s.defect, s.label, len(s.masks)) for s in open_dataset(root).test]
    (root / "test/good").rename(root / "test/for_a_moment")
    (root / "test/for_a_moment").rename(root / "test/Good")
    (root / "test/dent").mkdir()
    data = open_dataset(root)
    assert [(s.defect, s.label, len(s.masks)) for s in data.test] == expected
    assert data.notes == ("The test folder dent holds no image and was left out.",)


def test_masks_of_several_sizes_are_refused(tmp_path: Path) -> None:
    masks = (write(tmp_path / "a.png", mark=1), write(tmp_path / "b.png", size=(5, 8), mark=1))
    sample = Sample(write(tmp_path / "i.png"), 1, "dent", masks)
    data = DataSet(tmp_path, "loco", "x", (), (), (sample,))
    with pytest.raises(ValueError, match="differ in size"):
        data.read_mask(sample)


def test_real_screws(shared_data: Path) -> None:
    data = open_dataset(shared_data / "mvtec_screw_256")
    assert (data.layout, len(data.train), len(data.validation)) == ("mvtec", 288, 32)
    counts: dict[str, int] = {}
    for sample in data.test:
        counts[sample.defect] = counts.get(sample.defect, 0) + 1
    assert counts == {
        "good": 41,
        "manipulated_front": 24,
        "scratch_head": 24,
        "scratch_neck": 25,
        "thread_side": 23,
        "thread_top": 23,
    }
    assert data.has_masks
    good, bad = data.test[0], data.test[-1]
    assert image_size(good.path) == (256, 256)
    assert data.mask_size(good) == data.mask_size(bad) == (1024, 1024)
    mask = data.read_mask(bad)
    assert mask.shape == (1024, 1024)
    assert 0 < mask.mean() < 0.05
    assert not data.read_mask(good).any()
    paths = [sample.path for sample in data.validation]
    batches = list(load_batches(paths, (256, 256), batch_size=10))
    assert [len(batch.indices) for batch in batches] == [10, 10, 10, 2]
    for batch in batches:
        grey = batch.images
        assert torch.equal(grey[:, 0], grey[:, 1])
        assert 0.2 < grey.mean() < 0.9
