"""Our own file format, its atomic writer and its self-test.

One safetensors file per detector: the tensors of its `state_dict()`, and in the header the
settings, the provenance, golden values of a small built-in image, and a checksum of all of these.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from efficientad.checkpoint.contents import Contents, build_detector, check_weights, read_finite
from efficientad.checkpoint.safe_pickle import CheckpointError, LazyTensor, reading
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import golden_image
from efficientad.utils.checks import check_value_range
from efficientad.utils.files import digest_of, replace_file
from efficientad.utils.processes import computing

FORMAT = "efficientad"
FORMAT_VERSION = 5  # 1: the checksum was that of the tensors alone
# What a file does not have, packages of before it need not know: they read it, too.
WITHOUT_GLOBAL_TERM = 4  # the version of a file without one
WITHOUT_SCORE = 3  # and whose score is the maximum
WITHOUT_REGION = 2  # and that has no region
# Relative. Measured on S and M: another thread count, memory layout or convolution library, or
# float64, changes a golden value by at most 4e-7; two layers swapped or a filter mirrored, by about
# 1e-2. 1e-3 leaves room for processors that round float32 convolutions. Single bits are the
# checksum's task.
GOLDEN_TOLERANCE = 1e-3
_TEXTS = ("config", "provenance", "golden")  # JSON in the header
_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ADVICE = "The file is damaged or was made by an incompatible version; load(verify=False) skips"
_BUFFERS = {
    "image_mean": (1, 3, 1, 1),
    "image_std": (1, 3, 1, 1),
    "teacher_mean": (1, 384, 1, 1),
    "teacher_std": (1, 384, 1, 1),
    "quantiles": (4,),
}
_GLOBAL_TERM = {
    "global_term.mean": (384,),
    "global_term.whitening": (384, 384),
    "global_term.line": (2,),
}
_REGION = "region"  # uint8 (height, width) of the network's input, 1 where it is inspected


def save(detector: EfficientAD, path: str | os.PathLike) -> None:
    """Write a detector to one safetensors file, atomically: an old file stays until it is whole.

    Weights keep their dtype (float32, float16, bfloat16; float64 becomes float32). `threshold` and
    `provenance` (JSON values) are kept.

    Raises:
        CheckpointError: NaN or infinite weights, or a provenance that JSON cannot hold.
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written (a full disk, no permission); an old one is still whole.
    """
    path = Path(path)
    if not isinstance(detector, EfficientAD):
        raise ValueError(f"detector is a {type(detector).__name__}; it must be an EfficientAD")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; create it first")
    tensors = {name: _storable(name, value) for name, value in detector.state_dict().items()}
    config = {
        "size": detector.size,
        "padding": detector.padding,
        "image_size": list(detector.image_size),
        "border": detector.border,
        "map_padding": detector.map_padding,
        "score_size": detector.score_size,
        "threshold": None if detector.threshold is None else float(detector.threshold),
        "has_statistics": detector.has_statistics,
        "value_range": check_value_range(detector.value_range),
    }
    if detector.autoencoder_weight != 1:
        config["autoencoder_weight"] = detector.autoencoder_weight
    version = WITHOUT_REGION if detector.region is None else WITHOUT_SCORE
    if detector.score != "max":
        config["score"], version = detector.score, WITHOUT_GLOBAL_TERM
    if detector.global_term is not None:
        version = FORMAT_VERSION
    if detector.region is not None:
        tensors[_REGION] = detector.region.to("cpu", torch.uint8)
    lazy = {name: LazyTensor.of(value) for name, value in tensors.items()}
    golden = golden_values(build_detector(_contents(config, {}, lazy)))
    if not all(map(math.isfinite, golden.values())):
        raise CheckpointError(f"the detector's maps overflow on the built-in image ({golden})")
    try:
        texts = {
            name: json.dumps(value, allow_nan=False)
            for name, value in zip(_TEXTS, (config, detector.provenance, golden), strict=True)
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"threshold or provenance cannot be stored as JSON: {error}"
        ) from error
    metadata = {
        "format": FORMAT,
        "format_version": str(version),
        **texts,
        # Golden values see neither a threshold nor one weak bit among millions.
        "sha256": digest_of(tensors, texts),
    }
    _write_atomically(path, tensors, metadata)


def load_native(
    metadata: Mapping[str, str], tensors: Mapping[str, LazyTensor], verify: bool
) -> EfficientAD:
    """The detector of a file of `save`, opened by `open_safetensors`; see `loading.load`."""
    version = metadata.get("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version) or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {version!r}; this efficientad reads up to {FORMAT_VERSION}: "
            "upgrade efficientad"
        )
    texts = {name: metadata[name] for name in _TEXTS}
    config, provenance, golden = map(json.loads, texts.values())
    detector = build_detector(_contents(config, provenance, tensors))
    if verify:
        digest = digest_of(
            {name: value.read() for name, value in tensors.items()},
            texts if int(version) > 1 else {},
        )
        if digest != metadata.get("sha256"):
            raise CheckpointError(f"the checksum of the file differs. {_ADVICE}")
        _self_test(detector, golden)
    return detector


def open_safetensors(path: Path) -> tuple[dict[str, str], dict[str, LazyTensor]]:
    """Header metadata and tensors (still in the file) of a safetensors file.

    Raises:
        CheckpointError: a header that does not fit the file, or anything else that is wrong in it.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as head:
            declared = int.from_bytes(head.read(8), "little")
        if declared > size - 8:
            raise CheckpointError(
                f"declares a header of {declared} bytes and has {size} bytes; it is truncated, "
                "damaged or no safetensors file"
            )
        file = safetensors.safe_open(path, framework="pt")
        tensors = {}
        for name in file.keys():
            shape = tuple(file.get_slice(name).get_shape())
            tensors[name] = LazyTensor(shape, partial(file.get_tensor, name))
        return file.metadata() or {}, tensors


def _storable(name: str, value: Tensor) -> Tensor:
    value = value.detach().to("cpu")
    value = value.float() if value.dtype == torch.float64 else value
    if value.dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"{name} has dtype {value.dtype}; expected float32, float16 or bfloat16"
        )
    if name != "quantiles" and not torch.isfinite(value).all():
        raise CheckpointError(f"{name} has a NaN or infinite entry; such a detector is not saved")
    return value.clone(memory_format=torch.contiguous_format)


def _write_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        replace_file(path, lambda part: save_file(dict(tensors), part, metadata), durable=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


@torch.no_grad()
def golden_values(detector: EfficientAD) -> dict[str, float]:
    """Mean and maximum of both raw maps of the built-in image, and the score if calibrated."""
    computing()
    map_st, map_ae = detector.distance_maps(golden_image())
    values = {
        f"map_{kind}_{name}": getattr(values, name)().item()
        for kind, values in (("st", map_st), ("ae", map_ae))
        for name in ("mean", "max")
    }
    if detector.calibrated:
        values["score"] = detector.anomaly_map(map_st, map_ae, (256, 256))[1].item()
    return values


def _self_test(detector: EfficientAD, golden: dict[str, float]) -> None:
    now = golden_values(detector)
    if set(now) != set(golden):
        raise CheckpointError(f"golden values {sorted(golden)}, expected {sorted(now)}")
    scale = {name: max(abs(value), abs(golden[name])) for name, value in now.items()}
    if "score" in scale:  # a difference of large terms: its error is that of the terms
        a_st, a_ae, offset = (abs(v) for v in detector.affine.tolist()[:3])
        scale["score"] = a_st * now["map_st_max"] + a_ae * now["map_ae_max"] + offset
    for name, value in now.items():
        if not abs(value - golden[name]) <= GOLDEN_TOLERANCE * scale[name]:
            raise CheckpointError(
                f"self-test: {name} is {value:.6g}, stored {golden[name]:.6g}. {_ADVICE}"
            )


def _contents(config: dict, provenance: dict, tensors: Mapping[str, LazyTensor]) -> Contents:
    """`Contents` of a native file; the constructor of EfficientAD checks most of the settings."""
    check_weights({name: tensors[name] for name in _BUFFERS if name in tensors}, _BUFFERS)
    values = {name: read_finite(name, tensors[name]) for name in _BUFFERS if name != "quantiles"}
    for name in ("padding", "has_statistics"):
        if not isinstance(config[name], bool):
            raise CheckpointError(f"{name} is {config[name]!r}; expected true or false")
    quantiles = tensors["quantiles"].read().float()
    is_set = torch.isfinite(quantiles)
    if bool(is_set.any()) and not bool(is_set.all()):
        raise CheckpointError(f"has half-set quantiles {quantiles.tolist()}")
    term = None
    if any(name in tensors for name in _GLOBAL_TERM):
        own = {name: value for name, value in tensors.items() if name in _GLOBAL_TERM}
        check_weights(own, _GLOBAL_TERM)
        term = {name.partition(".")[2]: read_finite(name, value) for name, value in own.items()}
    threshold = config["threshold"]
    if threshold is not None and not (isinstance(threshold, float) and math.isfinite(threshold)):
        raise CheckpointError(f"threshold is {threshold!r}; expected a finite number or null")
    if not isinstance(provenance, dict):
        raise CheckpointError("provenance is not a JSON object")
    try:
        value_range = check_value_range(config.get("value_range"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    other = {*_BUFFERS, *_GLOBAL_TERM, _REGION}
    return Contents(
        config["size"],
        {name: value for name, value in tensors.items() if name not in other},
        padding=config["padding"],
        border=config["border"],
        map_padding=config["map_padding"],
        score_size=config["score_size"],
        image_size=tuple(config["image_size"]),
        statistics=(values["teacher_mean"], values["teacher_std"])
        if config["has_statistics"]
        else None,
        quantiles=tuple(quantiles.tolist()) if bool(is_set.all()) else None,
        threshold=threshold,
        normalization=(values["image_mean"], values["image_std"]),
        provenance=provenance,
        value_range=value_range,
        region=_region(tensors[_REGION]) if _REGION in tensors else None,
        score=config.get("score", "max"),
        autoencoder_weight=config.get("autoencoder_weight", 1.0),
        global_term=term,
    )


def _region(lazy: LazyTensor) -> Tensor:
    """bool (H, W); its size is checked with the detector's."""
    value = lazy.read()
    if value.dtype != torch.uint8 or value.dim() != 2 or bool((value > 1).any()):
        raise CheckpointError(
            f"region is {value.dtype} {tuple(value.shape)}; expected uint8 (height, width) of 0 "
            "and 1"
        )
    return value.bool()
