"""The compiled float32 convolutions of a CPU.

A `Layer` keeps the filters of a convolution in the order in which `_native` (csrc/conv.h) reads
them, transformed for minimal filtering where that saves multiplications. Images are channels last,
(N, H, W, C). Nothing here has a gradient; `differentiable_conv.convolve` has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.ops import native
from efficientad.ops.winograd import axis_transforms, transforms

PANEL = 32  # output channels that are computed together
FEW_CHANNELS = 16  # below, the transforms of the input cost more than they save


def available() -> bool:
    """Whether the compiled convolutions are there."""
    return hasattr(native.module(), "convolve")  # a module built before them has none


class Layer:
    """A convolution with its filters: `layer(x)`.

    Args:
        weight: (K, C, k, k), float32 or float64, on the CPU. bias: (K,), or None. Both are copied.
        step: between the convolution's outputs, in pixels. padding: with zeros on every side.
        relu: whether ReLU follows; a NaN stays one.
        pool: whether a 2x2 average of step 2 follows. pool_padding: its zeros, 0 or 1.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        step: int = 1,
        padding: int = 0,
        relu: bool = False,
        pool: bool = False,
        pool_padding: int = 0,
    ) -> None:
        self.out_channels, self.channels, self.kernel, _ = weight.shape
        self.step, self.padding = step, padding
        self.relu, self.pool, self.pool_padding = relu, pool, pool_padding
        self.direct = step > 1 or self.kernel not in (3, 4) or self.channels < FEW_CHANNELS
        self._filters = _packed(weight.detach(), self.direct)
        self._bias = torch.zeros(_panels(self.out_channels) * PANEL)
        if bias is not None:
            self._bias[: self.out_channels] = bias.detach()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of that size."""
        spare = 2 * self.padding - self.kernel
        sizes = [(length + spare) // self.step + 1 for length in (height, width)]
        if self.pool:
            sizes = [(length + 2 * self.pool_padding) // 2 for length in sizes]
        return sizes[0], sizes[1]

    def __call__(self, x: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        """x (N, H, W, C) -> (N, h, w, K), written to `out` if given; channels side by side in both.

        add: to what `out` holds, before ReLU; not with pooling.

        Raises:
            ValueError: another dtype, device, shape or layout, or an image smaller than the kernel.
        """
        if x.dim() != 4 or x.shape[3] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, H, W, {self.channels})")
        shape = (len(x), *self.size(*x.shape[1:3]), self.out_channels)
        if min(x.shape[1:3]) + 2 * self.padding < self.kernel or min(shape[1:3]) < 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, too small for a kernel of {self.kernel} with "
                f"padding {self.padding}"
            )
        if add and (out is None or self.pool):
            raise ValueError("add is True; it needs `out`, and no pooling")
        if out is None:
            out = x.new_empty(shape)
        if tuple(out.shape) != shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; it must be {shape}")
        inputs, outputs = 0, 0  # no transforms
        if not self.direct:
            inputs, outputs = (matrix.data_ptr() for matrix in axis_transforms(self.kernel))
        native.module().convolve(
            *_pixels(x, "x"), (self.kernel, self.step, self.padding), self._filters.data_ptr(),
            self._bias.data_ptr(), inputs, outputs, *_pixels(out, "out"), add, self.relu,
            self.pool, self.pool_padding, torch.get_num_threads(),
        )  # fmt: skip
        return out


def filter_gradient(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """The filters' gradient of a convolution without padding, (K, C, kernel, kernel).

    Args:
        x: (N, H, W, C), its input. gradient: (N, h, w, K), that of its outputs.
        kernel: 3 or 4.

    Raises:
        ValueError: another dtype, device, shape or layout.
    """
    out_channels, channels = gradient.shape[3], x.shape[3]
    expected = (len(x), *(length - kernel + 1 for length in x.shape[1:3]), out_channels)
    if tuple(gradient.shape) != expected:
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; it must be {expected}")
    inputs, outputs = axis_transforms(kernel)
    filters = transforms(kernel, torch.float32)[1]
    products = x.new_empty(len(filters), channels, _panels(out_channels) * PANEL)
    native.module().filter_gradient(
        *_pixels(x, "x"), kernel, inputs.data_ptr(), outputs.data_ptr(),
        *_pixels(gradient, "gradient"), products.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    taps = torch.mm(filters.T, products.view(len(filters), -1)).view(kernel, kernel, channels, -1)
    return taps[..., :out_channels].permute(3, 2, 0, 1)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize without antialias, as F.interpolate: x (N, H, W, C) -> (N, *size, C)."""
    x = x.contiguous()
    y = x.new_empty(len(x), *size, x.shape[3])
    native.module().resize(*_pixels(x, "x"), *_pixels(y, "y"), torch.get_num_threads())
    return y


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares of every pixel's channels: x (N, H, W, C) -> (N, H, W)."""
    x = x.contiguous()
    y = x.new_empty(x.shape[:3])
    data, _, shape = _pixels(x, "x")
    native.module().mean_square(data, y.numel(), shape[3], y.data_ptr(), torch.get_num_threads())
    return y


def _pixels(x: Tensor, name: str) -> native.Pixels:
    return native.pixels(x, name, torch.float32)


def _panels(out_channels: int) -> int:
    return -(-out_channels // PANEL)


def _packed(weight: Tensor, direct: bool) -> Tensor:
    """(K, C, k, k) -> float32 (panels, points, C, PANEL), direct (panels, k * k * C, PANEL)."""
    out_channels, channels, kernel, _ = weight.shape
    panels = _panels(out_channels)
    taps = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, panels * PANEL - out_channels))
    taps = taps.view(panels, PANEL, channels, kernel**2).permute(0, 3, 2, 1)
    taps = taps.reshape(panels, kernel**2, channels * PANEL)
    if not direct:
        taps = torch.matmul(transforms(kernel, weight.dtype)[1], taps)
    return taps.float().contiguous()
