"""Differentiable convolutions of a CPU.

For training, where the same large convolutions run forward and twice backward: with the compiled
code (compiled_conv.py) in float32, else by the same arithmetic in torch. A convolution of 3x3 or
4x4 is a sum of 36 or 49 matrix products over tiles of 4x4 outputs (winograd.py), with 4 or 5.2
times fewer multiplications than by definition, in the gradients too. Images are channels last,
(N, H, W, C), so that tiles are copied by whole pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.ops import compiled_conv
from efficientad.ops.winograd import OUT, transforms

STRIP_BYTES = 12 * 2**20  # of intermediate values at a time in torch, a share of the last cache


def serves(x: Tensor) -> bool:
    """Whether `convolve` is the faster one for x: on a CPU in float32 or float64, no autocast."""
    wide = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and wide and not torch.is_autocast_enabled("cpu")


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    """Stride-1 convolution without padding, then ReLU if wanted, of a channels-last image.

    Args:
        x: (N, H, W, C), float32 or float64, on the CPU.
        weight: (K, C, k, k), k in 1, 3, 4. bias: (K,).

    Returns:
        (N, H - k + 1, W - k + 1, K), differentiable in every argument.

    Raises:
        ValueError: another size of kernel.
    """
    kernel = weight.shape[2]
    if kernel == 1:
        y = F.linear(x, weight.flatten(1), bias)
        return torch.relu(y) if relu else y
    if kernel not in (3, 4) or weight.shape[3] != kernel:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; its kernel must be 1, 3 or 4")
    function: type[torch.autograd.Function]
    if compiled_conv.available() and x.dtype == torch.float32:
        function = _Compiled
    else:
        function = _Patches if x.shape[3] == 3 and not x.requires_grad else _Winograd
    return function.apply(x.contiguous(), weight, bias, relu)


class _Compiled(torch.autograd.Function):
    """The arguments of `convolve`, kernel 3 or 4, in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        y = compiled_conv.Layer(weight, bias, relu=relu)(x)
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, y = ctx.saved_tensors
        channels, kernel = weight.shape[1:3]
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.contiguous()
        d_x = None
        if ctx.needs_input_grad[0]:  # a convolution too, with the filters turned round
            turned = weight.transpose(0, 1).flip(2, 3)
            d_x = compiled_conv.Layer(turned, None, padding=kernel - 1)(grad)
        if channels < compiled_conv.FEW_CHANNELS:
            d_weight = _patches_gradient(_patches(x, kernel), grad, weight.shape)
        else:
            d_weight = compiled_conv.filter_gradient(x, grad, kernel)
        return d_x, d_weight, grad.sum((0, 1, 2)), None


class _Winograd(torch.autograd.Function):
    """The same arithmetic in torch: float32 or float64.

    Works through strips of tiles whose intermediate values fit in the cache, and makes the
    transformed input again in the backward pass: cheaper than to write and read it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        n, height, width, channels = x.shape
        out_channels, kernel = weight.shape[0], weight.shape[2]
        m, side = OUT, OUT + kernel - 1  # rows and columns of a tile, of outputs and inputs
        h, w = height - kernel + 1, width - kernel + 1
        rows, columns = -(-h // m), -(-w // m)
        data, filters, outputs = transforms(kernel, x.dtype)
        taps = weight.permute(2, 3, 1, 0).reshape(kernel**2, -1)
        u = torch.mm(filters, taps).view(side**2, channels, out_channels)
        x = _padded(x, rows * m + kernel - 1, columns * m + kernel - 1)
        y = x.new_empty((n, rows * m, columns * m, out_channels))
        for image, top, count in _strips(n, rows, columns * (channels + out_channels) * side**2):
            tiles = _tiles(x[image, top * m :], m, count, columns, side)  # [side^2, T, C]
            v = torch.mm(data, tiles.view(side**2, -1)).view(tiles.shape)
            product = torch.bmm(v, u)  # [side^2, T, K]
            part = torch.mm(outputs.T, product.view(side**2, -1))
            part = part.view(m, m, count, columns, out_channels).permute(2, 0, 3, 1, 4)
            strip = y[image, top * m : (top + count) * m]
            torch.add(part, bias, out=strip.view(count, m, columns, m, out_channels))
            if relu:
                strip.clamp_(min=0)
        if (rows * m, columns * m) != (h, w):
            y = y[:, :h, :w].contiguous()
        ctx.save_for_backward(x, u, y if relu else None)
        ctx.sizes = (n, height, width, rows, columns, kernel)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, u, y = ctx.saved_tensors
        n, height, width, rows, columns, kernel = ctx.sizes
        m, side, channels, out_channels = OUT, OUT + kernel - 1, u.shape[1], u.shape[2]
        data, filters, outputs = transforms(kernel, u.dtype)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        d_bias = grad.sum((0, 1, 2))
        grad = _padded(grad.contiguous(), rows * m, columns * m)
        d_u = torch.zeros_like(u)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = x.new_zeros((n, (rows + 1) * m, (columns + 1) * m, channels))
        u_t = u.transpose(1, 2)
        for image, top, count in _strips(n, rows, columns * (channels + out_channels) * side**2):
            tiles = _tiles(x[image, top * m :], m, count, columns, side)
            v = torch.mm(data, tiles.view(side**2, -1)).view(tiles.shape)
            tiles = _tiles(grad[image, top * m :], m, count, columns, m)
            d_product = torch.mm(outputs, tiles.view(m * m, -1)).view(side**2, -1, out_channels)
            d_u.baddbmm_(v.transpose(1, 2), d_product)
            if d_x is None:
                continue
            d_v = torch.bmm(d_product, u_t)
            d_tiles = torch.mm(data.T, d_v.view(side**2, -1))
            d_tiles = d_tiles.view(side, side, count, columns, channels)
            # Tiles overlap: cell (i, j) of a tile is in block (i // m, j // m) after its own.
            blocks = d_x[image].view(rows + 1, m, columns + 1, m, channels)
            for i, di in ((slice(0, m), 0), (slice(m, side), 1)):
                for j, dj in ((slice(0, m), 0), (slice(m, side), 1)):
                    part = d_tiles[i, j].permute(2, 0, 3, 1, 4)
                    target = blocks[top + di : top + di + count, :, dj : dj + columns]
                    target[:, : part.shape[1], :, : part.shape[3]] += part
        d_taps = torch.mm(filters.T, d_u.view(side**2, -1))
        d_weight = d_taps.view(kernel, kernel, channels, out_channels).permute(3, 2, 0, 1)
        if d_x is not None:
            d_x = d_x[:, :height, :width]
        return d_x, d_weight, d_bias, None


def _tiles(x: Tensor, step: int, rows: int, columns: int, size: int) -> Tensor:
    """Tiles of size x size cells, `step` apart, of x (H, W, C): (size^2, rows * columns, C).

    H and W must be (rows - 1) * step + size and (columns - 1) * step + size at least.
    """
    s, channels = x.stride(), x.shape[2]
    view = x.as_strided(
        (size, size, rows, columns, channels),
        (s[0], s[1], step * s[0], step * s[1], s[2]),
        x.storage_offset(),
    )
    return view.reshape(size * size, rows * columns, channels)


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """x (N, H, W, C) with zeros below and to the right up to height and width."""
    if x.shape[1] >= height and x.shape[2] >= width:
        return x
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def _strips(images: int, rows: int, values: int) -> Iterator[tuple[int, int, int]]:
    """(image, first row of tiles, rows of tiles) of the strips of a batch, near STRIP_BYTES.

    values: intermediate float32 numbers of a row of tiles.
    """
    size = max(1, STRIP_BYTES // (4 * values))
    size = -(-rows // -(-rows // size))  # of equal height, as far as it goes
    for image in range(images):
        for top in range(0, rows, size):
            yield image, top, min(size, rows - top)


class _Patches(torch.autograd.Function):
    """The first layer, whose input needs no gradient: one product of patches and filters."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out_channels, _, kernel, _ = weight.shape
        patches = _patches(x, kernel)
        y = torch.mm(patches, weight.permute(2, 3, 1, 0).reshape(-1, out_channels)).add_(bias)
        if relu:
            y.clamp_(min=0)
        y = y.view(len(x), x.shape[1] - kernel + 1, x.shape[2] - kernel + 1, out_channels)
        ctx.save_for_backward(patches, y if relu else None)
        ctx.shape = weight.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        patches, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return None, _patches_gradient(patches, grad, ctx.shape), grad.sum((0, 1, 2)), None


def _patches(x: Tensor, kernel: int) -> Tensor:
    """What each output sees of x (N, H, W, C): (N * h * w, kernel * kernel * C)."""
    n, height, width, channels = x.shape
    s = x.stride()
    view = x.as_strided(
        (n, height - kernel + 1, width - kernel + 1, kernel, kernel, channels),
        (s[0], s[1], s[2], s[1], s[2], s[3]),
        x.storage_offset(),
    )
    return view.reshape(-1, kernel * kernel * channels)


def _patches_gradient(patches: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """The filters' gradient, (K, C, k, k), from that of the outputs (N, h, w, K)."""
    out_channels, channels, kernel, _ = shape
    d_taps = torch.mm(patches.T, grad.reshape(-1, out_channels))
    return d_taps.view(kernel, kernel, channels, out_channels).permute(3, 2, 0, 1)
