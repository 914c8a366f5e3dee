"""anomalib: `accelerate(model)` gives an EfficientAd the fast forward and leaves it what it is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.adapters.model_server import RAW_QUANTILES, Server, lazy_tensors
from efficientad.checkpoint.anomalib import anomalib_contents
from efficientad.checkpoint.contents import build_detector
from efficientad.checkpoint.safe_pickle import naming
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import MIN_IMAGE_SIZE
from efficientad.model.output import AnomalyOutput
from efficientad.utils.devices import choose_device

MOST_SIZES = 4  # input sizes per model for which a predictor is kept


def accelerate(model: nn.Module, **predictor_options: Any) -> nn.Module:
    """Give anomalib's EfficientAd the fast forward, in place: `model = accelerate(model)`.

    The model stays what it is: its class, weights, state dict and training. In eval mode its
    forward returns what it did, of the same type, from a FastPredictor per input size; in training
    mode, with `normalize=False`, while it is traced or compiled, and for inputs that the detector
    does not take, its own forward runs. `del model.forward` undoes it (`del model.model.forward` of
    the LightningModule).

    Args:
        model: `EfficientAdModel` or the LightningModule `EfficientAd`, 1.x or 2.x.
        predictor_options: as `FastPredictor` takes them. Default: the model's device; on a CPU
            float32, on CUDA "auto", float16.

    Raises:
        ValueError: another model, or an option that does not exist.
    """
    core = model if _is_anomalib(model) else getattr(model, "model", None)
    if not isinstance(core, nn.Module) or not _is_anomalib(core):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be anomalib's EfficientAdModel or "
            "EfficientAd (for a detector of this package use FastPredictor)"
        )
    unknown = set(predictor_options) - {"device", "dtype", "batch_sizes", "backend"}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{names}: no such option; there are device, dtype, batch_sizes, backend")
    choose_device(predictor_options.get("device", "auto"))
    core.forward = _FastForward(core, predictor_options)
    return model


def _is_anomalib(model: object) -> bool:
    names = ("teacher", "student", "ae", "mean_std", "quantiles", "pad_maps")
    return isinstance(model, nn.Module) and all(hasattr(model, name) for name in names)


class _FastForward:
    """Stands in an EfficientAdModel's place of `forward`."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self.__setstate__(self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model start without predictors."""
        return {"_model": self._model, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._servers: OrderedDict[tuple[int, int], Server] = OrderedDict()
        self._shape: Any = None
        self._lock = threading.RLock()

    def __call__(self, batch: Tensor, *arguments: Any, **named: Any) -> Any:
        if not self._serves(batch, arguments, named):
            return self._own(batch, *arguments, **named)
        with self._lock:
            server = self._server(batch)
        if server.predictor is None:
            return self._own(batch, *arguments, **named)
        return self._result(server.detect(batch), (batch.shape[2], batch.shape[3]))

    def _own(self, *arguments: Any, **named: Any) -> Any:
        return type(self._model).forward(self._model, *arguments, **named)

    def _serves(self, batch: Tensor, arguments: tuple, named: dict[str, Any]) -> bool:
        normalize = arguments[1] if len(arguments) > 1 else named.get("normalize", True)
        return (
            normalize
            and not self._model.training
            and isinstance(batch, Tensor)
            and batch.is_floating_point()
            and batch.dim() == 4
            and len(batch) > 0
            and batch.shape[1] == 3
            and min(batch.shape[2:]) >= MIN_IMAGE_SIZE
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _server(self, batch: Tensor) -> Server:
        size = (batch.shape[2], batch.shape[3])
        tensors = list(self._model.parameters())
        server = self._servers.get(size)
        if server is None or server.source != tensors[0].device:
            server = Server(lambda: _anomalib_detector(self._model, size), tensors, self._options)
            with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
                own = self._own(batch[:1])
            found = self._learn(own, server.detect(batch[:1]), size)
            server.refuse_unless_equal(found, type(self._model).__name__)
            self._servers[size] = server
            while len(self._servers) > MOST_SIZES:
                self._servers.popitem(last=False)
        server.update(lambda: _anomalib_detector(self._model, size), tensors)
        self._servers.move_to_end(size)
        return server

    def _learn(self, own: Any, found: AnomalyOutput, size: tuple[int, int]) -> list:
        """Remember what the model's results look like; pairs (found, own) of maps."""
        if {"pred_score", "anomaly_map"} <= set(getattr(own, "_fields", ())):
            self._shape = own._replace(pred_score=None, anomaly_map=None)  # 2.x
            return [(getattr(self._result(found, size), n), getattr(own, n)) for n in
                    ("pred_score", "anomaly_map")]  # fmt: skip
        if isinstance(own, dict) and own.keys() - {"map_st", "map_ae"} in (
            {"anomaly_map"},
            {"anomaly_map_combined"},
        ):
            self._shape = list(own)  # 1.x
            return [(value, own[name]) for name, value in self._result(found, size).items()]
        raise ValueError(
            f"{type(self._model).__name__} returns a {type(own).__name__} of other fields than "
            "anomalib 1.x's or 2.x's; it cannot be accelerated"
        )

    def _result(self, found: AnomalyOutput, size: tuple[int, int]) -> Any:
        anomaly_map = found.anomaly_map[:, None]
        if not isinstance(self._shape, list):
            return self._shape._replace(pred_score=found.score[:, None], anomaly_map=anomaly_map)
        singles = {"map_st": ("st", found.map_st), "map_ae": ("ae", found.map_ae)}
        return {
            name: self._single(*singles[name], size) if name in singles else anomaly_map
            for name in self._shape
        }

    def _single(self, kind: str, raw: Tensor, size: tuple[int, int]) -> Tensor:
        """One of the two maps that 1.x returns beside the combined one."""
        resized = F.interpolate(
            F.pad(raw[:, None], (4 if self._model.pad_maps else 0,) * 4), size=size, mode="bilinear"
        )
        low, high = (self._model.quantiles[f"q{end}_{kind}"].detach() for end in "ab")
        return resized if not low and not high else 0.1 * (resized - low) / (high - low)


@torch.no_grad()
def _anomalib_detector(model: Any, image_size: tuple[int, int]) -> EfficientAD:
    """The detector of an EfficientAdModel; one without statistics or quantiles uses none."""
    settings = {"padding": model.teacher.conv1.padding != (0, 0), "pad_maps": model.pad_maps}
    tree = {"state_dict": lazy_tensors(model), "hyper_parameters": settings}
    with naming(type(model).__name__):
        contents = anomalib_contents(tree, False, image_size)
        assert contents is not None  # it has the modules of one
        contents.statistics = contents.statistics or (torch.zeros(384), torch.ones(384))
        contents.quantiles = contents.quantiles or RAW_QUANTILES
        return build_detector(contents)
