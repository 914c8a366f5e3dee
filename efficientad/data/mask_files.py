"""Which files of a folder of masks belong to which picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from efficientad.data.image_files import is_image, plain_name
from efficientad.utils.files import listed
from efficientad.utils.folders import files_below, subfolders

MASK_FOLDERS = ("groundtruth", "groundtruths", "masks", "mask", "gt")
# What may follow the picture's own name in that of its mask, and a number if there are several.
_TAIL = re.compile(
    r"[ _.-]*(mask|masks|gt|ground[ _-]?truth|label|labels|seg|segmentation|annotation)"
    r"[ _.-]*\d*"
)
_LISTED = 8


class MaskFiles:
    """The mask files of a data set: `ground_truth/<defect>/`, and what of them found a picture.

    The folder may be called ground_truth, masks, mask or gt, in any spelling; it and those of the
    defects are found in any case. A mask has its picture's name, with or without a word such as
    _mask or _gt behind it, and any suffix of an image; or it lies, with any name, in a folder of
    the picture's name. Masks of pictures in subfolders lie in the same subfolders.
    """

    def __init__(self, root: Path) -> None:
        found = [path for path in subfolders(root) if plain_name(path.name) in MASK_FOLDERS]
        found.sort(key=lambda path: MASK_FOLDERS.index(plain_name(path.name)))
        self.folder = found[0] if found else None
        self._files = [] if self.folder is None else files_below(self.folder)
        self._taken: set[Path] = set()
        self._second: set[Path] = set()
        # (folder below ground_truth, in lower case) -> its mask files
        self._inside: dict[tuple[str, ...], list[Path]] = {}
        for path in self._files:
            if is_image(path):
                self._inside.setdefault(self._place(path.parent), []).append(path)

    def _place(self, folder: Path) -> tuple[str, ...]:
        assert self.folder is not None
        return tuple(part.casefold() for part in folder.relative_to(self.folder).parts)

    def assign(self, defect: Path, pictures: Sequence[Path]) -> list[tuple[Path, ...]]:
        """The masks of each picture below `defect`, a folder of test images; () where none is."""
        stems = Counter(path.stem.casefold() for path in pictures)
        found = []
        for path in pictures:
            place = (defect.name, *path.parent.relative_to(defect).parts)
            places = [tuple(part.casefold() for part in place)]
            if len(place) > 1 and stems[path.stem.casefold()] == 1:
                places.append((defect.name.casefold(),))
            found.append(next((masks for p in places if (masks := self._masks(p, path))), ()))
        return found

    def _masks(self, place: tuple[str, ...], picture: Path) -> tuple[Path, ...]:
        own = self._inside.get((*place, picture.stem.casefold()), [])
        if own:
            self._taken.update(own)
            return tuple(own)
        named: dict[str, list[Path]] = {"tail": [], "": []}
        for path in self._inside.get(place, ()):
            tail = _tail(path, picture)
            if tail == "":
                named[""].append(path)
            elif tail is not None and _TAIL.fullmatch(tail):
                named["tail"].append(path)
        masks = named["tail"] or named[""][:1]  # "0.png" beside "0_mask.png": perhaps the picture
        self._taken.update(masks)
        self._second.update({*named["tail"], *named[""]} - {*masks})
        return tuple(masks)

    def notes(self) -> list[str]:
        """Sentences about the files that belong to no picture."""
        left = [path for path in self._files if path not in self._taken | self._second]
        second = sorted(self._second - self._taken)
        notes = []
        if left:
            belong = f"{_files(left)} in {self._shown} belong{'s' if len(left) == 1 else ''}"
            notes.append(f"{belong} to no picture: {self._names(left)}")
        if second:
            notes.append(
                f"{_files(second)} in {self._shown} left out, whose pictures have a mask of a "
                f"plainer name: {self._names(second)}"
            )
        return notes

    @property
    def _shown(self) -> str:
        return "" if self.folder is None else self.folder.name

    def _names(self, paths: Sequence[Path]) -> str:
        assert self.folder is not None
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        return f"{listed(names, _LISTED)}."


def looks_like_mask(path: Path, beside: Sequence[Path]) -> bool:
    """Whether a file is called a mask of another one among its neighbours: "0_mask" beside "0"."""
    if not _TAIL.search(path.stem.casefold()):
        return False
    tails = (_tail(path, other) for other in beside if other.parent == path.parent)
    return any(tail is not None and _TAIL.fullmatch(tail) for tail in tails)


def _tail(mask: Path, picture: Path) -> str | None:
    """What follows the picture's name, with or without its suffix, in that of a mask; or None."""
    name = mask.stem.casefold()
    for own in (picture.name.casefold(), picture.stem.casefold()):
        if name.startswith(own):
            return name.removeprefix(own)
    return None


def _files(paths: Sequence[Path]) -> str:
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''}"
