"""The fast predictor: what users call; it checks and judges, and its engine computes."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from efficientad.data.decoding import ImageError
from efficientad.data.images import as_sources
from efficientad.fast.backends import TorchBackend
from efficientad.fast.engine import Engine
from efficientad.fast.fp8 import check_calibration
from efficientad.fast.frame_inputs import Frame, as_batch, read_frame, read_frames
from efficientad.fast.options import choose_buckets, choose_bundle, choose_dtype, fastest_dtype
from efficientad.fast.streaming import stream
from efficientad.fast.tiling import DEFAULT_OVERLAP, predict_large
from efficientad.model.calibration import GoodImages
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.model.image_score import check_threshold
from efficientad.model.output import AnomalyOutput
from efficientad.model.precision import doubt, stored_precision
from efficientad.results.plain_path import OnError, RawMaps
from efficientad.results.prediction import Prediction, check_map_size
from efficientad.utils.devices import choose_device
from efficientad.utils.prefetch import ahead
from efficientad.utils.processes import pickled_by_content

MAP_SIZES = ("input", "source", "feature", None)


@pickled_by_content
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
            "auto" is float16 on CUDA; on a CPU bfloat16 where the processor has AMX or ARM's BF16
            (or AVX512-BF16 and no compiled float32 convolutions, which are faster); but only if the
            detector has earned it, see docs/precision.md: at its calibration the scores of the
            held-out images in that dtype lay close enough to float32's. Else it is float32. A
            detector that was calibrated before this was measured gets float32 on a CPU and float16
            on CUDA. A dtype that is named and has not been earned is used, with a warning.
            float8_e4m3fn is never automatic: it needs a CUDA device from sm_89 on, and
            `calibration`.
        batch_sizes: the buckets. A batch is cut into the largest that fit; what remains is padded
            to the next bucket on a GPU. None: (1, 4, 16) on a GPU and (1,) on a CPU, where a larger
            batch gains nothing.
        map_size: of the maps that calls return unless they say otherwise, see `__call__`.
        backend: "auto", or "triton" or "torch" to insist.
        calibration: for float8_e4m3fn alone: good images as `calibrate` takes them, at least 16.
            From them come the scales of its numbers and, anew, quantiles and threshold; on them its
            scores and maps must stay close to float32's, or construction stops (`fp8.Fp8Error`).
        fp8_layers: the PDN layers in fp8: "second", "inner" (second to last but one) or "all".
        bundle: a file of `efficientad bundle`, the kernels of this device compiled already; None is
            the one that EFFICIENTAD_BUNDLE names, if it does. One that does not fit is refused with
            a warning, and the kernels are compiled.

    Calls from several threads are safe: a lock serialises the steps. For more throughput give each
    thread an instance of its own. It can be pickled, and so handed to a process that is spawned; a
    forked one computes in one thread, and not at all on CUDA. While one is constructed on a GPU,
    other threads may compute but not call `torch.cuda.synchronize()`: CUDA does not allow that
    beside a graph's capture.

    After construction a step allocates nothing but its result, which never aliases the predictor's
    buffers. Nothing waits for the device but `Prediction.cpu()` and reading a value.

    Attributes:
        threshold: by which predictions are judged; the detector's, and may be set at any time.
        facts: device, dtype, backend, the reason if the kernels are not used, what came from a
            kernel bundle or None, fp8's layers and its `fp8.Fp8Check` or None, what is known of
            the dtype's errors ("precision"), and the seconds that construction took.
        device, dtype, batch_sizes, map_size: as chosen. size, padding, image_size, map_padding,
            score, score_size: the detector's.
        engine: what computes, see `engine.Engine`.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: arguments out of range; float16 on a CPU; a CUDA device where there is none;
            float8_e4m3fn where it cannot be computed in, without images, or not close enough.
        FileNotFoundError: a bundle that is not there.
    """

    torch_backend: type[TorchBackend] = TorchBackend  # a subclass may compute something lighter

    def __init__(
        self,
        detector: EfficientAD,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_sizes: Sequence[int] | None = None,
        map_size: str | None = "input",
        backend: str = "auto",
        calibration: GoodImages | None = None,
        fp8_layers: str = "second",
        bundle: str | os.PathLike | None = None,
    ) -> None:
        start = time.perf_counter()
        check_detector(detector)
        if not detector.calibrated:
            detector.raise_uncalibrated()
        check_map_size(map_size, MAP_SIZES)
        self.device = choose_device(device)
        self._automatic = dtype == "auto" and backend != "triton"
        self.dtype = choose_dtype(dtype, self.device, backend, lambda d: self._doubt(detector, d))
        check_calibration(self.dtype, calibration)
        self.batch_sizes = choose_buckets(batch_sizes, self.device)
        self.map_size = map_size
        self.size, self.padding = detector.size, detector.padding
        self.image_size = detector.image_size
        self.map_padding = detector.map_padding
        self.score, self.score_size = detector.score, detector.score_size
        self.value_range = detector.value_range
        self._frames = 0
        self._not_numbers: set[int] = set()
        self._options = {
            "device": str(self.device), "dtype": dtype, "batch_sizes": self.batch_sizes,
            "map_size": map_size, "backend": backend, "calibration": calibration,
            "fp8_layers": fp8_layers, "bundle": bundle,
        }  # fmt: skip
        self._detector = copy.deepcopy(detector).cpu()
        way, remark = choose_bundle(bundle, self.device)
        self.engine = Engine(
            detector, self.device, self.dtype, self.batch_sizes, kind=backend,
            calibration=calibration, fp8_layers=fp8_layers, torch_backend=self.torch_backend,
            bundle=way,
        )  # fmt: skip
        self.facts: dict[str, Any] = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.engine.backend.name,
            "reason": self.engine.reason,
            "bundle": remark if way is None else way.described(),
            "fp8": self.engine.fp8,
            "precision": self._judged(detector),
            "construction_seconds": round(time.perf_counter() - start, 3),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its detector and its arguments: whoever unpickles it builds it anew."""
        return _rebuilt, (type(self), self._detector, self._options, self.threshold)

    def _doubt(self, detector: EfficientAD, dtype: torch.dtype) -> str | None:
        """Why "auto" does not take this dtype, or None. Unmeasured: only a CPU is careful."""
        if self.device.type == "cuda" and stored_precision(detector) is None:
            return None
        return doubt(detector, dtype)

    def _judged(self, detector: EfficientAD) -> str:
        """What is known of the dtype's errors; warns of a named one that goes beyond the bound."""
        if self._automatic and self.dtype == torch.float32:
            problem = self._doubt(detector, fastest_dtype(self.device))
            return "float32" if problem is None else f"float32, because {problem}"
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            return name
        problem = None if self.engine.fp8 is not None else doubt(detector, self.dtype)
        if problem is not None and not self._automatic and stored_precision(detector) is not None:
            warnings.warn(f"dtype is {name}, and {problem}", stacklevel=3)
        return f"{name}, as earned" if problem is None else f"{name}, although {problem}"

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
        return self.predict_frames(
            read_frames(sources, self.value_range), map_size=map_size, batched=batched
        )

    @torch.no_grad()
    def predict_frames(
        self, frames: Sequence[Frame], *, map_size: str | None, batched: bool
    ) -> Prediction:
        """As `__call__`, of frames that `frame_inputs.read_frame` gave."""
        frames = [f.to(self.device) if isinstance(f, Tensor) else f for f in frames]
        sizes = [tuple(frame.shape[:2]) for frame in frames]
        with self.engine.step(frames) as hand_over:
            score, anomaly_map = self.engine.score_frames(frames, map_size)
            hand_over(score, anomaly_map)
            serial = self._serial(len(frames), score)
        whole = map_size != "feature" or not self.map_padding
        numbers: dict[str, Any] = {
            "region": self.region, "whole": whole,
            "serial": serial, "not_numbers": self._not_numbers,
        }  # fmt: skip
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
        with self.engine.step([images]) as hand_over:
            found = self.engine.score_images(images)
            hand_over(*found)
            self._serial(len(images), found[0])
        return AnomalyOutput(*found)

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

    @torch.no_grad()
    def distance_maps(
        self, sources: Iterable[Any], *, workers: int = 2, on_error: OnError | None = None
    ) -> Generator[RawMaps, None, None]:
        """Raw maps of images, one by one, as `plain_path.distance_maps` gives the detector's.

        The detector's `anomaly_map` makes of them the maps and scores that calls return.

        Raises:
            ValueError: in fp8, whose quantiles are not the detector's.
        """
        if self.engine.fp8 is not None:
            raise ValueError("dtype is float8_e4m3fn, whose maps go with quantiles of their own")

        def read(numbered: tuple[int, Any]) -> tuple[int, Any, Frame | ImageError]:
            try:
                return *numbered, read_frame(numbered[1], self.value_range)
            except ImageError as error:
                return *numbered, error

        steps = ahead(read, enumerate(as_sources(sources)), workers=workers, depth=1 + 2 * workers)
        with closing(steps):
            for index, source, frame in steps:
                if isinstance(frame, ImageError):
                    if on_error is None:
                        raise frame
                    on_error(index, source, frame)
                    continue
                with self.engine.step([frame]) as hand_over:
                    st, ae = self.engine.frame_maps(frame)
                    hand_over(st, ae)
                yield RawMaps(index, (frame.shape[0], frame.shape[1]), st, ae)

    def predict_large(
        self, source: Any, *, overlap: int = DEFAULT_OVERLAP, batch: int | None = None
    ) -> Prediction:
        """One image at its full resolution, in overlapping tiles; see `tiling.predict_large`."""
        return predict_large(self, source, overlap=overlap, batch=batch)

    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's weights, quantiles, threshold and region, without recapture.

        Raises:
            UncalibratedError: it has no statistics or quantiles.
            ValueError: another network, input size, map padding, score or score size; a region on
                one side alone; a detector that has not earned the dtype that "auto" chose; always
                in fp8, whose scales and quantiles belong to the predictor's own detector.
        """
        check_detector(detector)
        if not detector.calibrated:
            detector.raise_uncalibrated()
        rule = ("size, padding", "image_size", "map_padding", "score", "score_size", "value_range")
        mine, theirs = (
            ((d.size, d.padding), d.image_size, d.map_padding, d.score, d.score_size, d.value_range)
            for d in (self, detector)
        )
        for name, a, b in zip(rule, mine, theirs, strict=True):
            if a != b:
                raise ValueError(
                    f"the detector has {name} {b} and the predictor {a}; build a new predictor"
                )
        for name in ("region", "global_term"):
            it_has, this_has = (getattr(d, name) is not None for d in (detector, self._detector))
            if it_has != this_has:
                has = (f"a {name}", "none") if it_has else (f"no {name}", "one")
                raise ValueError(
                    f"the detector has {has[0]} and the predictor {has[1]}; build a new predictor"
                )
        problem = self._doubt(detector, self.dtype) if self._automatic else None
        if problem is not None:
            raise ValueError(
                f"the predictor computes in {self.facts['dtype']}, which another detector earned, "
                f"and {problem}; build a new predictor"
            )
        self.engine.reload(detector)
        self._detector = copy.deepcopy(detector).cpu()
        self.facts["precision"] = self._judged(detector)

    @property
    def region(self) -> Tensor | None:
        """What is inspected, bool (H, W) at `image_size`, on the host; None is everything."""
        return self._detector.region

    @property
    def threshold(self) -> float | None:
        """A finite number, or None: by which predictions are judged from the next call on."""
        return self.engine.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self.engine.threshold = check_threshold(value)

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
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _serial(self, images: int, score: Tensor) -> int:
        """Number of the first of these images since construction; counts those that are NaN."""
        serial = self._frames
        self._frames += images
        if self.device.type == "cpu":
            where = torch.nonzero(score.isnan()).flatten()
            self._not_numbers.update((serial + where).tolist())
        return serial


def _rebuilt(
    cls: type[FastPredictor],
    detector: EfficientAD,
    options: dict[str, Any],
    threshold: float | None,
) -> FastPredictor:
    predictor = cls(detector, **options)
    predictor.threshold = threshold
    return predictor
