"""Photos and their targets.

A view of a photo is the photo, perhaps mirrored, perhaps in grey; both networks get the same view
(paper, Algorithm 3). Targets are computed as they are needed, or once into a bank on the disk,
which saves the backbone's work when a photo comes up many times.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from efficientad.data.decoding import ImageError, read_image
from efficientad.data.images import resize_image, to_tensor
from efficientad.distillation.backbones import BACKBONE_SIZE, GRID
from efficientad.distillation.recipe import PDN_SIZE
from efficientad.model.calibration import ChannelStatistics, Progress
from efficientad.model.detector import IMAGENET_MEAN, IMAGENET_STD
from efficientad.model.networks import TEACHER_CHANNELS
from efficientad.utils.files import write_text
from efficientad.utils.prefetch import ahead
from efficientad.utils.sampling import random_numbers

_BANK_VERSION = 1
OnError = Callable[[Path, ImageError], None]


class View(NamedTuple):
    """How a photo is shown to both networks.

    window: (top, left, height, width) as parts of the photo's sides; the whole: (0, 0, 1, 1).
    """

    flip: bool
    grey: bool
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def draw_view(
    seed: int, stream: str, step: int, item: int, grey: float, flip: bool, zoom: float = 1.0
) -> View:
    """A view as a function of its arguments; see `Recipe`.

    The draws do not depend on each other, so switching flips on leaves the grey ones alone.
    """
    numbers = random_numbers(seed, stream, step, item).random(5).tolist()
    part = zoom + (1 - zoom) * numbers[2]
    return View(
        flip=flip and numbers[1] < 0.5,
        grey=numbers[0] < grey,
        window=((1 - part) * numbers[3], (1 - part) * numbers[4], part, part),
    )


def show_photo(photo: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """(512x512 for the backbone, 256x256 for the PDN), uint8 (H, W, 3), of one view of a photo.

    Grey is ITU-R 601 luma, as Pillow and torchvision have it, before the resize.
    """
    from PIL import Image

    photo = _window(photo, view.window)
    if view.flip:
        photo = np.ascontiguousarray(photo[:, ::-1])
    if view.grey:
        photo = np.repeat(np.asarray(Image.fromarray(photo).convert("L"))[..., None], 3, axis=2)
    large, small = (resize_image(photo, (size, size)) for size in (BACKBONE_SIZE, PDN_SIZE))
    return large, small


def _window(photo: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """The part of a photo (H, W, 3), of one pixel at the least."""
    rows, columns = photo.shape[:2]
    top, left, height, width = window
    first, row = min(round(top * rows), rows - 1), max(1, round(height * rows))
    second, column = min(round(left * columns), columns - 1), max(1, round(width * columns))
    return np.ascontiguousarray(photo[first : first + row, second : second + column])


def normalize(images: Sequence[np.ndarray] | np.ndarray, device: torch.device) -> Tensor:
    """uint8 images (H, W, 3) -> (N, 3, H, W) float32 with ImageNet's mean and std taken out."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in _IMAGENET)
    return (to_tensor(images).to(device) - mean) / std


_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


def split_photos(paths: Sequence[Path], held_out: int, seed: int) -> tuple[list[Path], list[Path]]:
    """(photos to train on, photos held out), the latter drawn by the seed; both in their order.

    Raises ValueError when nothing would be left to train on.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} photo found; distillation needs many, two at the least")
    if not 0 <= held_out < len(paths):
        raise ValueError(f"held-out is {held_out}; it must be from 0 to {len(paths) - 1}")
    chosen = set(random_numbers(seed, "held-out", 0).permutation(len(paths))[:held_out].tolist())
    train = [p for i, p in enumerate(paths) if i not in chosen]
    return train, [p for i, p in enumerate(paths) if i in chosen]


def photos_digest(paths: Sequence[Path]) -> str:
    """Identifies a list of photos by names and sizes of the files, wherever the folder is."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size if path.exists() else -1
        digest.update(f"{path.parent.name}/{path.name}:{size}\n".encode())
    return digest.hexdigest()


def read_or_none(path: Path, on_error: OnError | None) -> np.ndarray | None:
    """The photo, or None after on_error for one that cannot be read."""
    try:
        return read_image(path)
    except ImageError as error:
        if on_error is None:
            raise
        on_error(path, error)
        return None


@torch.no_grad()
def features_of(
    backbone: nn.Module,
    paths: Sequence[Path],
    view_of: Callable[[int], View],
    *,
    device: torch.device,
    workers: int,
    batch_size: int = 4,
    on_error: OnError | None = None,
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """(index, 256x256 uint8 image, features (384, 64, 64)) of each readable photo, in order."""

    def load(index: int) -> tuple[int, tuple[np.ndarray, np.ndarray] | None]:
        photo = read_or_none(paths[index], on_error)
        return index, None if photo is None else show_photo(photo, view_of(index))

    waiting: list[tuple[int, tuple[np.ndarray, np.ndarray]]] = []

    def computed() -> Iterator[tuple[int, np.ndarray, Tensor]]:
        x = normalize([pair[0] for _, pair in waiting], device)
        features = run_backbone(backbone, x)
        for (index, pair), feature in zip(waiting, features, strict=True):
            yield index, pair[1], feature
        waiting.clear()

    for index, pair in ahead(load, range(len(paths)), workers=workers, depth=2 * batch_size):
        if pair is not None:
            waiting.append((index, pair))
        if len(waiting) == batch_size:
            yield from computed()
    if waiting:
        yield from computed()


@torch.no_grad()
def run_backbone(backbone: nn.Module, x: Tensor) -> Tensor:
    """Features (N, 384, 64, 64), float32; half the memory traffic on a GPU through autocast."""
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.float16, enabled=x.device.type == "cuda"):
        return backbone(x).float()


class Bank:
    """Images and raw targets of fixed views of all photos: files in a folder, mapped into memory.

    images: (n, 256, 256, 3) uint8. targets: (n, c, c, 384) float16, c = 56 for crops (the cells
    of an unpadded PDN), 64 otherwise. mean, std: (384,) of the features over all cells and entries.
    """

    def __init__(self, folder: Path, facts: dict) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.targets = np.load(folder / "targets.npy", mmap_mode="r")
        self.entries = facts["entries"]  # rows that hold a photo: unreadable ones leave a gap
        self.failed = [tuple(pair) for pair in facts["failed"]]
        self.mean = torch.tensor(facts["mean"], dtype=torch.float64)
        self.std = torch.tensor(facts["std"], dtype=torch.float64)

    def nbytes(self) -> int:
        return self.images.nbytes + self.targets.nbytes


def bank_bytes(count: int, margin: int) -> int:
    """Size on the disk of a bank of `count` views."""
    return count * (2 * TEACHER_CHANNELS * (GRID - 2 * margin) ** 2 + 3 * PDN_SIZE**2)


def open_bank(
    folder: str | os.PathLike,
    backbone: nn.Module,
    paths: Sequence[Path],
    views: int,
    *,
    key: dict,
    view_of: Callable[[int, int], View],
    margin: int,
    device: torch.device,
    workers: int,
    progress: Progress | None = None,
) -> Bank:
    """The bank in `folder`, made if it is not there or was made of something else.

    key: JSON facts that the contents follow from. view_of: (photo, variant) -> view.

    Raises:
        ValueError: not one photo can be read.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    key = {**key, "margin": margin, "views": views, "version": _BANK_VERSION}
    known = folder / "bank.json"
    if known.is_file():
        facts = json.loads(known.read_text(encoding="utf-8"))
        if facts.get("key") == key:
            return Bank(folder, facts)
        known.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    cells = GRID - 2 * margin
    n = len(paths) * views
    make = np.lib.format.open_memmap
    images = make(folder / "images.npy", "w+", np.uint8, (n, PDN_SIZE, PDN_SIZE, 3))
    shape = (n, cells, cells, TEACHER_CHANNELS)
    targets = make(folder / "targets.npy", "w+", np.float16, shape)
    statistics = ChannelStatistics()
    entries: list[int] = []
    failed: list[tuple[str, str]] = []
    for index, image, feature in features_of(
        backbone,
        [path for path in paths for _ in range(views)],
        lambda index: view_of(*divmod(index, views)),
        device=device,
        workers=workers,
        on_error=lambda path, error: failed.append((str(path), error.reason)),
    ):
        statistics.add(feature[None])
        images[index] = image
        inside = feature[:, margin : GRID - margin, margin : GRID - margin]
        targets[index] = inside.permute(1, 2, 0).half().cpu().numpy()
        entries.append(index)
        if progress is not None:
            progress("targets", index + 1, n)
    if not entries:
        raise ValueError(f"none of the {len(paths)} photos could be read; first: {failed[0]}")
    images.flush()
    targets.flush()
    mean, std = (v.tolist() for v in statistics.result())
    failed = sorted(set(failed))
    facts = {"key": key, "entries": entries, "failed": failed, "mean": mean, "std": std}
    write_text(known, json.dumps(facts))
    return Bank(folder, facts)
