"""Every fused operation beside plain torch.

    python -m bench.gpu --only kernels,layers,compiled --out DIR

`bench_kernels.py` beside this file is the same under pytest-benchmark, one launch at a time.

Every operation at its real shapes, EfficientAD-S and M, batch 1, 8 and 32, against the same
expression in torch: eager (NCHW), channels_last and torch.compile of that, cuDNN's benchmark on. A
result is compared with the float32 definition first; what is wrong gets no time. Ours is the Triton
kernel on a CUDA device; a CPU has Triton in its interpreter alone, so there it is the torch backend
of `efficientad.ops.fused`, in float32.

Rows are of kind "kernel". `fraction_of_ceiling` is the floor over the time: the floor is what the
needed operations, or the bytes that must move, take at the ceiling measured in the same process,
whichever is longer (`bound`). `ratio` is the time over ours, both timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.kernels.case import Case
from bench.kernels.cases import Layer, layers
from bench.kernels.ceilings import Ceilings
from bench.kernels.device_times import device_times
from bench.record import Row
from bench.shapes import BOTH, TEACHER
from efficientad.benchmark.call_times import significant
from efficientad.utils.devices import FP8

Measure = Callable[[], list[Row]]
BATCHES = (1, 32, 8)  # in order of value
# Greatest and RMS error as parts of the result's greatest value, by the dtype of the activations.
TOLERANCE = {
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 3e-4),
    torch.bfloat16: (8e-3, 2e-3),
    FP8: (0.13, 2e-2),  # a step of its mantissa; its products are accumulated in fewer bits, too
}
ROUNDINGS = 4  # plain torch rounds after every step, the definition and the kernels once
PEERS = ("eager", "channels_last")


def ours(device: str | torch.device) -> str:
    """The backend that stands for this package on a device."""
    return "triton" if torch.device(device).type == "cuda" else "torch"


def default_dtype(device: str | torch.device) -> torch.dtype:
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def prepare(case: Case, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
    """(what is timed, its results after one call)."""
    if backend == "triton":
        launch, results = case.launch()
        launch()
        return launch, results
    if backend == "torch":
        return case.through_ops("torch")
    if backend == "compile":
        torch._dynamo.reset()  # it stops compiling a function after eight shapes, without a word

        def compiled(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False)

        return case.plain_torch(True, compiled)
    return case.plain_torch(backend == "channels_last")


def bounds(dtype: torch.dtype, backend: str) -> tuple[float, float]:
    """(greatest, RMS) error that a backend may have."""
    factor = 1 if backend in ("triton", "torch") else ROUNDINGS
    greatest, rms = TOLERANCE[dtype]
    return factor * greatest, factor * rms


def fault(
    case: Case, got: list[Tensor], want: list[Tensor], backend: str
) -> tuple[Row, str | None]:
    """(the errors as a part of a row, what is wrong with them)."""
    errors, limits = case.errors(got, want), bounds(case.dtype, backend)
    row = {"max_error": min(errors[0], 1e30), "rms_error": min(errors[1], 1e30)}
    if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        return row, None
    found, allowed = (" and ".join(f"{v:.1e}" for v in pair) for pair in (errors, limits))
    return row, f"wrong: greatest and RMS error {found}; allowed {allowed}"


@torch.inference_mode()
def measure(
    case: Case, device: str, backends: Sequence[str], ceilings: Ceilings, *, seconds: float = 0.2
) -> list[Row]:
    """A row per backend, timed in turn; one that is wrong or fails has `no_time`, the reason.

    backends: the first is the one that ratios are over.
    """
    want = case.definition()
    rows, calls = {}, {}
    for backend in backends:
        row = rows[backend] = place(case, backend, device)
        start = time.perf_counter()
        try:
            call, got = prepare(case, backend)
            errors, row["no_time"] = fault(case, got, want, backend)
        except Exception as error:  # whatever a compiler or cuDNN raises, the others go on
            row["no_time"] = first_line(error)
            alive(device)
            continue
        row |= {**errors, "first_call_s": round(time.perf_counter() - start, 2)}
        if row["no_time"] is None:
            calls[backend] = call
            row["nbytes"] = case.nbytes(got)
    del want
    timings = device_times(calls, device, seconds=seconds * len(calls)) if calls else {}
    for backend, timing in timings.items():
        row = rows[backend]
        row |= timing.row()
        row |= rates(case, row.pop("nbytes"), timing.us, ceilings)
        if backend != backends[0] and backends[0] in timings:
            row["ratio"] = significant(timing.us / timings[backends[0]].us)
    return list(rows.values())


def place(case: Case, backend: str, device: str) -> Row:
    """What says which launch a row is about, before it is measured."""
    return {
        "kind": "kernel",
        "name": case.operation,
        "size": case.size,
        "layer": case.layer,
        "small": case.small,
        "batch": case.batch,
        "dtype": case.dtype_name,
        "backend": backend,
        "device": torch.device(device).type,
        "us": None,
        "no_time": None,
    }


def rates(case: Case, nbytes: int, us: float, ceilings: Ceilings) -> Row:
    """TFLOP/s, GB/s and the fraction of the ceiling of a launch that took `us`."""
    flop = case.flop
    floor, bound = ceilings.floor_us(flop, nbytes, case.dtype_name)
    return {
        "gflop": round(flop / 1e9, 6),
        "mbytes": round(nbytes / 1e6, 4),
        "tflops": significant(flop / us / 1e6) if flop else None,
        "gb_s": significant(nbytes / us / 1e3),
        "floor_us": significant(floor),
        "bound": bound,
        "fraction_of_ceiling": significant(floor / us),
    }


def first_line(error: BaseException) -> str:
    """An exception in at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def alive(device: str | torch.device) -> None:
    """Raise what the device still has to report: after an illegal access it is lost for good."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def launches(device: str, batch: int, sizes: Sequence[str], small: bool) -> Iterator[Layer]:
    """The launches of both sizes at a batch, what they share once."""
    for i, size in enumerate(sizes):
        for layer in layers(size, parts=partial_maps(device, batch), small=small):
            if i == 0 or layer.size != BOTH:
                yield layer


def partial_maps(device: str, batch: int) -> int:
    """How many the pair kernel leaves for the map kernel; the torch backend leaves one."""
    if torch.device(device).type != "cuda":
        return 1
    from efficientad.kernels import pair_distance

    major, minor = torch.cuda.get_device_capability(device)
    tile = pair_distance.choose_tile(10 * major + minor, batch * 56 * 56, TEACHER)
    return TEACHER // (tile.bn + tile.bn_tail)


def measurements(
    device: str,
    ceilings: Callable[[], Ceilings],
    *,
    kind: str = "kernel",
    backends: Sequence[str] | None = None,
    sizes: Sequence[str] = ("S", "M"),
    batches: Sequence[int] = BATCHES,
    dtype: torch.dtype | None = None,
    small: bool = False,
    keep: Callable[[Layer], bool] = lambda layer: True,
    seconds: float = 0.2,
) -> Iterator[tuple[str, Measure]]:
    """(key, what measures it and gives its rows), in order of value.

    Args:
        ceilings: called when a measurement runs.
        kind: first part of the keys; keys of one kind take about as long.
        backends: default: ours, eager and channels_last.
        dtype: default: float16, on a CPU float32.
        small: shapes for a machine that cannot do the real ones.
        keep: which layers.
        seconds: of timing per backend.
    """
    backends = backends or (ours(device), *PEERS)
    dtype = dtype or default_dtype(device)
    for batch in batches:
        for layer in filter(keep, launches(device, batch, sizes, small)):

            def run(layer: Layer = layer, batch: int = batch) -> list[Row]:
                case = layer.case(device, batch, dtype)
                return measure(case, device, backends, ceilings(), seconds=seconds)

            name = str(dtype).removeprefix("torch.")
            yield f"{kind}/{layer.operation}/{layer.size}/{layer.name}/b{batch}/{name}", run
