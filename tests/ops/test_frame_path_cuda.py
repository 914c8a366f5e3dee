"""The frame path's CUDA kernels: emulated with threads of the CPU, and on a device if there is one.

The emulation compiles csrc/frame.cu with the host compiler: a block is 256 threads and a barrier.
It shows indices, barriers and arithmetic; `--device cuda` shows the rest.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientad.ops import frame_path, native
from efficientad.ops.frame_path import resize_pack

pytestmark = pytest.mark.skipif(not native.available(), reason="efficientad._native is not built")
ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RUNTIME = """
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <algorithm>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define __syncthreads() pthread_barrier_wait(&barrier)
using std::max;
using std::min;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static thread_local dim3 threadIdx(0), blockIdx(0);
static pthread_barrier_t barrier;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return 0; }
// Devices whose primary context is there, and the calling thread's context.
static bool there[2];
static void* current = nullptr;
static bool no_driver = false;
inline int cudaSetDevice(int device) {
  there[device] = true;
  current = &there[device];
  return 0;
}
inline int get_current(void** context) { return *context = current, 0; }
inline int set_current(void* context) { return current = context, 0; }
inline void* open_driver(const char* name, int) {
  return no_driver || strcmp(name, "libcuda.so.1") ? nullptr : &there;
}
inline void* find(void*, const char* name) {
  if (!strcmp(name, "cuCtxGetCurrent")) return reinterpret_cast<void*>(get_current);
  return strcmp(name, "cuCtxSetCurrent") ? nullptr : reinterpret_cast<void*>(set_current);
}
#define dlopen open_driver
#define dlsym find
inline const char* cudaGetErrorString(int) { return ""; }
template <class Kernel, class... Arguments>
void emulate(dim3 grid, unsigned size, Kernel kernel, Arguments... arguments) {
  pthread_barrier_init(&barrier, nullptr, size);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < size; ++t) threads.emplace_back([&, t] {
    threadIdx.x = t;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          kernel(arguments...);
          pthread_barrier_wait(&barrier);
        }
  });
  for (auto& thread : threads) thread.join();
  pthread_barrier_destroy(&barrier);
}
"""
ENTRIES = """
using namespace efficientad;
extern "C" void run_resize_pack(Frame* f, Taps* y, Taps* x, Normal* n, Packed* out) {
  cuda::resize_pack(*f, *y, *x, *n, *out, 0, 0);
}
// Contexts after a launch on `device` by a thread whose context is that of device `before`, or none
// if that is -1: a bit per device that has one, and behind them whether the thread's is the same.
extern "C" int run_on_device(int device, int before, Frame* f, Taps* y, Taps* x, Normal* n,
                             Packed* out) {
  there[0] = there[1] = false;
  current = nullptr;
  if (before >= 0) cudaSetDevice(before);
  void* const had = current;
  cuda::resize_pack(*f, *y, *x, *n, *out, device, 0);
  return there[0] | there[1] << 1 | (current == had) << 2;
}
extern "C" const char* without_driver(Frame* f, Taps* y, Taps* x, Normal* n, Packed* out) {
  no_driver = true;
  static std::string text;
  try {
    cuda::resize_pack(*f, *y, *x, *n, *out, 0, 0);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  return text.c_str();
}
"""
P, N, L, X = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def struct(*pairs: tuple[type, object]) -> ctypes.Structure:
    """A C struct on its own, by reference."""
    fields = [(f"f{i}", kind) for i, (kind, _) in enumerate(pairs)]
    made = type("Struct", (ctypes.Structure,), {"_fields_": fields})
    return ctypes.byref(made(*(value for _, value in pairs)))


def taps(source: int, target: int):
    (spans, weights, width, size), table = frame_path.taps(source, target, torch.device("cpu"))
    return struct((P, spans), (P, weights), (N, width), (N, size)), table


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Compiles csrc/frame.cu with the host compiler to a library, a new one at each call."""
    return lambda: _emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def kernels(emulated):
    return emulated()


def _emulated(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on the PATH")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    text = (ROOT / "csrc" / "frame.cu").read_text()
    launch = r"(\w+)<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>\(stream\)>>>\("
    text, launches = re.subn(launch, r"emulate(grid, kThreads, \1, ", text)
    assert launches == 1
    (folder / "frame.cpp").write_text(text + ENTRIES)
    flags = "-std=c++17 -O1 -shared -fPIC -pthread -ffp-contract=off".split()
    command = [compiler, *flags, f"-I{folder}", f"-I{ROOT / 'csrc'}", str(folder / "frame.cpp")]
    done = subprocess.run(
        [*command, "-o", str(folder / "frame.so")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "frame.so"))


@pytest.mark.parametrize(
    ("source", "target", "border", "channels", "dtype"),
    [
        ((40, 70), (9, 33), 0, 4, torch.float16),  # a pixel more than a block
        ((23, 17), (5, 31), 1, 3, torch.float32),  # with its border a pixel more than a block
        ((3, 5000), (2, 3), 2, 4, torch.bfloat16),  # spans wider than shared memory
        ((6, 2051), (3, 40), 33, 4, torch.float32),  # blocks of border only
        ((4, 64), (4, 64), 0, 4, torch.float16),
        ((1, 1), (2, 3), 0, 3, torch.float16),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_emulated_resize_pack_has_the_bits_of_the_host(
    kernels, source, target, border, channels, dtype, grey
):
    rng = np.random.default_rng(0)
    layers = 1 if grey else 3
    whole = rng.integers(0, 256, (source[0], (source[1] + 5) * layers), dtype=np.uint8)
    frame = whole[:, : source[1] * layers]
    frame = (
        frame
        if grey
        else frame.reshape(*source, 3)
        if source[0] == 1
        else np.ndarray((*source, 3), np.uint8, whole, strides=(whole.strides[0], 3, 1))
    )
    shape = (3, target[0] + 2 * border, target[1] + 2 * border, channels)
    have = torch.full(shape, torch.nan, dtype=dtype)
    (rows, _a), (columns, _b) = (taps(n, m) for n, m in zip(source, target, strict=True))
    kernels.run_resize_pack(
        struct((P, whole.ctypes.data), (L, whole.strides[0]), (N, source[0]), (N, source[1]),
               (N, layers)),
        rows, columns,
        struct(*((X, value) for value in (*MEAN, *STD))),
        struct((P, have[1].data_ptr()), (N, target[0]), (N, target[1]), (N, border),
               (N, channels), (N, frame_path.KINDS[dtype])),
    )  # fmt: skip
    options = {"border": border, "channels": channels, "dtype": dtype}
    assert torch.equal(have[1], resize_pack(frame, target, MEAN, STD, **options))
    assert have[0].isnan().all()
    assert have[2].isnan().all()


def one_pixel() -> tuple[tuple, tuple]:
    """Arguments of a launch, and what they keep alive: the result among it."""
    (rows, table), pixel, out = taps(1, 1), torch.zeros(1, dtype=torch.uint8), torch.ones(4)
    arguments = (
        struct((P, pixel.data_ptr()), (L, 1), (N, 1), (N, 1), (N, 1)), rows, rows,
        struct(*((X, value) for value in (*MEAN, *STD))),
        struct((P, out.data_ptr()), (N, 1), (N, 1), (N, 0), (N, 4),
               (N, frame_path.KINDS[out.dtype])),
    )  # fmt: skip
    return arguments, (pixel, out, table)


@pytest.mark.parametrize("before", [-1, 0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_a_launch_makes_no_context_on_another_device(device, before, kernels):
    """Nor does it change that of the calling thread."""
    arguments, _kept = one_pixel()
    there = {device, before} - {-1}
    expected = sum(1 << one for one in there) | 4
    assert kernels.run_on_device(device, before, *arguments) == expected


def test_without_a_driver_a_launch_says_so(emulated):
    """In a library of its own: what a process has found of the driver, it keeps."""
    kernels = emulated()
    kernels.without_driver.restype = ctypes.c_char_p
    arguments, _kept = one_pixel()
    assert (
        kernels.without_driver(*arguments) == b"CUDA: the driver does not tell the current context"
    )


def test_on_a_device_the_bits_are_the_hosts_also_in_a_graph(device):
    if not device.startswith("cuda"):
        pytest.skip("--device is cpu")
    if not native.info()["cuda"]:
        pytest.skip("efficientad._native has no CUDA: nvcc was missing when it was built")
    rng = np.random.default_rng(2)
    for source in [(480, 640), (2048, 2448), (256, 256), (3, 5000)]:
        host = torch.from_numpy(rng.integers(0, 256, (*source, 3), dtype=np.uint8))
        frame = host.to(device)
        want = resize_pack(host, (256, 256), MEAN, STD, border=2)
        out = torch.full(want.shape, torch.nan, dtype=want.dtype, device=device)
        resize_pack(frame, (256, 256), MEAN, STD, border=2, out=out)
        assert torch.equal(out.cpu(), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            resize_pack(frame, (256, 256), MEAN, STD, border=2, out=out)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out.cpu(), want)
