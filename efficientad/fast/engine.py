"""The steps of a predictor: backend, buffers, stream and lock in one place, and their order.

The predictor checks and judges; here a step takes its turn behind the caller's work, frames become
packed images, these scores and maps, and these the caller's own. `benchmark.stages` times the
parts.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientad.fast.backends import Backend, TorchBackend
from efficientad.fast.fp8 import build_fp8
from efficientad.fast.frame_inputs import Frame
from efficientad.fast.runners import EagerRunner, GraphRunner, Result, Staging
from efficientad.fast.self_check import LARGE_MAP, build_backend
from efficientad.model.calibration import GoodImages
from efficientad.model.detector import EfficientAD
from efficientad.ops import frame_path
from efficientad.ops.kernel_launch import BundleLaunch
from efficientad.utils.cuda_graphs import wait_before_drop
from efficientad.utils.processes import ADVICE, computing, fresh_lock_after_fork

Size = tuple[int, int]


class Engine:
    """One detector on one device; its steps are ordered with each other and with callers' work.

    Args:
        detector: calibrated; its weights are copied.
        device, dtype, batch_sizes: chosen, as `FastPredictor` does it.
        kind: "auto", "triton" or "torch", see `self_check.build_backend`.
        calibration, fp8_layers: of float8_e4m3fn, see `fp8.build_fp8`.
        torch_backend: the class that computes where the kernels do not.
        bundle: compiled kernels, or None to compile them.

    Whoever uses the parts holds `lock` and is `on_device()`, without gradients.

    Attributes:
        backend: what computes, see `backends`; reason: why it is not the kernels where it might
            have been, or None; fp8: facts of `fp8.build_fp8`, or None.
        runner: the input buffers and how what lies in them is run.
        staging: the way of frames to the device, and stream: where everything runs there; None on
            a CPU.
        normalization: mean and standard deviation of the images, a list of three each.
        threshold: the detector's; in fp8 that of its own maps.
        lock: serialises the steps.
    """

    def __init__(
        self,
        detector: EfficientAD,
        device: torch.device,
        dtype: torch.dtype,
        batch_sizes: tuple[int, ...],
        *,
        kind: str = "auto",
        calibration: GoodImages | None = None,
        fp8_layers: str = "second",
        torch_backend: type[TorchBackend] = TorchBackend,
        bundle: BundleLaunch | None = None,
    ) -> None:
        self.device, self.batch_sizes = device, batch_sizes
        self.image_size = detector.image_size
        self.map_padding = detector.map_padding
        self.score_size = detector.score_size
        self.lock = threading.Lock()
        self._process = os.getpid()
        fresh_lock_after_fork(self)
        computing()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            wait_before_drop(self, self.stream)
        self._wait_for_caller()
        with self.on_device(), torch.no_grad():
            self.backend: Backend
            self.reason: str | None = None
            self.fp8: dict[str, object] | None = None
            if calibration is not None:
                self.backend, detector, self.fp8 = build_fp8(
                    detector, calibration, fp8_layers, device, batch_sizes, bundle
                )
            else:
                self.backend, self.reason = build_backend(
                    detector, dtype, device, kind, batch_sizes, torch_backend, bundle
                )
            self.threshold = detector.threshold
            self.normalization = _normalization(detector)
            largest = batch_sizes[-1]
            self.runner: EagerRunner
            self.staging: Staging | None = None
            if self.stream is None:
                self.runner = EagerRunner(self.backend, self.image_size, self.map_padding, largest)
            else:
                self.runner = graphs = GraphRunner(
                    self.backend, self.image_size, self.map_padding, batch_sizes, self.stream
                )
                self.staging = Staging(graphs.packed(largest), graphs.frames(largest))
                self._compile_map_sizes()

    def reload(self, detector: EfficientAD) -> None:
        """Take over weights, normalisation and threshold of a detector of the same shape."""
        with self.lock:
            self._wait_for_caller()
            with self.on_device():
                self.backend.reload(detector)
                self.normalization = _normalization(detector)
                self.threshold = detector.threshold
                if self.stream is not None:  # the caller may free or change the detector now
                    self.stream.synchronize()

    # ---- order -------------------------------------------------------------------------------

    def on_device(self) -> contextlib.AbstractContextManager:
        """The engine's device and stream, whatever is current."""
        if self.stream is None:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.cuda.stream(self.stream))
        return stack

    def _wait_for_caller(self) -> None:
        """What follows on the engine's stream comes after what the caller has submitted."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def step(self, inputs: Sequence[Any]) -> Iterator[Callable[..., None]]:
        """One step at a time, on the engine's device and stream, ordered behind the caller's
        work on device inputs. Yields a function that hands the results to the caller's stream.

        Raises:
            RuntimeError: on a GPU, in a process that was forked after construction.
        """
        computing()
        stream = self.stream
        if stream is None:
            with self.lock:
                yield lambda *results: None
            return
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this process was forked after the predictor was built on {self.device}, and CUDA "
                f"does not work across fork(): {ADVICE}"
            )
        caller = torch.cuda.current_stream(self.device)
        on_device = [v for v in inputs if isinstance(v, Tensor) and v.is_cuda]
        with self.lock, self.on_device():
            if on_device:
                stream.wait_stream(caller)
            for value in on_device:
                value.record_stream(stream)

            def hand_over(*results: Any) -> None:
                caller.wait_stream(stream)
                for value in results:
                    for tensor in value if isinstance(value, list) else [value]:
                        if tensor is not None:
                            tensor.record_stream(caller)

            yield hand_over

    # ---- in a step ---------------------------------------------------------------------------

    def score_frames(
        self, frames: Sequence[Frame], map_size: str | None
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Scores (N,) and the maps asked for, (N, h, w) or a list of (h, w) where sizes differ."""
        scores: list[Tensor] = []
        maps: list[Tensor] = []
        at = 0
        for bucket, images in self._chunks(len(frames)):
            chunk = frames[at : at + images]
            result = self._run(chunk, bucket)
            score, some = self._take(result, [(f.shape[0], f.shape[1]) for f in chunk], map_size)
            scores.append(score)
            maps.extend(some)
            at += images
        return scores[0] if len(scores) == 1 else torch.cat(scores), _joined(maps)

    def score_images(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W), float in 0..1: scores, maps at that size, the two distance maps."""
        parts = []
        at = 0
        for bucket, count in self._chunks(len(images)):
            part = images[at : at + count].to(self.device, torch.float32)
            packed = self.runner.packed(bucket)
            self.backend.pack(part, packed[:count], channels_last=False)
            result = self.runner.run(bucket)
            st, ae = (m[..., :count, :, :] for m in result.maps)
            if st.dim() == 4:
                st, ae = st.sum(0), ae.sum(0)
            one = (result.score[:count], result.anomaly_map[:count], st, ae)
            parts.append([t.float().clone() for t in one])
            at += count
        return [torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True)]

    def frame_maps(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """The distance maps (1, h, w) of one frame, float32."""
        result = self._run([frame], self.batch_sizes[0])
        st, ae = (m[..., :1, :, :].float() for m in result.maps)
        return (st.sum(0), ae.sum(0)) if st.dim() == 4 else (st.clone(), ae.clone())

    def resize_pack(self, frame: Frame, place: Tensor) -> None:
        """A frame of any size to a packed image, where `place` lies."""
        mean, std = self.normalization
        frame_path.resize_pack(
            frame, self.image_size, mean, std, border=self.backend.border,
            channels=self.backend.channels, dtype=self.backend.packed_dtype, out=place,
        )  # fmt: skip

    def _chunks(self, images: int) -> Iterator[tuple[int, int]]:
        """(bucket, images) per run. A CPU pads nothing: there an idle image costs full time."""
        while images:
            fitting = [b for b in self.batch_sizes if b <= images]
            if images >= self.batch_sizes[-1] or (self.stream is None and fitting):
                bucket = fitting[-1]
            elif self.stream is None:
                bucket = images
            else:
                bucket = next(b for b in self.batch_sizes if b >= images)
            count = min(bucket, images)
            yield bucket, count
            images -= count

    def _run(self, frames: Sequence[Frame], bucket: int) -> Result:
        """Fill the input of a bucket and run it."""
        if self.staging is not None:
            assert isinstance(self.runner, GraphRunner)  # they are made together
            own_size = all(tuple(f.shape[:2]) == self.image_size for f in frames)
            fill = self.staging.fill_frames if own_size else self.staging.fill_packed
            fill(frames, *self.normalization, self.backend.border)
            return self.runner.run(bucket, from_frames=own_size)
        for place, frame in zip(self.runner.packed(bucket), frames, strict=False):
            self.resize_pack(frame, place)
        return self.runner.run(bucket)

    def _take(
        self, result: Result, sizes: Sequence[Size], map_size: str | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Copies of the scores (images,) and the maps asked for, each (k, h, w) of k images.

        sizes: of the frames, one per image.
        """
        images = len(sizes)
        maps = []
        if map_size == "input" and self.score_size == "input" and result.joined is not None:
            score, anomaly_map = result.split(result.joined.clone())
            return score[:images], [anomaly_map[:images]]
        score = result.score[:images].clone()
        if map_size == "input":
            maps.append(result.anomaly_map[:images].clone())
        if map_size == "feature":
            height, width = result.maps[0].shape[-2:]
            whole = self.backend.anomaly_map(result.maps, (height, width), 0, None)
            maps.append(whole[0][:images].float())
        if map_size == "source" or self.score_size == "source":
            for i, size in enumerate(sizes):
                st, ae = (_own_copy(m[..., i : i + 1, :, :]) for m in result.maps)
                own, best = self.backend.anomaly_map((st, ae), size, self.map_padding, None)
                if map_size == "source":
                    maps.append(own.float())
                if self.score_size == "source":
                    score[i] = best[0]
        return score, maps

    def _compile_map_sizes(self) -> None:
        """Make the maps of other sizes once, so that the first call for one compiles nothing."""
        small, large = self.image_size, LARGE_MAP
        for bucket in {self.batch_sizes[0], self.batch_sizes[-1]}:
            result = self.runner.run(bucket)
            self._take(result, [small], "feature")
            self._take(result, [large], "source")
            self._take(result, [small], "source")


def _own_copy(part: Tensor) -> Tensor:
    """Contiguous and aligned, where a view may be neither and would compile another kernel."""
    return part.clone(memory_format=torch.contiguous_format)


def _joined(maps: list[Tensor]) -> Tensor | list[Tensor] | None:
    """Maps (k, h, w) as one tensor (N, h, w), or as a list of (h, w) where sizes differ."""
    if not maps:
        return None
    if len(maps) == 1:
        return maps[0]
    if len({tuple(m.shape[1:]) for m in maps}) == 1:
        return torch.cat(maps)
    return [one for m in maps for one in m]


def _normalization(detector: EfficientAD) -> tuple[list[float], list[float]]:
    mean, std = detector.image_mean, detector.image_std
    return mean.flatten().tolist(), std.flatten().tolist()
