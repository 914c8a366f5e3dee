"""A bundle on a GPU: the same bits as compiled kernels, in a process that can compile nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from efficientad.aot.building import build_bundle
from efficientad.checkpoint.native_file import save
from efficientad.fast.predictor import FastPredictor
from efficientad.model.synthetic import frames, random_detector

BATCHES = (1, 4)
PROCESS = """
import sys, numpy as np
from efficientad.checkpoint.loading import load
from efficientad.fast.predictor import FastPredictor
from efficientad.model.synthetic import frames

fast = FastPredictor(load(sys.argv[1]), dtype=sys.argv[2], batch_sizes=(1, 4), backend="triton")
found = [fast(frames(n, 256, 256)).cpu() for n in (1, 4)]
found.append(fast(frames(2, 500, 700), map_size="source").cpu())
print(fast.facts["bundle"])
np.savez(sys.argv[3], *[value for f in found for value in (f.score, f.anomaly_map)])
"""


@pytest.mark.parametrize("size", ["S", "M"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bundle_gives_the_bits_of_compiled_kernels(size, dtype, cuda, tmp_path):
    detector = random_detector(size)
    arch = "{}{}".format(*torch.cuda.get_device_capability(cuda))
    model, bundle, result = (tmp_path / name for name in ("m.safetensors", "k", "r.npz"))
    save(detector, model)
    build_bundle(detector, bundle, arch, dtype=dtype, batch_sizes=BATCHES)
    fast = FastPredictor(detector, device=cuda, dtype=dtype, batch_sizes=BATCHES, backend="triton")
    wanted = [fast(frames(n, 256, 256)).cpu() for n in BATCHES]
    wanted.append(fast(frames(2, 500, 700), map_size="source").cpu())

    # No compiler, and no cache of what was compiled before.
    env = os.environ | {"EFFICIENTAD_BUNDLE": str(bundle), "CC": "/nowhere/cc"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_PTXAS_PATH": "/nowhere/ptxas"}
    command = [sys.executable, "-c", PROCESS, str(model), dtype, str(result)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels launched from it" in done.stdout
    assert "compiled here" not in done.stdout
    assert not (tmp_path / "cache").exists()
    values = [value for f in wanted for value in (f.score, f.anomaly_map)]
    with np.load(result) as found:
        assert len(found) == len(values)
        for name, value in zip(found, values, strict=True):
            assert np.array_equal(found[name], value)
