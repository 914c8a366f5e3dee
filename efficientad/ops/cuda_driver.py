"""As much of the CUDA driver as a compiled kernel needs to be loaded and launched, by ctypes.

Triton's own way needs a C compiler on the machine, for its launcher. This needs the driver alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

_MAX_DYNAMIC_SHARED, _PREFER_SHARED = 8, 1  # CU_FUNC_ATTRIBUTE_..., CU_FUNC_CACHE_...
_L2_128B = 2  # CU_TENSOR_MAP_L2_PROMOTION_...
_STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a program has without being asked
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of CUtensorMap
_SMALL_MAP, _SMALL_BIT, _FIXED_AFTER = 128 * 1024, 1 << 21, 13010
_INTEGERS = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
}  # fmt: skip
TYPES: dict[str, Any] = _INTEGERS | {"fp32": ctypes.c_float}  # of arguments, beside pointers


@functools.cache
def library() -> Any:
    """The driver's functions.

    Raises:
        OSError: there is no driver.
    """
    return ctypes.CDLL("libcuda.so.1")


def current() -> tuple[int, int]:
    """Torch's current device and stream, as numbers."""
    device = torch.cuda.current_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def check(code: int, what: str) -> None:
    """RuntimeError with the driver's words if a call has failed."""
    if code:
        text = ctypes.c_char_p()
        library().cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"CUDA driver: {what}: {said} ({code})")


@functools.cache
def load(cubin: bytes, symbol: str, shared_bytes: int, device: int) -> ctypes.c_void_p:
    """The function of a cubin on the current device; each is loaded once and stays."""
    driver = library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {symbol}")
    check(
        driver.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()),
        f"finding {symbol}",
    )
    if shared_bytes > _STATIC_LIMIT:
        check(driver.cuFuncSetCacheConfig(function, _PREFER_SHARED), f"shared memory of {symbol}")
        check(
            driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes),
            f"{shared_bytes} bytes of shared memory for {symbol}",
        )
    return function


class Arguments:
    """Values in the memory that the driver reads them from."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._kept: list[Any] = []

    def add(self, kind: str, value: Any) -> None:
        """A number of `TYPES`, or for a kind such as "*fp16" a tensor, whose address is passed."""
        if kind.startswith("*"):
            value = 0 if value is None else value.data_ptr()
        place = TYPES["u64" if kind.startswith("*") else kind](value)
        self._keep(place, ctypes.addressof(place))

    def add_map(self, value: Any, how: dict[str, Any]) -> None:
        """A `TensorDescriptor` as the compiled function takes it: the map, sizes and strides."""
        place = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        address = -(-ctypes.addressof(place) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        encode_map(address, value.base.data_ptr(), value.shape, value.strides, how)
        self._keep(place, address)
        for kind, sizes in (("i32", value.shape), ("i64", value.strides)):
            for size in sizes:
                self.add(kind, size)

    def _keep(self, place: Any, address: int) -> None:
        self._kept.append(place)
        self._addresses.append(address)

    def pointers(self) -> ctypes.Array:
        """Their addresses, in order; valid as long as this object."""
        return (ctypes.c_void_p * len(self._addresses))(*self._addresses)


def encode_map(
    place: int, address: int, shape: Sequence[int], strides: Sequence[int], how: dict[str, Any]
) -> None:
    """Write a CUtensorMap of a matrix at `address` to `place`, as Triton's kernels read it.

    shape, strides: in elements, the last axis contiguous. how: of `CompiledKernel.arguments`.
    """
    driver, rank, size = library(), len(shape), int(how["elem_size"])
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))  # the driver counts axes from the last
    steps = (ctypes.c_uint64 * rank)(*(size * step for step in reversed(strides[:-1])))
    box = (ctypes.c_uint32 * rank)(*reversed(how["block_size"]))
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    check(
        driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), int(how["elem_type"]), rank, ctypes.c_void_p(address), sizes,
            steps, box, ones, 0, int(how["swizzle"]), _L2_128B, 0,
        ),
        f"the tensor map of a matrix {list(shape)}",
    )  # fmt: skip
    version = ctypes.c_int()
    check(driver.cuDriverGetVersion(ctypes.byref(version)), "its version")
    extent = size + sum(size * step * (n - 1) for n, step in zip(shape, strides, strict=True))
    if version.value <= _FIXED_AFTER and extent - size + 1 < _SMALL_MAP:
        # Triton 3.9 takes this bit out of small matrices' maps for drivers up to CUDA 13.1.
        word = ctypes.c_uint64.from_address(place + 8)
        word.value &= ~_SMALL_BIT


def launch(function: ctypes.c_void_p, programs: int, warps: int, shared_bytes: int,
           stream: int, arguments: Arguments) -> None:  # fmt: skip
    """Launch `programs` programs of `warps` warps on a stream of the current device."""
    check(
        library().cuLaunchKernel(
            function, programs, 1, 1, 32 * warps, 1, 1, shared_bytes,
            ctypes.c_void_p(stream), arguments.pointers(), None,
        ),
        "a launch",
    )  # fmt: skip
