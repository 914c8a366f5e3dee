"""Options and fixtures of every test: the device, and the folder of real images if there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the kernels run: cpu (Triton's interpreter) or a CUDA device",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="compare the fast path with the reference on 200 images instead of 12",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this once, at import; interpreted and compiled kernels do not mix in a process.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def cuda(device: str):
    """The CUDA device as a torch.device; skips what needs one where --device names none."""
    if not device.startswith("cuda"):
        pytest.skip("this needs a GPU: run with --device cuda")
    import torch

    return torch.device(device)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images for tests; not part of the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the repository: the real images are not there")
    return path
