"""The fast path inside others' programs.

anomalib: `accelerate(model)` gives an EfficientAd the fast forward and leaves it what it is.
nelson1425: `predict` takes the place of the function of that name in `efficientad.py`.

Nothing of either project is imported. The first call with a model runs the model's own forward too
and compares; where the numbers differ by more than the computing dtype's bound (a changed network,
say), a warning says so and the model's own forward goes on serving. Weights that change later, in
place or by replacement, are noticed by their tensors' versions and taken over.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.adapters.model_server import Server
from efficientad.checkpoint.anomalib import anomalib_contents
from efficientad.checkpoint.contents import Contents, build_detector
from efficientad.checkpoint.foreign import network_of
from efficientad.checkpoint.safe_pickle import CheckpointError, LazyTensor
from efficientad.model.detector import AnomalyOutput, EfficientAD
from efficientad.model.networks import MIN_IMAGE_SIZE
from efficientad.utils.devices import choose_device

MOST_SIZES = 4  # input sizes per model for which a predictor is kept
_RAW = (0.0, 0.1, 0.0, 0.1)  # quantiles whose normalisation changes nothing


# ---- anomalib --------------------------------------------------------------------------------


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
    if not _is_anomalib(core):
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

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
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
        return self._result(server.detect(batch), tuple(batch.shape[-2:]))

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
        size = tuple(batch.shape[-2:])
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
        if isinstance(own, tuple) and {"pred_score", "anomaly_map"} <= set(own._fields):
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
def _anomalib_detector(model: nn.Module, image_size: tuple[int, int]) -> EfficientAD:
    """The detector of an EfficientAdModel; one without statistics or quantiles uses none."""
    path = Path(type(model).__name__)
    settings = {"padding": model.teacher.conv1.padding != (0, 0), "pad_maps": model.pad_maps}
    tree = {"state_dict": _lazy(model), "hyper_parameters": settings}
    contents = anomalib_contents(tree, path, False, image_size)
    contents.statistics = contents.statistics or (torch.zeros(384), torch.ones(384))
    contents.quantiles = contents.quantiles or _RAW
    return build_detector(contents, path)


def _lazy(module: nn.Module) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(tuple(value.shape), lambda value=value: value)
        for name, value in module.state_dict().items()
    }


# ---- nelson1425 ------------------------------------------------------------------------------

_nelson: weakref.WeakKeyDictionary[nn.Module, Server] = weakref.WeakKeyDictionary()
_nelson_lock = threading.Lock()


@torch.no_grad()
def predict(
    image: Tensor,
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    teacher_mean: Tensor,
    teacher_std: Tensor,
    q_st_start: Any = None,
    q_st_end: Any = None,
    q_ae_start: Any = None,
    q_ae_end: Any = None,
    **predictor_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """nelson1425's `predict`, with his arguments and results, on the fast path.

    A predictor is built at the first call with a student and goes when the student does. While the
    autoencoder is in training mode (its dropout counts), the networks run as they are.

    Args:
        image: (N, 3, H, W), normalised by ImageNet's statistics as his transform does.
        teacher, student, autoencoder: his `nn.Sequential` networks.
        teacher_mean, teacher_std: (1, 384, 1, 1); the same tensors in each call, or the weights
            are folded anew.
        q_st_start to q_ae_end: map quantiles, or None to leave a map as it is.
        predictor_options: as in `accelerate`.

    Returns:
        map_combined, map_st, map_ae: (N, 1, h, w) float32, h = 56 at 256 pixels.

    Raises:
        CheckpointError: networks of other layers than his.
    """
    networks = (teacher, student, autoencoder)
    statistics = (teacher_mean, teacher_std)
    maps = None
    if not autoencoder.training:
        with _nelson_lock:
            server = _nelson_server(image, networks, statistics, predictor_options)
        if server.predictor is not None:
            found = server.detect(image)
            maps = found.map_st[:, None], found.map_ae[:, None]
    map_st, map_ae = maps or _nelson_maps(image, networks, statistics)
    if q_st_start is not None:
        map_st = 0.1 * (map_st - q_st_start) / (q_st_end - q_st_start)
    if q_ae_start is not None:
        map_ae = 0.1 * (map_ae - q_ae_start) / (q_ae_end - q_ae_start)
    return 0.5 * map_st + 0.5 * map_ae, map_st, map_ae


def _nelson_server(image, networks, statistics, options) -> Server:
    tensors = [t for network in networks for t in network.parameters()] + list(statistics)
    size = tuple(image.shape[-2:])

    def build() -> EfficientAD:
        return _nelson_detector(networks, statistics, size)

    server = _nelson.get(networks[1])
    if server is not None and server.options == options and server.source == tensors[0].device:
        if server.predictor is None or server.predictor.image_size == size:
            server.update(build, tensors)
            return server
    server = Server(build, tensors, options)
    found = server.detect(image[:1])
    with torch.autocast(image.device.type, enabled=False):
        own = _nelson_maps(image[:1], networks, statistics)
    pairs = [(found.map_st[:, None], own[0]), (found.map_ae[:, None], own[1])]
    server.refuse_unless_equal(pairs, "the student")
    _nelson[networks[1]] = server
    return server


def _nelson_maps(image, networks, statistics) -> tuple[Tensor, Tensor]:
    """Both raw maps by the networks themselves."""
    teacher, student, autoencoder = (network(image) for network in networks)
    mean, std = statistics
    student_st, student_ae = student.chunk(2, dim=1)
    map_st = ((teacher - mean) / std - student_st).square().mean(1, keepdim=True)
    return map_st, (autoencoder - student_ae).square().mean(1, keepdim=True)


def _nelson_detector(networks, statistics, image_size: tuple[int, int]) -> EfficientAD:
    weights, size = {}, None
    for role, module in zip(("teacher", "student", "autoencoder"), networks, strict=True):
        network = network_of(_lazy(module), f"the {role} given")
        if network is None or network.role != role:
            found = "no network of EfficientAD" if network is None else f"a {network.role}"
            raise CheckpointError(f"the {role} given is {found}; it must be nelson1425's {role}")
        weights |= {f"{role}.{name}": value for name, value in network.weights.items()}
        size = network.size or size
    contents = Contents(
        size,
        weights,
        padding=networks[0][0].padding != (0, 0),
        border="nelson",
        image_size=image_size,
        statistics=tuple(v.flatten() for v in statistics),
        quantiles=_RAW,
        normalization=(torch.zeros(3), torch.ones(3)),  # the image comes normalised
    )
    return build_detector(contents, "the networks given")
