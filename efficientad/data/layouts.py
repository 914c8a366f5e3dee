"""Layouts of data sets on the disk: which images are good, which are not, where the masks are.

MVTec AD (and BTAD), MVTec AD 2, MVTec LOCO AD and a plain folder of good images, recognised by
content, as are VisA and Real-IAD, whose lists `data.tables` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from efficientad.data.datasets import GOOD, DataSet, Sample, Saturation, split_validation
from efficientad.data.image_files import (
    find_images,
    is_good_name,
    is_image,
    is_nearly_good_name,
    left_out,
    plain_name,
    says_not_good,
)
from efficientad.data.mask_files import MASK_FOLDERS, MaskFiles, looks_like_mask
from efficientad.data.tables import (
    LISTS,
    SPLIT,
    find_lists,
    looks_like_object,
    open_realiad,
    open_visa,
)
from efficientad.utils.folders import subfolders, visible

LAYOUTS = ("mvtec", "mvtec2", "loco", "visa", "realiad", "folder")
_LOOKED_FOR = (
    "mvtec (train/good, test/<defect>), mvtec2 (train/good, validation/good, test_public), "
    f"loco (train/good, validation/good), visa ({SPLIT.as_posix()}), realiad "
    f"({LISTS}/<object>.json) or a folder of good images"
)
_TEST = {"mvtec2": "testpublic"}  # plain name of the folder of labelled test images, if not "test"
_PRIVATE = ("testprivate", "testprivatemixed")  # of MVTec AD 2: images whose labels nobody has


def open_dataset(
    root: str | os.PathLike, layout: str = "auto", category: str | None = None
) -> DataSet:
    """List the images of a data set; no pixel is read.

    root: the folder of one object, or the data set's folder with `category` naming the object.
    layout: one of LAYOUTS, or "auto" to recognise it by content. "mvtec2" is MVTec AD 2.

    Folders are found in any case, and good ones may be called good, ok, normal and the like
    (`data.image_files`). "folder" takes every image below root as good and has no test images.
    "auto" takes for one only images that lie in a single folder, whose name does not say that they
    are not good. What a layout has no place for is named in the data set's notes.

    Raises:
        ValueError: no layout fits, or one does nearly: it says what was looked for and found, or
            which categories there are. FileNotFoundError: root does not exist.
    """
    root = Path(root)
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    if layout in ("auto", "visa"):
        if category is None and (root.parent / SPLIT).is_file():
            root, category = root.parent, root.name
        if layout == "auto" and (root / SPLIT).is_file() and _looks_like(root):
            raise ValueError(
                f"{root} looks like both visa and {_looks_like(root)[0]}; name a layout"
            )
        if layout == "visa" or (root / SPLIT).is_file():
            return open_visa(root, category)
    if layout in ("auto", "realiad"):
        home, name = root, category
        if category is not None and not find_lists(root) and (root / category).is_dir():
            home, name = root / category, None
        if layout == "auto" and find_lists(home) and _looks_like(home):
            raise ValueError(
                f"{home} looks like both realiad and {_looks_like(home)[0]}; name a layout"
            )
        if layout == "realiad" or find_lists(home):
            return open_realiad(home, name)
    if category is not None:
        root = root / category
        if not root.is_dir():
            raise FileNotFoundError(f"no such category: {root}")
    layout = _recognise(root) if layout == "auto" else layout
    if layout == "folder":
        train, validation = split_validation(_samples(find_images(root)))
        notes = tuple(left_out(root))
        return DataSet(root, layout, root.resolve().name, train, validation, notes=notes)
    if layout not in _looks_like(root):
        raise ValueError(
            f"{root} has not the layout {layout}; looked for {_LOOKED_FOR}{_nearly(root)}"
        )
    return _open_parts(root, layout)


def _part(root: Path, name: str) -> Path | None:
    """The folder of this name in root, in any case."""
    found = [path for path in subfolders(root) if plain_name(path.name) == name]
    return next((path for path in found if path.name == name), found[0] if found else None)


def _good_folders(part: Path | None) -> list[Path]:
    return [] if part is None else [p for p in subfolders(part) if is_good_name(p.name)]


def _looks_like(root: Path) -> tuple[str, ...]:
    if not _good_folders(_part(root, "train")):
        return ()
    if not _good_folders(_part(root, "validation")):
        return ("mvtec",)
    return ("loco", "mvtec") if _part(root, "testpublic") is None else ("mvtec2", "loco", "mvtec")


def _recognise(root: Path) -> str:
    known = _looks_like(root)
    public = _part(root, "testpublic")
    if known and public is not None:
        if _part(root, "test") is not None:
            raise ValueError(f"{root} holds both test and {public.name}; name a layout")
        if "mvtec2" not in known:
            raise ValueError(
                f"{root} is nearly mvtec2: it holds {public.name} and no validation/good, the good "
                "images for quantiles and threshold. To go on without its tests name the layout "
                "mvtec"
            )
    if known:
        return known[0]
    folders = subfolders(root)
    categories = [path.name for path in folders if _looks_like(path) or find_lists(path)]
    if categories:
        raise ValueError(f"{root} holds several objects, name a category: {', '.join(categories)}")
    holding = {path.parent.relative_to(root) for path in find_images(root)}
    parts = {path.name for path in folders} | {part for path in holding for part in path.parts}
    beside = len(folders) > 1 and any(is_good_name(path.name) for path in folders)
    if beside or len(holding) > 1 or any(map(says_not_good, parts)):
        held = sorted({"images" if not p.parts else p.as_posix() for p in holding} | parts)
        raise ValueError(
            f"the layout of {root} is not clear: it holds {_listed(held)}; looked for "
            f"{_LOOKED_FOR}{_nearly(root)}. If every image below it is good, say so: --layout "
            "folder (in Python open_dataset(..., layout='folder'))"
        )
    return "folder"


def _nearly(root: Path) -> str:
    """What keeps a folder from the layout that it nearly has, "" if it has none nearly."""
    train = _part(root, "train")
    if _good_folders(train):
        validated = _good_folders(_part(root, "validation"))
        return f". It holds train/good and no {'test_public' if validated else 'validation/good'}"
    if train is not None:
        held = [path.name for path in subfolders(train)]
        if any(path.is_file() and is_image(path) for path in visible(train)):
            held.insert(0, "images")
        return (
            f". It is nearly mvtec: {train.name} holds {_listed(held) or 'nothing'}, and the good "
            "images must lie in a folder good (or ok, normal) in it"
        )
    if _part(root, "test") is not None:
        return ". It is nearly mvtec: there is a folder test, and no train with good images"
    if (root / SPLIT).parent.is_dir():
        held = [path.name for path in visible((root / SPLIT).parent)]
        return f". It is nearly visa: {SPLIT.parent} holds {_listed(held)}, not {SPLIT.name}"
    if any((path / "Data" / "Images").is_dir() for path in (root, *subfolders(root))):
        return (
            f". It is nearly visa: {SPLIT.as_posix()} is missing, which says what is for training"
        )
    if looks_like_object(root) and any(plain_name(p.name) == "ng" for p in subfolders(root)):
        return (
            f". It is nearly realiad: {LISTS}/{root.resolve().name}.json is missing, which says "
            "what is for training"
        )
    deeper = [path for folder in subfolders(root) for path in subfolders(folder)]
    found = [path.relative_to(root).as_posix() for path in deeper if _looks_like(path)]
    return f". Objects lie deeper: {_listed(found)}" if found else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _samples(paths: Sequence[Path]) -> list[Sample]:
    return [Sample(path) for path in paths]


def _good(part: Path, notes: list[str]) -> list[Sample]:
    """The good images of train or validation; notes name what else is there."""
    _refuse_nearly_good(part)
    samples: list[Sample] = []
    for folder in subfolders(part):
        if not is_good_name(folder.name):
            _note_unread(f"{part.name}/{folder.name}", folder, notes)
            continue
        inside = subfolders(folder)
        if {"rgb", "xyz"} <= {path.name.lower() for path in inside}:
            raise ValueError(
                f"{folder} holds rgb and xyz, as MVTec 3D-AD does; copy the rgb images into the "
                "layout of MVTec AD, since xyz and gt are no pictures to learn from"
            )
        for path in inside:
            if says_not_good(path.name):
                raise ValueError(
                    f"{path} lies in a folder of good images, and its name says that not all in it "
                    "are good; move it elsewhere"
                )
        samples += _samples(find_images(folder))
    _note_loose(part, notes)
    return samples


def _refuse_nearly_good(part: Path) -> None:
    """ValueError where nothing is called good and something nearly is: it could be misread."""
    folders = subfolders(part)
    nearly = [path.name for path in folders if is_nearly_good_name(path.name)]
    if nearly and not _good_folders(part):
        raise ValueError(
            f"{part} holds {_listed([path.name for path in folders])}, none of which is called "
            f"good; rename {_listed(nearly)} to good if its images are, else to a name without "
            "such a word"
        )


def _note_unread(
    name: str, folder: Path, notes: list[str], why: str = "the folder has no place in the layout"
) -> None:
    try:
        count = len(find_images(folder))
    except ValueError:
        return
    notes.append(f"{count} images in {name} were left out: {why}.")


def _note_loose(part: Path, notes: list[str]) -> None:
    count = sum(path.is_file() and is_image(path) for path in visible(part))
    if count:
        notes.append(
            f"{count} images directly in {part.name} were left out: they must lie in folders such "
            f"as {part.name}/good."
        )


def _test_samples(root: Path, part: str, notes: list[str]) -> tuple[Sample, ...]:
    """The images of a test folder, good and anomalous, in order, with their masks."""
    test = _part(root, part)
    if test is None:
        return ()
    _refuse_nearly_good(test)
    files = MaskFiles(root if any(map(_holds_masks, subfolders(root))) else test)
    samples: list[Sample] = []
    for folder in subfolders(test):
        if _holds_masks(folder):
            continue
        try:
            paths = find_images(folder)
        except ValueError:
            notes.append(f"The test folder {folder.name} holds no image and was left out.")
            continue
        beside = [path for path in paths if looks_like_mask(path, paths)]
        if beside:
            notes.append(
                f"{len(beside)} images in {test.name}/{folder.name} are called masks of pictures "
                f"beside them and were left out; masks belong into ground_truth/{folder.name}."
            )
            paths = [path for path in paths if path not in set(beside)]
        defect = GOOD if is_good_name(folder.name) else folder.name
        if is_nearly_good_name(folder.name):
            notes.append(f"{test.name}/{folder.name} counts as a defect: it is not called good.")
        for path, masks in zip(paths, files.assign(folder, paths), strict=True):
            samples.append(Sample(path, int(defect != GOOD), defect, masks))
    _note_loose(test, notes)
    notes += files.notes()
    return tuple(samples)


def _holds_masks(folder: Path) -> bool:
    return plain_name(folder.name) in MASK_FOLDERS


def _open_parts(root: Path, layout: str) -> DataSet:
    """MVTec AD, or MVTec LOCO AD or AD 2, which bring their validation images."""
    notes: list[str] = []
    train_folder, validation_folder = _part(root, "train"), _part(root, "validation")
    assert train_folder is not None  # `_looks_like` has seen to it
    good = _good(train_folder, notes)
    saturation: dict[int, Saturation] = {}
    if layout == "mvtec":
        train, validation = split_validation(good)
    else:
        assert validation_folder is not None
        train, validation = tuple(good), tuple(_good(validation_folder, notes))
    if layout == "loco":
        saturation = _read_saturation(root)
    tests = _TEST.get(layout, "test")
    test = _test_samples(root, tests, notes)
    read = {"train", tests, *MASK_FOLDERS} | (set() if layout == "mvtec" else {"validation"})
    for folder in subfolders(root):
        plain = plain_name(folder.name)
        if layout == "mvtec2" and plain in _PRIVATE:
            _note_unread(folder.name, folder, notes, "they have no labels; `predict` scores them")
        elif plain not in read:
            _note_unread(folder.name, folder, notes)
    notes += left_out(root)
    name = root.resolve().name
    return DataSet(root, layout, name, train, validation, test, saturation, tuple(notes))


def _read_saturation(root: Path) -> dict[int, Saturation]:
    """Rules of defects_config.json in root or one above; empty where there is no such file."""
    for path in (root / "defects_config.json", root.resolve().parent / "defects_config.json"):
        if path.is_file():
            try:
                entries = json.loads(path.read_text(encoding="utf-8-sig"))
                return {int(entry["pixel_value"]): _saturation(entry) for entry in entries}
            except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
                raise ValueError(f"{path} is not a defects_config.json: {error!r}") from error
    return {}


def _saturation(entry: Mapping) -> Saturation:
    relative, threshold = bool(entry["relative_saturation"]), float(entry["saturation_threshold"])
    if not 0 < threshold <= (1 if relative else float("inf")):
        raise ValueError(f"saturation_threshold {threshold} with relative_saturation {relative}")
    return Saturation(str(entry["defect_name"]), threshold, relative)
