"""Other people's folders: other words for good, layouts that nearly fit, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from efficientad.data.image_files import is_good_name, is_nearly_good_name
from efficientad.data.layouts import open_dataset


def tree(root: Path, *names: str) -> Path:
    """Small pictures, and a text for every name without an image's suffix."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".bmp"):
            Image.new("L", (8, 6), 255).save(path)
        else:
            path.write_text("no picture")
    return root


@pytest.mark.parametrize(
    "good", ["good", "Good", "ok", "OK", "normal", "Normal", "i.O.", "defect_free", "No-Defect"]
)
def test_words_for_good(tmp_path: Path, good: str) -> None:
    root = tree(
        tmp_path / "x",
        *(f"train/{good}/{i}.png" for i in range(10)),
        f"test/{good}/0.png",
        "test/dent/0.png",
        "ground_truth/dent/0_mask.png",
    )
    data = open_dataset(root)
    assert data.layout == "mvtec"
    assert (len(data.train), len(data.validation)) == (9, 1)
    assert sorted((s.defect, s.label, len(s.masks)) for s in data.test) == [
        ("dent", 1, 1),
        ("good", 0, 0),
    ]
    assert data.notes == ()


def test_btad(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "BTech_Dataset_transformed/03",
        *(f"train/ok/{i:04}.bmp" for i in range(10)),
        "test/ok/0001.bmp",
        "test/ko/0000.bmp",
        "ground_truth/ko/0000.png",
    )
    (tmp_path / "BTech_Dataset_transformed/._03").touch()
    data = open_dataset(root)
    assert [(s.defect, s.label) for s in data.test] == [("ko", 1), ("good", 0)]
    assert data.test[0].masks == (root / "ground_truth/ko/0000.png",)
    assert data.notes == ()
    with pytest.raises(ValueError, match="name a category: 03"):
        open_dataset(tmp_path / "BTech_Dataset_transformed")


def test_parts_in_capitals_and_loco_with_ok(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "x",
        "Train/OK/0.png",
        "Validation/OK/1.png",
        "TEST/OK/2.png",
        "TEST/missing/3.png",
        "Ground Truth/Missing/3/0.png",
    )
    config = [
        {
            "defect_name": "missing",
            "pixel_value": 255,
            "saturation_threshold": 10,
            "relative_saturation": False,
        }
    ]
    (root / "defects_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    data = open_dataset(root)
    assert data.layout == "loco"
    assert [s.label for s in data.test] == [0, 1]
    truth = data.read_truth(data.test[1])
    assert [region.saturation_area for region in truth.regions] == [10]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/ok_front/0.png", "train/def_front/0.png"), "train holds def_front, ok_front"),
        (("train/0.png", "test/good/0.png"), "nearly mvtec: train holds images"),
        (("training/good/0.png", "test/bad/0.png"), "no train with good images"),
        (("split_csv/2cls_fewshot.csv", "candle/0.png", "nut/0.png"), "2cls_fewshot.csv, not 1cls"),
        (
            ("candle/Data/Images/Normal/0.png", "candle/Data/Images/Anomaly/0.png"),
            "split_csv/1cls.csv is missing",
        ),
        (("mvtec/screw/train/good/0.png", "mvtec/nut/train/ok/0.png"), "mvtec/nut, mvtec/screw"),
        (("train/good/rgb/0.png", "train/good/xyz/0.tiff"), "MVTec 3D-AD"),
        (("train/good/0.png", "train/good/NG/0.png"), "its name says that not all"),
        (
            ("train/good/0.png", "test/ok_front/0.png", "test/dent/0.png"),
            "test holds dent, ok_front, none of which is called good; rename ok_front",
        ),
        (("ok/0.png", "ko/0.png"), "it holds ko, ok"),
    ],
)
def test_layouts_that_nearly_fit_are_named(tmp_path: Path, names, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_dataset(tree(tmp_path / "x", *names))


def test_what_has_no_place_is_noted(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "x",
        "train/good/0.png",
        "train/good/1.png",
        "train/bad/0.png",
        "train/bad/1.png",
        "train/2.png",
        "test/good/0.png",
        "test/0.png",
        "test/normal_light/0.png",
        "test/scratch/0.png",
        "test/scratch/0_mask.png",
        "test_private/7.png",
        "docs/readme.txt",
        "__MACOSX/train/0.png",
    )
    data = open_dataset(root)
    assert [(s.defect, s.label) for s in data.test] == [
        ("good", 0),
        ("normal_light", 1),
        ("scratch", 1),
    ]
    assert [note.split(":")[0] for note in data.notes] == [
        "2 images in train/bad were left out",
        "1 images directly in train were left out",
        "test/normal_light counts as a defect",
        "1 images in test/scratch are called masks of pictures beside them and were left out; "
        "masks belong into ground_truth/scratch.",
        "1 images directly in test were left out",
        "1 images in test_private were left out",
    ]


def test_masks_inside_of_test_are_masks(tmp_path: Path) -> None:
    names = ("train/good/0.png", "test/bad/000.png", "test/ground_truth/bad/000_mask.png")
    root = tree(tmp_path / "x", *names)
    (sample,) = open_dataset(root).test
    assert (sample.defect, sample.masks) == ("bad", (root / names[2],))


@pytest.mark.parametrize(
    ("name", "good", "nearly"),
    [
        ("good", True, False),
        ("Non-defective", True, False),
        ("not_ok", False, False),
        ("NOK", False, False),
        ("abnormal", False, False),
        ("good_with_defects", False, False),
        ("no_good", False, False),
        ("ok_front", False, True),
        ("normal 2", False, True),
        ("goods_lift", False, False),
        ("scratch", False, False),
    ],
)
def test_names(name: str, good: bool, nearly: bool) -> None:
    assert (is_good_name(name), is_nearly_good_name(name)) == (good, nearly)
