"""nelson1425: `predict` takes the place of the function of that name in his `efficientad.py`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientad.adapters.model_server import RAW_QUANTILES, Server, lazy_tensors
from efficientad.checkpoint.contents import Contents, build_detector
from efficientad.checkpoint.foreign import network_of
from efficientad.checkpoint.safe_pickle import CheckpointError, LazyTensor, naming
from efficientad.model.detector import EfficientAD

_servers: weakref.WeakKeyDictionary[nn.Module, Server] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


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
        with _lock:
            server = _server(image, networks, statistics, predictor_options)
        if server.predictor is not None:
            found = server.detect(image)
            maps = found.map_st[:, None], found.map_ae[:, None]
    map_st, map_ae = maps or _own_maps(image, networks, statistics)
    if q_st_start is not None:
        map_st = 0.1 * (map_st - q_st_start) / (q_st_end - q_st_start)
    if q_ae_start is not None:
        map_ae = 0.1 * (map_ae - q_ae_start) / (q_ae_end - q_ae_start)
    return 0.5 * map_st + 0.5 * map_ae, map_st, map_ae


def _server(
    image: Tensor,
    networks: Sequence[nn.Module],
    statistics: Sequence[Tensor],
    options: dict[str, Any],
) -> Server:
    """The student's server, kept up to date; a new one for another input size or other options."""
    tensors = [t for network in networks for t in network.parameters()] + list(statistics)
    size = (image.shape[-2], image.shape[-1])

    def build() -> EfficientAD:
        return _detector(networks, statistics, size)

    server = _servers.get(networks[1])
    if server is not None and server.options == options and server.source == tensors[0].device:
        if server.predictor is None or server.predictor.image_size == size:
            server.update(build, tensors)
            return server
    server = Server(build, tensors, options)
    found = server.detect(image[:1])
    with torch.autocast(image.device.type, enabled=False):
        own = _own_maps(image[:1], networks, statistics)
    pairs = [(found.map_st[:, None], own[0]), (found.map_ae[:, None], own[1])]
    server.refuse_unless_equal(pairs, "the student")
    _servers[networks[1]] = server
    return server


def _own_maps(
    image: Tensor, networks: Sequence[nn.Module], statistics: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Both raw maps by the networks themselves."""
    teacher, student, autoencoder = (network(image) for network in networks)
    mean, std = statistics
    student_st, student_ae = student.chunk(2, dim=1)
    map_st = ((teacher - mean) / std - student_st).square().mean(1, keepdim=True)
    return map_st, (autoencoder - student_ae).square().mean(1, keepdim=True)


def _detector(
    networks: Sequence[nn.Module], statistics: Sequence[Tensor], image_size: tuple[int, int]
) -> EfficientAD:
    """The detector of his three networks; CheckpointError where one is none of his."""
    weights: dict[str, LazyTensor] = {}
    size = ""
    for role, module in zip(("teacher", "student", "autoencoder"), networks, strict=True):
        with naming(f"the {role} given"):
            network = network_of(lazy_tensors(module))
        if network is None or network.role != role:
            found = "no network of EfficientAD" if network is None else f"a {network.role}"
            raise CheckpointError(f"the {role} given is {found}; it must be nelson1425's {role}")
        weights |= {f"{role}.{name}": value for name, value in network.weights.items()}
        size = network.size or size
    teacher, (mean, std) = networks[0], statistics
    contents = Contents(
        size,
        weights,
        padding=next(teacher.children()).padding != (0, 0),
        border="nelson",
        image_size=image_size,
        statistics=(mean.flatten(), std.flatten()),
        quantiles=RAW_QUANTILES,
        normalization=(torch.zeros(3), torch.ones(3)),  # the image comes normalised
    )
    return build_detector(contents)
