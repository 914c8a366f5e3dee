"""Anomalib checkpoints, state dicts and exported models as `Contents`.

Source: open-edge-platform/anomalib, v1.0 to 2.x: `models/image/efficient_ad`, `post_processing`
(thresholds) and `models/components/base` (what a checkpoint and an export hold).
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from efficientad.checkpoint.contents import Contents, calibration
from efficientad.checkpoint.foreign import find_objects, modules_of, tensors_of
from efficientad.checkpoint.safe_pickle import (
    CheckpointError,
    LazyTensor,
    Placeholder,
    attributes,
    mapping,
)
from efficientad.model.detector import IMAGENET_MEAN, IMAGENET_STD
from efficientad.model.map_rule import QUANTILE_NAMES
from efficientad.model.networks import TEACHER_CHANNELS

_MARK = "teacher.conv1.weight"  # in the state dict of every EfficientAdModel
_NETWORKS = {"teacher.": "teacher.", "student.": "student.", "ae.": "autoencoder."}
_NOT_CARRIED = ("CenterCrop", "Pad", "SquarePad", "Grayscale")  # transforms that we do not apply


def anomalib_contents(
    tree: object,
    double_normalization: bool | None = None,
    image_size: tuple[int, int] | None = None,
) -> Contents | None:
    """A Lightning checkpoint, a state dict or an exported `.pt` of EfficientAd; None for others.

    Args:
        tree: what `read_torch` gave.
        double_normalization: whether images were normalised before anomalib's networks normalise
            them again (anomalib 1.0.x). None: if a Normalize transform is in the file.
        image_size: (height, width); None: from the file's Resize transform, else 256x256.

    Raises:
        CheckpointError: an EfficientAd with wrong shapes or half-set values.
    """
    top = mapping(tree)
    exported = tree if isinstance(tree, Placeholder) and not top else top.get("model")
    root = exported if isinstance(exported, Placeholder) else top.get("state_dict", tree)
    tensors = tensors_of(root)
    marks = [name for name in tensors if name == _MARK or name.endswith(f".{_MARK}")]
    if not marks:
        return None
    prefix = min(marks, key=len).removesuffix(_MARK)
    outer = prefix.removesuffix("model.")  # the LightningModule around the model
    weights = {
        new + name[len(prefix + old) :]: value
        for name, value in tensors.items()
        for old, new in _NETWORKS.items()
        if name.startswith(prefix + old)
    }
    modules = dict(modules_of(root))
    hyper = mapping(top.get("hyper_parameters")) or mapping(attributes(root).get("_hparams"))
    notes: list[str] = []

    model = attributes(modules.get(prefix))
    conv1 = attributes(modules.get(f"{prefix}teacher.conv1."))
    padding = conv1["padding"] != (0, 0) if "padding" in conv1 else hyper.get("padding", False)
    pad_maps = model.get("pad_maps", hyper.get("pad_maps", True))
    if not model and not hyper:
        notes.append("no settings in the file: anomalib's defaults padding=False, pad_maps=True")

    places = [top.get("transform"), hyper.get("pre_processor"), attributes(root).get("_transform")]
    places += [modules.get("transform."), modules.get("pre_processor.")]
    objects: dict[str, Placeholder] = {}
    for place in places:
        objects = find_objects(place) | objects
    if image_size is None:
        image_size = _resize_target(attributes(objects.get("Resize")).get("size"), notes)
    notes += [f"transform {name} is not applied" for name in _NOT_CARRIED if name in objects]
    normalization = _double_normalization(objects.get("Normalize"), double_normalization, notes)

    values = {name: tensors.get(f"{prefix}mean_std.{name}") for name in ("mean", "std")}
    for name, value in values.items():
        if value is not None and math.prod(value.shape) != TEACHER_CHANNELS:
            raise CheckpointError(f"mean_std.{name} has shape {value.shape}; expected 384")
    found = {name: _scalar(tensors.get(f"{prefix}quantiles.{name}")) for name in QUANTILE_NAMES}
    mean, std = (None if value is None else value.read().float() for value in values.values())
    statistics, quantiles = calibration(
        mean,
        std,
        {name: value for name, value in found.items() if value is not None},
    )
    metadata = mapping(top.get("metadata"))
    threshold, generation = _threshold(tensors, outer, metadata, hyper, notes)
    provenance: dict[str, object] = {
        "source": f"anomalib {generation}",
        "licence": "anomalib code: Apache-2.0; its pretrained teacher weights: not stated upstream",
        "notes": notes,
    }
    version = top.get("pytorch-lightning_version")
    if isinstance(version, str):
        provenance["lightning"] = version
    width = tensors[prefix + _MARK].shape[:1]
    return Contents(
        "M" if width == (256,) else "S",
        weights,
        padding=bool(padding),
        border="anomalib",
        map_padding=4 if pad_maps else 0,
        image_size=image_size,
        statistics=statistics,
        quantiles=quantiles,
        threshold=threshold,
        normalization=normalization,
        provenance=provenance,
    )


def _scalar(value: LazyTensor | None) -> float | None:
    if value is None or math.prod(value.shape) != 1:
        return None
    return float(value.read().item())


def _resize_target(size: object, notes: list[str]) -> tuple[int, int]:
    """(height, width) of a Resize transform; one number is the shorter side in torchvision."""
    found = list(size) if isinstance(size, list | tuple) else [size]
    numbers = [n for n in found if type(n) is int]
    if len(numbers) not in (1, 2) or len(numbers) < len(found):
        return 256, 256
    if len(numbers) == 1:
        notes.append(f"Resize({numbers[0]}) keeps the aspect ratio in anomalib; here it is square")
    return numbers[0], numbers[-1]


def _double_normalization(
    transform: Placeholder | None, wanted: bool | None, notes: list[str]
) -> tuple[Tensor, Tensor] | None:
    """Image mean and std of two normalisations in a row as one; None for the usual single one.

    ((x - m1) / s1 - m2) / s2 = (x - (m1 + s1 m2)) / (s1 s2): exact.
    """
    if transform is not None:
        text = (
            "the file's transform has Normalize, and anomalib's networks normalise again (its "
            "1.0.x did both): "
        )
        text += "only the networks' is applied" if wanted is False else "both are applied"
        notes.append(text)
        if wanted is None:
            warnings.warn(f"{text}. Decide with convert(double_normalization=...)", stacklevel=4)
    if wanted is False or (wanted is None and transform is None):
        return None
    inner_mean, inner_std = (torch.tensor(v) for v in (IMAGENET_MEAN, IMAGENET_STD))
    fields = attributes(transform)
    mean, std = fields.get("mean", IMAGENET_MEAN), fields.get("std", IMAGENET_STD)
    mean, std = torch.tensor(mean).view(3), torch.tensor(std).view(3)
    return mean + std * inner_mean, std * inner_std


def _threshold(
    tensors: dict[str, LazyTensor], outer: str, metadata: dict, hyper: dict, notes: list[str]
) -> tuple[float | None, str]:
    """The image threshold in raw score units (None: not set), and anomalib's generation."""
    generation = "state dict"
    value = None
    processed = any(name.startswith(f"{outer}post_processor.") for name in tensors)
    if processed or "post_processor" in hyper:
        generation = "2.x"
        value = _scalar(tensors.get(f"{outer}post_processor._image_threshold"))
    elif "image_threshold" in metadata or f"{outer}image_threshold.value" in tensors:
        generation = "1.x"
        value = metadata.get("image_threshold")
        value = _scalar(tensors.get(f"{outer}image_threshold.value")) if value is None else value
        if value == 0.5:
            notes.append("threshold 0.5 is anomalib 1.x's default: it may never have been computed")
    usable = isinstance(value, float) and math.isfinite(value)
    return (value if usable else None), generation
