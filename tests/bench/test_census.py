"""The compile census: what it reads out of a compilation, and the bounds that every kernel keeps.

It runs as a child process without TRITON_INTERPRET, which turns kernels into Python functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.census import compile as census
from efficientad.kernels import common

ROOT = Path(__file__).resolve().parents[2]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Loads run under the products.
OVERLAPPED = ("conv_relu", "conv_relu_pool", "pair_distance", "autoencoder_distance")
# Beside a PDN's program of 192 KiB there are 34 KiB left on an H200; 16 bytes are barriers.
BESIDE = ("strided_conv_relu", "resize_conv_relu", "bottleneck", "anomaly_map")
BESIDE_BYTES = 32 * 1024 + 16


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.census", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True)


def rows(folder: Path, *arguments: str) -> list[dict]:
    path = folder / "census.json"
    done = run("--json", str(path), "--markdown", str(folder / "census.md"), *arguments)
    assert done.returncode == 0, done.stderr
    table = json.loads(path.read_text())
    assert all(tuple(row) == census.KEYS for row in table)
    assert len((folder / "census.md").read_text().splitlines()) == len(table) + 2
    assert len(done.stdout.splitlines()) == len(table) + 1
    return table


def _beside(row: dict) -> int:
    """Bytes that a kernel of the autoencoder may take; on sm_90 speed alone counts for resize."""
    measured = row["kernel"] == "resize_conv_relu" and row["arch"] == 90
    return 48 * 1024 if measured else BESIDE_BYTES


def faults(row: dict) -> list[str]:
    """The bounds that a row breaks."""
    arch, kernel = row["arch"], row["kernel"]
    bounds = {
        "spills": not row["spill_stores"] and not row["spill_loads"],
        "local memory": not row["local_memory_ops"],
        "registers": row["registers"] <= 255,
        "shared memory": row["shared_bytes"] <= SHARED_KIB[arch] * 1024,
        "conversion in a loop": not row["layout_conversions_in_loop"],
        "fits beside the PDNs": kernel not in BESIDE or row["shared_bytes"] <= _beside(row),
        "instructions": row["instructions"] > 50,
    }
    if kernel in OVERLAPPED:
        bounds["tensor cores"] = bool(row["mma"])
        if arch == 90:
            bounds["wgmma"] = all(kind.split(".")[0] in ("HGMMA", "QGMMA") for kind in row["mma"])
            bounds["overlapped"] = row["wait_in_loop"] is not None and row["wait_in_loop"] >= 1
        else:
            bounds["no wgmma"] = row["wait_in_loop"] is None
        if arch in (80, 86, 89):
            bounds["cp.async"] = row["cp_async"] > 0
    return [name for name, kept in bounds.items() if not kept]


def check(table: list[dict]) -> None:
    broken = [
        (row["kernel"], row["config"], row["arch"], row["dtype"], faults(row)) for row in table
    ]
    assert not [entry for entry in broken if entry[-1]]


def test_every_kernel_once(tmp_path):
    table = rows(tmp_path, "--first", "--arch", "80", "90")
    check(table)
    kernels = {row["kernel"] for row in table}
    assert kernels == {*OVERLAPPED, *BESIDE, "first_conv_relu_pool", "pack"}
    assert len(table) == 2 * len(kernels)


@pytest.mark.slow
def test_every_configuration_on_every_architecture(tmp_path):
    table = rows(tmp_path)
    check(table)
    assert len(table) >= 40
    assert {row["arch"] for row in table} == set(census.ARCHITECTURES)
    assert {row["dtype"] for row in table} >= {"fp16", "bf16", "fp8", "fp32"}
    names = [(row["kernel"], row["config"], row["arch"], row["dtype"]) for row in table]
    assert len(set(names)) == len(names)


CONVERSIONS = r"""
import collections, dataclasses, json, re, triton
from triton.backends.compiler import GPUTarget
from bench.census import compile as census

found = {}
for case in census.cases(89):
    if case.dtype == "fp8" and "TO_E4M3" in case.constexprs and case.kernel not in found:
        found[case.kernel] = []
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        options["enable_fp_fusion"] = True
        for asm in (case.constexprs["TO_E4M3"], True):
            one = dataclasses.replace(case, constexprs=case.constexprs | {"TO_E4M3": asm})
            target = GPUTarget("cuda", 89, 32)
            ptx = triton.compile(census.source_of(one), target=target, options=options).asm["ptx"]
            kinds = re.findall(r"cvt[.\w]*[.]e4m3x2[.](\w+)", ptx)
            found[case.kernel].append(collections.Counter(kinds))
print(json.dumps(found))
"""


def test_fp8_is_rounded_once_on_sm_89():
    """From float32, without float16 in between: as shipped, and by the kernels' own instruction."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CONVERSIONS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"first_conv_relu_pool", "conv_relu", "conv_relu_pool"}
    for shipped, own in found.values():
        assert set(shipped) == {"f32"}
        assert own == shipped


@pytest.mark.parametrize(
    ("version", "target", "interpreted", "twice"),
    [("3.6.0", 89, "0", True), ("3.9.0", 89, "0", False), ("3.6.0", 90, "0", False),
     ("3.6.0", 120, "0", False), ("3.6.0", 89, "1", False)],
)  # fmt: skip
def test_where_triton_would_round_twice(version, target, interpreted, twice, monkeypatch):
    monkeypatch.setattr(common.triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert common.rounds_twice(target) == twice


GOOD = {
    "kernel": "conv_relu", "config": "", "arch": 90, "dtype": "fp16", "num_warps": 8,
    "num_stages": 4, "registers": 157, "spill_stores": 0, "spill_loads": 0, "local_memory_ops": 0,
    "shared_bytes": 196640, "mma": {"HGMMA.64x256x16": 4}, "tma": 4, "cp_async": 16,
    "wait_in_loop": 1, "layout_conversions_in_loop": 0, "instructions": 800,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spill_stores": 8}, "spills"),
        ({"spill_loads": 8}, "spills"),
        ({"local_memory_ops": 2}, "local memory"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"layout_conversions_in_loop": 1}, "conversion in a loop"),
        ({"wait_in_loop": 0}, "overlapped"),
        ({"wait_in_loop": None}, "overlapped"),
        ({"mma": {"HMMA.16816": 4}}, "wgmma"),
        ({"arch": 86, "wait_in_loop": None, "shared_bytes": 65536, "cp_async": 0}, "cp.async"),
        ({"kernel": "bottleneck", "shared_bytes": 40000}, "fits beside the PDNs"),
    ],
)
def test_bounds_can_fail(change, fault):
    assert faults(GOOD | change) == ([fault] if fault else [])


def test_cases_need_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None; from bench.census import compile as census; "
        "print(*(len(census.cases(arch)) for arch in census.ARCHITECTURES))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(count) > 50 for count in done.stdout.split())


def test_arguments():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "env -u TRITON_INTERPRET" in done.stderr
    done = run("--kernel", "convolve")
    assert done.returncode == 2
    assert "'convolve'; it must be one of anomaly_map, autoencoder_distance," in done.stderr


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], order = [1, 0]}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%x: !tt.ptr<f16> {tt.divisibility = 16 : i32}) attributes {a = "}"} {
    %0 = ttg.convert_layout %a : before
    %1 = scf.for %k = %c0 to %c1 step %c2 iter_args(%acc = %cst) -> (f32)  : i32 {
      %2 = ttg.convert_layout %b : first
      %3 = scf.if %p -> (f32) {
        %4 = ttg.convert_layout %b : second
      } else {
        scf.yield %b
      }
      %5 = "tt.reduce"(%3) <{axis = 1 : i32}> ({
        tt.reduce.return %5
      })
      scf.yield %5
    } {tt.num_stages = 3 : i32}
    %6 = ttg.convert_layout %1 : after
    %7 = scf.while (%s = %1) : (f32) -> f32 {
      %8 = ttg.convert_layout %s : third
      scf.condition(%8)
    } do {
      %9 = ttg.convert_layout %s : fourth
      scf.yield %9
    }
    scf.if %p {
      %10 = ttg.convert_layout %s : not in a loop
    }
  }
}
"""


def test_what_is_in_a_loop():
    found = census.count_in_loops(TTGIR, r"\bttg\.convert_layout\b")
    assert [line.split()[-1] for line in found] == ["first", "second", "third", "fourth"]


def test_opcode_lines():
    lines = {
        "        /*0060*/                   S2R R12, SR_CTAID.X ;": "S2R",
        "        /*12f0*/              @!P0 LDG.E.128 R4, [R2] ;": "LDG.E.128",
        "        /*0010*/  { @UP1 UTMALDG.2D [UR8], [UR4] }": "UTMALDG.2D",
        "                           /* 0x000fe20000000a00 */": None,
        ".L_x_1:": None,
    }
    for line, opcode in lines.items():
        match = census.SASS_LINE.match(line)
        assert (match[2] if match else None) == opcode
    kinds = ("HMMA.16816.F32", "HGMMA.64x128x16", "QGMMA.64x8x32", "UTCHMMA.2CTA", "UTCQMMA")
    assert all(census.TENSOR_CORE.match(kind) for kind in kinds)
    assert not any(census.TENSOR_CORE.match(op) for op in ("FFMA", "IMAD.WIDE", "UTMALDG.2D"))
