"""The layout of VisA: a table that says of every image where it belongs."""

from __future__ import annotations

import os
from pathlib import Path

from efficientad.data.datasets import GOOD, DataSet, Sample, split_validation
from efficientad.data.folder_names import is_good_name
from efficientad.data.tables import listed_file, read_table

SPLIT = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")


def open_visa(root: Path, category: str | None) -> DataSet:
    """VisA by its one-class split: paths below root. A file that is missing fails when it is read.

    Raises:
        ValueError: no table, not its columns, no such category, or training images that are not
            normal. FileNotFoundError: not one image of the category is there.
    """
    path = root / SPLIT
    if not path.is_file():
        raise ValueError(f"{root} has not the layout visa: no {SPLIT}")
    rows = read_table(path, COLUMNS)
    names = {row["object"].casefold(): row["object"] for row in reversed(rows)}
    objects = sorted(names.values())
    if category is None and len(objects) == 1:
        category = objects[0]
    if category is None or category.casefold() not in names:
        raise ValueError(f"category must be one of {', '.join(objects)}, got {category!r}")
    category = names[category.casefold()]
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    left_out: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["image"].replace("\\", "/")):
        if row["object"].casefold() != category.casefold():
            continue
        part = row["split"].casefold()
        if part not in parts or not row["image"]:
            left_out[row["split"]] = left_out.get(row["split"], 0) + 1
            continue
        normal = is_good_name(row["label"])
        masks = (listed_file(root, row["mask"]),) if row["mask"] else ()
        defect = GOOD if normal else row["label"]
        image = listed_file(root, row["image"])
        parts[part].append(Sample(image, int(not normal), defect, masks))
    if not parts["train"] or any(sample.label for sample in parts["train"]):
        raise ValueError(f"{path}: the training images of {category} must be normal, and some")
    listed = [sample.path for sample in (*parts["train"], *parts["test"])]
    if not any(map(os.path.isfile, listed)):
        raise FileNotFoundError(
            f"{path} lists {len(listed)} images of {category}, none of which exists; first: "
            f"{listed[0]}"
        )
    notes = [
        f"{count} rows of {SPLIT.name} with the split {split!r} were left out; splits are "
        f"{' and '.join(parts)}."
        for split, count in left_out.items()
    ]
    train, validation = split_validation(parts["train"])
    return DataSet(
        root, "visa", category, train, validation, tuple(parts["test"]), notes=tuple(notes)
    )
