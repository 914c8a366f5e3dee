"""Bundles built, read and launched where kernels are compiled: a process without the interpreter.

    python -m helpers_aot FILE ARCH:CASE...

writes what `main` found as a pickle. The driver is a fake that reads a launch's arguments where
the real one would, and writes them down for the simulator.
"""

from __future__ import annotations

import ctypes
import functools
import pickle
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from ptx.bulk import TensorMap
from ptx.launch import Launch, Recording
from ptx.parse import parse
from ptx.recordings import from_child

ROOT = Path(__file__).resolve().parents[1]
STREAM = 7
VERSION = 13000  # of the fake driver: one whose maps of small matrices are corrected
SMALL_BIT = 1 << 21


@functools.cache
def results(*cases: str) -> dict[str, Any]:
    """What `main` found for cases of `ptx.cases`, in one child process."""
    return from_child("helpers_aot", *cases, own_cache=True)


class Library:
    """As much of libcuda as a launch calls; ctypes objects come in as the caller made them."""

    def __init__(self, ptx: dict[bytes, str], recording: Recording):
        self.ptx, self.recording = ptx, recording
        self.modules: list[bytes] = []
        self.functions: list[tuple[bytes, str]] = []
        self.shared: dict[int, int] = {}
        self.maps: dict[int, TensorMap] = {}

    def cuModuleLoadData(self, module, cubin):
        self.modules.append(cubin)
        module._obj.value = len(self.modules)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.functions.append((self.modules[module.value - 1], name.decode()))
        function._obj.value = len(self.functions)
        return 0

    def cuFuncSetCacheConfig(self, function, config):
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == 8
        self.shared[function.value] = value
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = VERSION
        return 0

    def cuTensorMapEncodeTiled(
        self, place, kind, rank, address, sizes, steps, box, ones, interleave, swizzle, level, fill
    ):
        assert (rank, list(ones), interleave, fill) == (2, [1, 1], 0, 0)
        assert place.value % 64 == 0
        itemsize = {6: 2, 0: 1}[kind]  # float16, or bytes as e4m3 is
        self.maps[len(self.maps) + 1] = TensorMap(
            address.value, (sizes[1], sizes[0]), steps[0], (box[1], box[0]), itemsize,
            {1: 32, 2: 64, 3: 128}[swizzle],
        )  # fmt: skip
        words = (ctypes.c_uint64 * 16).from_address(place.value)
        words[0], words[1] = len(self.maps), SMALL_BIT
        return 0

    def cuLaunchKernel(self, function, x, y, z, bx, by, bz, shared, stream, pointers, extra):
        cubin, symbol = self.functions[function.value - 1]
        ptx = parse(self.ptx[cubin])
        assert (y, z, by, bz, stream.value, extra) == (1, 1, 1, 1, STREAM, None)
        assert bx == ptx.threads
        assert f".entry {symbol}(" in self.ptx[cubin]
        assert shared <= 48 * 1024 or self.shared[function.value] == shared
        assert len(pointers) == len(ptx.params)
        passed = [
            self._read(p, size) for p, size in zip(pointers, ptx.params.values(), strict=True)
        ]
        self.recording.launches.append(Launch(symbol, self.ptx[cubin], x, shared, passed))
        return 0

    def _read(self, pointer: int, size: int) -> tuple[str, object]:
        if size == 128:
            words = (ctypes.c_uint64 * 16).from_address(pointer)
            tensor = self.maps[words[0]]
            columns = (tensor.shape[1] - 1) * tensor.itemsize
            small = (tensor.shape[0] - 1) * tensor.stride + columns + 1 < 128 * 1024
            assert words[1] == (0 if small else SMALL_BIT)
            return "map", tensor
        kind, of = {8: ("ptr", ctypes.c_uint64), 4: ("i32", ctypes.c_int32)}[size]
        return kind, of.from_address(pointer).value


def launched(arch: int, name: str, folder: Path) -> Recording:
    """A case of `ptx.cases`: compiled into a file, and launched from it."""
    import triton
    from ptx.cases import CASES
    from ptx.record import Recorder
    from triton.tools.tensor_descriptor import TensorDescriptor

    from efficientad.aot.building import Compiler
    from efficientad.kernels import launching
    from efficientad.ops import cuda_driver, kernel_bundle, kernel_launch

    ptx: dict[bytes, str] = {}
    compile = triton.compile

    def remembering(*args, **kwargs):
        done = compile(*args, **kwargs)
        ptx[done.asm["cubin"]] = done.asm["ptx"]
        return done

    recorder = Recorder()
    run, inputs, outputs, wanted = CASES[name](arch)
    compiler = Compiler(arch)
    triton.compile = remembering
    with launching.by(compiler):
        run()
    triton.compile = compile

    digest = kernel_bundle.source_digest()
    made = kernel_bundle.Bundle(arch, triton.__version__, digest, {"name": name}, compiler.kernels)
    path = folder / f"{arch}.kernels"
    kernel_bundle.write_bundle(made, path)
    assert kernel_bundle.read_bundle(path) == made
    for row in made.kernels.values():
        assert row.cubin[:4] == b"\x7fELF"

    library = Library(ptx, recorder.recording)
    cuda_driver.library = lambda: library
    cuda_driver.current = lambda: (0, STREAM)
    way = kernel_launch.open_bundle(path, arch)

    def keeping(function, programs, args, options):
        for value in args:
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor):
                recorder.keep(tensor, fill=True)
        return way(function, programs, args, options)

    for tensor in (*inputs, *outputs.values()):
        recorder.keep(tensor)
    with launching.by(keeping):
        run()
    assert not way.lacking
    return recorder.finish(outputs, wanted)


def lacking(folder: Path) -> dict[str, list[str]]:
    """Kernels that a predictor launches and that its bundle lacks, with what was said of them.

    Nothing is compiled or computed: "own" for the predictor that the bundle was built for, "other"
    for one of another dtype.
    """
    from efficientad.aot import building
    from efficientad.fast import engine, self_check
    from efficientad.model.synthetic import frames, images, random_detector
    from efficientad.ops import cuda_driver
    from efficientad.ops.kernel_bundle import CompiledKernel
    from efficientad.ops.kernel_launch import BundleLaunch

    building.Compiler._compiled = lambda self, function, launch: CompiledKernel(
        function.__name__, function.__name__, 4, 0, (), b"cubin"
    )
    cuda_driver.current = lambda: (0, STREAM)
    cuda_driver.load = lambda *args: None
    cuda_driver.launch = lambda *args: None
    check = self_check._check_bucket
    self_check._check_bucket = lambda *args: check(*args) and None  # the results are noise
    detector = random_detector()
    bundle = building.build_bundle(detector, folder / "stub", "sm_80", batch_sizes=(1, 3))
    for name, module in list(sys.modules.items()):
        if name.startswith("efficientad.kernels.") and hasattr(module, "target_of"):
            module.target_of = lambda tensor: 80
    found = {}
    for who, dtype in (("own", torch.float16), ("other", torch.bfloat16)):
        way = BundleLaunch(bundle, "file")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if who == "own":
                made = engine.Engine(
                    detector, torch.device("cpu"), dtype, (1, 3), kind="triton", bundle=way
                )
                made._compile_map_sizes()
                for map_size in ("input", "feature", "source", None):
                    made.score_frames([*frames(3, 256, 256), *frames(1, 700, 1100)], map_size)
                made.score_images(images(4))
                made.frame_maps(frames(1, 300, 300)[0])
            else:
                image = torch.empty(1, 3, 256, 256)
                backend = self_check.KernelBackend(
                    detector, dtype, torch.device("cpu"), self_check.Kernels(launch_or(way))
                )
                packed = torch.empty(1, 256, 256, 4, dtype=dtype)
                for _ in range(2):
                    backend.pack(image, packed, channels_last=False)
        found[who] = [*sorted(way.lacking), *(str(w.message) for w in said)]
    found["described"] = [way.described()]
    return found | {"fp8": lacking_in_fp8(detector, folder)}


def lacking_in_fp8(detector, folder: Path) -> list[str]:
    """As `lacking`, of batches of calibration images, whose last may be of any size."""
    from efficientad.aot.building import build_bundle
    from efficientad.fast.backends import Fp8Backend, Kernels
    from efficientad.ops.kernel_launch import BundleLaunch

    settings = {"dtype": "float8_e4m3fn", "batch_sizes": (1, 16)}
    way = BundleLaunch(build_bundle(detector, folder / "fp8", 89, **settings), "file")
    kernels = Kernels(launch_or(way), target=89)
    backend = Fp8Backend(detector, [torch.ones(2)] * 3, "second", torch.device("cpu"), kernels)
    for images in (16, *range(1, 9)):
        packed = torch.empty(images, 256, 256, 4, dtype=torch.float16)
        backend.pack(torch.empty(images, 3, 256, 256), packed, channels_last=False)
        backend.distance_maps(packed)
    return sorted(way.lacking)


def launch_or(way):
    """A way that leaves nothing to Triton, which has no device here."""
    return lambda *launch: way(*launch) or True


def main(path: str, *cases: str) -> None:
    """Recordings of the cases, launched from bundles, and what `lacking` found."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {}
        for case in cases:
            arch, _, kernel = case.partition(":")
            found[case] = launched(int(arch), kernel, folder)
        found |= lacking(folder)
    Path(path).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
