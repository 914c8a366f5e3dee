"""Results files as the benchmarks write them, made up."""

from __future__ import annotations

from typing import Any

H200 = "NVIDIA H200"


def about(device: str = H200, **changes: Any) -> dict[str, Any]:
    facts = {
        "device": device,
        "capability": "sm_90",
        "driver": "1.0",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "commit": "abc",
        "date": "2026-01-02T00:00:00+00:00",
        "command": "made up",
    }
    return {**facts, **changes}


def end_to_end(size: str = "S", batch: int = 1, dtype: str = "float16", **values: Any) -> dict:
    kind = values.get("kind", "end_to_end")
    row = {
        "kind": kind, "name": "FastPredictor", "size": size, "batch": batch,
        "image_size": [256, 256], "dtype": dtype, "device": "cuda:0", "p50_ms": 0.2,
        "p90_ms": 0.205, "p99_ms": 0.21, "max_ms": 0.5, "mean_ms": 0.2, "spread_ms": 0.004,
        "images_per_s": 5000.0, "map_error": 1e-3, "rank_errors": 0, "no_time": None,
        "calls": 1000, "key": f"{kind}/{size}/256/{dtype}/b{batch}", "part": 1,
    }  # fmt: skip
    return {**row, **values}


def peer(name: str, ratio: float, size: str = "S", batch: int = 1, **values: Any) -> list[dict]:
    """The peer's row and that of its ratio to ours."""
    row = end_to_end(size, batch, kind="peer", name=name, p50_ms=0.2 * ratio,
                     images_per_s=5000.0 / ratio, **values)  # fmt: skip
    same = ("size", "batch", "image_size", "dtype", "device", "key", "part")
    return [
        row,
        {name: row[name] for name in same}
        | {"kind": "ratio", "name": f"{name} / FastPredictor", "against": name, "no_time": None,
           "peer_dtype": row["dtype"], "ratio": ratio, "ratio_spread": 0.01},
    ]  # fmt: skip


def stage(name: str, ms: float, size: str = "S", batch: int = 1) -> dict:
    return end_to_end(size, batch, kind="stage", name=name, p50_ms=ms, timing="events")


def kernel(layer: str = "conv2", backend: str = "triton", **values: Any) -> dict:
    row = {
        "kind": "kernel", "name": "conv_relu_pool", "size": "S", "layer": layer, "small": False,
        "batch": 1, "dtype": "float16", "backend": backend, "device": "cuda", "us": 51.25,
        "spread_us": 0.5, "tflops": 600.0, "gb_s": 200.0, "fraction_of_ceiling": 0.76,
        "max_error": 1e-4,
        "no_time": None, "ratio": None if backend == "triton" else 1.8,
        "key": f"kernel/conv_relu_pool/S/{layer}/b1/float16", "part": 1,
    }  # fmt: skip
    return {**row, **values}


def ceilings() -> list[dict]:
    product = {"kind": "ceiling", "name": "matmul 8192", "device": "cuda", "us": 1390.0,
               "spread_us": 3.0, "key": "ceiling/part1", "part": 1}  # fmt: skip
    copy = {**product, "name": "copy 2048 MiB", "dtype": "float32", "gb_s": 4300.0}
    rates = {"bfloat16": 790.0, "float16": 780.0}
    return [*({**product, "dtype": d, "tflops": t} for d, t in rates.items()), copy]


def results() -> dict[str, Any]:
    """An H200 run in which every kind of row occurs."""
    sweep = kernel(kind="sweep", tile="128x256x128B", warps=8, stages=4, shipped=True, ratio=1.0,
                   l2_tb_s=6.0, key="sweep/conv_relu_pool/S/conv2/b1/float16")  # fmt: skip
    rows = [
        {"kind": "correctness", "name": "conv_relu_pool", "size": None, "dtype": "float16",
         "ok": True, "error": None, "key": "correct/conv_relu_pool/float16", "part": 1},
        *ceilings(),
        kernel(),
        kernel(backend="eager"),
        kernel(backend="compile", key="compiled/conv_relu_pool/S/conv2/b1/float16"),
        sweep,
        {**sweep, "tile": "64x128x128B", "us": None, "no_time": "OutOfResources", "shipped": False},
        *(end_to_end(size, b, p50_ms=0.1 + 0.1 * b, images_per_s=b / (0.1 + 0.1 * b) * 1e3)
          for size in "SM" for b in (1, 16, 32)),
        *peer("nelson1425 order, eager", 4.0),
        *peer("torch.compile max-autotune", 1.7),
        stage("graph", 0.13),
        {"kind": "failure", "name": "peer/x", "error": "no answer", "key": "peer/x", "part": 1},
    ]  # fmt: skip
    return {"about": about(parts=[{}], keys={}, left_out=["sweep/x"]), "rows": rows}
