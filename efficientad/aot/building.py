"""A kernel bundle: the kernels that a predictor launches, compiled on any machine with Triton."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from efficientad import __version__
from efficientad.fast.backends import Fp8Backend, KernelBackend, Kernels
from efficientad.fast.fp8 import BATCH
from efficientad.fast.options import DEFAULT_BUCKETS, choose_buckets
from efficientad.fast.self_check import rehearse
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.model.networks import PDN_LAYERS
from efficientad.ops.cuda_driver import TYPES
from efficientad.ops.kernel_bundle import Bundle, CompiledKernel, source_digest, write_bundle
from efficientad.ops.kernel_launch import Specialised, Specialiser
from efficientad.utils.devices import FP8

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8_e4m3fn": FP8}


class Compiler:
    """A way of `kernels.launching` that compiles each kernel for sm_`arch` and launches nothing.

    Attributes:
        kernels: what was compiled, by `kernel_launch.Specialised.key`.
    """

    def __init__(self, arch: int) -> None:
        self.kernels: dict[str, CompiledKernel] = {}
        self._specialise = Specialiser(arch)

    def __call__(self, function: Any, programs: int, args: tuple, options: dict) -> bool:
        launch = self._specialise(function, args, options)
        if launch.key not in self.kernels:
            self.kernels[launch.key] = self._compiled(function, launch)
        return True

    def _compiled(self, function: Any, launch: Specialised) -> CompiledKernel:
        import triton
        from triton.compiler import ASTSource

        backend = self._specialise.backend
        options, signature, constants, attributes = function._pack_args(
            backend, dict(launch.options), launch.values, launch.types, None
        )
        source = ASTSource(function, signature, constants, attributes)
        done = triton.compile(source, target=self._specialise.target, options=options.__dict__)
        facts = done.metadata
        if (
            facts.num_ctas != 1
            or facts.launch_pdl
            or facts.launch_cooperative_grid
            or facts.global_scratch_size
            or facts.profile_scratch_size
        ):
            raise ValueError(f"{function.__name__} needs a launch that a kernel bundle cannot make")
        maps = list(getattr(facts, "tensordesc_meta", None) or ())
        arguments = tuple(
            (place, _argument(kind, maps))
            for place, kind in enumerate(signature.values())
            if kind != "constexpr"
        )
        return CompiledKernel(
            function.__name__, facts.name, facts.num_warps, facts.shared, arguments,
            done.asm["cubin"],
        )  # fmt: skip


def _argument(kind: str, maps: list[dict[str, Any]]) -> str | dict[str, Any]:
    """An argument's type as `CompiledKernel` has it; takes the next of `maps` if it is one."""
    if kind.startswith("tensordesc"):
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        how = maps.pop(0)
        return {
            "swizzle": how["swizzle"],
            "elem_size": how["elem_size"],
            "elem_type": TMA_DTYPE_DEVICE_TO_HOST[how["elem_type"]],
            "block_size": list(how["block_size"]),
        }
    if not kind.startswith("*") and kind not in TYPES:
        raise ValueError(f"an argument is of type {kind}, which a kernel bundle cannot pass")
    return kind


def architecture(arch: str | int) -> int:
    """A compute capability as an integer: "sm_90", "90" and 90 are 90.

    Raises:
        ValueError: anything else, or older than sm_80.
    """
    from efficientad.kernels.grouped import architecture as row_of_tables

    match = re.fullmatch(r"(?:sm_)?(\d{2,3})", str(arch))
    if match is None:
        raise ValueError(f"arch is {arch!r}; it must be a compute capability such as 'sm_90'")
    row_of_tables(int(match[1]))
    return int(match[1])


def build_bundle(
    detector: EfficientAD,
    path: str | os.PathLike,
    arch: str | int,
    *,
    dtype: str = "float16",
    batch_sizes: Sequence[int] | None = None,
    fp8_layers: str = "second",
) -> Bundle:
    """Compile what a `FastPredictor` of this detector launches on sm_`arch`, into one file.

    Needs Triton, and no GPU. The kernels depend on the detector's sizes, padding and region and not
    on its weights, so that a file serves every detector of the same shape.

    Args:
        detector: calibrated.
        path: of the file; an existing one is replaced.
        arch: "sm_90" or 90; exactly the device's.
        dtype: "float16", "bfloat16" or "float8_e4m3fn".
        batch_sizes, fp8_layers: as `FastPredictor` takes them.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: arguments out of range, or Triton's interpreter is on.
        ImportError: Triton is not installed.
        OSError: the file cannot be written.
    """
    check_detector(detector)
    if not detector.calibrated:
        detector.raise_uncalibrated()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET is '1', which leaves nothing to compile; unset it")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    number = architecture(arch)
    if dtype == "float8_e4m3fn" and number < 89:
        raise ValueError(f"dtype is float8_e4m3fn and arch sm_{number}; fp8 needs sm_89 or newer")
    cpu = torch.device("cpu")
    sizes = choose_buckets(DEFAULT_BUCKETS["cuda"] if batch_sizes is None else batch_sizes, cpu)
    compiler = Compiler(number)
    kernels = Kernels(compiler, target=number)
    backend: KernelBackend
    if dtype == "float8_e4m3fn":
        largest = [torch.ones(2)] * (len(PDN_LAYERS[detector.size]) - 1)
        backend = Fp8Backend(detector, largest, fp8_layers, cpu, kernels)
        calibration = range(1, min(BATCH, max(sizes)) + 1)  # batches of its images, the last, too
    else:
        backend = KernelBackend(detector, DTYPES[dtype], cpu, kernels)
        calibration = range(0)
    rehearse(backend, detector, (*sizes, *calibration))
    import triton

    made_for = {
        "efficientad": __version__,
        "network": f"EfficientAD-{detector.size}",
        "image_size": list(detector.image_size),
        "dtype": dtype,
        "batch_sizes": list(sizes),
    }
    if dtype == "float8_e4m3fn":
        made_for["fp8_layers"] = fp8_layers
    bundle = Bundle(number, triton.__version__, source_digest(), made_for, compiler.kernels)
    write_bundle(bundle, path)
    return bundle
