"""Random inputs of the kernel benchmarks, laid out as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientad.utils.devices import FP8

FILTER_SCALE = 16.0  # of fp8 filters, whose values would otherwise lie under the smallest normal


class Inputs:
    """Random tensors of one dtype on one device, the same for a seed; on "meta" shapes alone."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.half = torch.float16 if dtype == FP8 else dtype  # of what stays out of fp8
        self._generator = None
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self._generator).to(dtype)

    def activation(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(*shape).relu_().to(dtype or self.dtype)

    def filters(self, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
        """(Cout, K, K, Cin) each, consecutive views of one buffer."""
        factor = FILTER_SCALE if self.dtype == FP8 else 1.0
        parts = [self.normal(*s) * (factor * (s[1] * s[2] * s[3]) ** -0.5) for s in shapes]
        joined = torch.cat(parts).to(dtype or self.dtype)
        return list(joined.split([len(part) for part in parts]))

    def biases(self, *lengths: int) -> list[Tensor]:
        return list((self.normal(sum(lengths)) * 0.3).split(list(lengths)))

    def scales(self, *lengths: int) -> list[Tensor] | None:
        if self.dtype != FP8:
            return None
        whole = torch.full((sum(lengths),), 1 / FILTER_SCALE, device=self.device)
        return list(whole.split(list(lengths)))

    def image(self, *shape: int) -> Tensor:
        """Frames of bytes."""
        return torch.randint(
            0, 256, shape, device=self.device, dtype=torch.uint8, generator=self._generator
        )

    def packed(self, n: int, height: int, width: int) -> Tensor:
        """As `pack` gives it: normalised RGB and a fourth channel of zeros."""
        x = self.normal(n, height, width, 4, dtype=self.half)
        x[..., 3] = 0
        return x
