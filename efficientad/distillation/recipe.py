"""What a distillation follows from, and its first weights.

Source: arXiv 2303.14535, Algorithm 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from efficientad.model.networks import PDN, check_model_size
from efficientad.utils.sampling import random_numbers

PDN_SIZE = 256  # pixels
MARGIN = 4  # cells by which the padded PDN's grid exceeds the unpadded one's, on each side
MIN_CROP = 36  # one cell of the unpadded PDN, at a multiple of its stride


@dataclass(frozen=True)
class Recipe:
    """What a distilled teacher follows from, beside photos and backbone; defaults: the paper's.

    Attributes:
        size: "S" or "M".
        steps, batch_size: iterations, and photos in each.
        lr, weight_decay: Adam's (L2 in the gradient, not AdamW).
        schedule: "constant", or "cosine": down to 1 % of lr at the last step.
        warmup: steps over which the rate rises linearly to lr.
        grey: probability of a photo in grey, for both networks alike.
        flip: mirror photos with probability 1/2.
        zoom: 1 shows whole photos. Below it, windows with sides of U(zoom, 1) of the photo's, at
            any place: the same photo at several scales.
        crop: None trains the padded PDN on whole 256x256 images. A number of pixels trains the
            unpadded one on random windows, against the cells that it has in the whole image; its
            weights are those of the padded one and its cells equal that one's inner cells.
        bank: 0 computes targets at every step. n computes them once for n views of every photo.
        ema: decay of the averaged weights that are delivered; 0 delivers the last ones.
        dtype: "float32", or "bfloat16": convolutions of the PDN under autocast.
        held_out: photos that are never trained on. seed: of everything drawn.
        statistics: photos over which the backbone's channels are normalised (a bank: all of it).
    """

    size: str = "S"
    steps: int = 60_000
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 1e-5
    schedule: str = "constant"
    warmup: int = 0
    grey: float = 0.1
    flip: bool = False
    zoom: float = 1.0
    crop: int | None = None
    bank: int = 0
    ema: float = 0.0
    dtype: str = "float32"
    held_out: int = 48
    seed: int = 0
    statistics: int = 10_000

    def __post_init__(self) -> None:
        check_model_size(self.size)
        crop = self.crop
        rules = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "schedule": self.schedule in ("constant", "cosine"),
            "warmup": 0 <= self.warmup <= self.steps,
            "grey": 0 <= self.grey <= 1,
            "zoom": 0 < self.zoom <= 1,
            "crop": crop is None or (MIN_CROP <= crop <= PDN_SIZE and crop % 4 == 0),
            "bank": self.bank >= 0,
            "ema": 0 <= self.ema < 1,
            "dtype": self.dtype in ("float32", "bfloat16"),
            "held_out": self.held_out >= 0,
            "statistics": self.statistics >= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; see Recipe for its range")

    def learning_rate(self, step: int) -> float:
        """Rate of the update at `step` (from 0): a function of the step alone."""
        rate = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.schedule == "constant":
            return rate
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def ema_decay(self, step: int) -> float:
        """Weight of the old average at `step`: small at first, to forget the random weights."""
        return min(self.ema, (1 + step) / (10 + step))


@torch.no_grad()
def initial_pdn(recipe: Recipe) -> PDN:
    """A PDN with 384 channels and random weights that are a function of the seed alone.

    Padded if whole images are trained on. Weights are normal with variance 2 / fan-in before a ReLU
    (He et al.), so that features neither fade nor grow, and 0.01 / fan-in at the end, so that the
    loss begins at that of predicting zero; biases are 0.
    """
    pdn = PDN(recipe.size, padding=recipe.crop is None)
    convolutions = [conv for conv, _ in pdn.layers()]
    for i, conv in enumerate(convolutions):
        gain = 2.0 if conv is not pdn.last else 0.01
        numbers = random_numbers(recipe.seed, "initial-weights", i)
        values = numbers.standard_normal(tuple(conv.weight.shape), dtype=np.float32)
        conv.weight.copy_(torch.from_numpy(values) * (gain / conv.weight[0].numel()) ** 0.5)
        assert conv.bias is not None
        conv.bias.zero_()
    return pdn
