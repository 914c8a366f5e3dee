"""Options and fixtures of every test: the device, and the folder of real images if there is one."""

from __future__ import annotations

import collections
import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANOMALIB = "2.7.0"
MODEL_FILE = "anomalib/models/image/efficient_ad/torch_model.py"


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
    # Threads of processes that share the cores would wait for each other; torch reads this once.
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // worker["workercount"])))
    # Triton reads this once, at import; interpreted and compiled kernels do not mix in a process.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server, see `helpers_postgres`; skips where there can be none."""
    from helpers_postgres import PostgresServer, missing

    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """Each kind of database for a store: None for SQLite, or the URL of a new schema."""
    if request.param == "sqlite":
        return None
    return request.getfixturevalue("postgres").schema()


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


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration without the errors of the dtypes: most of its time, and not a test's point."""
    from efficientad.calibration import calibrating
    from efficientad.model.precision import Precision

    monkeypatch.setattr(
        calibrating, "measure_precision", lambda *_, **__: Precision(2, 1.0, None, {}, "cpu")
    )


@pytest.fixture(scope="module")
def light_networks() -> Iterator[None]:
    """New PDNs have zeros in all but 16 inner channels, and the plain path leaves those out."""
    import torch
    import torch.nn.functional as F

    from efficientad.model.networks import PDN

    kept, new, plain = 16, PDN.__init__, PDN.forward

    def init(self: PDN, *arguments, **options) -> None:
        new(self, *arguments, **options)
        for conv, _ in self.layers()[:-1]:
            conv.weight.data[kept:] = 0
            conv.bias.data[kept:] = 0

    def forward(self: PDN, x):
        inner = [conv for conv, _ in self.layers()[:-1]]
        rest = (t[kept:] for conv in inner for t in (conv.weight, conv.bias))
        if torch.compiler.is_compiling() or any(bool(t.any()) for t in rest):
            return plain(self, x)  # exported, or other weights were loaded
        for conv, row in self.layers():
            width = conv.out_channels if conv is self.last else kept
            weight = conv.weight[:width, : x.shape[1]]
            x = F.conv2d(x, weight, conv.bias[:width], padding=conv.padding)
            x = F.relu(x) if row.relu else x
            x = F.avg_pool2d(x, 2, 2, padding=int(self.padding)) if row.pool else x
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PDN, "__init__", init)
        patch.setattr(PDN, "forward", forward)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images for tests; not part of the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the repository: the real images are not there")
    return path


@pytest.fixture(scope="session")
def anomalib_model_file(tmp_path_factory) -> Path:
    """anomalib's torch_model.py: of the installed package, or of its wheel in an ignored folder."""
    spec = importlib.util.find_spec("anomalib")
    if spec is not None:
        return Path(spec.submodule_search_locations[0]).parent / MODEL_FILE
    cache = ROOT / ".work"
    wheel = cache / f"anomalib-{ANOMALIB}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache)]
        try:
            subprocess.run([*command, f"anomalib=={ANOMALIB}"], check=True, timeout=120)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"anomalib is not installed and its wheel cannot be fetched: {error}")
    target = tmp_path_factory.mktemp("anomalib")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(MODEL_FILE, target)
    return target / MODEL_FILE


@pytest.fixture(scope="session")
def anomalib(anomalib_model_file) -> types.ModuleType:
    """The one file as a module, with the imports of its package and of torchvision stubbed."""

    batch = collections.namedtuple("InferenceBatch", ("pred_score", "anomaly_map"))
    stubs = {name: types.ModuleType(name) for name in ("torchvision", "anomalib", "anomalib.data")}
    stubs["torchvision"].transforms = types.ModuleType("torchvision.transforms")
    stubs["anomalib.data"].InferenceBatch = batch
    spec = importlib.util.spec_from_file_location("anomalib_torch_model", anomalib_model_file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module
