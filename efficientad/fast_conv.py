"""Floor 1, imports torch only: the PDN's convolutions on a CPU, with fewer multiplications.

For training, where the same large convolutions run forward and twice backward. A convolution of
3x3 or 4x4 is a sum of 36 matrix products over tiles of 6x6 (Winograd's minimal filtering, F(4, 3)
and F(3, 4)): four times fewer multiplications than the definition, and all of them in `bmm`, in the
gradients too. Images are channels last, (N, H, W, C), so that tiles are copied by whole pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 6  # input rows and columns of a tile
STRIP_BYTES = 12 * 2**20  # of intermediate values at a time, a share of a CPU's last cache
# Where the polynomials are evaluated; with the point at infinity TILE of them. Chosen by measuring:
# the largest error against float64 is 2 to 4 times that of a direct float32 convolution.
POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))


@functools.cache
def _matrices(kernel: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Input (6, 6), filter (6, kernel) and output (6, 7 - kernel) transforms of one axis."""
    data, filters, outputs = [], [], []
    for i, a in enumerate(POINTS):
        others = [b for k, b in enumerate(POINTS) if k != i]
        norm = functools.reduce(lambda x, b: x * (a - b), others, Fraction(1))
        data.append([*_polynomial(others), Fraction(0)])
        filters.append([a**j / norm for j in range(kernel)])
        outputs.append([a**j for j in range(TILE + 1 - kernel)])
    data.append(_polynomial(POINTS))
    filters.append([Fraction(int(j == kernel - 1)) for j in range(kernel)])
    outputs.append([Fraction(int(j == TILE - kernel)) for j in range(TILE + 1 - kernel)])
    return tuple([[float(v) for v in row] for row in m] for m in (data, filters, outputs))


def _polynomial(roots: list[Fraction] | tuple[Fraction, ...]) -> list[Fraction]:
    """Coefficients of the product of (x - root), from the constant on."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, 0], strict=True)]
    return coefficients


@functools.cache
def _transforms(kernel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both axes at once: (36, 36), (36, kernel^2), (36, (7 - kernel)^2)."""
    with torch.inference_mode(False):
        one = (torch.tensor(m, dtype=torch.float64) for m in _matrices(kernel))
        return tuple(torch.kron(m, m).to(dtype) for m in one)


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


class _Winograd(torch.autograd.Function):
    """x (N, H, W, C), weight (K, C, k, k) with k 3 or 4, bias (K,) -> (N, H-k+1, W-k+1, K).

    Works through strips of tiles whose intermediate values fit in the cache, and makes the
    transformed input again in the backward pass: cheaper than to write and read it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        n, height, width, channels = x.shape
        out_channels, kernel = weight.shape[0], weight.shape[2]
        m = TILE + 1 - kernel  # output rows and columns of a tile
        h, w = height - kernel + 1, width - kernel + 1
        rows, columns = -(-h // m), -(-w // m)
        data, filters, outputs = _transforms(kernel, x.dtype)
        taps = weight.permute(2, 3, 1, 0).reshape(kernel**2, -1)
        u = torch.mm(filters, taps).view(TILE**2, channels, out_channels)
        x = _padded(x, rows * m + kernel - 1, columns * m + kernel - 1)
        y = x.new_empty((n, rows * m, columns * m, out_channels))
        for image, top, count in _strips(n, rows, columns, channels + out_channels):
            tiles = _tiles(x[image, top * m :], m, count, columns, TILE)  # [36, T, C]
            v = torch.mm(data, tiles.view(TILE**2, -1)).view(tiles.shape)
            product = torch.bmm(v, u)  # [36, T, K]
            part = torch.mm(outputs.T, product.view(TILE**2, -1))
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
        m, channels, out_channels = TILE + 1 - kernel, u.shape[1], u.shape[2]
        data, filters, outputs = _transforms(kernel, u.dtype)
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        d_bias = grad.sum((0, 1, 2))
        grad = _padded(grad.contiguous(), rows * m, columns * m)
        d_u = torch.zeros_like(u)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = x.new_zeros((n, (rows + 1) * m, (columns + 1) * m, channels))
        u_t = u.transpose(1, 2)
        for image, top, count in _strips(n, rows, columns, channels + out_channels):
            tiles = _tiles(x[image, top * m :], m, count, columns, TILE)
            v = torch.mm(data, tiles.view(TILE**2, -1)).view(tiles.shape)
            tiles = _tiles(grad[image, top * m :], m, count, columns, m)
            d_product = torch.mm(outputs, tiles.view(m * m, -1)).view(TILE**2, -1, out_channels)
            d_u.baddbmm_(v.transpose(1, 2), d_product)
            if d_x is None:
                continue
            d_v = torch.bmm(d_product, u_t)
            d_tiles = torch.mm(data.T, d_v.view(TILE**2, -1))
            d_tiles = d_tiles.view(TILE, TILE, count, columns, channels)
            # Tiles overlap: cell (i, j) of a tile is in block (i // m, j // m) after its own.
            blocks = d_x[image].view(rows + 1, m, columns + 1, m, channels)
            for i, di in ((slice(0, m), 0), (slice(m, TILE), 1)):
                for j, dj in ((slice(0, m), 0), (slice(m, TILE), 1)):
                    part = d_tiles[i, j].permute(2, 0, 3, 1, 4)
                    target = blocks[top + di : top + di + count, :, dj : dj + columns]
                    target[:, : part.shape[1], :, : part.shape[3]] += part
        d_taps = torch.mm(filters.T, d_u.view(TILE**2, -1))
        d_weight = d_taps.view(kernel, kernel, channels, out_channels).permute(3, 2, 0, 1)
        if d_x is not None:
            d_x = d_x[:, :height, :width]
        return d_x, d_weight, d_bias, None


def _strips(images: int, rows: int, columns: int, channels: int) -> Iterator[tuple[int, int, int]]:
    """(image, first row of tiles, rows of tiles) of the strips of a batch, near STRIP_BYTES."""
    size = max(1, STRIP_BYTES // (4 * TILE**2 * columns * channels))
    size = -(-rows // -(-rows // size))  # of equal height, as far as it goes
    for image in range(images):
        for top in range(0, rows, size):
            yield image, top, min(size, rows - top)


class _Patches(torch.autograd.Function):
    """The first layer, whose input needs no gradient: one product of patches and filters."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        n, height, width, channels = x.shape
        out_channels, _, kernel, _ = weight.shape
        h, w = height - kernel + 1, width - kernel + 1
        s = x.stride()
        view = x.as_strided(
            (n, h, w, kernel, kernel, channels), (s[0], s[1], s[2], s[1], s[2], s[3])
        )
        patches = view.reshape(n * h * w, -1)
        y = torch.mm(patches, weight.permute(2, 3, 1, 0).reshape(-1, out_channels)).add_(bias)
        if relu:
            y.clamp_(min=0)
        y = y.view(n, h, w, out_channels)
        ctx.save_for_backward(patches, y if relu else None)
        ctx.shape = weight.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        patches, y = ctx.saved_tensors
        out_channels, channels, kernel, _ = ctx.shape
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.reshape(-1, out_channels)
        d_weight = torch.mm(patches.T, grad).view(kernel, kernel, channels, out_channels)
        return None, d_weight.permute(3, 2, 0, 1), grad.sum(0), None


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    """Stride-1 convolution without padding, then ReLU if wanted, of a channels-last image.

    Args:
        x: (N, H, W, C) contiguous, float32 or float64, on the CPU.
        weight: (K, C, k, k), k in 1, 3, 4. bias: (K,).

    Returns:
        (N, H - k + 1, W - k + 1, K), differentiable in every argument (x of 3 channels: not in x).

    Raises:
        ValueError: another size of kernel.
    """
    kernel = weight.shape[2]
    if kernel == 1:
        y = F.linear(x, weight.flatten(1), bias)
        return torch.relu(y) if relu else y
    if kernel not in (3, 4) or weight.shape[3] != kernel:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; its kernel must be 1, 3 or 4")
    function = _Patches if x.shape[3] == 3 and not x.requires_grad else _Winograd
    return function.apply(x.contiguous(), weight, bias, relu)
