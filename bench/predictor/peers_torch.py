"""EfficientAD in plain torch, in nelson1425's order; see bench.predictor.peers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.benchmark.contenders import Run
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN, TEACHER_CHANNELS, Autoencoder, decoder_sizes
from efficientad.utils.cuda_graphs import captured
from efficientad.utils.devices import cpu_multiplies_bfloat16, lay_out

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Peer:
    """A peer that is ready to run.

    Attributes:
        prepare: a batch of images, float32 (N, 3, H, W) in 0..1 on the host -> its input.
        run: its input -> (scores (N,), maps (N, H, W)) on the host.
        dtype: what it computes in.
        border: the detector's border rule whose numbers it gives.
    """

    prepare: Callable[[Tensor], Tensor]
    run: Run
    dtype: torch.dtype
    border: str = "nelson"


@dataclass(frozen=True)
class Place:
    """Where and for what peers are built.

    Attributes:
        device: a CPU or CUDA device.
        batch: images per call.
        folder: for exported files, which are kept there.
        parked: whether threads that wait for work sleep, where a runtime would let them spin.
        good: uint8 (N, H, W, 3), for what is calibrated on good pictures; or None.
    """

    device: torch.device
    batch: int
    folder: Path
    parked: bool = False
    good: np.ndarray | None = None

    @property
    def dtype(self) -> torch.dtype:
        return HALF if self.device.type == "cuda" else FLOAT


class NotHere(Exception):
    """A peer that cannot be built here; the message says why."""


def need_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotHere("not installed")


def need_bfloat16() -> None:
    if not cpu_multiplies_bfloat16():
        raise NotHere("the processor does not multiply bfloat16")


class NelsonOrder(nn.Module):
    """Normalised images (N, 3, H, W) -> (scores (N,), maps (N, H, W)), in nelson1425's order.

    Weights are copies. Dropout, which does nothing in inference, is left out.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    def __init__(self, detector: EfficientAD, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        source = copy.deepcopy(detector).to(device)
        self.teacher, self.student = sequential_pdn(source.teacher), sequential_pdn(source.student)
        self.autoencoder = sequential_autoencoder(source.autoencoder, source.image_size)
        self.register_buffer("mean", source.teacher_mean)
        self.register_buffer("std", source.teacher_std)
        self.to(dtype).requires_grad_(False)
        self.register_buffer("quantiles", source.quantiles.float())  # numbers: they cost nothing
        self.map_padding = source.map_padding

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = self.teacher(x), self.student(x)
        autoencoder = self.autoencoder(x)
        teacher = (teacher - self.mean) / self.std
        student_st, student_ae = student[:, :TEACHER_CHANNELS], student[:, TEACHER_CHANNELS:]
        map_st = torch.mean((teacher - student_st) ** 2, dim=1, keepdim=True)
        map_ae = torch.mean((autoencoder - student_ae) ** 2, dim=1, keepdim=True)
        qa_st, qb_st, qa_ae, qb_ae = self.quantiles
        map_st = 0.1 * (map_st - qa_st) / (qb_st - qa_st)
        map_ae = 0.1 * (map_ae - qa_ae) / (qb_ae - qa_ae)
        combined = F.pad(0.5 * map_st + 0.5 * map_ae, (self.map_padding,) * 4)
        maps = F.interpolate(combined, x.shape[-2:], mode="bilinear")[:, 0]
        return maps.amax((1, 2)), maps


def sequential_pdn(pdn: PDN) -> nn.Sequential:
    layers: list[nn.Module] = []
    for conv, row in pdn.layers():
        layers.append(conv)
        layers += [nn.ReLU(inplace=True)] * row.relu
        layers += [nn.AvgPool2d(2, 2, padding=int(pdn.padding))] * row.pool
    return nn.Sequential(*layers)


def sequential_autoencoder(source: Autoencoder, size: tuple[int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(1, 7):
        layers += [getattr(source.encoder, f"enconv{i}"), nn.ReLU(inplace=True)]
    layers.pop()
    decoder = source.decoder
    rows, columns = (decoder_sizes(length, decoder.padding) for length in size)
    for i in range(1, 8):
        layers.append(nn.Upsample(size=(rows[i - 1], columns[i - 1]), mode="bilinear"))
        layers += [getattr(decoder, f"deconv{i}"), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, decoder.deconv8)


def host_input(
    detector: EfficientAD, place: Place, dtype: torch.dtype, channels_last: bool
) -> Callable[[Tensor], Tensor]:
    """Normalise in float32, round to `dtype`, lay out, and pin for CUDA."""
    mean, std = (v.detach().float().cpu() for v in (detector.image_mean, detector.image_std))
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(images: Tensor) -> Tensor:
        x = ((images - mean) / std).to(dtype).contiguous(memory_format=layout)
        return x.pin_memory() if place.device.type == "cuda" else x

    return prepare


def torch_peer(
    detector: EfficientAD,
    place: Place,
    dtype: torch.dtype,
    *,
    channels_last: bool = True,
    wrap: Callable[[nn.Module], Callable] = lambda module: module,
) -> Peer:
    """The module in torch, launched operation by operation unless `wrap` changes that."""
    module = NelsonOrder(detector, dtype, place.device)
    if channels_last:
        lay_out(module, torch.channels_last)
    function = wrap(module)

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, channels_last
        try:
            score, maps = function(x.to(place.device, non_blocking=True))
            return score.cpu(), maps.cpu()
        finally:
            cudnn.benchmark = before

    return Peer(host_input(detector, place, dtype, channels_last), run, dtype)


def nelson(detector: EfficientAD, place: Place) -> Peer:
    return torch_peer(detector, place, place.dtype, channels_last=False)


def channels_last(detector: EfficientAD, place: Place) -> Peer:
    return torch_peer(detector, place, place.dtype)


def channels_last_bfloat16(detector: EfficientAD, place: Place) -> Peer:
    need_bfloat16()
    return torch_peer(detector, place, BF16)


@torch.no_grad()
def cuda_graph(detector: EfficientAD, place: Place) -> Peer:
    """One graph of the whole batch; the input is copied into it."""
    module = NelsonOrder(detector, place.dtype, place.device)
    lay_out(module, torch.channels_last)
    prepare = host_input(detector, place, place.dtype, True)
    images = torch.rand(place.batch, 3, *detector.image_size)
    static = prepare(images).to(place.device)
    stream = torch.cuda.Stream(place.device)
    stream.wait_stream(torch.cuda.current_stream(place.device))
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(static)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with captured(graph, stream):
            score, maps = module(static)
    finally:
        torch.backends.cudnn.benchmark = before

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        static.copy_(x, non_blocking=True)
        graph.replay()
        return score.cpu(), maps.cpu()

    return Peer(prepare, run, place.dtype)


def compiled(detector: EfficientAD, place: Place, dtype: torch.dtype | None = None) -> Peer:
    """torch.compile of the module for this batch alone."""
    from torch._inductor import config

    on_cuda = place.device.type == "cuda"
    if dtype == BF16:
        need_bfloat16()
    mode = "max-autotune" if on_cuda else None

    def wrap(module: nn.Module) -> Callable:
        function = torch.compile(module, mode=mode, fullgraph=True, dynamic=False)
        x = torch.rand(place.batch, 3, *detector.image_size).to(place.device, dtype or place.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), config.patch(freezing=not on_cuda):
            for _ in range(3):  # compiles, then records its CUDA graph
                function(x)
        return function

    return torch_peer(detector, place, dtype or place.dtype, wrap=wrap)
