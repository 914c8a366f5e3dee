"""What the fp8 tests share: fp8 written by hand, kernels of plain torch, images on disk."""

from __future__ import annotations

import types

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from efficientad.ops import reference


def e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn's nearest values, ties to even: 3 bits of mantissa, exponents from -6 on.

    As torch does it, from float32.
    """
    x = x.float().to(x.dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


class Definitions:
    """Operations of `efficientad.ops.reference`; they write to `out` where it is given."""

    def __getattr__(self, name):
        operation = getattr(reference, name)

        def call(*arguments, out=None, **options):
            result = operation(*arguments, **options)
            if out is None:
                return result
            for place, value in zip(*(_listed(v) for v in (out, result)), strict=True):
                place.copy_(value)
            return out

        return call


def _listed(values) -> list[Tensor]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def interpreted_small() -> types.SimpleNamespace:
    """The PDN kernels with a few hundred pixels a program, for images of a few hundred cells."""
    pixels = {
        "first_conv_relu_pool": 512,
        "conv_relu": 512,
        "conv_relu_pool": 512,
        "pair_distance": 256,
        "student_distance": 256,
        "autoencoder_distance": 256,
    }
    return helpers.interpreted(pixels)


def interpret_fp8_exactly(patch: pytest.MonkeyPatch) -> None:
    """Mend Triton's interpreter, which rounds 1.97 to 1 in fp8 and writes 384 for NaN."""
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float
    kinds = {
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
        tl.float16: (torch.float16, np.uint16),
        tl.float32: (torch.float32, np.uint32),
    }

    def convert(values, source, target, rounding):
        if tl.float8e4nv not in (source, target):
            return own(values, source, target, rounding)
        tensor = torch.from_numpy(np.ascontiguousarray(values)).view(kinds[source][0])
        signless = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        result = tensor.float().to(kinds[target][0])
        return result.view(signless[result.itemsize]).numpy().view(kinds[target][1])

    patch.setattr(interpreter, "_convert_float", convert)


def write_images(folder, images: Tensor) -> list:
    """PNG files of images (N, 3, H, W) in 0..1."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    paths = [folder / f"{i:03}.png" for i in range(len(pixels))]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    return paths
