"""Every fused operation beside plain torch, one launch at a time under pytest-benchmark.

    python -m pytest bench/kernels/bench_kernels.py --device cuda [-k "S-conv2-b32"] [--compiled]
    python -m pytest bench/kernels/bench_kernels.py               # small shapes on the CPU

See `measure` for what is compared and timed; a results file comes from `python -m bench.gpu`.
"""

from __future__ import annotations

import pytest
import torch

from bench.kernels.cases import layers
from bench.kernels.device_times import device_times
from bench.kernels.measure import (
    BATCHES,
    PEERS,
    alive,
    default_dtype,
    fault,
    ours,
    partial_maps,
    prepare,
)
from bench.shapes import BOTH

PLACES = [
    (size, layer.name, batch)
    for size in ("S", "M")
    for batch in sorted(BATCHES)
    for layer in layers(size)
    if size == "S" or layer.size != BOTH
]


@pytest.mark.parametrize("backend", ["ours", *PEERS, "compile"])
@pytest.mark.parametrize(
    ("size", "name", "batch"), PLACES, ids=[f"{s}-{n}-b{b}" for s, n, b in PLACES]
)
def test_kernel(size: str, name: str, batch: int, backend: str, device: str, benchmark, request):
    """pytest-benchmark's clock waits for the device; the device's own time is in extra_info."""
    if backend == "compile" and not request.config.getoption("--compiled"):
        pytest.skip("torch.compile is timed with --compiled")
    on_cuda = torch.device(device).type == "cuda"
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    found = layers(size, parts=partial_maps(device, batch), small=not on_cuda)
    layer = next(x for x in found if x.name == name)
    case = layer.case(device, batch, default_dtype(device))
    backend = ours(device) if backend == "ours" else backend
    with torch.inference_mode():
        call, got = prepare(case, backend)
        errors, wrong = fault(case, got, case.definition(), backend)
        assert wrong is None, wrong

        def wait() -> None:
            call()
            alive(device)

        benchmark.extra_info |= {**errors, "backend": backend, "small": not on_cuda}
        if on_cuda:
            benchmark.extra_info |= device_times({backend: call}, device)[backend].row()
        benchmark.pedantic(wait, rounds=20 if on_cuda else 5, warmup_rounds=1)
