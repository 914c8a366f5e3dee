"""Build description that pyproject.toml cannot hold: top-level rooms, and the native frame path.

`kernels/` becomes `efficientad.kernels` and `csrc/` travels as `efficientad/csrc`. csrc/build.py
compiles `efficientad._native` where there is a C++ compiler, with CUDA where there is nvcc;
EFFICIENTAD_CUDA=auto|0|1 overrides. Without a compiler the package is pure Python.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path("csrc")
spec = importlib.util.spec_from_file_location("efficientad_build", SOURCE / "build.py")
native = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildNative(build_ext):
    """Runs ninja; the objects stay in build/, also between editable installs."""

    def build_extension(self, ext):
        tag = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output = Path(self.get_ext_fullpath(ext.name))
        print(native.build(tools, SOURCE, Path("build", tag), output), flush=True)


tools = native.find_tools()
if isinstance(tools, str):
    print(f"efficientad: installed without the native frame path: {tools}", flush=True)
    extensions = []
else:
    # Optional: a compilation that fails leaves a pure Python package.
    extensions = [Extension("efficientad._native", sources=[], optional=True)]

setup(
    packages=[
        "efficientad",
        *(f"efficientad.{room}" for room in find_packages("efficientad")),
        "efficientad.kernels",
        "efficientad.csrc",
    ],
    package_dir={
        "efficientad": "efficientad",
        "efficientad.kernels": "kernels",
        "efficientad.csrc": "csrc",
    },
    package_data={
        "efficientad": ["py.typed", "*.safetensors"],
        "efficientad.service": ["static/*"],
        "efficientad.csrc": ["*.md", "*.h", "*.cpp", "*.cu"],
    },
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
