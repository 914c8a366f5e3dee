"""What else runs EfficientAD, with the same weights.

Every peer takes a batch of images on the host and gives scores and maps on the host, as the
predictor does. What it need not do under the clock is done before: its input lies ready in its
dtype and layout, in pinned memory on CUDA, and, but for anomalib, onnxruntime and OpenVINO, which
do it themselves, normalised. The predictor gets uint8 frames in ordinary memory and normalises them
under the clock.

The order of operations is nelson1425's: three networks, the teacher normalised, squared differences
averaged over channels, both maps normalised by their quantiles and averaged, padded by four cells,
resized, maximum. dtype: float32 on a CPU, float16 on CUDA, unless the name says otherwise.

    nelson1425 order, eager     NCHW, without cuDNN's benchmark, as published
    channels_last               the same operations, cuDNN's benchmark on
    channels_last bfloat16      on a CPU that multiplies bfloat16
    channels_last, CUDA graph   on CUDA
    torch.compile               channels_last; "max-autotune" (with CUDA graphs) on CUDA, frozen on
                                a CPU, there in bfloat16, too. Takes a minute or more to build
    anomalib                    its EfficientAdModel, under autocast to float16 on CUDA. It pads the
                                maps before it normalises them: judged by the border rule "anomalib"
    onnxruntime, OpenVINO       our ONNX export, on a CPU, with torch's number of threads
    OpenVINO int8               its convolutions quantised by NNCF on good pictures, which
                                `bench.predictor.processes` has
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.predictor import peers_packages, peers_torch
from bench.predictor.peers_torch import BF16, NotHere, Peer, Place
from efficientad.model.detector import EfficientAD

Builder = Callable[[EfficientAD, Place], Peer]
NELSON, COMPILE, INT8 = "nelson1425 order, eager", "torch.compile", "OpenVINO int8"
PEERS: dict[str, dict[str, Builder]] = {
    "cpu": {
        NELSON: peers_torch.nelson,
        "channels_last": peers_torch.channels_last,
        "channels_last bfloat16": peers_torch.channels_last_bfloat16,
        "anomalib": peers_packages.anomalib,
        "onnxruntime": peers_packages.onnxruntime,
        "OpenVINO": peers_packages.openvino,
        "OpenVINO bfloat16": functools.partial(peers_packages.openvino, dtype=BF16),
        f"{COMPILE}, frozen": peers_torch.compiled,
        f"{COMPILE} bfloat16, frozen": functools.partial(peers_torch.compiled, dtype=BF16),
    },
    "cuda": {
        NELSON: peers_torch.nelson,
        "channels_last": peers_torch.channels_last,
        "channels_last, CUDA graph": peers_torch.cuda_graph,
        "anomalib": peers_packages.anomalib,
        f"{COMPILE} max-autotune": peers_torch.compiled,
    },
}
# In a process of its own, with good pictures.
PROCESSES = PEERS["cpu"] | {INT8: peers_packages.openvino_int8}


def names(device: torch.device, *, compile: bool) -> tuple[str, ...]:
    """The peers on a device that use torch.compile, or those that do not."""
    return tuple(n for n in PEERS[device.type] if n.startswith(COMPILE) == compile)


def build(name: str, detector: EfficientAD, place: Place) -> Peer:
    """Build a peer of `names`, or of PROCESSES where the place has good pictures.

    Whatever others' software raises comes through, see `reason`.
    """
    field = PEERS[place.device.type] if place.good is None else PROCESSES
    return field[name](detector, place)


def reason(error: Exception) -> str:
    """Why a peer that raised this has no time."""
    if isinstance(error, NotHere):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ImportError):  # of what a peer needs beside its own package
        return f"not installed: {first}"
    return f"failed: {type(error).__name__}: {first}"
