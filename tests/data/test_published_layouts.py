"""MVTec AD 2 and Real-IAD as they are published, and what nearly has their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from efficientad.data.layouts import open_dataset
from efficientad.model.calibration import split_good_images

LIGHTS = ("regular", "overexposed", "shift_1")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 6), 255).save(path)
    return path


def mvtec2(root: Path) -> Path:
    for name in (
        *(f"train/good/{i:03}_regular.png" for i in range(10)),
        *(f"validation/good/{i:03}_regular.png" for i in range(3)),
        *(f"test_public/good/000_{light}.png" for light in LIGHTS),
        *(f"test_public/bad/000_{light}.png" for light in LIGHTS),
        *(f"test_public/ground_truth/bad/000_{light}_mask.png" for light in LIGHTS),
        "test_private/000_regular.png",
        "test_private_mixed/000_overexposed.png",
        "test_private_mixed/001_shift_1.png",
    ):
        picture(root / name)
    return root


def entry(label: str, name: str, mask: str | None = None, category: str = "nut") -> dict:
    return {
        "category": category,
        "anomaly_class": label,
        "image_path": name,
        "mask_path": mask,
    }


TRAIN = [entry("OK", f"OK/S{i:04}/nut_{i:04}_OK_C1.jpg") for i in range(10)]
TEST = [
    entry("OK", "OK/S0010/nut_0010_OK_C1.jpg"),
    entry("AK", "NG/AK/S0011/nut_0011_NG_C1.jpg", "NG/AK/S0011/nut_0011_NG_C1.png"),
    entry("OK", "NG/AK/S0011/nut_0011_NG_C2.jpg"),  # the defect is not seen from there
]
META = {"normal_class": "OK", "prefix": "nut/"}


def realiad(
    root: Path,
    *,
    sizes: tuple[str, ...] = ("realiad_1024",),
    lists: tuple[str, ...] = ("realiad_jsons/realiad_jsons/nut.json",),
    meta: dict | None = META,
    train: list = TRAIN,
    test: list = TEST,
) -> Path:
    for size in sizes:
        for listed in (*TRAIN, *TEST):
            for name in filter(None, (listed["image_path"], listed["mask_path"])):
                picture(root / size / "nut" / name)
    for name in lists:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        document = {"train": train, "test": test} | ({} if meta is None else {"meta": meta})
        (root / name).write_text(json.dumps(document), encoding="utf-8")
    return root


def test_mvtec_ad_2(tmp_path: Path) -> None:
    root = mvtec2(tmp_path / "can")
    data = open_dataset(root)
    assert (data.layout, data.name) == ("mvtec2", "can")
    assert (len(data.train), len(data.validation)) == (10, 3)
    assert [(s.defect, s.label) for s in data.test] == [("bad", 1)] * 3 + [("good", 0)] * 3
    masks = [sample.masks for sample in data.test[:3]]
    folder = root / "test_public/ground_truth/bad"
    assert masks == [(folder / f"000_{light}_mask.png",) for light in sorted(LIGHTS)]
    assert data.has_masks
    assert data.notes == (
        "1 images in test_private were left out: they have no labels; `predict` scores them.",
        "2 images in test_private_mixed were left out: they have no labels; `predict` scores them.",
    )
    assert open_dataset(tmp_path, category="can").test == data.test
    with pytest.raises(ValueError, match="name a category: can"):
        open_dataset(tmp_path)


def test_a_calibration_takes_the_validation_images_of_mvtec_ad_2(tmp_path: Path) -> None:
    root = mvtec2(tmp_path / "can")
    statistics, held_out = split_good_images(root, True)
    assert len(statistics) == 10
    assert held_out == [root / f"validation/good/{i:03}_regular.png" for i in range(3)]


def test_what_is_nearly_mvtec_ad_2_is_named(tmp_path: Path) -> None:
    root = mvtec2(tmp_path / "can")
    (root / "validation").rename(tmp_path / "validation")
    with pytest.raises(ValueError, match="nearly mvtec2: it holds test_public and no validation"):
        open_dataset(root)
    with pytest.raises(ValueError, match=r"not the layout mvtec2.*train/good and no validation"):
        open_dataset(root, "mvtec2")
    assert open_dataset(root, "mvtec").test == ()
    (tmp_path / "validation").rename(root / "validation")
    picture(root / "test/good/0.png")
    with pytest.raises(ValueError, match="both test and test_public; name a layout"):
        open_dataset(root)
    assert len(open_dataset(root, "loco").test) == 1
    assert len(open_dataset(root, "mvtec2").test) == 6


@pytest.mark.parametrize("part", ["test_private", "test_private_mixed", "Test Public"])
def test_tests_of_mvtec_ad_2_alone_are_not_good(tmp_path: Path, part: str) -> None:
    picture(tmp_path / "can" / part / "000_regular.png")
    with pytest.raises(ValueError, match="is not clear"):
        open_dataset(tmp_path / "can")


@pytest.mark.parametrize(
    ("lists", "opened", "category"),
    [
        (("realiad_jsons/realiad_jsons/nut.json",), "", None),
        (("realiad_jsons/nut.json",), "", "NUT"),
        (("realiad_jsons/nut.json",), "realiad_1024/nut", None),
        (("realiad_jsons/realiad_jsons/nut.json",), "realiad_1024", "nut"),
        (("realiad_1024/nut.json",), "realiad_1024", None),
        (("realiad_1024/nut.json",), "realiad_1024/nut", "nut"),
    ],
)
@pytest.mark.parametrize("meta", [META, None])
def test_real_iad(tmp_path: Path, lists, opened: str, category: str | None, meta) -> None:
    root = realiad(tmp_path / "Real-IAD", lists=lists, meta=meta)
    data = open_dataset(root / opened, category=category)
    assert (data.layout, data.name, data.notes) == ("realiad", "nut", ())
    pictures = root / "realiad_1024/nut"
    assert (len(data.train), len(data.validation)) == (9, 1)
    assert {s.path for s in (*data.train, *data.validation)} == {
        pictures / listed["image_path"] for listed in TRAIN
    }
    found = {s.path.relative_to(pictures).as_posix(): s for s in data.test}
    assert [(found[e["image_path"]].defect, found[e["image_path"]].label) for e in TEST] == [
        ("good", 0),
        ("AK", 1),
        ("good", 0),
    ]
    assert found[TEST[1]["image_path"]].masks == (pictures / TEST[1]["mask_path"],)
    assert data.has_masks


def test_one_of_several_lists_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    inner = "realiad_jsons/realiad_jsons"
    lists = (f"{inner}/nut.json", f"{inner}_fuiad_0.1/nut.json", f"{inner}_sv/nut.json")
    root = realiad(tmp_path / "x", lists=lists)
    fewer = {"meta": META, "train": TRAIN[:2], "test": TEST}
    (root / lists[2]).write_text(json.dumps(fewer))
    data = open_dataset(root)
    assert len(data.train) == 9
    (note,) = data.notes
    assert "that of realiad_jsons/nut.json" in note
    assert "left out: realiad_jsons_fuiad_0.1, realiad_jsons_sv." in note
    (root / "realiad_1024/nut.json").write_text(json.dumps(fewer))
    assert len(open_dataset(root / "realiad_1024/nut").train) == 1


def test_one_of_several_sizes_must_be_named(tmp_path: Path) -> None:
    root = realiad(tmp_path / "x", sizes=("realiad_256", "realiad_512"))
    with pytest.raises(ValueError, match=r"more than once; name one of: .*256/nut, .*512/nut"):
        open_dataset(root)
    (first, *_) = open_dataset(root / "realiad_512/nut").train
    assert first.path.is_relative_to(root / "realiad_512/nut")


def test_what_a_list_says_that_cannot_be_used_is_noted(tmp_path: Path) -> None:
    root = realiad(tmp_path / "x", test=[*TEST, TRAIN[0], entry("AK", "a.jpg", category="bolt")])
    assert open_dataset(root).notes == (
        "1 entries of nut.json are of other objects and were left out.",
        "1 images of nut are listed more than once in nut.json.",
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": [*TRAIN, TEST[1]]}, "must be normal, and some; 1 of 11 are not normal"),
        ({"train": []}, "must be normal, and some; 0 of 0"),
        ({"train": None}, "is not a list of Real-IAD"),
        ({"train": TRAIN[0]}, "is not a list of Real-IAD"),
        ({"test": [{"image_path": "a.jpg"}]}, "anomaly_class"),
        ({"test": [entry("", "a.jpg")]}, "without image_path or anomaly_class"),
        ({"test": [entry("AK", "\ud800.jpg")]}, "surrogates not allowed"),
        ({"test": [entry("good", "a.jpg")]}, "anomaly_class 'good' where normal_class is 'OK'"),
        ({"meta": {"normal_class": 1}}, "normal_class must be a text, got 1"),
        ({"meta": []}, "is not a list of Real-IAD"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, changed, said: str) -> None:
    root = realiad(tmp_path / "x", **changed)
    with pytest.raises(ValueError, match=said) as refused:
        open_dataset(root)
    assert "nut.json" in str(refused.value)


def test_what_is_nearly_real_iad_is_named(tmp_path: Path) -> None:
    root = realiad(tmp_path / "x", lists=())
    with pytest.raises(ValueError, match=r"nearly realiad: realiad_jsons/nut\.json is missing"):
        open_dataset(root / "realiad_1024/nut")
    with pytest.raises(
        ValueError, match=r"not the layout realiad: no realiad_jsons/<object>\.json"
    ):
        open_dataset(root, "realiad")
    root = realiad(tmp_path / "x")
    with pytest.raises(ValueError, match="category must be one of nut, got 'bolt'"):
        open_dataset(root, category="bolt")
    with pytest.raises(ValueError, match="several objects, name a category: nut"):
        open_dataset(root / "realiad_1024")
    (root / "realiad_1024").rename(root.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match="none of the 13 images of nut is there"):
        open_dataset(root)
    picture(root / "train/good/0.png")
    with pytest.raises(ValueError, match="both realiad and mvtec; name a layout"):
        open_dataset(root)
    assert open_dataset(root, "mvtec").layout == "mvtec"


def test_other_json_beside_a_folder_of_good_images_is_no_list(tmp_path: Path) -> None:
    picture(tmp_path / "photos/a/0.png")
    (tmp_path / "photos/a.json").write_text("{}")
    assert open_dataset(tmp_path / "photos").layout == "folder"
