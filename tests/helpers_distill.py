"""What the tests of distillation share: a tiny recipe, a backbone, photos, runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from efficientad.distillation.distiller import Distillation
from efficientad.distillation.recipe import Recipe
from efficientad.distillation.targets import Targets

# Small enough for a test: windows of one or four cells, two photos a step.
SMALL = Recipe(
    steps=4, batch_size=2, lr=1e-3, schedule="cosine", warmup=2, crop=36, bank=1, ema=0.9,
    flip=True, grey=0.3, held_out=1,
)  # fmt: skip
FACTS = {"name": "tiny", "sha256": "0"}


class TinyBackbone(nn.Module):
    """384 channels at 1/8 of the image, from its colours: cheap, and not the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 384, 1)

    def forward(self, x):
        features = self.mix(F.avg_pool2d(x, 8)).tanh()
        return torch.cat([features[:, :-1], torch.zeros_like(features[:, :1])], 1)  # a dead one


def draw_photos(folder: Path, count: int = 8) -> list[Path]:
    """Smooth coloured noise, each of another size, as PNG files."""
    numbers = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        coarse.resize((70 + i, 60), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def make_run(recipe: Recipe, photos: list[Path], folder: Path, **options) -> Distillation:
    options = {"workers": 0, "backbone_facts": FACTS, **options}
    return Distillation(recipe, photos, TinyBackbone(), state=folder / "run.state", **options)


def make_targets(recipe: Recipe, photos: list[Path], folder: Path) -> Targets:
    return Targets(
        recipe, photos, TinyBackbone(), backbone_facts=FACTS, bank_folder=folder, workers=0
    )
