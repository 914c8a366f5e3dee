"""A predictor for a model that lives elsewhere and may change.

The first call with a model runs the model's own forward too and compares; where the numbers differ
by more than the computing dtype's bound (a changed network, say), a warning says so and the model's
own forward goes on serving (`Server.refuse_unless_equal`). Weights that change later, in place or
by replacement, are noticed by their tensors' versions and taken over.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientad.checkpoint.safe_pickle import LazyTensor
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS, difference, worst
from efficientad.model.detector import EfficientAD
from efficientad.model.output import AnomalyOutput
from efficientad.utils.devices import choose_device

RAW_QUANTILES = (0.0, 0.1, 0.0, 0.1)  # their normalisation changes nothing


def lazy_tensors(module: nn.Module) -> dict[str, LazyTensor]:
    """The module's state as the readers of files take it: name -> tensor, nothing copied."""
    return {name: LazyTensor.of(value) for name, value in module.state_dict().items()}


class Versions:
    """Tells whether tensors are those it was made of, unchanged; keeps none of them alive.

    Writing through `tensor.data` is not seen: torch does not count it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(t), self._state(t)) for t in tensors]

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version

    def same(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._seen) and all(
            ref() is tensor and state == self._state(tensor)
            for tensor, (ref, state) in zip(tensors, self._seen, strict=True)
        )


class Server:
    """A predictor for one model at one input size, kept up to date; None where it must not serve.

    Args:
        build: gives the detector of the model's present weights.
        tensors: all that the detector is made of.
        options: the predictor's.
    """

    def __init__(
        self, build: Callable[[], EfficientAD], tensors: Sequence[Tensor], options: dict[str, Any]
    ) -> None:
        self.options = options
        self.source = tensors[0].device  # where the model is
        self._versions = Versions(tensors)
        options = {"device": self.source} | options
        if choose_device(options["device"]).type == "cpu":
            options = {"dtype": "float32"} | options
        with torch.inference_mode(False):  # buffers made inside could not be written outside
            self.predictor: FastPredictor | None = FastPredictor(build(), **options)

    def update(self, build: Callable[[], EfficientAD], tensors: Sequence[Tensor]) -> None:
        """Take over weights that have changed since."""
        if self._versions.same(tensors) or self.predictor is None:
            return
        versions = Versions(tensors)
        with torch.inference_mode(False):
            self.predictor.reload(build())
        self._versions = versions

    def detect(self, images: Tensor) -> AnomalyOutput:
        """(N, 3, H, W), as the detector takes them; results on the images' device, float32."""
        predictor = self._serving()
        with torch.autocast(predictor.device.type, enabled=False):
            out = predictor.detect(images.detach())
        fields = (out.score, out.anomaly_map, out.map_st, out.map_ae)
        return AnomalyOutput(*(t.to(images.device) for t in fields))

    def _serving(self) -> FastPredictor:
        """The predictor; callers have seen that it serves."""
        assert self.predictor is not None
        return self.predictor

    def refuse_unless_equal(self, pairs: Sequence[tuple[Tensor, Tensor]], what: str) -> None:
        """Compare (found, expected) maps; past the bound this server serves no more."""
        most = worst(difference(found, expected).largest for found, expected in pairs)
        bound = BOUNDS[self._serving().dtype][0]
        if not most <= bound:  # true for NaN
            self.predictor = None
            warnings.warn(
                f"{what} keeps its own forward: the fast path's maps differ from its own by "
                f"{most:.2g} of their scale (bound {bound:g}). Was the network changed?",
                stacklevel=5,
            )
