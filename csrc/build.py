"""Builds `efficientad._native`; the standard library alone, pybind11 and ninja on use.

setup.py calls it. It writes a build.ninja, so that nvcc and the host compiler run side by side and
a rebuild compiles only what changed. It needs neither torch, a GPU, the network nor git.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MODULE = "_native.so"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HOST = (
    "amx.cpp",
    "amx_host.cpp",
    "bindings.cpp",
    "conv.cpp",
    "host.cpp",
    "pool.cpp",
    "portable.cpp",
    "taps.cpp",
)
CUDA = ("frame.cu",)
_AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
LEVELS = {  # sources with instructions of their own, chosen at run time
    "avx2.cpp": "-mavx2 -mfma -mf16c",
    "avx512.cpp": _AVX512,
}
# amx.cpp is empty without these, which a compiler before 2021 does not know.
AMX = f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
# Nothing is contracted to a fused multiply-add unless it is written so; without errno and traps
# the square root and the roundings become instructions. None of this changes a value.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
FLAGS += " -fno-trapping-math"


@dataclass(frozen=True)
class Tools:
    """What the build runs; `nvcc` is None for the host twin alone."""

    compiler: str
    ninja: str
    pybind11: str
    nvcc: str | None


def wanted() -> str:
    """EFFICIENTAD_CUDA: "auto", "0" or "1"; SystemExit for another value."""
    value = os.environ.get("EFFICIENTAD_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"EFFICIENTAD_CUDA is {value!r}; it must be auto, 0 or 1")
    return value


def find_tools() -> Tools | str:
    """The tools, or one line that says why nothing can be compiled here.

    SystemExit where EFFICIENTAD_CUDA=1 asks for what is not there.
    """
    cuda = wanted()
    nvcc = shutil.which("nvcc") if cuda != "0" else None
    if cuda == "1" and nvcc is None:
        raise SystemExit("EFFICIENTAD_CUDA=1, but there is no nvcc on the PATH")
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for path in map(shutil.which, compilers) if path), None)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    reason = None
    if sys.platform != "linux":
        reason = f"the native frame path is built on Linux only, not on {sys.platform}"
    elif compiler is None:
        reason = f"no C++ compiler on the PATH (looked for {', '.join(compilers)})"
    elif not headers.is_file():
        reason = "no Python.h (install the headers of this Python, e.g. python3-dev)"
    else:
        try:
            import pybind11

            include = pybind11.get_include()
        except ImportError:
            reason = "no pybind11 (pip install pybind11)"
    ninja = shutil.which("ninja")
    if reason is None and ninja is None:
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR, "ninja"))
        except ImportError:
            reason = "no ninja (pip install ninja)"
    if reason is None:
        return Tools(compiler, ninja, include, nvcc)
    if cuda == "1":
        raise SystemExit(f"EFFICIENTAD_CUDA=1, but {reason}")
    return reason


def architectures(nvcc: str) -> list[int]:
    """Those of ARCHITECTURES that this nvcc compiles for; an older one knows fewer."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", done.stdout)}
    return [number for number in ARCHITECTURES if number in known]


def gencode(numbers: list[int]) -> str:
    """nvcc's options; code for later GPUs is made from the last one's PTX."""
    parts = [f"-gencode arch=compute_{n},code=sm_{n}" for n in numbers]
    return " ".join([*parts, f"-gencode arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"])


def knows(compiler: str, options: str) -> bool:
    """Whether a compiler accepts these options."""
    command = [compiler, *options.split(), "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _escape(path: object) -> str:
    """A path inside a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(tools: Tools, source: Path) -> str:
    """Text of build.ninja; object files and the module, MODULE, go beside it.

    RuntimeError if nvcc is too old.
    """
    includes = [sysconfig.get_path("include"), tools.pybind11]
    headers = " ".join(f"-isystem '{path}'" for path in includes)
    lines = [
        "ninja_required_version = 1.5",
        f"flags = {FLAGS}",
        f"headers = {headers}",
        "level =",
        "rule host",
        f"  command = '{tools.compiler}' -MMD -MF $out.d $flags $level $headers -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
    ]
    define, link = "", f"'{tools.compiler}' -shared -s $in -o $out -pthread"
    sources: list[tuple[str, str]] = [(name, "host") for name in HOST]
    levels = {}
    if re.fullmatch("x86_64|amd64", platform.machine().lower()):
        levels = LEVELS | ({"amx.cpp": AMX} if knows(tools.compiler, AMX) else {})
        sources += [(name, "host") for name in LEVELS]
    if tools.nvcc:
        numbers = architectures(tools.nvcc)
        if not numbers:
            raise RuntimeError(f"{tools.nvcc} compiles for none of {ARCHITECTURES}")
        define = f"-DEFFICIENTAD_CUDA='\"{' '.join(map(str, numbers))}\"'"
        # The runtime is linked statically, by nvcc, which alone knows where its toolkit is.
        link = f"'{tools.nvcc}' -ccbin '{tools.compiler}' -shared -cudart static $in -o $out"
        link += " -Xcompiler -pthread,-s"
        host_flags = "-fPIC,-fvisibility=hidden,-ffp-contract=off"
        lines += [
            "rule cuda",
            f"  command = '{tools.nvcc}' -ccbin '{tools.compiler}' -MD -MF $out.d -O3 -std=c++17 "
            f"--fmad=false --threads 2 {gencode(numbers)} -Xcompiler {host_flags} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
        ]
        sources = [(name, "cuda") for name in CUDA] + sources  # the slowest first
    lines += ["rule link", f"  command = {link}", "  description = link $out"]
    objects = []
    for name, rule in sources:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: {rule} {_escape(source / name)}")
        level = levels.get(name, "")
        if name == "bindings.cpp":
            level = define
        if level:
            lines.append(f"  level = {level}")
    lines.append(f"build {MODULE}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_module(tools: Tools, source: Path, folder: Path, output: Path) -> str:
    """Write `folder`/build.ninja, run it, copy the module to `output`; returns what ninja printed.

    RuntimeError if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(tools, source.resolve()))
    done = subprocess.run(
        [tools.ninja, "-C", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip())
    output.unlink(missing_ok=True)  # a process that has it open keeps what it has
    shutil.copyfile(folder / MODULE, output)
    return done.stdout


def build(tools: Tools, source: Path, folder: Path, output: Path) -> str:
    """Compile with CUDA if there is nvcc, else or if that fails without; one line on what was done.

    Raises:
        SystemExit: EFFICIENTAD_CUDA=1 and the build with CUDA failed.
    """
    attempts = [tools]
    if tools.nvcc and wanted() != "1":
        attempts.append(Tools(tools.compiler, tools.ninja, tools.pybind11, None))
    for attempt in attempts:
        what = "frame path for CUDA and the CPU" if attempt.nvcc else "frame path for the CPU"
        try:
            printed = compile_module(attempt, source, folder, output)
        except RuntimeError as error:
            print(f"{error}\nefficientad: the {what} did not compile (see above)", flush=True)
            continue
        print(printed, end="", flush=True)
        return f"efficientad: built the {what}"
    if wanted() == "1":
        raise SystemExit("EFFICIENTAD_CUDA=1, but the build with CUDA failed (see above)")
    output.unlink(missing_ok=True)
    return "efficientad: installed without the native frame path; frames go through torch"
