"""Teacher files: what they hold, how they are written, and the default one.

A teacher file is safetensors: float16 weights named as in the paper's tables ("conv1.weight"), and
in the header what it was made from. `load_teacher` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from efficientad.checkpoint.loading import TEACHER_FORMAT, load_teacher, teacher_checksum
from efficientad.model.networks import PDN
from efficientad.utils.files import replace_file

DEFAULT_LICENSE = (
    "follows from the photos and the backbone it was distilled from; not that of the package"
)

# Teachers that come with the package, all PDN-S; the first one is the default.
SHIPPED = {
    "research": "teacher_small.safetensors",
    "commercial": "teacher_small_commercial.safetensors",
}


def named_teacher(teacher: Any) -> Any:
    """The file of a teacher that is named as in `SHIPPED`; anything else as it is.

    A file of one's own with such a name is asked for with its folder, "./commercial".
    """
    named = isinstance(teacher, (str, Path)) and str(teacher) in SHIPPED
    return shipped_teacher(str(teacher)) if named else teacher


def shipped_teacher(name: str = "research") -> Path:
    """Where a PDN-S teacher of `SHIPPED` is installed; FileNotFoundError where it is not."""
    path = Path(__file__).parents[1] / SHIPPED[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not installed. Make a teacher with `efficientad distill PHOTOS --backbone "
            "FILE --out teacher.safetensors`, or name another project's teacher file"
        )
    return path


def default_teacher() -> PDN:
    """The default teacher: PDN-S, unpadded, frozen, float32, on the CPU. Errors as its path."""
    return load_teacher(shipped_teacher(), "S")


def default_teacher_facts() -> dict[str, Any]:
    """What the default teacher's header says: recipe, data, held-out loss, licence."""
    return teacher_facts(shipped_teacher())


def teacher_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a teacher file: "license" and others as text, "recipe" and "facts" as objects.

    A teacher of another project has no header: the result is empty. Raises FileNotFoundError, or
    ValueError for a file that is not safetensors or whose header is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
        if header.get("format") != TEACHER_FORMAT:
            return {}
        return {k: json.loads(v) if v[:1] in "{[" else v for k, v in header.items()}
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has no readable header: {error}") from None


def teacher_license(teacher: PDN | str | os.PathLike | None) -> str | None:
    """The licence of a teacher as `fit` takes it (None: the default one); None where none is known.

    That of a file is in its header. Weights in memory are known if they are a shipped teacher's.
    """
    teacher = named_teacher(teacher)
    try:
        if isinstance(teacher, PDN):
            found = next(
                (file for file in map(shipped_teacher, SHIPPED) if _holds(file, teacher)), None
            )
            return None if found is None else teacher_facts(found).get("license")
        return teacher_facts(shipped_teacher() if teacher is None else teacher).get("license")
    except (ValueError, OSError):  # no such file, or another project's
        return None


def _holds(file: Path, teacher: PDN) -> bool:
    """Whether a shipped file holds a teacher's weights."""
    if teacher.size != "S":
        return False
    own, shipped = teacher.state_dict(), load_teacher(file, "S").state_dict()
    return all(torch.equal(own[name].float().cpu(), shipped[name]) for name in shipped)


def save_teacher(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    *,
    size: str,
    license: str = DEFAULT_LICENSE,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a teacher's weights as float16, atomically, with a header that says what it is.

    weights: the state dict of a `PDN`. facts: header key -> JSON object.

    Raises:
        ValueError: weights that are not finite in float16.
        OSError: the file cannot be written; an older one is unchanged.
    """
    stored = {}
    for name, value in weights.items():
        half = value.detach().to("cpu", torch.float16, copy=True).contiguous()
        if not torch.isfinite(half).all():
            raise ValueError(f"{name} has a NaN, infinite or too large entry for float16")
        stored[name] = half
    header = {
        "format": TEACHER_FORMAT,
        "network": f"PDN-{size}, 384 channels (arXiv 2303.14535, Tables 6 and 7)",
        "input": "RGB in 0..1, minus ImageNet mean, over ImageNet std; 256x256 in training",
        "license": license,
        "make your own": "efficientad distill PHOTOS --backbone FILE --out teacher.safetensors",
    }
    header |= {k: json.dumps(dict(v), allow_nan=False) for k, v in (facts or {}).items()}
    header["sha256"] = teacher_checksum(stored, header)
    try:
        # Not save_file, which makes files that no other user can read.
        data = save(stored, header)
        replace_file(path, lambda part: part.write_bytes(data), durable=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def teacher_header(
    facts: dict[str, Any], sources: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """What a teacher file says of its run, from the facts of its state, and of its sources."""
    last = facts["curve"][-1] if facts["curve"] else {}
    result = {k: facts[k] for k in ("step", "planned_before", "held_out", "failed")}
    losses = {k: last[k] for k in ("step", "train", "held_out", "held_out_inner") if k in last}
    return {
        "recipe": facts["recipe"],
        "photos": facts["photos"],
        "backbone": facts["backbone"],
        "result": {**result, "measured": losses},
        **({} if sources is None else {"sources": sources}),
    }
