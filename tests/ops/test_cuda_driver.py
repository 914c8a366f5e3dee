"""What `ops.cuda_driver` passes, as C sees it: a library of the driver's signatures, compiled."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch

from efficientad.ops import cuda_driver

COMPILER = shutil.which("cc")
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>

uint64_t seen[32];

int cuGetErrorString(int code, const char **text) { *text = "bad luck"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\x7f\0ELF", 5)) return 200;
    *module = (void *)0x7f00000000000010; return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    if (module != (void *)0x7f00000000000010 || strcmp(name, "symbol")) return 500;
    *function = (void *)0x7f00000000000020; return 0;
}
int cuFuncSetCacheConfig(void *function, unsigned config) { return config != 1; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
    seen[0] = (uint64_t)function; seen[1] = attribute; seen[2] = value; return 0;
}
int cuTensorMapEncodeTiled(void *map, unsigned type, uint32_t rank, void *address,
        const uint64_t *sizes, const uint64_t *steps, const uint32_t *box, const uint32_t *ones,
        unsigned interleave, unsigned swizzle, unsigned level, unsigned fill) {
    uint64_t values[16] = {type, rank, (uint64_t)address, sizes[0], sizes[1], steps[0], box[0],
                           box[1], ones[0], ones[1], interleave, swizzle, level, fill};
    memcpy(map, values, sizeof values); return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
        unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
    uint64_t values[11] = {(uint64_t)function, x, y, z, bx, by, bz, shared, (uint64_t)stream,
                           (uint64_t)params[0] % 64, extra == NULL};
    float number;
    memcpy(seen, values, sizeof values);
    memcpy(seen + 11, params[0], 128);              /* the map */
    seen[27] = *(int32_t *)params[1] == 7 && *(int32_t *)params[2] == 64;
    seen[28] = *(int64_t *)params[3] == 64 && *(int64_t *)params[4] == 1;
    seen[29] = *(uint64_t *)params[5];
    memcpy(&number, params[6], 4); seen[30] = number == -0.5f;
    seen[31] = *(int64_t *)params[7] == -(1ll << 40);
    return 0;
}
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    if COMPILER is None:
        pytest.skip("this needs a C compiler")
    (tmp_path / "driver.c").write_text(SOURCE)
    path = tmp_path / "driver.so"
    command = [COMPILER, "-shared", "-fPIC", "-o", path, tmp_path / "driver.c"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    monkeypatch.setattr(cuda_driver, "library", lambda: library)
    return library


class Matrix:
    """As much of Triton's TensorDescriptor as a launch reads."""

    base = torch.zeros(7, 64, dtype=torch.float16)
    shape, strides = (7, 64), (64, 1)


def test_c_reads_what_was_passed(driver):
    load = cuda_driver.load.__wrapped__
    function = load(b"\x7f\0ELF", "symbol", 100_000, 0)
    seen = (ctypes.c_uint64 * 32).in_dll(driver, "seen")
    assert list(seen)[:3] == [0x7F00000000000020, 8, 100_000]
    arguments = cuda_driver.Arguments()
    how = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [128, 32]}
    arguments.add_map(Matrix, how)
    tensor = torch.zeros(3)
    for kind, value in (("*fp32", tensor), ("fp32", -0.5), ("i64", -(1 << 40))):
        arguments.add(kind, value)
    cuda_driver.launch(function, 3_000_000_000, 8, 100_000, (1 << 40) + 1, arguments)
    grid, block = [3_000_000_000, 1, 1], [256, 1, 1]
    assert list(seen)[:11] == [function.value, *grid, *block, 100_000, (1 << 40) + 1, 0, 1]
    address = Matrix.base.data_ptr()
    assert list(seen)[11:25] == [6, 2, address, 64, 7, 128, 32, 128, 1, 1, 0, 3, 2, 0]
    assert list(seen)[27:] == [1, 1, tensor.data_ptr(), 1, 1]


def test_its_errors_are_told(driver):
    load = cuda_driver.load.__wrapped__
    with pytest.raises(RuntimeError, match=r"CUDA driver: loading symbol: bad luck \(200\)"):
        load(b"no code", "symbol", 0, 0)
    with pytest.raises(RuntimeError, match=r"CUDA driver: finding other: bad luck \(500\)"):
        load(b"\x7f\0ELF", "other", 0, 0)
