"""What is installed and would run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from efficientad import __version__
from efficientad.checkpoint.teachers import default_teacher_facts
from efficientad.fast.backends import KernelBackend
from efficientad.fast.folded_network import network_name
from efficientad.fast.options import choose_dtype
from efficientad.ops import native
from efficientad.ops.fused import choose_backend


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
    dtype = choose_dtype("auto", device, "auto")
    kernels = choose_backend(device) == "triton"
    chosen = KernelBackend.name if kernels else network_name(dtype, device)
    facts["fast path"] = f"{chosen}, {str(dtype).removeprefix('torch.')}"
    try:
        facts["default teacher"] = default_teacher_facts()["license"]
    except FileNotFoundError:
        facts["default teacher"] = "not there; `train` needs --teacher"
    frames = native.info()
    facts["frame path"] = (
        f"compiled, {frames['level']}, {frames['threads']} threads; CUDA code for "
        f"{', '.join(f'sm_{n}' for n in frames['cuda']) or 'no device'}"
        if frames["available"]
        else f"torch: {frames['reason']}"
    )
    return facts
