"""What the device can do at most, measured in the same process as the rest.

    python -m bench.kernels.ceilings [--device cpu]

Two ceilings: the rate of a large matrix product per dtype (through torch's own library), and the
bandwidth of a large copy, whose bytes are counted read and written. Every other figure is quoted as
a fraction of the one that bounds it. A product is checked against float32 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernels.device_times import device_times
from bench.record import Row
from efficientad.benchmark.call_times import significant
from efficientad.utils.devices import FP8

FP8_CAPABILITY = (8, 9)
SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
LARGEST_ERROR = 2e-2  # of a product's norm; bfloat16 results keep 8 bits


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s by dtype name ("float16") and GB/s."""

    tflops: dict[str, float]
    gb_s: float

    def floor_us(self, flop: float, nbytes: float, dtype: str) -> tuple[float, str]:
        """(the least time for so much work, "tflops" or "gb_s": which ceiling sets it).

        A dtype without a product of its own is measured against the fastest there is.
        """
        rate = self.tflops.get(dtype, max(self.tflops.values()))
        compute, memory = flop / rate / 1e6, nbytes / self.gb_s / 1e3
        return (compute, "tflops") if compute >= memory else (memory, "gb_s")


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes whose matrix products are worth knowing on a device."""
    if device.type != "cuda":
        return (torch.float32, torch.bfloat16)
    halves = (torch.bfloat16, torch.float16)
    return (*halves, FP8) if torch.cuda.get_device_capability(device) >= FP8_CAPABILITY else halves


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T; fp8 with unit scales and a bfloat16 result."""
    if a.dtype != FP8:
        return a @ b.T
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(
        a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def measure(
    device: str | torch.device, *, seconds: float = 0.5, side: int | None = None
) -> list[Row]:
    """Rows of kind "ceiling": a product per dtype and a copy.

    side: of the matrices; None is SIDE's.
    """
    device = torch.device(device)
    side = side or SIDE[device.type]
    rows: list[Row] = []
    for dtype in dtypes(device):
        name = str(dtype).removeprefix("torch.")
        row: Row = {"kind": "ceiling", "name": f"matmul {side}"}
        row |= {"dtype": name, "device": device.type}
        try:
            rows.append(row | _product(dtype, device, side, seconds))
        except RuntimeError as error:  # a dtype that the library has not; the others do
            lines = str(error).splitlines() or [""]
            rows.append(row | {"us": None, "tflops": None, "no_time": lines[0]})
    rows.append(_copy(device, seconds))
    return rows


def _product(dtype: torch.dtype, device: torch.device, side: int, seconds: float) -> Row:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator) for _ in range(2))
    a, b = a.to(dtype), b.to(dtype)
    row = {"max_error": round(_product_error(a, b), 6)}
    if row["max_error"] > LARGEST_ERROR:
        wrong = "wrong: the product differs from float64's"
        return row | {"us": None, "tflops": None, "no_time": wrong}
    timing = device_times({"product": lambda: product(a, b)}, device, seconds=seconds)["product"]
    return row | timing.row() | {"tflops": significant(2 * side**3 / timing.us / 1e6)}


def _product_error(a: Tensor, b: Tensor) -> float:
    """Of the first rows, as a part of their norm."""
    got = product(a, b)[:64].double()
    want = a[:64].float().double() @ b.float().double().T
    return float((got - want).norm() / want.norm())


def _copy(device: torch.device, seconds: float) -> Row:
    nbytes = COPY_BYTES[device.type]
    if device.type == "cuda":  # a quarter of what is free, at most
        nbytes = min(nbytes, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.empty(nbytes // 4, device=device).normal_()
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    timing = device_times(call, device, seconds=seconds)["copy"]
    row = {"kind": "ceiling", "name": f"copy {nbytes >> 20} MiB", "dtype": "float32"}
    row |= {"device": device.type, **timing.row()}
    return {**row, "gb_s": significant(2 * source.nbytes / timing.us / 1e3)}


def from_rows(rows: Iterable[Row]) -> Ceilings:
    """The ceilings in a results file; the latest of each.

    Raises:
        ValueError: no product or no copy was measured.
    """
    ours = [row for row in rows if row["kind"] == "ceiling"]
    tflops = {row["dtype"]: row["tflops"] for row in ours if row.get("tflops")}
    copies = [row["gb_s"] for row in ours if row.get("gb_s")]
    if not tflops or not copies:
        raise ValueError(f"the rows hold {len(tflops)} products and {len(copies)} copies; need one")
    return Ceilings(tflops, copies[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.kernels.ceilings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for row in measure(parser.parse_args(argv).device):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
