"""Data sets whose files a list names: VisA's table, Real-IAD's JSON; tables as people write them.

A file that is missing fails when it is read, unless all are.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable
from os.path import exists, isfile  # False for names that no system can have
from pathlib import Path
from typing import NamedTuple

from efficientad.data.datasets import GOOD, DataSet, Sample, split_validation
from efficientad.data.image_files import is_good_name, plain_name
from efficientad.utils.files import listed
from efficientad.utils.folders import subfolders, visible

SPLIT = Path("split_csv", "1cls.csv")  # of VisA: says of every image where it belongs
COLUMNS = ("object", "split", "label", "image", "mask")
LISTS = "realiad_jsons"  # folder of Real-IAD's lists; those of other splits have a longer name
_LISTED = 8
_DELIMITERS = ",;\t|"


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a text table that has (at least) these columns: column -> cell, stripped.

    UTF-8 with or without a byte order mark, UTF-16 with one, or Windows-1252; any line ends;
    commas, semicolons, tabs or bars between cells; quotes around cells, or around whole lines as a
    spreadsheet leaves them that expected another separator; headings in any case; blank lines.

    Raises:
        ValueError: no such columns, no row, or a row with fewer cells than the columns need.
        FileNotFoundError: no file.
    """
    wanted = list(columns)
    text = _text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    if text[:4].lower() == "sep=":  # a spreadsheet's own first line
        text = text.partition("\n")[2]
    try:
        lines = _lines(text, wanted)
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error}") from error
    if lines is None or len(lines) < 2:
        raise ValueError(f"{path} lacks rows or one of the columns {','.join(wanted)}")
    (_, first), *rest = lines
    places = {name: _plain(first).index(name) for name in wanted}
    rows = []
    for number, cells in rest:
        if len(cells) <= max(places.values()):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells, fewer than its columns")
        rows.append({name: cells[place].strip() for name, place in places.items()})
    return rows


def _text(data: bytes) -> str:
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _lines(text: str, wanted: list[str]) -> list[tuple[int, list[str]]] | None:
    """(line number, cells) of the lines that are not blank, headings first; None: no such table."""
    plain = _parsed(text, ",")
    quoted_whole = "\n".join(cells[0] if cells else "" for _, cells in plain)
    for source in (text, quoted_whole):
        for delimiter in _DELIMITERS:
            lines = [(n, cells) for n, cells in _parsed(source, delimiter) if any(cells)]
            if lines and set(wanted) <= set(_plain(lines[0][1])):
                return lines
    return None


def _parsed(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    return [(reader.line_num, cells) for cells in reader]


def _plain(headings: list[str]) -> list[str]:
    return [heading.strip().casefold() for heading in headings]


def listed_file(root: Path, name: str) -> Path:
    """The file that a table names, relative to root: also with "\\" and in another case.

    Where there is none it is the path as it was written, with "/".
    """
    plain = root / name
    if isfile(plain) or not name:
        return plain
    plain = root / name.replace("\\", "/")
    if isfile(plain) or not plain.is_relative_to(root):
        return plain
    found = root
    for part in plain.relative_to(root).parts:
        if not exists(found / part):
            alike = [p for p in visible(found) if p.name.casefold() == part.casefold()]
            if len(alike) != 1:
                return plain
            part = alike[0].name
        found = found / part
    return found


def open_visa(root: Path, category: str | None) -> DataSet:
    """VisA by its one-class split: paths below root.

    Raises:
        ValueError: no table, not its columns, no such category, or training images that are not
            normal. FileNotFoundError: not one image of the category is there.
    """
    path = root / SPLIT
    if not path.is_file():
        raise ValueError(f"{root} has not the layout visa: no {SPLIT}")
    rows = read_table(path, COLUMNS)
    category = _category(category, [row["object"] for row in rows])
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    left_out: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: row["image"].replace("\\", "/")):
        if row["object"].casefold() != category.casefold():
            continue
        part = row["split"].casefold()
        if part not in parts or not row["image"]:
            left_out[row["split"]] += 1
            continue
        defect = GOOD if is_good_name(row["label"]) else row["label"]
        parts[part].append(_sample(root, row["image"], row["mask"], defect))
    notes = [
        f"{count} rows of {SPLIT.name} with the split {split!r} were left out; splits are "
        f"{' and '.join(parts)}."
        for split, count in left_out.items()
    ]
    return _data_set(root, "visa", category, path, parts, notes)


class Lists(NamedTuple):
    """Real-IAD's lists near a folder: object -> its JSON files, the one to take first.

    pictures: the folder of the one object's images, None: it lies somewhere below.
    """

    files: dict[str, list[Path]]
    pictures: Path | None = None


def looks_like_object(folder: Path) -> bool:
    """Whether it holds folders OK or NG, as those of Real-IAD's objects do."""
    return any(plain_name(path.name) in ("ok", "ng") for path in subfolders(folder))


def find_lists(root: Path) -> Lists | None:
    """The lists in a data set's folder, or those beside and above the folder of an object.

    `<object>.json` lies beside the folder of its object or in realiad_jsons, where Real-IAD has
    further folders of other splits (realiad_jsons_sv and so on). None where there are none.
    """
    if not looks_like_object(root):
        files = _lists_in(root)
        return Lists(files) if files else None
    own = root.resolve()
    found = [
        path
        for base in (own.parent, own.parent.parent)
        for name, paths in _lists_in(base).items()
        for path in paths
        if name.casefold() == own.name.casefold()
    ]
    return Lists({own.name: found}, root) if found else None


def _lists_in(base: Path) -> dict[str, list[Path]]:
    outer = [path for path in subfolders(base) if path.name.casefold().startswith(LISTS)]
    inner = [path for folder in outer for path in subfolders(folder)]
    folders = [*outer, *(path for path in inner if path.name.casefold().startswith(LISTS))]
    folders.sort(key=lambda path: (path.name.casefold() != LISTS, path.parts))
    beside = [path for path in _json_files(base) if looks_like_object(path.with_suffix(""))]
    found: dict[str, list[Path]] = {}
    for path in (*beside, *(path for folder in folders for path in _json_files(folder))):
        found.setdefault(path.stem, []).append(path)
    return found


def _json_files(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.suffix.lower() == ".json" and path.is_file()]


def open_realiad(root: Path, category: str | None) -> DataSet:
    """Real-IAD, or a data set of its form: see `find_lists`.

    root: the data set's folder, or that of an object's images at one of its sizes.

    Raises:
        ValueError: no list, one of another form, no such category, images of several sizes, or
            training images that are not normal. FileNotFoundError: not one image is there.
    """
    lists = find_lists(root)
    if lists is None:
        raise ValueError(
            f"{root} has not the layout realiad: no {LISTS}/<object>.json in it, nor beside or "
            "above it, were it the folder of an object"
        )
    category = _category(category, lists.files)
    path, *others = lists.files[category]
    prefix, entries = _read_list(path)
    prefix = category if prefix is None else prefix
    images = [entry.image for part in entries.values() for entry in part]
    pictures = lists.pictures or _pictures(root, prefix, category, images)
    notes = []
    if others:
        names = listed([other.parent.name for other in others], _LISTED)
        notes.append(
            f"The split is that of {path.parent.name}/{path.name}; others were left out: {names}. "
            f"Copy {path.name} of one beside the folder {category} to take it."
        )
    parts: dict[str, list[Sample]] = {}
    elsewhere = 0
    for part, listed_there in entries.items():
        own = [e for e in listed_there if e.category.casefold() in ("", category.casefold())]
        elsewhere += len(listed_there) - len(own)
        parts[part] = [_sample(pictures, e.image, e.mask, e.defect) for e in own]
    if elsewhere:
        notes.append(f"{elsewhere} entries of {path.name} are of other objects and were left out.")
    return _data_set(root, "realiad", category, path, parts, notes)


class _Entry(NamedTuple):
    """An image of a list; mask and category may be ""."""

    image: str
    mask: str
    defect: str
    category: str


def _read_list(path: Path) -> tuple[str | None, dict[str, list[_Entry]]]:
    """The folder that the paths of a list start from, None: not said; its entries, by path."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        meta = document.get("meta", {})
        normal, prefix = meta.get("normal_class", "OK"), meta.get("prefix")
        _check_texts(("normal_class", normal), ("prefix", prefix or ""))
        entries = {
            part: sorted(_entry(entry, normal) for entry in document[part])
            for part in ("train", "test")
        }
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a list of Real-IAD, an object with train and test, of entries with "
            f"image_path, anomaly_class and mask_path: {error!r}"
        ) from error
    return prefix, entries


def _entry(entry: dict, normal: str) -> _Entry:
    image, label = entry["image_path"], entry["anomaly_class"]
    mask, category = entry.get("mask_path") or "", entry.get("category") or ""
    _check_texts(
        ("image_path", image), ("anomaly_class", label), ("mask_path", mask), ("category", category)
    )
    if not image or not label:
        raise ValueError(f"an entry without image_path or anomaly_class: {entry}")
    if label.casefold() == normal.casefold():
        return _Entry(image, mask, GOOD, category)
    if is_good_name(label):
        raise ValueError(f"anomaly_class {label!r} where normal_class is {normal!r}")
    return _Entry(image, mask, label, category)


def _check_texts(*named: tuple[str, object]) -> None:
    for name, value in named:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r}")
        value.encode()  # no file has a name that cannot be encoded


def _pictures(root: Path, prefix: str, category: str, images: list[str]) -> Path:
    """The folder below root that the paths of a list start from, by the files that are there."""
    places = [place / prefix.strip("/\\") for place in (root, *subfolders(root))]
    found = [p for p in places if any(isfile(listed_file(p, image)) for image in images)]
    if not found:
        raise FileNotFoundError(
            f"none of the {len(images)} images of {category} is there; looked for "
            f"{listed([str(place) for place in places], _LISTED)}"
        )
    if len(found) > 1:
        names = ", ".join(str(place) for place in found)
        raise ValueError(f"the images of {category} are there more than once; name one of: {names}")
    return found[0]


def _category(category: str | None, names: Collection[str]) -> str:
    """The object that is named, in any case, or the only one."""
    known = {name.casefold(): name for name in reversed(list(names))}
    if category is None and len(known) == 1:
        return next(iter(known.values()))
    if category is None or category.casefold() not in known:
        raise ValueError(
            f"category must be one of {', '.join(sorted(known.values()))}, got {category!r}"
        )
    return known[category.casefold()]


def _sample(root: Path, image: str, mask: str, defect: str) -> Sample:
    masks = (listed_file(root, mask),) if mask else ()
    return Sample(listed_file(root, image), int(defect != GOOD), defect, masks)


def _data_set(
    root: Path,
    layout: str,
    category: str,
    path: Path,
    parts: dict[str, list[Sample]],
    notes: list[str],
) -> DataSet:
    """The data set of what a list (path) names."""
    defective = sum(sample.label for sample in parts["train"])
    if not parts["train"] or defective:
        raise ValueError(
            f"{path}: the training images of {category} must be normal, and some; "
            f"{defective} of {len(parts['train'])} are not normal"
        )
    files = [sample.path for sample in (*parts["train"], *parts["test"])]
    if not any(map(isfile, files)):
        raise FileNotFoundError(
            f"{path} lists {len(files)} images of {category}, none of which exists; first: "
            f"{files[0]}"
        )
    twice = len(files) - len(set(files))
    if twice:
        notes.append(f"{twice} images of {category} are listed more than once in {path.name}.")
    train, validation = split_validation(parts["train"])
    return DataSet(
        root, layout, category, train, validation, tuple(parts["test"]), notes=tuple(notes)
    )
