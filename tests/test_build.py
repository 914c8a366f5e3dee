"""The build of the native frame path: what is compiled, what a rebuild costs, what is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from efficientad.ops import native

ROOT = Path(__file__).resolve().parent.parent
REGISTERS = 64  # of 256 threads: 4 blocks on a multiprocessor


@pytest.fixture
def build(monkeypatch):
    """csrc/build.py as a module, on the host twin unless a test says otherwise."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    # For time: no optimisation, and without pybind11's templates (the installed module has them).
    monkeypatch.setattr(loaded, "FLAGS", loaded.FLAGS.replace("-O3", "-O0"))
    monkeypatch.setattr(loaded, "HOST", tuple(n for n in loaded.HOST if n != "bindings.cpp"))
    monkeypatch.setenv("EFFICIENTAD_CUDA", "0")
    return loaded


@pytest.fixture
def tools(build):
    found = build.find_tools()
    if isinstance(found, str):
        pytest.skip(f"nothing can be compiled: {found}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, Path]:
    """A copy of csrc and a build folder that the tests of this file share."""
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder / "csrc", folder / "build"


def built(printed: str) -> set[str]:
    """Names of the sources and modules that ninja made."""
    return {Path(line.split()[-1]).name for line in printed.splitlines() if line[0] == "["}


def test_a_rebuild_compiles_only_what_changed(build, tools, compiled, tmp_path):
    source, folder = compiled
    output = tmp_path / "out" / "_native.so"
    first = built(build.compile_module(tools, source, folder, output))
    assert first >= {*build.HOST, build.MODULE}
    assert output.is_file()
    assert "no work to do" in build.compile_module(tools, source, folder, output)
    with open(source / "taps.cpp", "a") as file:
        file.write("// changed\n")
    assert built(build.compile_module(tools, source, folder, output)) == {"taps.cpp", build.MODULE}
    users = {"portable.cpp", *(first & build.LEVELS.keys()), build.MODULE}
    for header in ("rows.h", "conv_block.h", "conv_gradient.h"):
        with open(source / header, "a") as file:
            file.write("// changed\n")
        assert built(build.compile_module(tools, source, folder, output)) == users


def test_an_nvcc_that_fails_leaves_the_host_twin(build, tools, compiled, tmp_path, monkeypatch):
    source, folder = compiled
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_90\nexit 1\n')
    nvcc.chmod(0o755)
    with_cuda = build.Tools(tools.compiler, tools.ninja, tools.pybind11, str(nvcc))
    output = tmp_path / "_native.so"
    monkeypatch.setenv("EFFICIENTAD_CUDA", "auto")
    done = build.build(with_cuda, source, folder, output)
    assert done == "efficientad: built the frame path for the CPU"
    assert output.is_file()
    monkeypatch.setenv("EFFICIENTAD_CUDA", "1")
    with pytest.raises(SystemExit, match="EFFICIENTAD_CUDA=1, but the build with CUDA failed"):
        build.build(with_cuda, source, folder, output)


def test_a_compiler_that_fails_leaves_pure_python(build, tools, tmp_path, capsys):
    broken = build.Tools("/bin/false", tools.ninja, tools.pybind11, None)
    output = tmp_path / "_native.so"
    done = build.build(broken, ROOT / "csrc", tmp_path / "build", output)
    assert done.startswith("efficientad: installed without the native frame path")
    assert "did not compile" in capsys.readouterr().out
    assert not output.exists()


@pytest.fixture
def project(tmp_path) -> Path:
    """What setup.py needs, away from the checkout."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("efficientad", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", *arguments],
        cwd=project,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_it_is_pure_python_and_says_so(project):
    done = setup(project, "--version", PATH="", CXX="", EFFICIENTAD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("efficientad: installed without the native frame path: no C++ compiler")
    assert re.fullmatch(r"\d+\.\d+\.\d+", last)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("1", "EFFICIENTAD_CUDA=1, but there is no nvcc on the PATH"),
        ("yes", "EFFICIENTAD_CUDA is 'yes'; it must be auto, 0 or 1"),
    ],
)
def test_what_cannot_be_done_stops_with_one_line(project, value, line):
    done = setup(project, "--version", PATH="", EFFICIENTAD_CUDA=value)
    assert done.returncode == 1
    assert done.stderr.strip() == line


def test_an_architecture_that_nvcc_does_not_know_is_left_out(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_75\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    assert build.architectures(str(nvcc)) == [80, 90]
    options = build.gencode([80, 90])
    assert "code=sm_80" in options
    assert options.endswith("code=compute_90")


def test_kernels_compile_for_every_architecture_without_spills(build, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    numbers = build.architectures(nvcc)
    command = [nvcc, *"-O3 -std=c++17 --fmad=false --threads 2 -Xptxas -v".split()]
    command += [*build.gencode(numbers).split(), "-c", str(ROOT / "csrc" / "frame.cu")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "frame.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)", done.stderr)
    assert {int(number) for _, number in kernels} == set(numbers)
    assert len(kernels) == 3 * len(numbers)  # a dtype each
    assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= REGISTERS
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0")}


@pytest.mark.skipif(not native.available(), reason="efficientad._native is not built")
def test_the_module_needs_neither_torch_nor_a_driver():
    """It loads alone, and names no library of torch or CUDA."""
    path = native.module().__file__
    assert path.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    data = Path(path).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in data
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("efficientad._native", {path!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.level(), len(__import__("os").listdir("/proc/self/task")))
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [native.module().levels()[0], "1"], (
        done.stderr
    )  # no thread at import
