"""The transforms of Winograd's minimal filtering, F(4, 3) and F(4, 4).

Four outputs of a filter of 3 or 4 taps are values of a product of polynomials. Both factors are
evaluated at as many points as the product has coefficients, multiplied point by point, and the
outputs found by (transposed) interpolation: 6 or 7 multiplications instead of 12 or 16, and on both
axes of an image 36 of 144 or 49 of 256. Source: Lavin and Gray, arXiv 1509.09308.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
from torch import Tensor

OUT = 4  # output rows and columns of a tile
# Where the polynomials are evaluated, beside infinity. Chosen by measuring: in float32 the largest
# error of a layer is near 3e-6 (3 taps) and 5e-6 (4 taps) of its largest output, that of a direct
# convolution 1e-6. Binary fractions, so that the input and output transforms are exact numbers.
POINTS = {3: (0, 1, -1, 0.5, -2), 4: (0, 1, -1, -0.5, -2, 1.5)}


@functools.cache
def matrices(kernel: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """One axis: input (T, T), filter (T, kernel) and output (T, OUT) transform, T = kernel + 3."""
    points = [Fraction(point) for point in POINTS[kernel]]
    data: list[list[Fraction]] = []
    filters: list[list[Fraction]] = []
    outputs: list[list[Fraction]] = []
    for i, a in enumerate(points):
        others = [b for k, b in enumerate(points) if k != i]
        norm = functools.reduce(lambda x, b: x * (a - b), others, Fraction(1))
        data.append([*_polynomial(others), Fraction(0)])
        filters.append([a**j / norm for j in range(kernel)])
        outputs.append([a**j for j in range(OUT)])
    data.append(_polynomial(points))
    filters.append([Fraction(int(j == kernel - 1)) for j in range(kernel)])
    outputs.append([Fraction(int(j == OUT - 1)) for j in range(OUT)])
    return _floats(data), _floats(filters), _floats(outputs)


def _floats(matrix: list[list[Fraction]]) -> list[list[float]]:
    return [[float(value) for value in row] for row in matrix]


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), from the constant on."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        kept = [*coefficients, Fraction(0)]
        coefficients = [s - root * c for s, c in zip(shifted, kept, strict=True)]
    return coefficients


@functools.cache
def axis_transforms(kernel: int) -> tuple[Tensor, Tensor]:
    """Input (T, T) and output (OUT, T) transform of one axis, float32, for the compiled code."""
    data, _, outputs = matrices(kernel)
    with torch.inference_mode(False):
        return torch.tensor(data), torch.tensor(outputs).T.contiguous()


@functools.cache
def transforms(kernel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both axes at once: input (T^2, T^2), filter (T^2, kernel^2) and output (T^2, OUT^2)."""
    with torch.inference_mode(False):
        one = [torch.tensor(m, dtype=torch.float64) for m in matrices(kernel)]
        data, filters, outputs = (torch.kron(m, m).to(dtype) for m in one)
        return data, filters, outputs
