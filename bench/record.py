"""What every file in bench/results/ says of itself.

A results file is JSON: `about` (device, versions, commit, date, command) and `rows`, a list with
one dictionary per measurement. A figure without such a file does not exist.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad.utils.files import write_text

if TYPE_CHECKING:  # reports read results files where there is no torch
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]  # of a results file
PACKAGES = ("torch", "triton", "numpy", "pillow", "onnxruntime", "openvino", "nncf", "anomalib")


def about(device: str | torch.device = "cpu", command: str | None = None) -> dict[str, Any]:
    """Device, driver, versions, commit, date and command of a measurement.

    command: default: this process's, as it would be typed in the root of the checkout.
    """
    import torch

    device = torch.device(device)
    facts: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        facts["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        facts["cuda"] = torch.version.cuda
    else:
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["versions"] = versions
    facts["commit"] = commit()
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts["command"] = _command() if command is None else command
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of cores this process may use."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}+changes" if found != "unknown" and changed not in ("", "unknown") else found


def write(path: str | os.PathLike, facts: dict[str, Any], rows: list[Row]) -> None:
    """Write a results file, whole or not at all. ValueError: a number that is not finite."""
    text = json.dumps({"about": facts, "rows": rows}, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """A results file. ValueError: not one."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"about", "rows"} <= set(found):
        raise ValueError(f"{path} is no results file; it must hold `about` and `rows`")
    return found


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = (
        ["python", "-m", spec.name.removesuffix(".__main__")]
        if spec is not None
        else ["python", sys.argv[0]]
    )
    return " ".join([*program, *sys.argv[1:]])


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
