"""A fresh process: what it reports, and that its failure is told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from efficientad import EfficientAD
from efficientad.benchmark.cold_start import cold_start
from efficientad.benchmark.contenders import ROW


@pytest.fixture(scope="module")
def model() -> EfficientAD:
    torch.manual_seed(0)
    made = EfficientAD()
    made.set_statistics(torch.zeros(384), torch.ones(384))
    made.set_quantiles(0.1, 0.2, 0.3, 0.4)
    return made


def test_a_fresh_process(model, tmp_path):
    bundle = tmp_path / "some.kernels"
    bundle.touch()
    found = cold_start(model, device="cpu", batch_sizes=(1, 2), bundle=bundle)
    assert found["name"] == "cold start, kernel bundle"
    assert found["bundle"] == f"{bundle}: not used, since the device is cpu"
    assert set(ROW) <= set(found)
    assert (found["kind"], found["size"], found["device"]) == ("cold_start", "S", "cpu")
    parts = [found[name] for name in ("import_s", "load_s", "construction_s")]
    assert all(part > 0 for part in parts)
    first = found["first_call_ms"]
    assert found["p50_ms"] == pytest.approx(found["construction_s"] * 1e3 + first, abs=0.02)
    assert found["process_s"] > sum(parts) + (first + found["second_call_ms"]) / 1e3
    assert found["device_mb"] == 0
    assert 100 < found["host_mb"] < 10_000


def test_what_the_process_is_told(model, monkeypatch):
    asked = {}

    def run(command, **options):
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 1, "", "first\nValueError: no such thing\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"ended with 1: ValueError: no such thing"):
        cold_start(model, device="cuda:1", dtype=torch.float16, empty_cache=True)
    assert asked["command"][4:] == ["--device", "cuda:1", "--dtype", "float16"]
    assert asked["env"]["TRITON_CACHE_DIR"].startswith(asked["command"][3].rpartition("/")[0])

    with pytest.raises(RuntimeError):
        cold_start(model, batch_sizes=(1, 4))
    assert asked["command"][-3:] == ["--batch-sizes", "1", "4"]
    assert asked["env"] == dict(os.environ)

    with pytest.raises(RuntimeError):
        cold_start(model, bundle=Path("some.kernels"))
    assert asked["command"][-2:] == ["--bundle", "some.kernels"]


def test_a_process_that_hangs_is_ended(model, monkeypatch):
    monkeypatch.setattr("efficientad.benchmark.cold_start.TIMEOUT", 0.05)
    with pytest.raises(RuntimeError, match=r"took more than 0\.05 s"):
        cold_start(model, device="cpu")
