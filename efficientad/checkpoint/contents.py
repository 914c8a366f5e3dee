"""What a model file says, checked, and the detector built of it.

Every reader (native and foreign) ends in `Contents`, so shapes, finiteness and half-set values are
checked in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efficientad.checkpoint.safe_pickle import CheckpointError, LazyTensor
from efficientad.model.detector import EfficientAD
from efficientad.model.global_term import GlobalTerm
from efficientad.model.image_score import ScoreRule
from efficientad.model.map_rule import QUANTILE_NAMES, check_weight
from efficientad.model.networks import PDN, TEACHER_CHANNELS

NETWORKS = ("teacher", "student", "autoencoder")


@dataclass
class Contents:
    """What a file says of a detector, in this package's terms; see `EfficientAD` for the meanings.

    Attributes:
        weights: name ("teacher.conv1.weight") -> tensor that is still in the file.
        statistics: teacher mean and std, 384 values each, or None.
        quantiles: qa_st, qb_st, qa_ae, qb_ae, or None.
        normalization: image mean and std, 3 values each, or None for ImageNet's.
        region: bool of image_size, True where inspected, or None.
        score: "max" or a number of cells, see `EfficientAD.score`.
        autoencoder_weight: for the next calibration; the quantiles hold it already.
        global_term: tensors of `GlobalTerm` by its names, or None.
    """

    size: str
    weights: Mapping[str, LazyTensor]
    padding: bool = False
    border: str | None = None
    map_padding: int | None = None
    score_size: str = "input"
    image_size: tuple[int, int] = (256, 256)
    statistics: tuple[Tensor, Tensor] | None = None
    quantiles: tuple[float, ...] | None = None
    threshold: float | None = None
    normalization: tuple[Tensor, Tensor] | None = None
    provenance: dict[str, object] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    region: Tensor | None = None
    score: ScoreRule = "max"
    autoencoder_weight: float = 1.0
    global_term: dict[str, Tensor] | None = None


@functools.cache
def weight_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the detector of a size ("S" or "M"), without building it."""
    with torch.device("meta"):
        state = EfficientAD(size).state_dict()
    return {k: tuple(v.shape) for k, v in state.items() if k.partition(".")[0] in NETWORKS}


def check_weights(
    weights: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless names and shapes are exactly the expected ones."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"is not an EfficientAD: {'; '.join(problems[:3])}{more}")


def read_finite(name: str, lazy: LazyTensor) -> Tensor:
    """The values of a floating-point tensor as float32; CheckpointError unless they are finite."""
    value = lazy.read()
    if not value.is_floating_point():
        raise CheckpointError(f"{name} has dtype {value.dtype}; expected floating point")
    value = value.to(torch.float32)
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{name} has a NaN or infinite entry; every one must be finite")
    return value


@torch.no_grad()
def build_detector(contents: Contents) -> EfficientAD:
    """The float32 detector on the CPU, in eval mode, that the contents describe.

    Raises:
        CheckpointError: wrong names or shapes, NaN or infinite values, half-set values.
    """
    check_weights(contents.weights, weight_shapes(contents.size))
    try:
        detector = EfficientAD(
            contents.size,
            padding=contents.padding,
            border=contents.border,
            map_padding=contents.map_padding,
            score_size=contents.score_size,
            image_size=contents.image_size,
        )
        detector.score = contents.score
        detector.autoencoder_weight = check_weight(contents.autoencoder_weight)
        if contents.region is not None:
            if tuple(contents.region.shape) != detector.image_size:
                raise CheckpointError(
                    f"region has shape {tuple(contents.region.shape)}, expected the image size "
                    f"{detector.image_size}"
                )
            detector.set_region(contents.region)
        if contents.global_term is not None:
            term = GlobalTerm()
            term.load_state_dict(contents.global_term)
            detector.set_global_term(term)
        for name, parameter in detector.named_parameters():
            parameter.copy_(read_finite(name, contents.weights[name]))
        if contents.normalization is not None:  # first: it clears statistics and quantiles
            detector.set_image_normalization(*contents.normalization)
        if contents.statistics is not None:
            detector.set_statistics(*contents.statistics)
        if contents.quantiles is not None:
            detector.set_quantiles(*contents.quantiles)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    detector.threshold = contents.threshold if detector.calibrated else None
    detector.provenance = contents.provenance
    detector.value_range = contents.value_range
    return detector


@torch.no_grad()
def build_teacher(size: str, weights: Mapping[str, LazyTensor]) -> PDN:
    """The frozen float32 teacher of weights named "conv1.weight" and so on, checked."""
    prefix = "teacher."
    shapes = {k[len(prefix) :]: v for k, v in weight_shapes(size).items() if k.startswith(prefix)}
    check_weights(weights, shapes)
    teacher = PDN(size, TEACHER_CHANNELS).requires_grad_(False).eval()
    for name, parameter in teacher.named_parameters():
        parameter.copy_(read_finite(f"teacher.{name}", weights[name]))
    return teacher


def calibration(
    mean: Tensor | None, std: Tensor | None, quantiles: Mapping[str, float]
) -> tuple[tuple[Tensor, Tensor] | None, tuple[float, ...] | None]:
    """Statistics and quantiles of a foreign file; absent or all zero means never computed.

    Raises:
        CheckpointError: half-set values, which no training writes: a file that was cut or mixed.
    """
    found = {
        "teacher mean": mean is not None and bool(mean.any()),
        "teacher std": std is not None and bool(std.any()),
        "student quantiles": bool(quantiles.get("qa_st") or quantiles.get("qb_st")),
        "autoencoder quantiles": bool(quantiles.get("qa_ae") or quantiles.get("qb_ae")),
    }
    has_mean, has_std, has_st, has_ae = found.values()
    partial = bool(quantiles) and set(quantiles) != set(QUANTILE_NAMES)
    if has_mean != has_std or has_st != has_ae or (has_st and not has_mean) or partial:
        names = [name for name, is_set in found.items() if is_set]
        raise CheckpointError(
            f"has half-set values: of {', '.join(found)} only {', '.join(names) or 'none'} "
            f"set (quantiles present: {', '.join(quantiles) or 'none'}). A file has all of them, "
            "or the teacher's two, or none"
        )
    return (
        (mean, std) if mean is not None and std is not None and has_mean else None,
        tuple(quantiles[name] for name in QUANTILE_NAMES) if has_st else None,
    )
