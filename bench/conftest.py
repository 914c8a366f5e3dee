"""Options of the benchmarks that run under pytest; the tests' own are in tests/conftest.py."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (small shapes) or a CUDA device")
    parser.addoption(
        "--compiled", action="store_true", help="torch.compile too: ten seconds or more a case"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--device is {name} and torch sees no CUDA device", returncode=2)
    return name
