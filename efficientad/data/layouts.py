"""Layouts of data sets on the disk: which images are good, which are not, where the masks are.

MVTec AD, MVTec LOCO AD, VisA and a plain folder of good images, recognised by content.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from efficientad.data.datasets import GOOD, DataSet, Sample, Saturation, split_validation
from efficientad.data.image_files import find_images
from efficientad.data.mask_files import MaskFiles
from efficientad.utils.folders import subfolders

LAYOUTS = ("mvtec", "loco", "visa", "folder")
_PARTS = frozenset(("train", "test", "ground_truth"))
# Words in the name of a folder by which not all images below it are good.
_NOT_GOOD = frozenset(
    "abnormal anomalies anomalous anomaly bad broken damaged defect defective defects error errors "
    "fail failed failure fault faults faulty flaw flawed flaws mask masks ng nio nok reject "
    "rejected rejects scrap".split()
)
_VISA_SPLIT = Path("split_csv", "1cls.csv")
_LOOKED_FOR = (
    "mvtec (train/good, test/<defect>), loco (train/good, validation/good), "
    "visa (split_csv/1cls.csv) or a folder of good images"
)


def open_dataset(
    root: str | os.PathLike, layout: str = "auto", category: str | None = None
) -> DataSet:
    """List the images of a data set; no pixel is read.

    root: the folder of one object, or the data set's folder with `category` naming the object.
    layout: "mvtec", "loco", "visa", "folder", or "auto" to recognise it by content.

    "folder" takes every image below root as good and has no test images. "auto" takes for one only
    images that lie in a single folder, whose name does not say that they are not good (ValueError
    that says what was looked for, or which categories there are). FileNotFoundError for a root or
    a listed file that does not exist.
    """
    root = Path(root)
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    if layout in ("auto", "visa"):
        if category is None and (root.parent / _VISA_SPLIT).is_file():
            root, category = root.parent, root.name
        if layout == "auto" and (root / _VISA_SPLIT).is_file() and _looks_like(root):
            raise ValueError(
                f"{root} looks like both visa and {_looks_like(root)[0]}; name a layout"
            )
        if layout == "visa" or (root / _VISA_SPLIT).is_file():
            return _open_visa(root, category)
    if category is not None:
        root = root / category
        if not root.is_dir():
            raise FileNotFoundError(f"no such category: {root}")
    layout = _recognise(root) if layout == "auto" else layout
    if layout == "folder":
        train, validation = split_validation(_good(root))
        return DataSet(root, layout, root.resolve().name, train, validation)
    if layout not in _looks_like(root):
        raise ValueError(f"{root} has not the layout {layout}; looked for {_LOOKED_FOR}")
    return (_open_loco if layout == "loco" else _open_mvtec)(root)


def _looks_like(root: Path) -> tuple[str, ...]:
    if not (root / "train" / GOOD).is_dir():
        return ()
    return ("loco", "mvtec") if (root / "validation" / GOOD).is_dir() else ("mvtec",)


def _recognise(root: Path) -> str:
    known = _looks_like(root)
    if known:
        return known[0]
    folders = subfolders(root)
    categories = [path.name for path in folders if _looks_like(path)]
    if categories:
        raise ValueError(f"{root} holds several objects, name a category: {', '.join(categories)}")
    holding = {path.parent.relative_to(root) for path in find_images(root)}
    parts = {path.name for path in folders} | {part for path in holding for part in path.parts}
    beside = len(folders) > 1 and any(path.name.lower() == GOOD for path in folders)
    if beside or len(holding) > 1 or any(map(_says_not_good, parts)):
        held = sorted({"images" if not p.parts else p.as_posix() for p in holding} | parts)
        shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")
        raise ValueError(
            f"the layout of {root} is not clear: it holds {shown}; looked for {_LOOKED_FOR}. If "
            "every image below it is good, say so: --layout folder (in Python "
            "open_dataset(..., layout='folder'))"
        )
    return "folder"


def _says_not_good(name: str) -> bool:
    name = name.lower()
    return name in _PARTS or not _NOT_GOOD.isdisjoint(re.split(r"[^a-z]+", name))


def _good(folder: Path) -> list[Sample]:
    return [Sample(path) for path in find_images(folder)]


def _test_samples(root: Path, notes: list[str]) -> tuple[Sample, ...]:
    """The test images, good and anomalous, in order, with their masks."""
    files = MaskFiles(root)
    test: list[Sample] = []
    for folder in subfolders(root / "test"):
        try:
            paths = find_images(folder)
        except ValueError:
            notes.append(f"The test folder {folder.name} holds no image and was left out.")
            continue
        defect = GOOD if folder.name.lower() == GOOD else folder.name
        for path, masks in zip(paths, files.assign(folder, paths), strict=True):
            test.append(Sample(path, int(defect != GOOD), defect, masks))
    notes += files.notes()
    return tuple(test)


def _open_mvtec(root: Path) -> DataSet:
    train, validation = split_validation(_good(root / "train" / GOOD))
    notes: list[str] = []
    test = _test_samples(root, notes)
    name = root.resolve().name
    return DataSet(root, "mvtec", name, train, validation, test, notes=tuple(notes))


def _open_loco(root: Path) -> DataSet:
    notes: list[str] = []
    test = _test_samples(root, notes)
    return DataSet(
        root,
        "loco",
        root.resolve().name,
        tuple(_good(root / "train" / GOOD)),
        tuple(_good(root / "validation" / GOOD)),
        test,
        _read_saturation(root),
        tuple(notes),
    )


def _read_saturation(root: Path) -> dict[int, Saturation]:
    """Rules of defects_config.json in root or one above; empty where there is no such file."""
    for path in (root / "defects_config.json", root.resolve().parent / "defects_config.json"):
        if path.is_file():
            try:
                entries = json.loads(path.read_text(encoding="utf-8"))
                return {int(entry["pixel_value"]): _saturation(entry) for entry in entries}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not a defects_config.json: {error!r}") from error
    return {}


def _saturation(entry: Mapping) -> Saturation:
    relative, threshold = bool(entry["relative_saturation"]), float(entry["saturation_threshold"])
    if not 0 < threshold <= (1 if relative else float("inf")):
        raise ValueError(f"saturation_threshold {threshold} with relative_saturation {relative}")
    return Saturation(str(entry["defect_name"]), threshold, relative)


def _open_visa(root: Path, category: str | None) -> DataSet:
    """VisA by its one-class split: columns object, split, label, image, mask, paths below root."""
    path = root / _VISA_SPLIT
    if not path.is_file():
        raise ValueError(f"{root} has not the layout visa: no {_VISA_SPLIT}")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not {"object", "split", "label", "image", "mask"} <= set(rows[0] if rows else ()):
        raise ValueError(f"{path} lacks rows or one of the columns object,split,label,image,mask")
    objects = sorted({row["object"] for row in rows})
    if category is None and len(objects) == 1:
        category = objects[0]
    if category is None or category not in objects:
        raise ValueError(f"category must be one of {', '.join(objects)}, got {category!r}")
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    rows = [row for row in rows if row["object"] == category and row["split"] in parts]
    for row in sorted(rows, key=lambda row: row["image"]):
        normal = row["label"] == "normal"
        masks = (root / row["mask"],) if row["mask"] else ()
        for file in (root / row["image"], *masks):
            if not file.is_file():
                raise FileNotFoundError(f"{path} lists a file that does not exist: {file}")
        defect = GOOD if normal else row["label"]
        parts[row["split"]].append(Sample(root / row["image"], int(not normal), defect, masks))
    if not parts["train"] or any(sample.label for sample in parts["train"]):
        raise ValueError(f"{path}: the training images of {category} must be normal, and some")
    train, validation = split_validation(parts["train"])
    return DataSet(root, "visa", category, train, validation, tuple(parts["test"]))
