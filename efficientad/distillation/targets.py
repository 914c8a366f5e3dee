"""The batches and targets of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efficientad.data.decoding import ImageError
from efficientad.distillation.photos import (
    Bank,
    View,
    draw_view,
    features_of,
    normalize,
    open_bank,
    photos_digest,
    read_or_none,
    run_backbone,
    show_photo,
    split_photos,
)
from efficientad.distillation.recipe import MARGIN, PDN_SIZE, Recipe
from efficientad.model.calibration import ChannelStatistics, Progress
from efficientad.utils.devices import lay_out
from efficientad.utils.sampling import random_numbers, shuffled


class Targets:
    """Photos and targets of a run. Batches are functions of the step: any thread may make them.

    failed: photos that could not be read -> reason. target_mean, target_std: (384,) of the
    backbone's features; pass those of an interrupted run as `statistics`.
    """

    def __init__(
        self,
        recipe: Recipe,
        photos: Sequence[Path],
        backbone: nn.Module,
        *,
        backbone_facts: dict[str, Any],
        bank_folder: str | os.PathLike,
        statistics: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 2,
        progress: Progress | None = None,
    ) -> None:
        self.recipe, self.device, self.workers = recipe, torch.device(device), workers
        self.progress = progress or (lambda what, done, total: None)
        self.backbone = backbone.to(self.device)
        lay_out(self.backbone, torch.channels_last)
        self.train, self.held_out = split_photos(photos, recipe.held_out, recipe.seed)
        self.failed: dict[Path, str] = {}
        self.bank = self._open_bank(bank_folder, backbone_facts) if recipe.bank else None
        mean, std = statistics or self._statistics()
        self.target_mean = mean.to(self.device, torch.float32)
        std = std.to(self.device, torch.float32)
        self.target_std = torch.where(std > 0, std, torch.ones_like(std))  # a dead channel
        self.held_images: list[np.ndarray] = []
        self.held_targets: list[Tensor] = []
        for index, image, feature in self._features(self.held_out, None):
            self.held_images.append(image)
            self.held_targets.append(self.normalize_target(feature[None]).half())
            self.progress("held-out targets", index + 1, len(self.held_out))

    def view(self, stream: str, a: int, b: int) -> View:
        recipe = self.recipe
        return draw_view(recipe.seed, stream, a, b, recipe.grey, recipe.flip, recipe.zoom)

    def load_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(PDN images (N, P, P, 3) uint8, what the targets come from) of a step; no shared state.

        The second is the backbone's images (N, 512, 512, 3) uint8, or with a bank the raw targets
        of the same windows, (N, cells, cells, 384) float16.
        """
        size = self.recipe.batch_size
        rows = [self._load_item(step, item) for item in range(size)]
        images, sources = (np.stack(part) for part in zip(*rows, strict=True))
        return images, sources

    def window(self, step: int, item: int) -> tuple[int, int]:
        """First (row, column) of a crop on the grid of cells: pixels 4 row, 4 column."""
        assert self.recipe.crop is not None
        room = (PDN_SIZE - self.recipe.crop) // 4
        numbers = random_numbers(self.recipe.seed, "window", step, item)
        row, column = numbers.integers(0, room + 1, 2).tolist()
        return row, column

    def _load_item(self, step: int, item: int) -> tuple[np.ndarray, np.ndarray]:
        position = step * self.recipe.batch_size + item
        crop = self.recipe.crop
        if self.bank is not None:
            count = len(self.bank.entries)
            entry = self.bank.entries[shuffled(self.recipe.seed, "photo", count, position)]
            image, target = self.bank.images[entry], self.bank.targets[entry]
        else:
            image, target = self._read(position, self.view("view", step, item))
        if crop is not None:
            row, column = self.window(step, item)
            image = image[4 * row : 4 * row + crop, 4 * column : 4 * column + crop]
            if self.bank is not None:
                cells = crop // 4 - 2 * MARGIN
                target = target[row : row + cells, column : column + cells]
        return image, target

    def _read(self, position: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        """(256x256, 512x512) of the photo at a position; the next one in place of a bad one."""
        count = len(self.train)
        first = shuffled(self.recipe.seed, "photo", count, position)
        for offset in range(count):
            photo = read_or_none(self.train[(first + offset) % count], self._fail)
            if photo is not None:
                return show_photo(photo, view)[::-1]
        raise ValueError(f"none of the {count} photos can be read; the first: {self._first()}")

    def _fail(self, path: Path, error: ImageError) -> None:
        self.failed[path] = error.reason

    def _first(self) -> str:
        path, reason = next(iter(self.failed.items()), ("", ""))
        return f"{path}: {reason}"

    def _open_bank(self, folder: str | os.PathLike, backbone_facts: dict[str, Any]) -> Bank:
        recipe = self.recipe
        bank = open_bank(
            folder,
            self.backbone,
            self.train,
            recipe.bank,
            key={
                "photos": photos_digest(self.train),
                "backbone": backbone_facts["sha256"],
                **{name: getattr(recipe, name) for name in ("seed", "grey", "flip", "zoom")},
            },
            view_of=lambda photo, variant: self.view("view", photo, variant),
            margin=0 if recipe.crop is None else MARGIN,
            device=self.device,
            workers=self.workers,
            progress=self.progress,
        )
        self.failed.update((Path(path), reason) for path, reason in bank.failed)
        return bank

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std of the backbone's channels, from the bank or from the photos."""
        if self.bank is not None:
            return self.bank.mean, self.bank.std
        seed, count = self.recipe.seed, min(self.recipe.statistics, len(self.train))
        order = random_numbers(seed, "statistics", 0).permutation(len(self.train))[:count]
        collected = ChannelStatistics()
        for index, _, feature in self._features([self.train[i] for i in order], "statistics-view"):
            collected.add(feature[None])
            self.progress("feature statistics", index + 1, count)
        if collected.count == 0:
            raise ValueError(f"none of {count} photos can be read; the first: {self._first()}")
        return collected.result()

    def _features(self, paths: Sequence[Path], stream: str | None):
        plain = View(False, False)
        return features_of(
            self.backbone,
            paths,
            lambda index: self.view(stream, index, 0) if stream else plain,
            device=self.device,
            workers=self.workers,
            on_error=self._fail,
        )

    def normalize_target(self, features: Tensor) -> Tensor:
        """(Psi - mu) / sigma of features (N, 384, h, w)."""
        shape = (1, -1, 1, 1)
        return (features - self.target_mean.view(shape)) / self.target_std.view(shape)

    def targets(self, step: int, source: np.ndarray) -> Tensor:
        """Normalised targets (N, 384, cells, cells) of what `load_batch` gave second."""
        if self.bank is not None:
            raw = torch.from_numpy(source).to(self.device).permute(0, 3, 1, 2).float()
            return self.normalize_target(raw)
        raw = self.normalize_target(run_backbone(self.backbone, normalize(source, self.device)))
        if self.recipe.crop is None:
            return raw
        cells, rows = self.recipe.crop // 4 - 2 * MARGIN, []
        for item, features in enumerate(raw):
            row, column = (MARGIN + first for first in self.window(step, item))
            rows.append(features[:, row : row + cells, column : column + cells])
        return torch.stack(rows)
