"""Compile census: every kernel in its shipped configurations, for six architectures, without a GPU.

    python -m bench.census [--arch 80 90 ...] [--kernel NAME ...] [--json PATH] [--markdown PATH]
                           [--first] [--jobs 2]

It compiles with Triton's own ptxas and reads the machine code with Triton's own nvdisasm, so it
shows what a GPU would run: registers, spills, shared memory, tensor-core and copy instructions. It
needs triton only, neither torch nor an installed package; another Triton is therefore one command:

    python3 -m venv .work/triton36
    .work/triton36/bin/pip install triton==3.6.0 'numpy<2.4'
    .work/triton36/bin/python -m bench.census --json census-3.6.0.json

Columns (the keys of a JSON row): `spill_*` are ptxas' bytes; `local_memory_ops` counts LDL and STL;
`mma`, `tma` and `cp_async` count instructions; `wait_in_loop` is the smallest number of wgmma
groups that stay in flight at a wait inside a loop (0: the products are serialised; null: there is
no wgmma in a loop); `layout_conversions_in_loop` counts ttg.convert_layout inside loop bodies.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from bench.census.case import CensusCase

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CASE_MODULES = ("bench.census.pdn", "bench.census.autoencoder")
ROOT = Path(__file__).resolve().parents[2]
KEYS = (
    "kernel", "config", "arch", "dtype", "num_warps", "num_stages", "registers", "spill_stores",
    "spill_loads", "local_memory_ops", "shared_bytes", "mma", "tma", "cp_async", "wait_in_loop",
    "layout_conversions_in_loop", "instructions",
)  # fmt: skip
TENSOR_CORE = re.compile(r"([HQIDOB]G?MMA|UTC[A-Z]*MMA)\b")
SASS_LINE = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def use_clone() -> None:
    """Make this clone's kernels importable as `efficientad.kernels`, installed or not."""
    name = "efficientad.kernels"
    if name in sys.modules:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None  # as for every .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def cases(arch: int) -> list[CensusCase]:
    """Every kernel in the configurations that are launched on sm_`arch`."""
    use_clone()
    return [case for name in CASE_MODULES for case in importlib.import_module(name).cases(arch)]


def count_in_loops(ttgir: str, pattern: str) -> list[str]:
    """Lines of TTGIR that match `pattern` inside the body of an scf.for or scf.while."""
    found: list[str] = []
    stack: list[bool] = []  # per open brace: whether it opens the body of a loop
    for line in ttgir.splitlines():
        if any(stack) and re.search(pattern, line):
            found.append(line.strip())
        is_loop = re.search(r"\bscf\.(for|while)\b", line) is not None
        closed = False
        for char in re.sub(r'"[^"]*"', "", line):
            if char == "{":
                stack.append(is_loop)
            elif char == "}" and stack:
                closed = stack.pop()
                is_loop |= closed and "} do {" in line  # the second region of an scf.while
    return found


def source_of(case: CensusCase):
    """The case as `triton.compile` takes it, with the alignment that a launch would find."""
    from triton.compiler import ASTSource

    function = case.function
    multiple_of_16 = [["tt.divisibility", 16]]
    signature, attrs = {}, {}
    for i, param in enumerate(function.params):
        kind = case.signature.get(param.name, "constexpr")
        signature[param.name] = kind
        pointer = kind.startswith("*") and not param.do_not_specialize_on_alignment
        if pointer or param.name in case.divisible_by_16:
            attrs[(i,)] = multiple_of_16
    defaults = {p.name: p.default for p in function.params if p.has_default}
    constants = defaults | case.constexprs
    missing = set(signature) - set(case.signature) - set(constants)
    unknown = (set(case.signature) | set(case.constexprs)) - set(signature)
    if missing or unknown:
        raise ValueError(f"{case.kernel}: missing arguments {missing}, unknown {unknown}")
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)


def compile_case(case: CensusCase, arch: int) -> tuple[dict[str, object], bytes]:
    """The row without what is counted in machine code, and that code."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # a kernel from the cache comes without ptxas' log
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source_of(case),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": case.num_warps,
                "num_stages": case.num_stages,
                "enable_fp_fusion": True,
                "launch_pdl": bool(case.constexprs.get("PDL")),
            },
        )
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reported no register use: {log.getvalue()!r}")
    ttgir = compiled.asm["ttgir"]
    waits = count_in_loops(ttgir, r"warp_group_dot_wait")
    row = {
        "kernel": case.kernel,
        "config": case.config,
        "arch": arch,
        "dtype": case.dtype,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "registers": int(registers[1]),
        "spill_stores": int(spills[1]),
        "spill_loads": int(spills[2]),
        "shared_bytes": compiled.metadata.shared,
        "wait_in_loop": min(
            (int(re.findall(r"pendings = (\d+)", w)[0]) for w in waits), default=None
        ),
        "layout_conversions_in_loop": len(count_in_loops(ttgir, r"\bttg\.convert_layout\b")),
    }
    return row, machine_code(compiled.asm["cubin"])


def machine_code(cubin: bytes) -> bytes:
    """The executable sections of a cubin, which is a 64-bit ELF file."""
    start, size, number = (
        *struct.unpack_from("<Q", cubin, 40),
        *struct.unpack_from("<HH", cubin, 58),
    )
    code = b""
    for i in range(number):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, start + i * size)
        if flags & 4:  # SHF_EXECINSTR
            code += cubin[offset : offset + length]
    return code


def opcodes(codes: list[bytes], arch: int) -> list[collections.Counter[str]]:
    """How often each instruction occurs in each code; one nvdisasm for all, it starts slowly."""
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    name = f"SM{arch}" + ("a" if arch >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        sass = subprocess.run(
            [nvdisasm, "-ndf", "-b", name, path], capture_output=True, text=True, check=True
        ).stdout
    ends = list(itertools.accumulate(map(len, codes)))
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in codes]
    for match in filter(None, map(SASS_LINE.match, sass.splitlines())):
        counts[bisect.bisect_right(ends, int(match[1], 16))][match[2]] += 1
    return counts


def _counted(row: dict[str, object], ops: collections.Counter[str]) -> dict[str, object]:
    """The whole row, its keys in order."""

    def count(*names: str) -> int:
        return sum(n for op, n in ops.items() if op.split(".")[0] in names)

    mma: collections.Counter[str] = collections.Counter()
    for op, n in ops.items():
        if TENSOR_CORE.match(op):
            mma[".".join(op.split(".")[:2])] += n
    row = row | {
        "local_memory_ops": count("LDL", "STL"),
        "mma": dict(mma),
        "tma": count("UTMALDG", "UTMASTG"),
        "cp_async": count("LDGSTS"),
        "instructions": ops.total(),
    }
    return {key: row[key] for key in KEYS}


def _compile_job(arch: int, index: int) -> tuple[dict[str, object], bytes]:
    # Cases hold functions, which do not travel between processes: each derives them anew.
    case = cases(arch)[index]
    try:
        return compile_case(case, arch)
    except Exception as error:
        text = " | ".join(str(error).strip().splitlines()[-3:])
        name = f"{case.kernel} ({case.config}, {case.dtype}) on sm_{arch}"
        return {"error": f"{name}: {type(error).__name__}: {text[:500]}"}, b""


def run(
    archs: list[int], kernels: list[str] | None, jobs: int, first: bool = False
) -> list[dict[str, object]]:
    """Rows of the census, in the order of the cases; a row that did not compile has only `error`.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which turns kernels into Python functions.
        ValueError: an unknown kernel name.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError(
            "TRITON_INTERPRET=1 is set, so there is nothing to compile; run "
            "`env -u TRITON_INTERPRET python -m bench.census`"
        )
    names = {arch: [case.kernel for case in cases(arch)] for arch in archs}
    known = sorted({name for column in names.values() for name in column})
    for name in kernels or ():
        if name not in known:
            raise ValueError(f"--kernel is {name!r}; it must be one of {', '.join(known)}")
    work = [
        (arch, i)
        for arch in archs
        for i, name in enumerate(names[arch])
        if (not kernels or name in kernels) and not (first and name in names[arch][:i])
    ]
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache
        results = list(pool.map(_compile_job, *zip(*work, strict=True), chunksize=4))
        codes = {arch: [code for row, code in results if row.get("arch") == arch] for arch in archs}
        counts = itertools.chain(*pool.map(opcodes, codes.values(), codes))
    return [row if "error" in row else _counted(row, next(counts)) for row, _ in results]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} x{n}" for k, n in sorted(value.items())) or "-"
    return "-" if value is None else str(value)


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(KEYS) + " |", "|" + "---|" * len(KEYS)]
    lines += ["| " + " | ".join(_text(row[key]) for key in KEYS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, object]]) -> str:
    """The rows as text columns."""
    cells = [list(KEYS), *([_text(row[key]) for key in KEYS] for row in rows)]
    short = {"spill_stores": "sp_st", "spill_loads": "sp_ld", "local_memory_ops": "local",
             "layout_conversions_in_loop": "cvt", "wait_in_loop": "wait", "num_warps": "warps",
             "num_stages": "stages", "registers": "regs", "shared_bytes": "shared",
             "instructions": "instr"}  # fmt: skip
    cells[0] = [short.get(key, key) for key in KEYS]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.census", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", help="only these operations")
    parser.add_argument("--first", action="store_true", help="only each one's first configuration")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    try:
        results = run(args.arch or list(ARCHITECTURES), args.kernel, args.jobs, args.first)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = [row for row in results if "error" not in row]
    errors = [row["error"] for row in results if "error" in row]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    print(table(rows))
    for message in errors:
        print(f"did not compile: {message}", file=sys.stderr)
    return 1 if errors else 0
