"""The package as a user gets it: what it holds, what importing it costs, what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import efficientad

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {f"bench/results/{p.name}" for p in (ROOT / "bench" / "results").iterdir()}


def python(code: str, executable: str | Path = sys.executable, **environment: str) -> str:
    """Run code in a fresh interpreter away from the checkout; returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(executable), "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(sys.prefix),
        env=clean | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    assert efficientad.__all__ == [
        "AnomalyOutput",
        "CheckpointError",
        "EfficientAD",
        "FastPredictor",
        "Fp8Error",
        "Prediction",
        "UncalibratedError",
        "__version__",
        "accelerate",
        "calibrate",
        "convert",
        "evaluate",
        "export",
        "fit",
        "load",
        "load_teacher",
        "predict",
        "save",
    ]
    for name in efficientad.__all__:
        assert getattr(efficientad, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        efficientad.trian  # noqa: B018


def test_import_adds_little_to_torch_and_loads_nothing_heavy():
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import efficientad
cost = time.perf_counter() - start
efficientad.EfficientAD, efficientad.load, efficientad.calibrate, efficientad.evaluate
heavy = {"triton", "sklearn", "matplotlib", "scipy", "PIL", "rich"}
print(cost, sorted(heavy & (set(sys.modules) - before)))
"""
    cost, heavy = python(code).split(" ", 1)
    assert heavy == "[]"
    assert float(cost) <= 0.2


def test_works_without_triton_and_without_a_compiler():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, efficientad
model = efficientad.EfficientAD("S")
with torch.no_grad():
    print(model.distance_maps(torch.rand(1, 3, 256, 256))[0].shape)
"""
    assert python(code, PATH="", CUDA_VISIBLE_DEVICES="") == "torch.Size([1, 56, 56])"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist, built in a venv of their own from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("efficientad", "kernels", "csrc", "bench", "tests", "docs"):
        (source / name).symlink_to(ROOT / name)
    for name in ROOT.iterdir():
        if name.is_file():
            (source / name.name).symlink_to(name)
    builder = folder / "builder"
    venv.create(builder, with_pip=True)
    executable = builder / "bin" / "python"
    installed = subprocess.run(
        [executable, "-m", "pip", "install", "-q", "setuptools>=77"], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"setuptools cannot be fetched: {installed.stderr[-300:]}")
    code = f"""
import os
os.chdir({str(source)!r})
import setuptools.build_meta as build
build.build_wheel({str(folder)!r})
build.build_sdist({str(folder)!r})
"""
    python(code, executable)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def sources(folder: str) -> set[str]:
    """Files below a folder, as paths from there, without what a build left there."""
    built = (".pyc", ".so")
    files = (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in built)
    return {p.relative_to(ROOT / folder).as_posix() for p in files}


def test_wheel_holds_kernels_csrc_and_package_data_and_runs_in_an_empty_venv(
    distributions, tmp_path
):
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, target in [("efficientad", ""), ("kernels", "kernels/"), ("csrc", "csrc/")]:
        for name in sources(folder):
            assert f"efficientad/{target}{name}" in names
    assert not any(name.startswith(("tests/", "bench/", "kernels/")) for name in names)
    venv.create(tmp_path / "venv", with_pip=True)
    executable = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    code = (
        "import efficientad, efficientad.kernels as k; print(efficientad.__version__, k.__file__)"
    )
    version, kernels = python(code, executable).split()
    assert version == efficientad.__version__
    assert str(tmp_path) in kernels
    # With torch on the path (not in the venv: it is large) the installed wheel runs.
    parent = next(p for p in sys.path if (Path(p) / "torch").is_dir())
    code = (
        "import efficientad; from efficientad.cli.main import main; print(efficientad.__file__);"
        "main(['info'])"
    )
    lines = python(code, executable, PYTHONPATH=parent).splitlines()
    assert str(tmp_path) in lines[0]
    assert lines[1].split() == ["efficientad", efficientad.__version__]


def test_sdist_holds_every_room(distributions):
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("efficientad", "kernels", "csrc", "bench", "tests"):
        assert {f"{folder}/{name}" for name in sources(folder)} - RESULTS <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= names


def test_missing_kernels_name_the_install_command():
    """An interpreter that finds the checkout but not the mapped package."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.meta_path = [f for f in sys.meta_path if "Editable" not in repr(f)]
try:
    from efficientad import kernels
except ImportError as error:
    print(error)
"""
    assert "pip install -c constraints.txt -e ." in python(code)
