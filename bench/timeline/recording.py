"""What a replay of the predictor's graph launches, by the predictor's own code on a CPU.

`GraphRunner`'s step runs on `KernelBackend`, with tensors on the CPU and the tiles of an
architecture; each launch is written down in place of being made, and so are the fork and the join
of the two streams. No kernel runs or is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench.report import timeline
from efficientad.fast import backends
from efficientad.fast.backends import KernelBackend, Kernels
from efficientad.fast.folding import FoldedWeights, fold
from efficientad.fast.runners import EagerRunner, GraphRunner
from efficientad.kernels import launching
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import TEACHER_CHANNELS

MAIN, BRANCH = 0, 1  # streams


@dataclass(frozen=True)
class Recorded:
    """A launch.

    Attributes:
        layer: as measured timelines name it, "conv2", "d6", "d6 resize".
        kernel: the `triton.jit` function.
        stream: MAIN or BRANCH. waits: places in the recording of the launches that it waits for.
        programs: of its grid.
        values: argument name -> value, constants included.
        warps, stages: launch options. early: whether it starts while the one before still runs.
    """

    layer: str
    kernel: Any
    stream: int
    waits: tuple[int, ...]
    programs: int
    values: dict[str, Any]
    warps: int
    stages: int
    early: bool

    @property
    def name(self) -> str:
        return self.kernel.__name__


class _Recorder:
    """A way of `kernels.launching` that writes launches down."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.stream = MAIN
        self._last: dict[int, int] = {}
        self._waits: dict[int, set[int]] = {MAIN: set(), BRANCH: set()}

    def __call__(self, kernel: Any, programs: int, args: tuple, options: dict[str, Any]) -> bool:
        self.wait(self.stream, self.stream)
        waits, self._waits[self.stream] = self._waits[self.stream], set()
        self._last[self.stream] = len(self.found)
        constants = {name: options[name] for name in kernel.arg_names if name in options}
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants
        self.found.append(
            {
                "kernel": kernel,
                "stream": self.stream,
                "waits": tuple(sorted(waits)),
                "programs": programs,
                "values": values,
                "warps": options["num_warps"],
                "stages": options.get("num_stages", 1),
                "early": bool(options.get("launch_pdl", False)),
            }
        )
        return True

    def wait(self, stream: int, other: int) -> None:
        """What follows on `stream` comes after what is on the other one now."""
        if other in self._last:
            self._waits[stream].add(self._last[other])


@functools.lru_cache(maxsize=2)
def _folded(model: EfficientAD) -> FoldedWeights:
    return fold(model, torch.float16, "cpu")


class _Backend(KernelBackend):
    """The kernels' backend, whose streams are the recorder's."""

    def __init__(self, detector: EfficientAD, recorder: _Recorder, target: int) -> None:
        kernels = Kernels(recorder, target=target)
        super().__init__(detector, torch.float16, torch.device("cpu"), kernels)
        self._recorder, self._target = recorder, target

    def _fold(self, detector: EfficientAD) -> FoldedWeights:
        return _folded(detector)

    def _join(self) -> None:
        self._recorder.wait(MAIN, BRANCH)

    @contextmanager
    def _branch(self) -> Iterator[None]:
        early = backends.PDL and divmod(self._target, 10) >= backends.PDL_CAPABILITY
        self._recorder.wait(BRANCH, MAIN)
        self._recorder.stream = BRANCH
        try:
            with launching.overlapped() if early else nullcontext():
                yield
        finally:
            self._recorder.stream = MAIN


class _Step(GraphRunner):
    """A graph runner that captures nothing."""

    def __init__(self, backend: KernelBackend, detector: EfficientAD, images: int) -> None:
        size, padding = detector.image_size, detector.map_padding
        EagerRunner.__init__(self, backend, size, padding, images)
        self._frames = torch.zeros((images, *size, 3), dtype=torch.uint8)

    def replay(self, images: int) -> None:
        anomaly_map, score, _ = self._allocate(images)
        self._step((anomaly_map, score), from_frames=True)


def detector(size: str) -> EfficientAD:
    """Calibrated in name alone, on 256x256 images: no value of it is looked at."""
    made = EfficientAD(size)
    made.set_statistics(torch.zeros(TEACHER_CHANNELS), torch.ones(TEACHER_CHANNELS))
    made.set_quantiles(0.0, 1.0, 0.0, 1.0)
    return made


@torch.no_grad()
def record(model: EfficientAD, images: int, target: int = 90) -> list[Recorded]:
    """The launches of one replay for a batch of `images` frames, in float16, in their order.

    Raises:
        ValueError: images is below 1.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    recorder = _Recorder()
    _Step(_Backend(model, recorder, target), model, images).replay(images)
    names = _layers(recorder.found)
    return [Recorded(name, **launch) for name, launch in zip(names, recorder.found, strict=True)]


def _layers(found: list[dict[str, Any]]) -> list[str]:
    """Layers' names, by the rules for measured timelines: a place stands for the start."""
    trace = [
        [float(i), 1.0, launch["kernel"].__name__, launch["stream"], [1, 1, 1], 0, 0]
        for i, launch in enumerate(found)
    ]
    return [launch.layer for launch in timeline.launches({"trace": trace})]
