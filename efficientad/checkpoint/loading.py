"""Detectors and teachers from files, whoever wrote them: load, convert, load_teacher.

Files are recognised by their content, never by their name, and read as data: see `safe_pickle`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from efficientad.checkpoint.anomalib import anomalib_contents
from efficientad.checkpoint.contents import Contents, build_detector, build_teacher
from efficientad.checkpoint.foreign import (
    Network,
    nelson_folder,
    network_of,
    rximg_categories,
    rximg_folder,
    tensors_of,
)
from efficientad.checkpoint.native_file import FORMAT, load_native, open_safetensors
from efficientad.checkpoint.safe_pickle import CheckpointError, reading
from efficientad.checkpoint.torch_zip import file_kind, read_torch
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN, check_model_size
from efficientad.utils.file_kinds import kind_of_file
from efficientad.utils.files import digest_of

TEACHER_FORMAT = "efficientad-teacher"  # of `checkpoint.teachers`
_KNOWN = (
    "a file of efficientad.save; an anomalib .ckpt, state dict or exported .pt of EfficientAd; a "
    "nelson1425 training folder (teacher_final.pth, student_final.pth, autoencoder_final.pth); an "
    "rximg folder (best_teacher.pth, NAME_student.pth, NAME_autoencoder.pth)"
)


def load(path: str | os.PathLike, *, verify: bool = True) -> EfficientAD:
    """A detector from a file or folder, recognised by content; float32, on the CPU, in eval mode.

    A file of `save` is checked against its checksum and golden values unless `verify` is False;
    everything else goes through `convert` with its defaults. A file without statistics or quantiles
    gives an uncalibrated detector.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: not a detector, damaged, or of a newer format.
    """
    path = _existing(path)
    if not _is_native(path):
        return convert(path)
    with reading(path):
        return load_native(*open_safetensors(path), verify)


def convert(
    source: str | os.PathLike,
    *,
    double_normalization: bool | None = None,
    image_size: tuple[int, int] | None = None,
    category: str | None = None,
    teacher: str | os.PathLike | None = None,
) -> EfficientAD:
    """A detector from an anomalib, nelson1425 or rximg file or folder; `save` then keeps it.

    Args:
        source: the file, or the folder of a nelson1425 or rximg training.
        double_normalization: anomalib only: whether images were normalised once before the networks
            normalise again (anomalib 1.0.x). None: if the file has a Normalize transform, with a
            warning; a bare state dict cannot tell.
        image_size: anomalib only: (height, width) in pixels; None: the file's Resize, else 256x256.
        category: rximg only: which category of the folder.
        teacher: rximg only: the teacher's file, if it is not the folder's best_teacher.pth.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: not a detector, damaged, half-set values, or one network alone.
    """
    path = _existing(source)
    with reading(path):
        if _is_native(path):
            raise CheckpointError("is a file of efficientad.save already; load it with load")
        if path.is_dir():
            _only("anomalib", double_normalization=double_normalization, image_size=image_size)
            contents = _folder(path, category, None if teacher is None else _existing(teacher))
        else:
            _only("rximg", category=category, teacher=teacher)
            tree = _read(path)
            found = anomalib_contents(tree, double_normalization, image_size)
            if found is None:
                raise _not_a_detector(path, network_of(tensors_of(tree)))
            contents = found
            contents.provenance["file"] = path.name
        return build_detector(contents)


def load_teacher(path: str | os.PathLike, size: str | None = None) -> PDN:
    """The frozen teacher of a teacher file or of a whole detector; unpadded, float32, on the CPU.

    Args:
        path: nelson1425's `teacher_*.pth` (a state dict, or the whole module of a training),
            anomalib's or rximg's teacher state dict, a safetensors file with the same names, or any
            file or folder that `load` takes.
        size: "S" or "M" to insist on; None: whatever the file has.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: no teacher, the wrong size, damaged, wrong shapes, NaN or infinite weights.
    """
    path = _existing(path)
    if size is not None:
        check_model_size(size)
    with reading(path):
        whole = path.is_dir() or _is_native(path)
        network = None if whole else network_of(tensors_of(_read(path)))
        if network is not None and network.role != "teacher":
            raise CheckpointError(f"holds the {network.role}; expected a teacher")
        if network is not None:
            teacher = build_teacher(network.size, network.weights)
        else:
            detector = load(path)
            teacher = PDN(detector.size).requires_grad_(False).eval()
            teacher.load_state_dict(detector.teacher.state_dict())
        if size is not None and teacher.size != size:
            raise CheckpointError(f"holds a PDN-{teacher.size} teacher; size is {size!r}")
    return teacher


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {_KNOWN}")
    return path


def _only(source: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise CheckpointError(f"{name} is {value!r}; it is for {source} and this is not that")


def _is_native(path: Path) -> bool:
    if path.is_dir() or file_kind(path) != "safetensors":
        return False
    return open_safetensors(path)[0].get("format") == FORMAT


def _read(path: Path) -> object:
    """The content of a file as a tree of dicts, LazyTensors and placeholders."""
    kind = file_kind(path)
    if kind == "safetensors":
        metadata, tensors = open_safetensors(path)
        if metadata.get("format") == TEACHER_FORMAT and "sha256" in metadata:  # older ones lack it
            found = {name: value.read() for name, value in tensors.items()}
            if teacher_checksum(found, metadata) != metadata["sha256"]:
                raise CheckpointError("the checksum of the file differs: it is damaged")
        return tensors
    if kind in ("torch", "pickle"):
        return read_torch(path)
    raise CheckpointError(f"is {kind_of_file(path) or 'of an unknown format'}; expected {_KNOWN}")


def teacher_checksum(weights: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of a teacher file's weights and header, but for the header's own "sha256"."""
    return digest_of(weights, {k: header[k] for k in sorted(header) if k != "sha256"})


def _folder(path: Path, category: str | None, teacher: Path | None) -> Contents:
    if (path / "student_final.pth").exists():
        _only("rximg", category=category, teacher=teacher)
        return nelson_folder(path)
    if rximg_categories(path):
        return rximg_folder(path, category, teacher)
    raise CheckpointError(f"is a folder without a training; expected {_KNOWN}")


def _not_a_detector(path: Path, network: Network | None) -> CheckpointError:
    if network is None:
        return CheckpointError(f"holds no EfficientAD; expected {_KNOWN}")
    if network.role == "teacher":
        return CheckpointError(
            f"holds a PDN-{network.size} teacher alone, not a detector: train one with "
            f"`--teacher {path.name}`, or read it with load_teacher"
        )
    return CheckpointError(
        f"holds the {network.role} alone, not a detector: pass the training's folder"
    )
