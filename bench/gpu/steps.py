"""What `python -m bench.gpu` measures, in order of value.

Correctness comes first, then the ceilings, which every process takes anew. On a CPU the same steps
run with small shapes and counts, as a smoke test of the program; Triton's kernels run there in its
interpreter, where they are checked and not timed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.gpu.run_log import Measurement, RunLog
from bench.kernels import ceilings, correctness, measure, sweeps
from bench.kernels.ceilings import Ceilings
from bench.record import ROOT, Row
from bench.shapes import BOTH
from efficientad.utils.devices import FP8

PDN_BATCHES = (1, 32)
HALF, BF16 = torch.float16, torch.bfloat16
FP8_PRODUCTS = ("conv_relu", "conv_relu_pool", "pair_distance")  # the first layer's stay in float16
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 400.0
SANITIZED = (
    *("-m", "pytest", "--device", "cuda", "tests/ops/test_ops.py", "-q", "-p", "no:cacheprovider"),
    *("-k", "both_backends and triton"),
)
# Seconds without a word after which a measurement counts as hung, by kind.
PATIENCE = {"sanitizer": SANITIZER_SECONDS + 30, "peer": 300.0, "peer-compile": 420.0}
DEFAULT_PATIENCE = 180.0

Step = Callable[["Plan"], Iterator[Measurement]]


class Plan:
    """What the steps need to know.

    Args:
        device: "cpu" or a CUDA device.
        seed: of the random inputs of the correctness checks.
        log: where the ceilings of this process are found once they are measured.
    """

    def __init__(self, device: str, seed: int, log: RunLog) -> None:
        self.device, self.seed, self._log = device, seed, log
        self.on_cuda = torch.device(device).type == "cuda"
        self.has_fp8 = self.on_cuda and (
            torch.cuda.get_device_capability(device) >= ceilings.FP8_CAPABILITY
        )

    def ceilings(self) -> Ceilings:
        """Those of this process.

        Raises:
            ValueError: they are not measured.
        """
        return ceilings.from_rows(row for row in self._log.rows if row["part"] == self._log.part)

    @property
    def part(self) -> int:
        return self._log.part


def correctness_step(plan: Plan) -> Iterator[Measurement]:
    """Every kernel at odd sizes and the predictor, in the dtypes that are on by default."""
    small = not plan.on_cuda
    yield from correctness.kernels(plan.device, plan.seed, (HALF,), small)
    dtypes = (HALF,) if plan.on_cuda else (torch.float32,)
    sizes = ("S", "M") if plan.on_cuda else ("S",)
    yield from correctness.networks(plan.device, plan.seed, sizes, dtypes)


def other_dtypes_step(plan: Plan) -> Iterator[Measurement]:
    """The same in bfloat16, and the kernels in fp8, on CUDA; on a CPU the predictor in bfloat16."""
    if not plan.on_cuda:
        yield from correctness.networks(plan.device, plan.seed, ("S",), (BF16,))
        return
    yield from correctness.networks(plan.device, plan.seed, ("S", "M"), (BF16,))
    dtypes = (BF16, FP8) if plan.has_fp8 else (BF16,)
    yield from correctness.kernels(plan.device, plan.seed, dtypes)


def ceilings_step(plan: Plan) -> Iterator[Measurement]:
    yield f"ceiling/part{plan.part}", lambda: ceilings.measure(plan.device)


def kernels_step(plan: Plan) -> Iterator[Measurement]:
    """The large convolutions at batch 1 and 32: where the time goes."""
    batches = PDN_BATCHES if plan.on_cuda else (1,)
    yield from _kernels(plan, batches=batches, keep=lambda layer: layer.size != BOTH)


def layers_step(plan: Plan) -> Iterator[Measurement]:
    """The other layers, batch 8, and fp8."""
    yield from _kernels(plan, batches=measure.BATCHES if plan.on_cuda else (1,))
    if plan.has_fp8:
        yield from _kernels(
            plan,
            dtype=FP8,
            backends=("triton",),
            batches=PDN_BATCHES,
            keep=lambda layer: layer.operation in FP8_PRODUCTS,
        )


def compiled_step(plan: Plan) -> Iterator[Measurement]:
    """torch.compile of the same expressions, beside ours."""
    options = {"kind": "compiled", "backends": (measure.ours(plan.device), "compile")}
    if plan.on_cuda:
        yield from _kernels(plan, **options, keep=lambda layer: layer.size != BOTH)
        yield from _kernels(plan, **options, batches=(1,))
    else:
        yield from _kernels(plan, **options, batches=(1,), keep=lambda layer: layer.name == "conv3")


def _kernels(plan: Plan, **options) -> Iterator[Measurement]:
    if not plan.on_cuda:
        options |= {"small": True, "seconds": 0.05}
    yield from measure.measurements(plan.device, plan.ceilings, **options)


def sweeps_step(plan: Plan) -> Iterator[Measurement]:
    """Tiles, and fusions against their parts."""
    if plan.on_cuda:
        yield from sweeps.measurements(plan.device, plan.ceilings)
        return
    few = {("S", "conv2"): 2, ("S", "pair"): 6, (BOTH, "bottleneck"): 1}
    plan_of_few = [
        (size, name, (1,), tiles[: few[size, name]])
        for size, name, _, tiles in sweeps.PLAN
        if (size, name) in few
    ]
    yield from sweeps.measurements(plan.device, plan.ceilings, plan=plan_of_few, small=True)


def predictor_step(plan: Plan) -> Iterator[Measurement]:
    """End to end, stages and peers. Imported here: a peer that breaks it costs this step alone."""
    from bench.predictor import options, run

    changes = {} if plan.on_cuda else {"image_sizes": (256,)}
    yield from run.measurements(options.options(plan.device, **changes))


def sanitizer_step(plan: Plan) -> Iterator[Measurement]:
    """NVIDIA's checker of memory accesses and races over the kernels' tests, where it is there."""
    if plan.on_cuda and shutil.which("compute-sanitizer"):
        for tool in SANITIZERS:

            def run(tool: str = tool) -> list[Row]:
                return [sanitize(tool)]

            yield f"sanitizer/{tool}", run


def sanitize(tool: str, program: Sequence[str] = (sys.executable, *SANITIZED)) -> Row:
    """Run a program under compute-sanitizer; a row of kind "sanitizer"."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SANITIZER_SECONDS,
        )
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        text, code = (error.stdout or b"").decode(errors="replace"), None
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return {
        "kind": "sanitizer",
        "name": tool,
        "seconds": round(time.monotonic() - start, 1),
        "exit_code": code,
        "errors": int(found[-1]) if found else None,
        "ok": code == 0 and bool(found) and int(found[-1]) == 0,
        "log_end": text[-1500:],
    }


STEPS: dict[str, Step] = {
    "correctness": correctness_step,
    "ceilings": ceilings_step,
    "kernels": kernels_step,
    "predictor": predictor_step,
    "layers": layers_step,
    "dtypes": other_dtypes_step,
    "sweeps": sweeps_step,
    "compiled": compiled_step,
    "sanitizer": sanitizer_step,
}
NEEDS_CEILINGS = ("kernels", "layers", "sweeps", "compiled")


def chosen(only: Sequence[str] | None) -> list[str]:
    """Names of the steps to take, in order, with the ceilings where they are needed.

    Raises:
        ValueError: no such step.
    """
    for name in only or ():
        if name not in STEPS:
            raise ValueError(f"--only is {name!r}; it must be of {', '.join(STEPS)}")
    wanted = set(only or STEPS)
    if wanted & set(NEEDS_CEILINGS):
        wanted.add("ceilings")
    return [name for name in STEPS if name in wanted]


def measurements(plan: Plan, steps: Sequence[str]) -> Iterator[Measurement]:
    """All measurements of the steps; a step that cannot be set up is one that fails."""
    for name in steps:
        try:
            yield from STEPS[name](plan)
        except Exception as error:  # the others are still worth taking
            text = f"{type(error).__name__}: {error}"

            def fail(text: str = text) -> list[Row]:
                raise RuntimeError(text)

            yield f"setup/{name}", fail
