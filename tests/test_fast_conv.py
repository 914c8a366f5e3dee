"""Winograd's convolutions against torch's, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from efficientad import fast_conv

CASES = [
    # kernel, input and output channels, images, height, width
    (3, 5, 7, 2, 6, 9),
    (3, 5, 7, 1, 3, 3),
    (3, 16, 8, 3, 23, 17),
    (4, 5, 7, 2, 7, 9),
    (4, 5, 7, 1, 4, 4),
    (4, 16, 8, 3, 22, 31),
    (4, 3, 8, 2, 13, 12),
    (1, 5, 7, 2, 4, 3),
]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("kernel", "channels", "width", "n", "rows", "columns"), CASES)
def test_output_and_gradients(kernel, channels, width, n, rows, columns, relu, dtype, monkeypatch):
    monkeypatch.setattr(fast_conv, "STRIP_BYTES", 40_000)  # several strips an image
    torch.manual_seed(0)
    make = {"dtype": torch.float64}
    x = torch.randn(n, rows, columns, channels, **make).requires_grad_(channels != 3)
    weight = (torch.randn(width, channels, kernel, kernel, **make) / kernel).requires_grad_()
    bias = torch.randn(width, **make).requires_grad_()
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    # Not at the kink of ReLU, where float32 may fall to the other side.
    direction = torch.randn_like(y) * ((y.detach().abs() > 1e-3) if relu else 1)
    y = y.relu() if relu else y
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    expected = [y, *torch.autograd.grad(y, inputs, direction)]

    cast = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    found = fast_conv.convolve(*cast, relu=relu)
    inputs = [t for t in cast if t.requires_grad]
    found = [found, *torch.autograd.grad(found, inputs, direction.to(dtype))]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= TOLERANCES[dtype] * b.abs().max().clamp(min=1)


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match="must be 1, 3 or 4"):
        fast_conv.convolve(torch.rand(1, 8, 8, 4), torch.rand(2, 4, 5, 5), torch.rand(2), relu=True)
