"""What must be right before a speed is worth anything.

Every kernel at odd sizes and the whole predictor on fresh random inputs against the float32
definition, drawn anew in every run from a seed that stands in the row. Rows are of kind
"correctness" with `ok`; `bench.gpu.run_log` takes the times away from what failed here.

On a CPU the kernels run in Triton's interpreter, in float16 alone (its bfloat16 products are wrong)
and with few channels; the predictor is the folded torch network there.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.kernels import cases as make
from bench.kernels.case import Case
from bench.kernels.inputs import Inputs
from bench.kernels.measure import TOLERANCE, Measure, alive, first_line
from bench.record import Row
from bench.shapes import TEACHER
from efficientad.fast.backends import KernelBackend, TorchBackend
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS, difference
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import frames, images, random_detector
from efficientad.utils.devices import FP8

DRAWS = 3  # sizes per configuration; one where the interpreter computes them
CONVOLUTIONS = ("conv_relu", "conv_relu_pool", "pair_distance", "first_conv_relu_pool")  # in fp8


def builders(small: bool) -> dict[str, list[Callable[[Inputs, random.Random], dict]]]:
    """Operation -> configurations; each draws its sizes. small: few channels and cells."""

    def ch(n: int) -> int:
        return max(n // 8, 32) if small else n

    def wide(n: int) -> int:
        return n // 8 if small else n

    def sides(r: random.Random, low: int, high: int) -> tuple[int, int, int]:
        """(batch, rows, columns), rows and columns mostly odd and different."""
        high = min(high, low + 5) if small else high
        return r.choice((1, 2, 3)), r.randrange(low, high), r.randrange(low, high) | 1

    def conv(r, x, low, cin, couts, kernel, **options):
        couts = tuple(map(wide, couts))
        return make.conv_relu(x, *sides(r, low, 70), ch(cin), couts, kernel, **options)

    def pair(r, x, cins, kernel):
        ct, cs, ca = map(ch, cins)
        return make.pair_distance(x, *sides(r, kernel, 60), (ct, cs, ca), kernel, wide(TEACHER))

    def resize(r, x, kernel, **options):
        size = sides(r, 4, 70)[1:]
        return make.resize_conv_relu(x, *sides(r, 2, 40), ch(64), 64, kernel, size, **options)

    def anomaly_map(r, x, parts):
        most = 30 if small else 300
        size = r.randrange(5, most), r.randrange(5, most)
        return make.anomaly_map(x, *sides(r, 2, 70), parts, size, padding=r.choice((0, 4)))

    pooled = {"pool": True, "padding": 3, "pool_padding": 1}
    pixels: dict[str, Any] = {"stride": 1, "padding": 0, "relu": False}
    half, full = (128, 128), (256, 256)
    return {
        "pack": [lambda x, r: make.pack(x, *sides(r, 1, 70), border=r.randrange(4))],
        "first_conv_relu_pool": [
            lambda x, r: make.first_conv_relu_pool(x, *sides(r, 5, 70), half, pool_padding=1),
            lambda x, r: make.first_conv_relu_pool(x, *sides(r, 5, 70), full),
        ],
        "conv_relu": [
            lambda x, r: conv(r, x, 3, 256, full, 3, padding=1),
            lambda x, r: conv(r, x, 4, 512, (384, 768), 4),
            lambda x, r: conv(r, x, 1, 512, (512, 512), 1),
        ],
        "conv_relu_pool": [
            lambda x, r: conv(r, x, 5, 128, full, 4, pool=True),
            lambda x, r: conv(r, x, 4, 256, (512, 512), 4, **pooled),
        ],
        "pair_distance": [
            lambda x, r: pair(r, x, (256, 256, 64), 4),
            lambda x, r: pair(r, x, (384, 768, 64), 1),
        ],
        "strided_conv_relu": [
            lambda x, r: make.strided_conv_relu(x, *sides(r, 4, 90), 4, 32, 4, border=2),
            lambda x, r: make.strided_conv_relu(x, *sides(r, 4, 70), ch(64), 64, 4),
            lambda x, r: make.strided_conv_relu(x, *sides(r, 8, 20), ch(64), 64, 8, **pixels),
        ],
        "resize_conv_relu": [
            lambda x, r: resize(r, x, 4),
            lambda x, r: resize(r, x, 3, padding=1),
            lambda x, r: resize(r, x, 4, read_by=r.randrange(2, 40)),
        ],
        "bottleneck": [lambda x, r: make.bottleneck(x, r.randrange(1, 40), 64, 64, 64)],
        "anomaly_map": [
            lambda x, r: anomaly_map(r, x, 1),
            lambda x, r: anomaly_map(r, x, 3),
        ],
    }


@functools.lru_cache(maxsize=4)
def _detector(size: str, padding: bool = False) -> EfficientAD:
    """On the CPU; nobody changes it."""
    return random_detector(size, padding=padding)


def _row(name: str, size: str | None, dtype: torch.dtype, device: str, seed: int) -> Row:
    return {
        "kind": "correctness",
        "name": name,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "seed": seed,
        "cases": 0,
        "max_error": 0.0,
        "rms_error": 0.0,
        "ok": True,
        "error": None,
    }


def _judge(row: Row, errors: tuple[float, float], bounds: tuple[float, float], where: str) -> None:
    """Add one comparison to a row; the first that is out of bounds is told."""
    row["cases"] += 1
    for key, error in zip(("max_error", "rms_error"), errors, strict=True):
        row[key] = max(row[key], min(error, 1e30))
    if row["ok"] and not all(e <= b for e, b in zip(errors, bounds, strict=True)):
        row["ok"] = False
        row["error"] = f"{where}: error {errors[0]:.2g}, RMS {errors[1]:.2g}; bounds {bounds}"


@torch.inference_mode()
def check_operation(
    name: str, device: str, dtype: torch.dtype, seed: int, *, small: bool = False
) -> Row:
    """The kernel of an operation at odd sizes, its output poisoned, against the definition."""
    row = _row(name, None, dtype, device, seed)
    row["bound"] = TOLERANCE[dtype][0]
    for number, build in enumerate(builders(small)[name]):
        for draw in range(1 if small else DRAWS):
            own = seed + 1000 * number + draw
            made = build(Inputs(device, dtype, own), random.Random(own))
            case = Case(layer="", size="", batch=0, dtype=dtype, **made)
            where = f"configuration {number}, seed {own}"
            try:
                launch, got = case.launch()
                launch()
                errors = case.errors(got, case.definition())
            except Exception as error:  # the other operations are still worth knowing
                alive(device)
                row |= {"ok": False, "error": f"{where}: {first_line(error)}"}
                return row
            _judge(row, errors, TOLERANCE[dtype], where)
    return row


def _map_errors(found: Tensor, want: Tensor) -> tuple[float, float]:
    """As `agreement.difference` has them; NaN is infinite, since a row holds the largest."""
    greatest, rms = (math.inf if math.isnan(v) else v for v in difference(found, want))
    return greatest, rms


def _float32_maps(detector: EfficientAD, batch: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """(anomaly map, score) by the folded torch network in float32."""
    backend = TorchBackend(detector, torch.float32, torch.device(device))
    count, _, height, width = batch.shape
    packed = torch.empty((count, height, width, 3), device=device)
    backend.pack(batch, packed, channels_last=False)
    maps = backend.distance_maps(packed)
    return backend.anomaly_map(maps, (height, width), detector.map_padding, None)


@torch.no_grad()
def check_forward(size: str, padding: bool, dtype: torch.dtype, device: str, seed: int) -> Row:
    """All kernels in a row, launched one by one, three images: maps against float32."""
    row = _row("forward", size, dtype, device, seed)
    row |= {"padding": padding, "bound": BOUNDS[dtype][0]}
    detector = _detector(size, padding)
    batch = images(3, seed=seed).to(device)
    backend = KernelBackend(detector, dtype, torch.device(device))
    side = 256 + 2 * backend.border
    packed = torch.empty((3, side, side, 4), dtype=dtype, device=device)
    backend.pack(batch, packed, channels_last=False)
    maps = backend.distance_maps(packed)
    found, score = backend.anomaly_map(maps, (256, 256), detector.map_padding, None)
    want, best = _float32_maps(detector, batch, device)
    _judge(row, _map_errors(found, want), BOUNDS[dtype], "anomaly map")
    _judge(row, _map_errors(score, best), BOUNDS[dtype], "score")
    return row


@torch.no_grad()
def check_predictor(size: str, dtype: torch.dtype, device: str, seed: int) -> Row:
    """`FastPredictor` on five frames (on CUDA graphs of 4 and 1) against the float32 detector.

    In fp8 it is built only after it has made this comparison itself.
    """
    row = _row("predictor", size, dtype, device, seed)
    detector = _detector(size)
    predictor = FastPredictor(detector, device=device, dtype=dtype, batch_sizes=(1, 4))
    row["backend"] = predictor.facts["backend"]
    backend = predictor.engine.backend
    if torch.device(device).type == "cuda" and not isinstance(backend, KernelBackend):
        reason = predictor.facts["reason"]
        return row | {"ok": False, "error": f"the kernels are not used: {reason}"}
    row["bound"] = BOUNDS[dtype][0]
    batch = frames(5, seed=seed)
    found = predictor(list(batch))
    floats = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    want = torch.cat([detector(one[None]).anomaly_map for one in floats]).to(device)
    _judge(row, _map_errors(found.anomaly_map, want), BOUNDS[dtype], "anomaly map")
    score = want.amax(dim=(-2, -1))
    _judge(row, _map_errors(found.score, score), BOUNDS[dtype], "score")
    return row


def kernels(
    device: str, seed: int, dtypes: Sequence[torch.dtype], small: bool = False
) -> Iterator[tuple[str, Measure]]:
    """(key, check) of every operation in every dtype; fp8 where an operation has it."""
    for dtype in dtypes:
        for name in builders(small) if dtype != FP8 else CONVOLUTIONS:

            def run(name: str = name, dtype: torch.dtype = dtype) -> list[Row]:
                return [check_operation(name, device, dtype, seed, small=small)]

            yield f"correct/{name}/{str(dtype).removeprefix('torch.')}", run


def networks(
    device: str, seed: int, sizes: Sequence[str], dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, Measure]]:
    """(key, check) of the kernels in a row, on CUDA, and of the predictor."""
    on_cuda = torch.device(device).type == "cuda"
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for size in sizes:
            if on_cuda:
                for padding in (False, True):

                    def forward(size=size, padding=padding, dtype=dtype) -> list[Row]:
                        return [check_forward(size, padding, dtype, device, seed)]

                    yield f"correct-network/forward/{size}{'-padded' * padding}/{name}", forward

            def predictor(size: str = size, dtype: torch.dtype = dtype) -> list[Row]:
                return [check_predictor(size, dtype, device, seed)]

            yield f"correct-network/predictor/{size}/{name}", predictor
