"""Float8_e4m3fn that proves itself or stops.

fp8 rounds activations and filters to three bits of mantissa, and an anomaly map is a small
difference of large numbers: whether its scores still mean something depends on the detector. So fp8
is never chosen unasked. It needs good images: from them come the steps of its numbers and the
quantiles of its maps, and on them its scores are compared with float32's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from efficientad.data.images import Batch, load_batches
from efficientad.fast.backends import Fp8Backend, Kernels
from efficientad.fast.folding import fold
from efficientad.fast.folding_fp8 import last_fp8_layer
from efficientad.fast.fused_network import Plan, forward
from efficientad.fast.self_check import self_check
from efficientad.model.calibration import (
    FALSE_POSITIVE_RATE,
    GoodImages,
    MapFile,
    set_quantiles_from_maps,
    split_good_images,
    threshold_from_scores,
    validation_scores,
)
from efficientad.model.detector import EfficientAD
from efficientad.ops import reference
from efficientad.ops.kernel_launch import BundleLaunch
from efficientad.utils.devices import FP8, full_float32

FEWEST_IMAGES = 16  # 120 pairs
# A score of 0.1 is the maps' upper quantile, and those of good images lie some hundredths apart.
RESOLUTION = 0.02
# Noise with 0.45 of the scores' own spread, which it widens by a tenth, puts 5 % of the pairs half
# a spread apart in another order (normal distribution, computed).
DISCORDANT_BOUND = 0.05
# At a third the two maps still correlate by 0.94.
MAP_BOUND = 1 / 3
BATCH = 8  # calibration images at a time, at most


class Fp8Error(ValueError):
    """fp8 does not keep this detector's scores, or its kernels do not work on this device."""


@dataclass(frozen=True)
class Fp8Check:
    """Maps and scores of good images through fp8 beside those of float32.

    Both have quantiles from these images, so that they differ by nothing but fp8.

    Attributes:
        images: how many there were.
        pairs: pairs of images whose float32 scores lie more than RESOLUTION apart.
        discordant: share of these pairs that fp8 does not put in the same order.
        map_error: RMS difference of an image's two anomaly maps as part of the standard deviation
            of its float32 map, the median over the images; over cells, without the padding.
    """

    images: int
    pairs: int
    discordant: float
    map_error: float

    def problem(self) -> str | None:
        """None if the scores can stand in for float32's, else what is against it."""
        if self.discordant <= DISCORDANT_BOUND and self.map_error <= MAP_BOUND:  # false for NaN
            return None
        return (
            f"of {self.pairs} pairs of the {self.images} calibration images whose float32 scores "
            f"are more than {RESOLUTION:g} apart, {100 * self.discordant:.1f} % change their order "
            f"(bound {100 * DISCORDANT_BOUND:g} %), and the maps differ by {self.map_error:.2f} of "
            f"their standard deviation (bound {MAP_BOUND:.2f})"
        )


def build_fp8(
    detector: EfficientAD,
    calibration: GoodImages,
    layers: str,
    device: torch.device,
    buckets: Sequence[int],
    bundle: BundleLaunch | None = None,
) -> tuple[Fp8Backend, EfficientAD, dict[str, object]]:
    """The kernels with layers in fp8, calibrated and compared with float32.

    Args:
        detector: calibrated; it is read, not changed.
        calibration: good images as `calibrate` takes them, at least FEWEST_IMAGES; of a data set
            its validation images serve.
        layers: see `folding_fp8.last_fp8_layer`.
        buckets: the batch sizes.
        bundle: compiled kernels. If they fail, the kernels are compiled.

    Returns:
        The backend; the detector with the quantiles of fp8 maps and, if it had a threshold, with
        one from fp8 scores (its networks are shared); facts: the layers and `Fp8Check`.

    Raises:
        ValueError: a global term, no or too few calibration images, unknown layers, activations
            that are not finite.
        ImageError: a calibration image that cannot be read.
        Fp8Error: kernels that fail or do not give what they are to, or scores that fp8 changes.
    """
    last_fp8_layer(detector.size, layers)
    if detector.global_term is not None:
        raise ValueError(
            "dtype is float8_e4m3fn, and the detector has a global term, which is not computed in "
            "it; use dtype 'float16'"
        )
    paths = _good_images(calibration)

    def batches() -> Iterator[Batch]:
        return load_batches(
            paths,
            detector.image_size,
            batch_size=min(BATCH, max(buckets)),
            value_range=detector.value_range,
        )

    with ExitStack() as stack:
        maps, fp8_maps = (
            stack.enter_context(closing(MapFile(*detector.feature_size()))) for _ in range(2)
        )
        largest, source_sizes = _float32_maps(detector, batches(), device, maps)
        backend = _checked(detector, largest, layers, device, buckets, bundle)
        for batch in batches():
            fp8_maps.add(*_fp8_maps(backend, batch.images.to(device)))
        exact, scores = _recalibrated(detector, maps, source_sizes)
        own, fp8_scores = _recalibrated(detector, fp8_maps, source_sizes)
        pairs, changed = changed_order(scores, fp8_scores, RESOLUTION)
        check = Fp8Check(
            len(scores), pairs, changed / max(pairs, 1), _map_error(exact, maps, own, fp8_maps)
        )
    problem = check.problem()
    if problem is not None:
        instead = "" if layers == "second" else "fp8_layers='second' or "
        raise Fp8Error(
            f"float8_e4m3fn in layers {layers!r} does not keep this detector's scores: {problem}. "
            f"Use {instead}dtype='float16'"
        )
    backend.weights.affine.copy_(own.affine)
    return backend, own, {"layers": layers, **asdict(check)}


def check_calibration(dtype: torch.dtype, calibration: object) -> None:
    """ValueError unless good images come with float8_e4m3fn and only with that."""
    if dtype == FP8 and calibration is None:
        raise ValueError(
            "calibration is None and dtype float8_e4m3fn, which needs good images to find its "
            "scales and quantiles and to prove itself: a folder, a data set or a list of files"
        )
    if dtype != FP8 and calibration is not None:
        raise ValueError(
            f"calibration is given and dtype is {dtype}; it goes with float8_e4m3fn only, whose "
            "quantiles are other than the detector's"
        )


def _good_images(calibration: GoodImages) -> list[Path]:
    paths = split_good_images(calibration, statistics=False)[1]
    if len(paths) < FEWEST_IMAGES:
        raise ValueError(
            f"calibration has {len(paths)} good images; float8_e4m3fn needs at least "
            f"{FEWEST_IMAGES}, whose order by score is compared with float32's"
        )
    return paths


@torch.no_grad()
def _float32_maps(
    detector: EfficientAD, batches: Iterator[Batch], device: torch.device, maps: MapFile
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Adds the images' distance maps in float32 to `maps`.

    Returns:
        The largest activations, as `folding_fp8.fold_fp8` takes them, and the images' sizes.
    """
    weights = fold(detector, torch.float32, device)
    plan = Plan(detector.size, detector.padding, detector.image_size, detector.map_padding, device)
    largest = [torch.zeros(2, device=device) for _ in weights.trunk]

    def run(name: str, operation: Callable, *arguments, **options):
        result = operation(*arguments, **options)
        if name.startswith("trunk"):
            i = int(name.removeprefix("trunk")) - 1
            largest[i] = torch.maximum(largest[i], torch.stack([t.amax() for t in result]))
        return result

    source_sizes: list[tuple[int, int]] = []
    for batch in batches:
        image = batch.images.to(device)
        packed = reference.pack(
            image, weights.image_mean, weights.image_std,
            channels_last=False, border=plan.border, dtype=torch.float32,
        )  # fmt: skip
        with full_float32(), torch.autocast(device.type, enabled=False):
            found = forward(plan, weights, packed, reference, run)
        maps.add(*(m.sum(0) for m in found))
        source_sizes += batch.source_sizes
    return largest, source_sizes


def _checked(
    detector: EfficientAD,
    largest: Sequence[Tensor],
    layers: str,
    device: torch.device,
    buckets: Sequence[int],
    bundle: BundleLaunch | None,
) -> Fp8Backend:
    """The kernels, from the bundle or, where that has none or fails, compiled."""
    if bundle is not None:
        try:
            backend = Fp8Backend(detector, largest, layers, device, Kernels(bundle))
            _check_kernels(backend, detector, buckets)
            return backend
        except Fp8Error as error:
            bundle.give_up(str(error))
    backend = Fp8Backend(detector, largest, layers, device)
    _check_kernels(backend, detector, buckets)
    return backend


def _check_kernels(backend: Fp8Backend, detector: EfficientAD, buckets: Sequence[int]) -> None:
    """Fp8Error if the kernels do not run or do not give what `reference` does: no other dtype takes
    over, because fp8 was asked for."""
    cause = None
    try:
        problem = self_check(backend, detector, buckets)
    except Exception as error:  # whatever Triton or the driver raises
        problem, cause = f"{type(error).__name__}: {error}".splitlines()[0], error
    if problem is not None:
        raise Fp8Error(
            f"the kernels cannot be used in float8_e4m3fn on {backend.device}: {problem}. "
            "Use dtype='float16'"
        ) from cause


@torch.no_grad()
def _fp8_maps(backend: Fp8Backend, image: Tensor) -> list[Tensor]:
    height, width = (length + 2 * backend.border for length in image.shape[2:])
    packed = image.new_empty((len(image), height, width, backend.channels), dtype=backend.dtype)
    backend.pack(image, packed, channels_last=False)
    maps = [m.sum(0) for m in backend.distance_maps(packed)]
    if not all(torch.isfinite(m).all() for m in maps):
        raise Fp8Error(
            "the maps of a calibration image are not finite in float8_e4m3fn. Use dtype='bfloat16'"
        )
    return maps


def _recalibrated(
    detector: EfficientAD, maps: MapFile, source_sizes: Sequence[tuple[int, int]]
) -> tuple[EfficientAD, list[float]]:
    """The detector with quantiles and, if it has one, a threshold from these maps; their scores."""
    networks = (detector.teacher, detector.student, detector.autoencoder)
    own = copy.deepcopy(detector, {id(network): network for network in networks})
    set_quantiles_from_maps(own, maps)
    scores, _ = validation_scores(own, maps, source_sizes)
    if detector.threshold is not None:
        facts = detector.provenance.get("calibration")
        rate = facts.get("false_positive_rate") if isinstance(facts, dict) else None
        own.threshold = threshold_from_scores(scores, FALSE_POSITIVE_RATE if rate is None else rate)
    return own, scores


def changed_order(
    expected: Sequence[float], found: Sequence[float], apart: float
) -> tuple[int, int]:
    """Pairs of scores of which `expected` are more than `apart` apart, and how many of these are
    not in the same order in `found`; ties and NaN count as another order."""
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    pairs = changed = 0
    for i in range(len(a) - 1):
        first, second = a[i] - a[i + 1 :], b[i] - b[i + 1 :]
        far = np.abs(first) > apart
        pairs += int(far.sum())
        changed += int((far & ~(first * second > 0)).sum())
    return pairs, changed


@torch.no_grad()
def _map_error(exact: EfficientAD, maps: MapFile, own: EfficientAD, fp8_maps: MapFile) -> float:
    """`Fp8Check.map_error`."""
    errors: list[float] = []
    for chunk, fp8_chunk in zip(maps.chunks(), fp8_maps.chunks(), strict=True):
        expected, found = _cell_map(exact, chunk), _cell_map(own, fp8_chunk)
        rms = (found - expected).square().mean(1).sqrt()
        errors += (rms / expected.std(1)).tolist()
    return float(np.median(errors))


def _cell_map(detector: EfficientAD, chunk: Tensor) -> Tensor:
    """Distance maps (N, 2, h, w) -> the detector's anomaly map of the cells, (N, h * w)."""
    map_st, map_ae = chunk.unbind(1)
    size, affine = (chunk.shape[2], chunk.shape[3]), detector.affine.cpu()
    return reference.anomaly_map(map_st, map_ae, affine, size, padding=0)[0].flatten(1)
