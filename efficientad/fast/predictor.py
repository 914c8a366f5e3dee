"""The fast predictor."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientad.data.images import ImageError
from efficientad.fast.fp8 import build_fp8, check_calibration
from efficientad.fast.frame_inputs import Frame, as_batch, read_frames
from efficientad.fast.options import choose_buckets, choose_dtype
from efficientad.fast.runners import EagerRunner, GraphRunner, Result, Staging
from efficientad.fast.self_check import build_backend
from efficientad.fast.streaming import stream
from efficientad.fast.tiling import DEFAULT_OVERLAP, predict_large
from efficientad.model.detector import AnomalyOutput, EfficientAD
from efficientad.ops import frame_path
from efficientad.results.prediction import Prediction
from efficientad.utils.checks import check_detector, check_map_size, check_threshold
from efficientad.utils.devices import FP8, choose_device

MAP_SIZES = ("input", "source", "feature", None)


class FastPredictor:
    """Frames in, scores and anomaly maps out, as fast as the device allows.

    On a CUDA device from sm_80 on: the fused kernels in one CUDA graph per batch size. On an older
    one, or where the kernels cannot be compiled or fail their numerical self-check: the folded
    torch network in the same graphs. On a CPU: the folded network in channels_last, in float32
    with compiled convolutions (csrc/conv.h) if they are built, else through torch.

    Args:
        detector: calibrated; its weights are copied, and it may be dropped or changed afterwards.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", or a torch.device.
        dtype: "auto", or "float32", "float16", "bfloat16", "float8_e4m3fn" or the torch dtype.
            "auto" is float16 on CUDA. On a CPU it is bfloat16 where the processor has AMX or ARM's
            BF16, else float32, whose compiled convolutions were measured faster than bfloat16
            through AVX512-BF16; that is taken where they are missing. float8_e4m3fn is never
            automatic: it needs a CUDA device from sm_89 on, and `calibration`.
        batch_sizes: the buckets. A batch is cut into the largest that fit; what remains is padded
            to the next bucket on a GPU. None: (1, 4, 16) on a GPU and (1,) on a CPU, where a larger
            batch gains nothing.
        map_size: of the maps that calls return unless they say otherwise, see `__call__`.
        backend: "auto", or "triton" or "torch" to insist.
        calibration: for float8_e4m3fn alone: good images as `calibrate` takes them, at least 16.
            From them come the scales of its numbers and, anew, quantiles and threshold; on them its
            scores and maps must stay close to float32's, or construction stops (`fp8.Fp8Error`).
        fp8_layers: the PDN layers in fp8: "second", "inner" (second to last but one) or "all".

    Calls from several threads are safe: a lock serialises the steps. For more throughput give each
    thread an instance of its own. While one is constructed on a GPU, other threads may compute but
    not call `torch.cuda.synchronize()`: CUDA does not allow that beside a graph's capture.

    After construction a step allocates nothing but its result, which never aliases the predictor's
    buffers. Nothing waits for the device but `Prediction.cpu()` and reading a value.

    Attributes:
        threshold: by which predictions are judged; the detector's, and may be set at any time.
        facts: device, dtype, backend, the reason if the kernels are not used, fp8's layers and its
            `fp8.Fp8Check` or None, and the seconds that construction took.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: arguments out of range; float16 on a CPU; a CUDA device where there is none;
            float8_e4m3fn where it cannot be computed in, without images, or not close enough.
    """

    def __init__(
        self,
        detector: EfficientAD,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_sizes: Sequence[int] | None = None,
        map_size: str | None = "input",
        backend: str = "auto",
        calibration: object = None,
        fp8_layers: str = "second",
    ) -> None:
        start = time.perf_counter()
        check_detector(detector)
        if not detector.calibrated:
            detector.raise_uncalibrated()
        check_map_size(map_size, MAP_SIZES)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device, backend)
        check_calibration(self.dtype, calibration)
        self.batch_sizes = choose_buckets(batch_sizes, self.device)
        self.map_size = map_size
        self.size, self.padding = detector.size, detector.padding
        self.image_size = detector.image_size
        self.map_padding = detector.map_padding
        self.score_size = detector.score_size
        self._frames, self._not_numbers = 0, set()
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._wait_for_caller()
        with self._on_device(), torch.no_grad():
            largest, reason, fp8 = self.batch_sizes[-1], None, None
            if self.dtype == FP8:
                arguments = (detector, calibration, fp8_layers, self.device, self.batch_sizes)
                self._backend, detector, fp8 = build_fp8(*arguments)
            else:
                arguments = (detector, self.dtype, self.device, backend, self.batch_sizes)
                self._backend, reason = build_backend(*arguments)
            self.threshold = detector.threshold
            self._normalization = _normalization(detector)
            arguments = (self._backend, self.image_size, self.map_padding)
            if self._stream is None:
                self._runner, self._staging = EagerRunner(*arguments, largest), None
            else:
                self._runner = GraphRunner(*arguments, self.batch_sizes, self._stream)
                self._staging = Staging(self._runner.packed(largest), self._runner.frames(largest))
                self._compile_map_sizes()
        self.facts = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self._backend.name,
            "reason": reason,
            "fp8": fp8,
            "construction_seconds": round(time.perf_counter() - start, 3),
        }

    # ---- calls -------------------------------------------------------------------------------

    def __call__(self, source: Any, *, map_size: str | None = "default") -> Prediction:
        """Score one frame or a batch.

        Args:
            source: one frame: uint8 (H, W, 3) RGB as an array or a tensor on the host or the
                device, (H, W) grey, uint16 on the host (scaled from 0..65535), a PIL image, a path,
                or encoded bytes. Or a batch of them: a list, a tuple, an iterator, an array
                (N, H, W, C). Sizes may differ.
            map_size: "input" (the network's input size), "source" (each frame's own), "feature"
                (the networks' grid, no padding), or None for no map. Default: the predictor's.
                The score does not depend on it.

        Returns:
            The prediction of one frame, or of a batch with N of everything. Its fields are tensors
            on the predictor's device.

        Raises:
            ImageError: a frame that cannot be read; in a batch the error names its place.
            ValueError: an empty batch, an unknown map_size.
        """
        map_size = self.map_size if map_size == "default" else map_size
        check_map_size(map_size, MAP_SIZES)
        sources, batched = as_batch(source)
        return self.predict_frames(read_frames(sources), map_size=map_size, batched=batched)

    @torch.no_grad()
    def predict_frames(
        self, frames: Sequence[Frame], *, map_size: str | None, batched: bool
    ) -> Prediction:
        """As `__call__`, of frames that `frame_inputs.read_frame` gave."""
        frames = [f.to(self.device) if isinstance(f, Tensor) else f for f in frames]
        sizes = [tuple(frame.shape[:2]) for frame in frames]
        scores, maps = [], []
        with self._step(frames) as hand_over:
            at = 0
            for bucket, images in self._chunks(len(frames)):
                result = self._run(frames[at : at + images], bucket)
                score, chunk = self._take(result, images, sizes[at : at + images], map_size)
                scores.append(score)
                maps.extend(chunk)
                at += images
            score = scores[0] if len(scores) == 1 else torch.cat(scores)
            anomaly_map = _joined(maps)
            hand_over(score, anomaly_map)
            serial = self._serial(len(frames), score)
        numbers = {"serial": serial, "not_numbers": self._not_numbers}
        if batched:
            index = range(len(frames))
            return Prediction(index, score, self.threshold, anomaly_map, sizes, frames, **numbers)
        one_map = None if anomaly_map is None else anomaly_map[0]
        return Prediction(0, score[0], self.threshold, one_map, sizes[0], frames[0], **numbers)

    @torch.no_grad()
    def detect(self, images: Tensor) -> AnomalyOutput:
        """The detector's own forward pass: RGB float in 0..1, (N, 3, H, W) -> scores and maps.

        A drop-in for `detector(images)`: the images have the network's input size already, and the
        maps come at that size. Tensors on the predictor's device.

        Raises:
            ValueError: another shape, dtype or size.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; they must be (N, 3, "
                f"{self.image_size[0]}, {self.image_size[1]}), the predictor's input size"
            )
        if images.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"images have dtype {images.dtype}; they must be float in 0..1")
        if not len(images):
            raise ValueError("the batch is empty; give at least one image")
        parts = []
        with self._step([images]) as hand_over:
            at = 0
            for bucket, count in self._chunks(len(images)):
                part = images[at : at + count].to(self.device, torch.float32)
                packed = self._runner.packed(bucket)
                self._backend.pack(part, packed[:count], channels_last=False)
                result = self._runner.run(bucket)
                st, ae = (m[..., :count, :, :] for m in result.maps)
                if st.dim() == 4:
                    st, ae = st.sum(0), ae.sum(0)
                one = (result.score[:count], result.anomaly_map[:count], st, ae)
                parts.append([t.float().clone() for t in one])
                at += count
            joined = [torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True)]
            hand_over(*joined)
            self._serial(len(images), joined[0])
        return AnomalyOutput(*joined)

    def stream(
        self,
        sources: Iterable[Any],
        *,
        policy: str = "all",
        map_size: str | None = "default",
        workers: int = 2,
        on_error: Callable[[int, Any, ImageError], None] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions of frames as they come; see `streaming.stream`."""
        map_size = self.map_size if map_size == "default" else map_size
        check_map_size(map_size, MAP_SIZES)
        return stream(
            self, sources, policy=policy, map_size=map_size, workers=workers, on_error=on_error
        )

    def predict_large(
        self, source: Any, *, overlap: int = DEFAULT_OVERLAP, batch: int | None = None
    ) -> Prediction:
        """One image at its full resolution, in overlapping tiles; see `tiling.predict_large`."""
        return predict_large(self, source, overlap=overlap, batch=batch)

    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's weights, quantiles and threshold, without recapture.

        Raises:
            UncalibratedError: it has no statistics or quantiles.
            ValueError: another network, input size, map padding or score size; always in fp8, whose
                scales and quantiles belong to the predictor's own detector.
        """
        check_detector(detector)
        if not detector.calibrated:
            detector.raise_uncalibrated()
        rule = ("size, padding", "image_size", "map_padding", "score_size")
        theirs = ((detector.size, detector.padding), detector.image_size)
        theirs += (detector.map_padding, detector.score_size)
        mine = ((self.size, self.padding), self.image_size, self.map_padding, self.score_size)
        for name, a, b in zip(rule, mine, theirs, strict=True):
            if a != b:
                raise ValueError(
                    f"the detector has {name} {b} and the predictor {a}; build a new predictor"
                )
        with self._lock:
            self._wait_for_caller()
            with self._on_device():
                self._backend.reload(detector)
                self._normalization = _normalization(detector)
                self.threshold = detector.threshold
                if self._stream is not None:  # the caller may free or change the detector now
                    self._stream.synchronize()

    @property
    def threshold(self) -> float | None:
        """A finite number, or None: by which predictions are judged from the next call on."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._threshold = check_threshold(value)

    @property
    def counters(self) -> dict[str, int]:
        """Frames answered, and those with a score that is not a number.

        On a GPU the latter are known once `Prediction.cpu()` has read them.
        """
        return {"frames": self._frames, "not_a_number": len(self._not_numbers)}

    @property
    def max_memory(self) -> int:
        """Most bytes of the device that torch held at once since the process began.

        On a CPU 0: torch does not count there.
        """
        return torch.cuda.max_memory_reserved(self.device) if self._stream is not None else 0

    # ---- steps -------------------------------------------------------------------------------

    def _on_device(self) -> contextlib.AbstractContextManager:
        """The predictor's device and stream, whatever is current."""
        if self._stream is None:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def _wait_for_caller(self) -> None:
        """What follows on the predictor's stream comes after what the caller has submitted."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _compile_map_sizes(self) -> None:
        """Make the maps of other sizes once, so that the first call for one compiles nothing."""
        small, large = self.image_size, (1024, 1024)  # a kernel's two tiles
        for bucket in {self.batch_sizes[0], self.batch_sizes[-1]}:
            result = self._runner.run(bucket)
            self._take(result, 1, [small], "feature")
            self._take(result, 1, [large], "source")
            self._take(result, 1, [small], "source")

    @contextlib.contextmanager
    def _step(self, inputs: Sequence[Any]) -> Iterator[Callable[..., None]]:
        """One step at a time, on the predictor's device and stream, ordered behind the caller's
        work on device inputs. Yields a function that hands the results to the caller's stream."""
        if self._stream is None:
            with self._lock:
                yield lambda *results: None
            return
        caller = torch.cuda.current_stream(self.device)
        on_device = [v for v in inputs if isinstance(v, Tensor) and v.is_cuda]
        with self._lock, self._on_device():
            if on_device:
                self._stream.wait_stream(caller)
            for value in on_device:
                value.record_stream(self._stream)

            def hand_over(*results: Any) -> None:
                caller.wait_stream(self._stream)
                for value in results:
                    for tensor in value if isinstance(value, list) else [value]:
                        if tensor is not None:
                            tensor.record_stream(caller)

            yield hand_over

    def _chunks(self, images: int) -> Iterator[tuple[int, int]]:
        """(bucket, images) per step. A CPU pads nothing: there an idle image costs full time."""
        while images:
            fitting = [b for b in self.batch_sizes if b <= images]
            if images >= self.batch_sizes[-1] or (self._stream is None and fitting):
                bucket = fitting[-1]
            elif self._stream is None:
                bucket = images
            else:
                bucket = next(b for b in self.batch_sizes if b >= images)
            count = min(bucket, images)
            yield bucket, count
            images -= count

    def _run(self, frames: Sequence[Frame], bucket: int) -> Result:
        """Fill the input of a bucket and run it."""
        if self._staging is not None:
            own_size = all(tuple(f.shape[:2]) == self.image_size for f in frames)
            fill = self._staging.fill_frames if own_size else self._staging.fill_packed
            fill(frames, *self._normalization, self._backend.border)
            return self._runner.run(bucket, from_frames=own_size)
        packed = self._runner.packed(bucket)
        mean, std = self._normalization
        for place, frame in zip(packed, frames, strict=False):
            frame_path.resize_pack(
                frame, self.image_size, mean, std, border=self._backend.border,
                channels=self._backend.channels, dtype=self._backend.dtype, out=place,
            )  # fmt: skip
        return self._runner.run(bucket)

    def _take(
        self, result: Result, images: int, sizes: list[tuple[int, int]], map_size: str | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Copies of the scores (images,) and the maps asked for, each (k, h, w) of k images."""
        maps = []
        if map_size == "input" and self.score_size == "input" and result.joined is not None:
            score, anomaly_map = result.split(result.joined.clone())
            return score[:images], [anomaly_map[:images]]
        score = result.score[:images].clone()
        if map_size == "input":
            maps.append(result.anomaly_map[:images].clone())
        if map_size == "feature":
            whole = self._backend.anomaly_map(
                result.maps, tuple(result.maps[0].shape[-2:]), 0, None
            )
            maps.append(whole[0][:images].float())
        if map_size == "source" or self.score_size == "source":
            score = score.clone()
            for i, size in enumerate(sizes):
                one = tuple(_own_copy(m[..., i : i + 1, :, :]) for m in result.maps)
                own, best = self._backend.anomaly_map(one, size, self.map_padding, None)
                if map_size == "source":
                    maps.append(own.float())
                if self.score_size == "source":
                    score[i] = best[0]
        return score, maps

    def _serial(self, images: int, score: Tensor) -> int:
        """Number of the first of these images since construction; counts those that are NaN."""
        serial = self._frames
        self._frames += images
        if self._stream is None:
            where = torch.nonzero(score.isnan()).flatten()
            self._not_numbers.update((serial + where).tolist())
        return serial


def _own_copy(part: Tensor) -> Tensor:
    """Contiguous and aligned, where a view may be neither and would compile another kernel."""
    return part.clone(memory_format=torch.contiguous_format)


def _joined(maps: list[Tensor]) -> Any:
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
