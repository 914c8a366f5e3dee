"""Convolutions of bfloat16 images in a CPU's AMX tiles, with what follows them.

A layer is a convolution, bias, ReLU and 2x2 average pooling in one pass: products are summed in
float32 and rounded once, at the end. `mean_square` rounds nothing at all. Images are channels last,
(N, H, W, C). The bits depend neither on the number of threads nor on the rest of a batch. Nothing
here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.ops import native

PANEL = 32  # output channels that are computed together
GROUP = 32  # input channels of a step
PARTS = 8  # numbers of a pixel of `pack`
PACKED_KERNEL = 4  # pixels of `pack` in a step


def available() -> bool:
    """Whether the processor has AMX, the system lets it be used and csrc is compiled with it."""
    module = native.module()
    return hasattr(module, "amx") and module.amx()  # a module built before has none


class Layer:
    """A convolution with its filters: `layer(x)`.

    Args:
        weight: (K, C, k, k), float32 or float64, on the CPU; rounded to bfloat16. bias: (K,),
            float32 or float64, or None. Both are copied.
        step: between the convolution's outputs, in pixels. padding: with zeros on every side.
        relu: whether ReLU follows; a NaN stays one.
        pool: whether a 2x2 average of step 2 follows. pool_padding: its zeros, 0 or 1.
        packed: whether it reads images of `pack`, which have their padding; C is 3 then and k 4,
            and the filters are kept as two numbers each.
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
        packed: bool = False,
    ) -> None:
        self.out_channels, self.channels, self.kernel, _ = weight.shape
        self.step, self.padding, self.packed = step, padding, packed
        self.relu, self.pool, self.pool_padding = relu, pool, pool_padding
        if packed and (self.channels != 3 or self.kernel != PACKED_KERNEL or padding):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and padding is {padding}; a layer of "
                "packed images has filters (K, 3, 4, 4) and no padding"
            )
        weight = weight.detach()
        self._groups = 0 if packed else _blocks(self.channels)
        self._filters = _panels(_packed_steps(weight) if packed else _steps(weight))
        self.bias = torch.zeros(_blocks(self.out_channels) * PANEL)
        if bias is not None:
            self.bias[: self.out_channels] = bias.detach()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of that size."""
        sizes = self._convolved(height, width)
        if self.pool:
            sizes = [(length + 2 * self.pool_padding) // 2 for length in sizes]
        return sizes[0], sizes[1]

    def _convolved(self, height: int, width: int) -> list[int]:
        """The same before pooling."""
        spare = 2 * self.padding - self.kernel
        return [(length + spare) // self.step + 1 for length in (height, width)]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (N, H, W, C), bfloat16 -> (N, h, w, K), written to `out` if given.

        Channels lie side by side in both. x is copied if the layer pads it or C is no multiple of
        32. packed: x is `pack`'s, (N, H, W, 8).

        Raises:
            ValueError: another dtype, device, shape or layout, or an image smaller than the kernel.
        """
        self._check(x)
        shape = (len(x), *self.size(*x.shape[1:3]), self.out_channels)
        if out is None:
            out = image(*shape)
        if tuple(out.shape) != shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; it must be {shape}")
        size = self._convolved(*x.shape[1:3])
        x, source = self._input(x)
        native.module().amx_convolve(
            source, size, self.bias.data_ptr(), *_pixels(out, "out"), self.relu, self.pool,
            self.pool_padding, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _check(self, x: Tensor) -> None:
        channels = PARTS if self.packed else self.channels
        if x.dim() != 4 or x.shape[3] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, H, W, {channels})")
        short = min(x.shape[1:3]) + 2 * self.padding < self.kernel
        if short or min(self.size(*x.shape[1:3])) < 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, too small for a kernel of {self.kernel} with "
                f"padding {self.padding}"
            )

    def _input(self, x: Tensor) -> tuple[Tensor, tuple]:
        """x as the compiled code reads it, which must live on, and its description."""
        _pixels(x, "x")
        if self.padding or (x.shape[3] % GROUP and not self.packed):
            n, height, width, channels = x.shape
            p = self.padding
            whole = x.new_zeros(n, height + 2 * p, width + 2 * p, self._groups * GROUP)
            whole[:, p : p + height, p : p + width, :channels] = x
            x = whole
        address, strides, _ = _pixels(x, "x")
        filters = self._filters.data_ptr()
        return x, (address, strides, self.kernel, self.step, self._groups, filters)


def mean_square(*terms: tuple[Layer, Tensor]) -> Tensor:
    """Mean of the squares of every pixel's channels of a sum of one or two layers' outputs.

    Args:
        terms: layers and what they read. The layers give the same shape, neither ReLU nor pooling
            follows, and the first one's bias is that of the sum.

    Returns:
        (N, h, w), float32; the outputs are never rounded.

    Raises:
        ValueError: as a layer does, or layers that cannot be added.
    """
    shapes = []
    for layer, x in terms:
        layer._check(x)
        shapes.append((len(x), *layer.size(*x.shape[1:3]), layer.out_channels))
    plain = not any(layer.relu or layer.pool for layer, _ in terms)
    if len(terms) not in (1, 2) or len(set(shapes)) != 1 or not plain:
        raise ValueError(
            f"terms give outputs of shapes {shapes}; they must be one or two layers without ReLU "
            "and pooling, of the same shape"
        )
    inputs = [layer._input(x) for layer, x in terms]
    y = torch.empty(shapes[0][:3])
    bias = terms[0][0].bias
    native.module().amx_mean_square(
        [source for _, source in inputs], bias.data_ptr(), shapes[0], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def image(n: int, height: int, width: int, channels: int) -> Tensor:
    """Memory for an image (n, height, width, channels), bfloat16, its values undefined.

    Pixels lie an odd multiple of 64 bytes apart, so that neighbours don't share the few places
    that a cache has for powers of two.
    """
    groups = _blocks(channels)
    pitch = (groups + 1 - groups % 2) * GROUP
    whole = torch.empty(n, height, width, pitch, dtype=torch.bfloat16)
    return whole[..., :channels]


def pack(x: Tensor, border: int) -> Tensor:
    """Images as two bfloat16 numbers each, with zeros around: for layers of packed images.

    Args:
        x: (N, H, W, 3), float32, channels side by side.
        border: of zeros, in pixels.

    Returns:
        (N, H + 2 border, W + 2 border, 8), bfloat16: x rounded, 0, what is missing, 0.
    """
    if x.dim() != 4 or x.shape[3] != 3 or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}; it must be float32 "
            "(N, H, W, 3) on the CPU"
        )
    x = x.contiguous()
    n, height, width, _ = x.shape
    make = torch.zeros if border else torch.empty
    y = make(n, height + 2 * border, width + 2 * border, PARTS, dtype=torch.bfloat16)
    inner = y[:, border : border + height, border : border + width]
    native.module().amx_pack(
        x.data_ptr(), x.stride()[:3], tuple(x.shape), *_pixels(inner, "y"), torch.get_num_threads()
    )
    return y


def resize(x: Tensor, size: tuple[int, int], border: int = 0) -> Tensor:
    """Bilinear resize without antialias, as F.interpolate, with zeros around.

    x (N, H, W, C), bfloat16 -> (N, h + 2 border, w + 2 border, C) for size (h, w).
    """
    make = torch.zeros if border else torch.empty
    height, width = (length + 2 * border for length in size)
    y = make(len(x), height, width, x.shape[3], dtype=torch.bfloat16)
    inner = y[:, border : border + size[0], border : border + size[1]]
    native.module().amx_resize(*_pixels(x, "x"), *_pixels(inner, "y"), torch.get_num_threads())
    return y


def _pixels(x: Tensor, name: str) -> native.Pixels:
    return native.pixels(x, name, torch.bfloat16)


def _blocks(channels: int) -> int:
    return -(-channels // PANEL)


def _steps(weight: Tensor) -> Tensor:
    """(K, C, k, k) -> (steps, 32, K): of each row, each group of channels, each column."""
    out_channels, channels, kernel, _ = weight.shape
    groups = _blocks(channels)
    taps = F.pad(weight, (0, 0, 0, 0, 0, groups * GROUP - channels))
    taps = taps.view(out_channels, groups, GROUP, kernel, kernel).permute(3, 1, 4, 2, 0)
    return taps.reshape(-1, GROUP, out_channels).to(torch.bfloat16)


def _packed_steps(weight: Tensor) -> Tensor:
    """(K, 3, 4, 4) -> (steps, 32, K): of each row rounded filters, then what is missing."""
    high = weight.to(torch.bfloat16)
    parts = torch.stack([high, (weight - high).to(torch.bfloat16)])  # (2, K, 3, 4, 4)
    taps = F.pad(parts.permute(3, 0, 4, 2, 1), (0, 0, 0, 1))  # (row, 2, column, 4, K)
    return torch.cat([taps, taps], 3).reshape(2 * PACKED_KERNEL, GROUP, -1)


def _panels(steps: Tensor) -> Tensor:
    """(steps, 32, K) -> (panels, steps, 2, 16, 16, 2): pairs of steps, channel by channel."""
    count, _, out_channels = steps.shape
    panels = _blocks(out_channels)
    steps = F.pad(steps, (0, panels * PANEL - out_channels))
    steps = steps.view(count, GROUP // 2, 2, panels, 2, PANEL // 2)
    return steps.permute(3, 0, 4, 1, 5, 2).contiguous()
