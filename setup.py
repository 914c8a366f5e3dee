"""Build description that pyproject.toml cannot hold: `kernels/` becomes `efficientad.kernels`."""

from setuptools import setup

setup(
    packages=["efficientad", "efficientad.kernels"],
    package_dir={"efficientad": "efficientad", "efficientad.kernels": "kernels"},
    package_data={"efficientad": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
)
