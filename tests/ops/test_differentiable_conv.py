"""Differentiable convolutions of a CPU, compiled and in torch, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from efficientad.ops import compiled_conv, differentiable_conv, native, winograd
from efficientad.ops.differentiable_conv import convolve

CASES = [
    # kernel, input and output channels, images, height, width
    (3, 5, 7, 2, 6, 9),
    (3, 5, 7, 1, 3, 3),
    (3, 16, 8, 3, 23, 17),
    (3, 33, 40, 1, 7, 8),
    (4, 5, 7, 2, 7, 9),
    (4, 5, 7, 1, 4, 4),
    (4, 16, 8, 3, 22, 31),
    (4, 3, 8, 2, 13, 12),
    (4, 20, 33, 1, 5, 6),
    (4, 130, 17, 1, 9, 8),
    (1, 5, 7, 2, 4, 3),
]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}
AVAILABLE = compiled_conv.available()
needs_native = pytest.mark.skipif(not AVAILABLE, reason="efficientad._native is not built")
WAYS = [
    pytest.param("compiled", torch.float32, marks=needs_native),
    ("torch", torch.float32),
    ("torch", torch.float64),
]


@pytest.fixture
def threads():
    """Sets the number of threads of torch and of the compiled code."""
    before = torch.get_num_threads()

    def choose(count: int) -> None:
        torch.set_num_threads(count)
        native.set_threads(count)

    yield choose
    torch.set_num_threads(before)
    native.set_threads(0)


@pytest.fixture(autouse=True)
def several_strips(monkeypatch):
    """An image is cut into several strips, in torch."""
    monkeypatch.setattr(differentiable_conv, "STRIP_BYTES", 40_000)


def example(kernel, channels, width, n, rows, columns, *, requires_grad=True):
    """x, weight and bias in float64; first layers (3 channels) need no gradient of x."""
    torch.manual_seed(0)
    make = {"dtype": torch.float64}
    x = torch.randn(n, rows, columns, channels, **make)
    weight = torch.randn(width, channels, kernel, kernel, **make) / kernel
    bias = torch.randn(width, **make)
    x.requires_grad_(requires_grad and channels != 3)
    return x, weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad)


def with_gradients(function, inputs, direction) -> list[torch.Tensor]:
    y = function(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, direction.to(y.dtype))]


def by_definition(x, weight, bias):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("way", "dtype"), WAYS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("kernel", "channels", "width", "n", "rows", "columns"), CASES)
def test_output_and_gradients(
    kernel, channels, width, n, rows, columns, relu, way, dtype, monkeypatch
):
    monkeypatch.setattr(compiled_conv, "available", lambda: way == "compiled")
    inputs = example(kernel, channels, width, n, rows, columns)
    y = by_definition(*inputs)
    # Not at the kink of ReLU, where float32 may fall to the other side.
    direction = torch.randn_like(y) * ((y.detach().abs() > 1e-3) if relu else 1)

    def exact(*inputs):
        y = by_definition(*inputs)
        return y.relu() if relu else y

    expected = with_gradients(exact, inputs, direction)
    cast = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
    found = with_gradients(lambda *i: convolve(*i, relu=relu), cast, direction)
    assert len(found) == len(expected) == (4 if channels != 3 else 3)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= TOLERANCES[dtype] * b.abs().max().clamp(min=1)


@needs_native
def test_the_way_is_chosen_by_what_is_there_and_by_dtype(monkeypatch):
    """Float64 goes through torch, float32 through the compiled code where it is there."""
    inputs = [t.detach() for t in example(3, 16, 8, 1, 9, 9)]

    def name(dtype) -> str:
        cast = [t.to(dtype).requires_grad_() for t in inputs]
        return type(convolve(*cast, relu=False).grad_fn).__name__

    assert name(torch.float64) == "_WinogradBackward"
    assert name(torch.float32) == "_CompiledBackward"
    monkeypatch.setattr(native, "_native", None)
    assert not compiled_conv.available()
    assert name(torch.float32) == "_WinogradBackward"


@pytest.mark.parametrize(("way", "dtype"), WAYS[:2])
def test_the_error_of_a_real_layer(way, dtype, monkeypatch):
    """The widest layer of PDN-S: within TOLERANCES, and 5e-6 of the outputs in the mean."""
    monkeypatch.setattr(compiled_conv, "available", lambda: way == "compiled")
    torch.manual_seed(1)
    x = torch.randn(1, 19, 19, 512, dtype=torch.float64).relu()
    weight = torch.randn(96, 512, 4, 4, dtype=torch.float64) / (4 * 512**0.5)
    expected = by_definition(x, weight, None)
    found = convolve(x.to(dtype), weight.to(dtype), torch.zeros(96), relu=False)
    error = found.double() - expected
    assert error.abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    assert error.square().mean().sqrt() <= 5e-6 * expected.square().mean().sqrt()


@needs_native
@pytest.mark.parametrize("kernel", [3, 4])
def test_bits_are_the_same_at_a_fixed_number_of_threads(kernel, threads):
    """What an exact resume of a training rests on. Outputs and d_x are so for any number."""
    inputs = [t.float().detach() for t in example(kernel, 40, 70, 2, 40, 37)]
    direction = torch.randn(2, 41 - kernel, 38 - kernel, 70)
    results = []
    for count in (1, 2, 2, 5):
        threads(count)
        leaves = [t.clone().requires_grad_() for t in inputs]
        results.append(with_gradients(lambda *i: convolve(*i, relu=True), leaves, direction))
    assert all(map(torch.equal, results[1], results[2]))
    for result in results[1:]:
        assert all(map(torch.equal, result[:2], results[0][:2]))


def test_a_frozen_input_gets_no_gradient():
    x, weight, bias = (t.detach().float() for t in example(3, 16, 8, 1, 9, 9))
    weight.requires_grad_()
    y = convolve(x, weight, bias, relu=False)
    y.sum().backward()
    assert x.grad is None
    assert weight.grad.shape == weight.shape


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match="must be 1, 3 or 4"):
        convolve(torch.rand(1, 8, 8, 4), torch.rand(2, 4, 5, 5), torch.rand(2), relu=True)


@pytest.mark.parametrize("kernel", [3, 4])
def test_the_transforms_are_exact_on_whole_numbers(kernel):
    """F(4, kernel): outputs of one axis by transforms, which float32 holds without rounding."""
    data, filters, outputs = (
        torch.tensor(m, dtype=torch.float64) for m in winograd.matrices(kernel)
    )
    side = winograd.OUT + kernel - 1
    assert data.shape == (side, side)
    assert filters.shape == (side, kernel)
    assert outputs.shape == (side, winograd.OUT)
    x, taps = torch.arange(side) ** 2 % 7.0, torch.arange(kernel) * 3.0 - 2
    found = outputs.T @ ((data @ x.double()) * (filters @ taps.double()))
    expected = F.conv1d(x[None, None], taps[None, None])[0, 0].double()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for exact in (data, outputs):
        assert torch.equal(exact.float().double(), exact)
    inputs, transposed = winograd.axis_transforms(kernel)
    assert torch.equal(inputs.double(), data)
    assert torch.equal(transposed.double(), outputs.T)
    both = winograd.transforms(kernel, torch.float64)
    assert torch.equal(both[1], torch.kron(filters, filters))
