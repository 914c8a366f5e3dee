"""Launches of the kernels on an architecture, compiled and recorded instead of run.

    python -m ptx.record FILE ARCH:CASE...

writes {"ARCH:CASE": Recording} as a pickle. It is a process of its own, because in the tests' own
Triton's interpreter is on, which leaves nothing to compile. The project's own launchers run, with
tensors on the CPU; between them and Triton's compiler nothing is replaced, and where Triton would
hand a kernel and its arguments to the driver they are written down.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import sys
import tempfile

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from efficientad.kernels.launching import overlapped
from ptx.bulk import TensorMap
from ptx.cases import CASES, EARLY
from ptx.launch import Launch, Recording

SWIZZLE = {1: 32, 2: 64, 3: 128}  # of CUtensorMapSwizzle
NAMES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3", torch.float16: "f2",
         torch.float32: "f4"}  # fmt: skip


class Driver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, arch: int):
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.get_device_capability = lambda device=0: divmod(arch, 10)


class Recorder:
    """Stands in for `JITFunction.run`."""

    def __init__(self):
        self.recording = Recording()
        self.tensors: dict[int, torch.Tensor] = {}  # storage's address -> a tensor in it
        self.run = JITFunction.run

    def __call__(self, function, *args, grid, warmup, **kwargs):
        kernel = self.run(function, *args, grid=grid, warmup=True, **kwargs)
        bound = inspect.signature(function.fn).bind(
            *args, **{k: v for k, v in kwargs.items() if k in function.arg_names}
        )
        types = kernel.src.signature
        metas = list(getattr(kernel.metadata, "tensordesc_meta", None) or ())
        passed: list[tuple[str, object]] = []
        for name, value in bound.arguments.items():
            if types[name] == "constexpr":
                continue
            if isinstance(value, TensorDescriptor):
                passed += self._descriptor(value, metas.pop(0))
            elif isinstance(value, torch.Tensor):
                self.keep(value, fill=True)
                passed.append(("ptr", value.data_ptr()))
            else:
                passed.append((types[name], value))
        passed += [("ptr", 0)] * 2  # scratch memory, global and of the profiler
        if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
            raise ValueError(f"{kernel.name} wants scratch memory")
        if len(grid) != 1:
            raise ValueError(f"{kernel.name} has the grid {grid}")
        self.recording.launches.append(
            Launch(
                kernel.name,
                kernel.asm["ptx"],
                grid[0],
                kernel.metadata.shared,
                passed,
                bool(kernel.metadata.launch_pdl),
            )
        )

    def _descriptor(self, value: TensorDescriptor, meta: dict) -> list[tuple[str, object]]:
        """As Triton's launcher takes it apart: the map, shape and strides."""
        self.keep(value.base, fill=True)
        itemsize = value.base.element_size()
        tensor = TensorMap(
            value.base.data_ptr(), tuple(value.shape), value.strides[0] * itemsize,
            tuple(meta["block_size"]), itemsize, SWIZZLE[meta["swizzle"]],
        )  # fmt: skip
        sizes = [("i32", n) for n in value.shape] + [("i64", n) for n in value.strides]
        return [("map", tensor), *sizes]

    def finish(self, outputs: dict, wanted: dict) -> Recording:
        """The recording, with what the outputs are to be."""
        for key, tensor in outputs.items():
            values = wanted[key].float().contiguous().numpy()
            self.recording.results[key] = tensor.data_ptr(), NAMES[tensor.dtype], values
        return self.recording

    def keep(self, tensor: torch.Tensor, fill: bool = False) -> None:
        """`fill`: a tensor that the launchers allocated is NaN to begin with."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.tensors:
            return
        self.tensors[storage.data_ptr()] = tensor
        data = np.frombuffer(bytes(storage), np.uint8)
        self.recording.buffers.append(
            (storage.data_ptr(), np.full_like(data, 0xFF) if fill else data)
        )


def compile_to_ptx_alone() -> None:
    """Machine code would not be looked at; nothing of this goes into the user's cache."""
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, src, *rest: b""
    knobs.compilation.always_compile = True


def record(arch: int, name: str) -> Recording:
    recorder = Recorder()
    triton.runtime.driver.set_active(Driver(arch))
    original = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: recorder(self, *args, **kwargs)
    try:
        run, inputs, outputs, wanted = CASES[name.removesuffix(EARLY)](arch)
        for tensor in (*inputs, *outputs.values()):
            recorder.keep(tensor)
        with overlapped() if name.endswith(EARLY) else contextlib.nullcontext():
            run()
    finally:
        JITFunction.run = original
    return recorder.finish(outputs, wanted)


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    compile_to_ptx_alone()
    recordings = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name in names:
            arch, case = name.split(":")
            recordings[name] = record(int(arch), case)
    with open(path, "wb") as file:
        pickle.dump(recordings, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
