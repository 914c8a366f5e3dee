"""Networks in foreign files; nelson1425 and rximg folders.

Sources: nelson1425/EfficientAD (`common.py`, `efficientad.py`) and rximg/EfficientAD (`models.py`,
`train_reduced_student.py`, `eval.py`). Files are read as data; no class of theirs is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from efficientad.checkpoint.contents import Contents, calibration, check_weights, weight_shapes
from efficientad.checkpoint.safe_pickle import (
    CheckpointError,
    LazyTensor,
    Placeholder,
    attributes,
    mapping,
    reading,
)
from efficientad.checkpoint.torch_zip import numpy_value, read_npy_object, read_torch
from efficientad.model.map_rule import QUANTILE_NAMES
from efficientad.model.networks import decoder_sizes
from efficientad.utils.folders import visible

# Places of the convolutions in nelson1425's nn.Sequential. His first autoencoder had no Dropout
# modules, so its indices differ; dropout has no weights and does nothing at inference.
_PDN_INDICES = {"S": (0, 3, 6, 8), "M": (0, 3, 6, 8, 10, 12)}
_AUTOENCODER_INDICES = (
    (0, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 38),
    (0, 2, 4, 6, 8, 10, 12, 15, 18, 21, 24, 27, 30, 32),
)
_AUTOENCODER_NAMES = tuple(f"encoder.enconv{i}" for i in range(1, 7)) + tuple(
    f"decoder.deconv{i}" for i in range(1, 9)
)


_WRAPPERS = ("module", "_orig_mod")


class Network(NamedTuple):
    """One network of a file."""

    role: str  # "teacher", "student" or "autoencoder"
    size: str  # "S" or "M"; of the autoencoder "", which is the same in both
    weights: dict[str, LazyTensor]  # named as in `model.networks`


def tensors_of(node: object) -> dict[str, LazyTensor]:
    """Flat name -> tensor of a state dict, or of a pickled module as its `state_dict()` would say.

    Entries of a state dict that are no tensors (anomalib 1.x keeps class names there) are skipped.
    """
    if not isinstance(node, Placeholder) or node.mapping:
        flat = {str(k): v for k, v in mapping(node).items() if isinstance(v, LazyTensor)}
    else:
        flat = {}
        for prefix, module in modules_of(node):
            for group in ("_parameters", "_buffers"):
                for name, value in mapping(attributes(module).get(group)).items():
                    if isinstance(value, LazyTensor):
                        flat[f"{prefix}{name}"] = value
    return _unwrapped(flat)


def _unwrapped(flat: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by the names of the network itself, without those of what it was wrapped in.

    Those are "module" of data parallel and averaged models and "_orig_mod" of compiled ones.
    """
    found: dict[str, LazyTensor] = {}
    wrapped = any(name.startswith(f"{wrapper}.") for wrapper in _WRAPPERS for name in flat)
    for name, value in flat.items():
        if wrapped and name == "n_averaged":  # how often an averaged model was updated
            continue
        own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if own in found:
            raise CheckpointError(f"has {own} twice, once inside of a wrapper; which one is meant?")
        found[own] = value
    return found


def modules_of(node: object) -> Iterator[tuple[str, Placeholder]]:
    """(prefix, module) of a pickled module and everything in its `_modules`, each once."""
    stack, seen = [("", node)], set()
    while stack:
        prefix, module = stack.pop()
        if not isinstance(module, Placeholder) or id(module) in seen:
            continue
        seen.add(id(module))
        yield prefix, module
        children = mapping(attributes(module).get("_modules")).items()
        stack += [
            (prefix if name in _WRAPPERS else f"{prefix}{name}.", child) for name, child in children
        ]


def find_objects(node: object) -> dict[str, Placeholder]:
    """Class name -> the first object of that class anywhere inside `node`, in file order."""
    stack, seen = [node], set()
    found: dict[str, Placeholder] = {}
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        children: list = []
        if isinstance(item, Placeholder):
            found.setdefault(item.origin.rpartition(".")[2], item)
            children = [item.args, item.state, item.entries, item.mapping]
        elif isinstance(item, dict):
            children = list(item.values())
        elif isinstance(item, list | tuple):
            children = list(item)
        stack += reversed(children)
    return found


def network_of(tensors: Mapping[str, LazyTensor]) -> Network | None:
    """Recognise one network by its names and shapes, in nelson's, anomalib's or rximg's naming.

    Returns None if the names are those of no single network.

    Raises:
        CheckpointError: a network with other layers or shapes than EfficientAD's.
    """
    names = {name.removeprefix("pdn."): value for name, value in tensors.items()}
    if any(re.search(r"(^|\.)bn\d+\.", name) for name in names):
        raise CheckpointError(
            "has batch normalisation (rximg's with_bn variant); EfficientAD has none"
        )
    layers = tuple(sorted({name.rpartition(".")[0] for name in names}))
    if layers and all(layer.isascii() and layer.isdigit() for layer in layers):
        indices = tuple(sorted(map(int, layers)))
        by_index: dict[tuple[int, ...], tuple[str, ...]] = {
            places: tuple(f"conv{i}" for i in range(1, len(places) + 1))
            for places in _PDN_INDICES.values()
        }
        by_index |= dict.fromkeys(_AUTOENCODER_INDICES, _AUTOENCODER_NAMES)
        if indices not in by_index:
            raise CheckpointError(
                f"has convolutions at {', '.join(map(str, indices))}; no network of "
                "nelson1425/EfficientAD has them there"
            )
        new = dict(zip(map(str, indices), by_index[indices], strict=True))
        names = {f"{new[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in names.items()}
    if "encoder.enconv1.weight" in names:
        role, size = "autoencoder", ""
    elif "conv4.weight" in names:
        size = "M" if "conv6.weight" in names else "S"
        width = tuple(names[f"conv{6 if size == 'M' else 4}.weight"].shape[:1])
        role = "teacher" if width == (384,) else "student" if width == (768,) else ""
        if not role:
            raise CheckpointError(
                f"holds a PDN-{size} of width {width}; a teacher has 384, a student 768"
            )
    else:
        return None
    shapes = weight_shapes(size or "S").items()
    prefix = f"{role}."
    check_weights(names, {k.removeprefix(prefix): v for k, v in shapes if k.startswith(prefix)})
    return Network(role, size, names)


def _combine(networks: Mapping[str, Network]) -> tuple[str, dict[str, LazyTensor]]:
    """Size and named weights of teacher, student and autoencoder."""
    weights = {
        f"{role}.{name}": value
        for role, network in networks.items()
        for name, value in network.weights.items()
    }
    return networks["teacher"].size, weights


def read_network(path: Path, role: str) -> tuple[Network, object]:
    """The network of one torch file, which must have `role`; and the file's whole tree."""
    with reading(path):
        tree = read_torch(path)
        network = network_of(tensors_of(tree))
        if network is None or network.role != role:
            found = "no network of EfficientAD" if network is None else f"the {network.role}"
            raise CheckpointError(f"holds {found}; expected the {role}")
        return network, tree


# ---- nelson1425 ------------------------------------------------------------------------------


def nelson_folder(folder: Path) -> Contents:
    """The three whole modules that nelson1425's `efficientad.py` writes at the end of a training.

    He saves neither channel statistics nor quantiles, so the detector is uncalibrated.
    """
    networks = {}
    for role in ("teacher", "student", "autoencoder"):
        path = folder / f"{role}_final.pth"
        with reading(path):
            networks[role], tree = read_network(path, role)
            _check_nelson_layers(tree, role)
    size, weights = _combine(networks)
    provenance: dict[str, object] = {
        "source": "nelson1425/EfficientAD",
        "file": folder.name,
        "licence": "code and teacher weights: Apache-2.0 (repository); training data: yours",
        "notes": ["statistics and quantiles are not in these files: calibrate the detector"],
    }
    return Contents(size, weights, border="nelson", score_size="source", provenance=provenance)


def _check_nelson_layers(tree: object, role: str) -> None:
    """Whole modules also say how they pad and resize; a state dict does not."""
    layers = [
        (module.origin.rpartition(".")[2], attributes(module)) for _, module in modules_of(tree)
    ]
    padded = [
        a for kind, a in layers if kind == "Conv2d" and a.get("padding") not in ((0, 0), None)
    ]
    if role != "autoencoder" and padded:
        raise CheckpointError(
            "is a padded PDN; nelson1425's trainings and his map rule are unpadded"
        )
    sizes = tuple(sorted(a["size"] for kind, a in layers if kind == "Upsample"))
    if role == "autoencoder" and sizes and sizes != tuple(sorted(decoder_sizes(256))):
        raise CheckpointError(
            f"resizes to {sizes}; nelson1425's autoencoder to {decoder_sizes(256)}"
        )


# ---- rximg -----------------------------------------------------------------------------------


def rximg_categories(folder: Path) -> list[str]:
    """Categories of an rximg checkpoint folder; "" is the one without a name in its files."""
    names = (path.name for path in visible(folder) if path.name.endswith("student.pth"))
    return sorted(name.removesuffix("student.pth").removesuffix("_") for name in names)


def rximg_folder(folder: Path, category: str | None, teacher: Path | None) -> Contents:
    """`best_teacher.pth` and a category's student, autoencoder and quantiles (a pickled `.npy`).

    Its PDN is padded and its maps are resized without a frame: the paper's rule. Its score is the
    maximum in the central 224 of 256 pixels, ours is the maximum of the whole map.
    """
    categories = rximg_categories(folder)
    if category is None and len(categories) == 1:
        category = categories[0]
    if category not in categories:
        raise CheckpointError(
            f"has the categories {', '.join(map(repr, categories))}; category is "
            f"{category!r}: name one of them (convert(..., category=...))"
        )
    stem = f"{category}_" if category else ""
    files = {
        "teacher": teacher or folder / "best_teacher.pth",
        "student": folder / f"{stem}student.pth",
        "autoencoder": folder / f"{stem}autoencoder.pth",
    }
    networks = {role: read_network(path, role)[0] for role, path in files.items()}
    size, weights = _combine(networks)
    quantile_file = folder / f"{stem}quantiles.npy"
    values = {}
    with reading(quantile_file):
        if quantile_file.exists():
            node = mapping(read_npy_object(quantile_file))
            if not node:
                raise CheckpointError("holds no dict of quantiles and statistics")
            names = (*QUANTILE_NAMES, "mean", "std")
            values = {name: numpy_value(node[name]) for name in names if name in node}
        mean, std = (
            torch.tensor(values[k]).float() if k in values else None for k in ("mean", "std")
        )
        statistics, quantiles = calibration(
            mean,
            std,
            {name: float(values[name].item()) for name in QUANTILE_NAMES if name in values},
        )
    provenance: dict[str, object] = {
        "source": "rximg/EfficientAD",
        "file": f"{folder.name}/{category}" if category else folder.name,
        "licence": "not stated in the files; see the repository",
        "notes": ["score: maximum of the whole map; rximg takes the central 224 of 256 pixels"],
    }
    return Contents(
        size,
        weights,
        padding=True,
        border="paper",
        statistics=statistics,
        quantiles=quantiles,
        provenance=provenance,
    )
