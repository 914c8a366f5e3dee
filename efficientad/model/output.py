"""What a detector says of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnomalyOutput:
    """What the detector says of a batch of N images.

    Attributes:
        score: (N,) image scores, the maximum of `anomaly_map` or the mean of its largest cells, see
            `EfficientAD.score`; not clamped, negative is normal.
        anomaly_map: (N, H, W) at the size of the network's input.
        map_st, map_ae: (N, h, w) raw student-teacher and student-autoencoder distance maps at
            feature resolution, before any normalisation.
    """

    score: Tensor
    anomaly_map: Tensor
    map_st: Tensor
    map_ae: Tensor


torch.export.register_dataclass(AnomalyOutput, serialized_type_name="efficientad.AnomalyOutput")
