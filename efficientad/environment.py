"""Floor 4, imports devices, frames, native_conv, ops, teachers: what is installed and would run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from efficientad import __version__, native_conv
from efficientad.devices import choose_dtype
from efficientad.frames import native_info
from efficientad.ops import choose_backend
from efficientad.teachers import default_teacher_facts


def environment() -> dict[str, Any]:
    """What is installed and what the package would run on."""
    facts: dict[str, Any] = {"efficientad": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "safetensors", "pillow", "scipy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {"triton": "triton kernels", "torch": "folded torch network"}[choose_backend(device)]
    dtype = choose_dtype("auto", device, "auto")
    if device.type == "cpu" and dtype == torch.float32 and native_conv.available():
        chosen += ", compiled convolutions"
    facts["fast path"] = f"{chosen}, {str(dtype).removeprefix('torch.')}"
    try:
        facts["default teacher"] = default_teacher_facts()["license"]
    except FileNotFoundError:
        facts["default teacher"] = "not there; `train` needs --teacher"
    native = native_info()
    facts["frame path"] = (
        f"compiled, {native['level']}, {native['threads']} threads; CUDA code for "
        f"{', '.join(f'sm_{n}' for n in native['cuda']) or 'no device'}"
        if native["available"]
        else f"torch: {native['reason']}"
    )
    return facts
