"""Build description that pyproject.toml cannot hold: top-level rooms that install as one package.

`kernels/` becomes `efficientad.kernels` and `csrc/` travels as `efficientad/csrc`.
"""

from setuptools import setup

setup(
    packages=["efficientad", "efficientad.kernels", "efficientad.csrc"],
    package_dir={
        "efficientad": "efficientad",
        "efficientad.kernels": "kernels",
        "efficientad.csrc": "csrc",
    },
    package_data={
        "efficientad": ["py.typed"],
        "efficientad.csrc": ["*.md", "*.h", "*.cpp", "*.cu"],
    },
    include_package_data=False,
    zip_safe=False,
)
