"""The scores of a detector's held-out images in the precisions that its fast path may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientad.fast.backends import TorchBackend
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.fast.predictor import FastPredictor
from efficientad.model.calibration import Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.precision import Precision, compare
from efficientad.utils.devices import cpu_convolves_bfloat16
from efficientad.utils.sampling import evenly

MOST_IMAGES = 64  # scored again; evenly spread over those behind the threshold


def measure_precision(
    detector: EfficientAD,
    images: Sequence[Any],
    scores: Sequence[float],
    *,
    progress: Progress | None = None,
) -> Precision:
    """How far a calibrated detector's scores in other dtypes lie from float32's.

    Args:
        detector: on the device where the dtypes are tried: on CUDA float16 and bfloat16; on a CPU
            bfloat16 where torch has convolutions in it, and float16 as a GPU would compute,
            simulated: weights and activations of teacher and student rounded to it.
        images: good ones, as `FastPredictor` takes them; at most MOST_IMAGES are scored.
        scores: theirs, of the plain float32 detector.
        progress: called with (what, images done, images in all).

    Raises:
        ImageError: an image that cannot be read any more.
    """
    device = detector.affine.device
    places = evenly(len(images), MOST_IMAGES)
    found: dict[str, list[float]] = {}
    for name, build in _ways(device).items():
        predictor = build(detector, device=device, dtype=name, batch_sizes=(1,), map_size=None)
        found[name] = []
        for done, i in enumerate(places, start=1):
            found[name].append(predictor(images[i]).cpu().score)
            if progress is not None:
                progress(f"errors in {name}", done, len(places))
    return compare([scores[i] for i in places], found, detector.threshold, str(device))


def _ways(device: torch.device) -> dict[str, Callable[..., FastPredictor]]:
    """What computes in which dtype on a device."""
    if device.type == "cuda":
        return {"float16": _Trial, "bfloat16": _Trial}
    ways: dict[str, Callable[..., FastPredictor]] = {"float16": _simulated_float16}
    return ways | ({"bfloat16": _Trial} if cpu_convolves_bfloat16() else {})


class _Trial(FastPredictor):
    """In a dtype that is being measured: what an earlier calibration found does not matter."""

    def _judged(self, detector: EfficientAD) -> str:
        return "being measured"


def _simulated_float16(detector: EfficientAD, **options: Any) -> FastPredictor:
    return _RoundedPredictor(detector, **options | {"dtype": "float32", "backend": "torch"})


class _RoundedNetwork(FoldedNetwork):
    """Teacher and student as the fused kernels compute them in float16, with float32 sums.

    Of the autoencoder the filters alone are rounded: its whole share of the error was measured at a
    fifth and less, in bfloat16 on two detectors.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            for name, value in self.named_buffers():
                if name.endswith("_weight"):
                    value.copy_(value.half())

    def _compiled(self, tensors: dict[str, Tensor]) -> None:
        return None

    def _conv(self, x: Tensor, name: str, *, padding: int = 0, relu: bool = False) -> Tensor:
        return super()._conv(x.half().float(), name, padding=padding, relu=relu)


class _RoundedBackend(TorchBackend):
    def __init__(self, detector: EfficientAD, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(detector, dtype, device)
        self.network = _RoundedNetwork(detector, dtype, device)


class _RoundedPredictor(_Trial):
    torch_backend = _RoundedBackend
