"""What features hold without any training.

    python -m bench.training.nearest_neighbour mvtec/screw --backbone trunk.safetensors

Patch nearest neighbour (as PatchCore, arXiv 2106.08265, without its coreset): the distance of every
cell's features to the nearest of 60,000 cells drawn from the good training images, resized to a
map; its maximum is the image's score. The rows in bench/results/accuracy.json have the kind
"yardstick": they are what a trained detector is compared with, and no results of EfficientAD.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record
from bench.training.accuracy import TABLE, Areas, add_rows, areas, row_of
from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.teachers import named_teacher
from efficientad.data.datasets import DataSet
from efficientad.data.images import load_batches
from efficientad.data.layouts import open_dataset
from efficientad.distillation.backbones import load_backbone
from efficientad.evaluation.metrics import PixelMetrics
from efficientad.model.detector import EfficientAD
from efficientad.training.start import teacher_digest

BANK = 60_000  # cells
_BLOCK = 2000  # of them at a time, so that the distances of an image's cells stay in the caches


def nearest_distance(cells: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance of each row of cells (n, C) to the nearest row of bank (m, C)."""
    best = torch.full((len(cells),), torch.inf)
    for rows in bank.split(_BLOCK):  # without |cell|^2, which moves no minimum
        squares = torch.addmm(rows.square().sum(1)[None], cells, rows.T, alpha=-2)
        best = torch.minimum(best, squares.amin(1))
    return (best + cells.square().sum(1)).clamp(min=0).sqrt()


def draw_bank(features: Iterator[Tensor], images: int, size: int, seed: int) -> Tensor:
    """Up to `size` random cells (size, C), equally many of each image's features (1, C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for x in features:
        cells = x[0].flatten(1).T
        rows.append(cells[torch.randperm(len(cells), generator=generator)[: -(-size // images)]])
    return torch.cat(rows)[:size]


@torch.no_grad()
def patch_nearest_neighbour(
    features_of: Callable[[Sequence[Path]], Iterator[Tensor]],
    dataset: DataSet,
    *,
    bank: int = BANK,
    seed: int = 0,
) -> Areas:
    """Image AU-ROC, pixel AU-ROC and AU-PRO (None without masks) of patch distances.

    features_of: images -> features (1, C, h, w) of each, in order.
    """
    train = [sample.path for sample in (*dataset.train, *dataset.validation)]
    known = draw_bank(features_of(train), len(train), bank, seed)
    labels, scores, pixels = [], [], PixelMetrics() if dataset.has_masks else None
    found = features_of([sample.path for sample in dataset.test])
    for sample, x in zip(dataset.test, found, strict=True):
        distances = nearest_distance(x[0].flatten(1).T, known).view(1, 1, *x.shape[2:])
        size = dataset.mask_size(sample)
        sized = F.interpolate(distances, size=size, mode="bilinear")[0, 0]
        labels.append(sample.label)
        scores.append(float(sized.max()))
        if pixels is not None:
            pixels.update(sized.numpy(), dataset.read_mask(sample))
    return areas(labels, scores, pixels)


def network_features(network: torch.nn.Module) -> Callable[[Sequence[Path]], Iterator[Tensor]]:
    """Features of images at 256x256, normalised as for all networks of the method."""
    normalize = EfficientAD("S").normalize

    def features_of(paths: Sequence[Path]) -> Iterator[Tensor]:
        for batch in load_batches(list(paths), (256, 256)):
            yield from network(normalize(batch.images)).split(1)

    return features_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="data set with a test part and masks")
    parser.add_argument("--teacher", type=Path, help="a file, or research (default) or commercial")
    parser.add_argument("--backbone", type=Path, help="also of this backbone's features")
    parser.add_argument("--bank", type=int, default=BANK, help="cells of good images to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=TABLE, help="the table")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    teacher = load_teacher(named_teacher(options.teacher or "research"), "S")
    networks: dict[str, torch.nn.Module] = {teacher_digest(teacher): teacher}
    if options.backbone is not None:
        networks[f"backbone {options.backbone.stem}"] = load_backbone(options.backbone)
    facts = record.about()
    for name, network in networks.items():
        start = time.monotonic()
        found = patch_nearest_neighbour(
            network_features(network), dataset, bank=options.bank, seed=options.seed
        )
        row = row_of(
            "yardstick",
            f"patch nearest neighbour, {name}, {dataset.name}",
            facts,
            dataset=dataset.name,
            size="S" if network is teacher else None,
            teacher=name,
            steps=0,
            seconds=round(time.monotonic() - start, 1),
            **found,
            bank=options.bank,
            seed=options.seed,
            test_images=len(dataset.test),
        )
        add_rows(options.json, [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
