"""The convolutions in AMX tiles: against the definition in float64, borders, NaN, threads, bits."""

from __future__ import annotations

import copy
import multiprocessing
import os

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers_memory import at_the_end_of_a_page

from efficientad.fast import folded_network
from efficientad.fast.backends import TorchBackend
from efficientad.fast.folded_network import FoldedNetwork, network_name
from efficientad.ops import amx_conv, native
from efficientad.ops.amx_conv import Layer, image, mean_square, pack, resize

AVAILABLE = amx_conv.available()
WHY = "efficientad._native is not built, or the processor has no AMX"
needs_amx = pytest.mark.skipif(not AVAILABLE, reason=WHY)

ROUNDED = 2.0**-8  # of a number, to the eight digits of bfloat16
SUMMED = 2.0**-24  # of the sum of the absolute products, for each of them: float32, one by one
TWO = 2.0**-15  # of a product of numbers that are kept as two bfloat16 each
SENTINEL = 12345.0
CASES = [
    # channels, outputs, kernel, step, padding, pool, pool padding, images, height, width
    (32, 8, 3, 1, 0, False, 0, 2, 3, 3),
    (16, 32, 3, 1, 1, False, 0, 1, 23, 17),
    (20, 33, 4, 1, 3, True, 1, 3, 9, 22),
    (64, 70, 3, 1, 1, True, 1, 2, 8, 9),
    (129, 40, 4, 1, 2, False, 0, 1, 9, 7),
    (300, 32, 4, 1, 0, False, 0, 1, 4, 4),
    (64, 96, 4, 1, 0, True, 0, 4, 33, 30),
    (32, 24, 4, 1, 3, True, 1, 1, 2, 1),
    (64, 32, 4, 2, 1, False, 0, 2, 20, 23),
    (130, 5, 4, 2, 1, False, 0, 1, 9, 6),
    (64, 64, 8, 1, 0, False, 0, 1, 8, 9),
    (96, 65, 1, 1, 0, False, 0, 2, 5, 40),
    (32, 16, 3, 1, 0, True, 0, 1, 4, 70),
]
PACKED = [
    # outputs, step, pool, pool padding, images, height, width
    (40, 1, True, 0, 1, 21, 26),
    (128, 1, True, 1, 2, 12, 11),
    (32, 2, False, 0, 2, 20, 23),
    (7, 1, False, 0, 1, 4, 4),
]


@pytest.fixture
def threads():
    """threads(count): of the compiled code."""
    before = torch.get_num_threads()

    def choose(count: int) -> None:
        torch.set_num_threads(count)
        native.set_threads(count)

    yield choose
    choose(before)
    native.set_threads(0)


def example(channels, outputs, kernel, n, rows, columns):
    """Images in bfloat16, filters of bfloat16 numbers in float32, biases."""
    torch.manual_seed(channels + kernel)
    x = torch.randn(n, rows, columns, channels).bfloat16()
    weight = (torch.randn(outputs, channels, kernel, kernel) / kernel).bfloat16().float()
    return x, weight, torch.randn(outputs)


def by_definition(x, weight, bias, step=1, padding=0, relu=False, pool=False, pool_padding=0):
    """In float64, and the same of absolute values: what rounding is measured against."""
    x, weight, bias = x.double().permute(0, 3, 1, 2), weight.double(), bias.double()
    y = F.conv2d(x, weight, bias, step, padding)
    size = F.conv2d(x.abs(), weight.abs(), bias.abs(), step, padding)
    y = y.relu() if relu else y
    if pool:
        y, size = (F.avg_pool2d(t, 2, 2, pool_padding) for t in (y, size))
    return y.permute(0, 2, 3, 1), size.permute(0, 2, 3, 1)


def check(found, expected, size, products, other=0.0):
    """Whether float32 sums of so many products, rounded once, explain every difference."""
    assert found.shape == expected.shape
    bound = ROUNDED * expected.abs() + ((products + 8) * SUMMED + other) * size
    assert ((found.double() - expected).abs() <= bound).all()


@needs_amx
@pytest.mark.parametrize("case", CASES)
def test_layers(case):
    channels, outputs, kernel, step, padding, pool, pool_padding, n, h, w = case
    x, weight, bias = example(channels, outputs, kernel, n, h, w)
    for relu in (False, True):
        arguments = (step, padding, relu, pool, pool_padding)
        names = ("step", "padding", "relu", "pool", "pool_padding")
        layer = Layer(weight, bias, **dict(zip(names, arguments, strict=True)))
        found = layer(x)
        check(found, *by_definition(x, weight, bias, *arguments), channels * kernel**2)
        assert found.shape[1:3] == layer.size(h, w)


@needs_amx
@pytest.mark.parametrize("case", PACKED)
def test_layers_of_packed_images(case):
    outputs, step, pool, pool_padding, n, h, w = case
    x, weight, bias = example(3, outputs, 4, n, h, w)
    x, weight = 3 + x.float() / 7, weight / 3  # which are no bfloat16
    options = {"step": step, "relu": True, "pool": pool, "pool_padding": pool_padding}
    for border in (0, 1, 3):
        found = Layer(weight, bias, packed=True, **options)(pack(x, border))
        check(found, *by_definition(x, weight, bias, padding=border, **options), 96, TWO)


@needs_amx
def test_a_packed_image_is_two_numbers_a_value_with_zeros_around():
    x = torch.randn(2, 5, 6, 3) * torch.tensor([1e-3, 1.0, 300.0])
    packed = pack(x, 2)
    assert packed.shape == (2, 9, 10, 8)
    inner = packed[:, 2:-2, 2:-2].float()
    assert torch.equal(inner[..., :3], x.bfloat16().float())
    assert torch.equal(inner[..., 4:7], (x - inner[..., :3]).bfloat16().float())
    assert not inner[..., 3::4].any()
    packed[:, 2:-2, 2:-2] = 0
    assert not packed.any()


@needs_amx
@pytest.mark.parametrize(("channels", "kernel", "outputs"), [(64, 4, 384), (40, 3, 33)])
def test_mean_square_rounds_nothing(channels, kernel, outputs):
    """The layers' sums enter with float32's rounding alone."""
    x, weight, bias = example(channels, outputs, kernel, 2, 13, 20)
    y, size = by_definition(x, weight, bias)
    error = (channels * kernel**2 + 8) * SUMMED * size
    bound = (2 * y.abs() * error + error**2).mean(3) + 64 * SUMMED * y.square().mean(3)
    found = mean_square((Layer(weight, bias), x))
    assert found.dtype == torch.float32
    assert ((found - y.square().mean(3)).abs() <= bound).all()
    rounded = Layer(weight, bias)(x).double().square().mean(3)
    ours, theirs = ((t - y.square().mean(3)).abs().max() for t in (found, rounded))
    assert ours <= theirs / 20


@needs_amx
@pytest.mark.parametrize("spare", [0, 1])
def test_mean_square_of_two_layers(spare):
    """Whether the two images' rows are as long or not, which is laid into tiles otherwise."""
    x, weight, bias = example(40, 50, 4, 2, 12, 19)
    z, more, _ = example(64, 50, 3, 2, 11, 18 + spare)
    z = z[:, :, :18]
    y = by_definition(x, weight, bias)[0] + by_definition(z, more, torch.zeros(50))[0]
    found = mean_square((Layer(weight, bias), x), (Layer(more, None), z))
    assert (found - y.square().mean(3)).abs().max() <= 1e-5 * y.square().mean(3).max()


@needs_amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_reaches_exactly_the_outputs_that_read_it(bad):
    for kernel, channels in ((3, 40), (4, 64)):
        x, weight, bias = example(channels, 40, kernel, 2, 25, 26)
        layer = Layer(weight, bias)
        clean = layer(x)
        x[1, 11, 13, 1] = bad
        expected, found = by_definition(x, weight, bias)[0], layer(x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isposinf(), expected.isposinf())
        assert torch.equal(found.isneginf(), expected.isneginf())
        assert torch.equal(found[expected.isfinite()], clean[expected.isfinite()])
        relu = Layer(weight, bias, relu=True, pool=True)(x)
        assert torch.equal(
            relu.isnan(), by_definition(x, weight, bias, 1, 0, True, True)[0].isnan()
        )
        squares = mean_square((layer, x))
        assert torch.equal(squares.isfinite(), expected.isfinite().all(3))


@needs_amx
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("channels", [24, 64])
def test_windows_of_larger_tensors(channels, pool):
    """Input and output are windows; around the input lie NaNs, around the output a sentinel."""
    x, weight, bias = example(channels, 41, 4, 2, 14, 15)
    layer = Layer(weight, bias, relu=True, pool=pool)
    expected = layer(x)
    around = torch.full((4, 20, 21, channels + 7), float("nan"), dtype=torch.bfloat16)
    window = around[1:3, 2:16, 3:18, 4 : 4 + channels]
    window.copy_(x)
    n, h, w, k = expected.shape
    canvas = torch.full((n + 2, h + 3, w + 4, k + 5), SENTINEL, dtype=torch.bfloat16)
    outside = canvas[0, 0, 0, 0].clone()
    target = canvas[1:-1, 1:-2, 2:-2, 3:-2]
    target.fill_(float("nan"))
    assert layer(window, target) is target
    assert torch.equal(target, expected)
    target.fill_(SENTINEL)
    assert (canvas == outside).all()


@needs_amx
@pytest.mark.parametrize("step", [1, 2])
def test_nothing_is_touched_behind_the_last_value(step, threads):
    """In a forked child, which touching it would kill, and which may use the tiles, too."""
    threads(1)
    x, weight, bias = example(64, 41, 4, 1, 12, 13)
    layer = Layer(weight, bias, step=step)
    expected = layer(x).contiguous()
    last, out = at_the_end_of_a_page(x), at_the_end_of_a_page(expected)
    last.copy_(x)

    def work() -> None:
        os._exit(0 if torch.equal(layer(last, out), expected) else 1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0


@needs_amx
def test_bits_depend_neither_on_threads_nor_on_the_batch(threads):
    """Nor where there are more threads than tiles."""
    for case in ((64, 200, 4, 4, 40, 37), (64, 32, 3, 3, 9, 9)):
        x, weight, bias = example(*case)
        layer, plain = Layer(weight, bias, relu=True, pool=True), Layer(weight, bias)
        threads(1)
        expected, squares = layer(x), mean_square((plain, x))
        for count in (2, 3, 40):
            threads(count)
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x[1:2]), expected[1:2])
            assert torch.equal(mean_square((plain, x)), squares)
            assert torch.equal(mean_square((plain, x[1:2])), squares[1:2])


@needs_amx
@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (33, 16)])
@pytest.mark.parametrize("source", [(1, 1), (4, 4), (31, 15)])
def test_resize(source, size, channels):
    x = torch.randn(2, *source, channels).bfloat16()
    expected = F.interpolate(x.double().permute(0, 3, 1, 2), size=size, mode="bilinear")
    found = resize(x, size, border=2)
    inner = found[:, 2:-2, 2:-2]
    bound = ROUNDED * expected.abs() + 1e-5
    assert ((inner - expected.permute(0, 2, 3, 1)).abs() <= bound.permute(0, 2, 3, 1)).all()
    assert torch.equal(inner, resize(x, size))
    inner.zero_()
    assert not found.any()


@pytest.mark.parametrize("channels", [3, 32, 64, 512])
def test_pixels_of_an_image_lie_an_odd_number_of_lines_apart(channels):
    x = image(2, 5, 6, channels)
    assert x.shape == (2, 5, 6, channels)
    assert x.dtype == torch.bfloat16
    assert x.stride(2) % 64 == 32


@needs_amx
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x: layer(x.float()), "x is torch.float32 on cpu; it must be bfloat16"),
        (lambda layer, x: layer(x[0]), r"x has shape \(8, 9, 20\); it must be \(N, H, W, 20\)"),
        (lambda layer, x: layer(x[:, :2]), "too small for a kernel of 3 with padding 0"),
        (lambda layer, x: layer(x.transpose(2, 3).contiguous().transpose(2, 3)),
         "its channels must lie side by side"),
        (lambda layer, x: layer(x, x), r"out has shape \(1, 8, 9, 20\); it must be"),
        (lambda layer, x: mean_square((layer, x), (layer, x[:, :5])), "terms give outputs of"),
        (lambda layer, x: pack(x, 1), r"x is torch.bfloat16 of shape \(1, 8, 9, 20\)"),
        (lambda layer, x: Layer(torch.rand(8, 20, 4, 4), None, packed=True),
         r"weight has shape \(8, 20, 4, 4\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    layer = Layer(torch.rand(7, 20, 3, 3), torch.rand(7))
    with pytest.raises(ValueError, match=message):
        call(layer, torch.rand(1, 8, 9, 20).bfloat16())


# ---- the network of them ---------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def without_amx():
    """without_amx(): as on a processor without."""
    module = native.module()
    yield lambda: module.set_amx(False)
    module.set_amx(True)


@pytest.fixture(scope="module")
def small():
    return helpers.detector("S")


@needs_amx
@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ("S", False),
        pytest.param("S", True, marks=pytest.mark.slow),
        pytest.param("M", False, marks=pytest.mark.slow),
    ],
)
def test_the_network_is_as_near_to_float32_as_the_one_in_torch(size, padding, small, without_amx):
    plain_small = (size, padding) == ("S", False)
    model = small if plain_small else helpers.detector(size, padding=padding)
    images = model.normalize(helpers.images(2, seed=5))
    images = images.contiguous(memory_format=torch.channels_last)
    amx = FoldedNetwork(model, torch.bfloat16)
    with torch.no_grad():
        found, single = amx(images), amx(images[1:])
        exact = FoldedNetwork(model, torch.float32)(images[1:])
        without_amx()
        in_torch = FoldedNetwork(model, torch.bfloat16)(images[1:])
    for a, one, b, expected in zip(found, single, in_torch, exact, strict=True):
        assert torch.equal(a[1:], one)
        ours, theirs = ((t - expected).square().mean().sqrt() for t in (one, b))
        assert not torch.equal(one, b)  # two ways indeed
        assert ours <= 1.1 * theirs
        assert ours <= 2e-3 * expected.max()


@needs_amx
def test_without_amx_bfloat16_is_left_to_torch(without_amx):
    name = "folded torch network, AMX convolutions"
    assert network_name(torch.bfloat16, CPU) == name
    assert folded_network.compiled_network(torch.float64, CPU) is None
    without_amx()
    assert not amx_conv.available()
    assert network_name(torch.bfloat16, CPU) == "folded torch network"
    assert folded_network.compiled_network(torch.bfloat16, CPU) is None


@pytest.mark.skipif(AVAILABLE or not native.available(), reason="the processor has AMX")
def test_a_processor_without_amx_refuses_it():
    with pytest.raises(RuntimeError, match="this processor or system has no AMX"):
        native.module().set_amx(True)


@needs_amx
@pytest.mark.parametrize("shared", [False, True])
def test_a_nan_in_one_image_reaches_its_maps_alone(shared, small):
    """Also where teacher and student have the same inner layers, computed once."""
    model = small
    if shared:
        model = copy.deepcopy(small)
        pairs = zip(model.student.layers()[:-1], model.teacher.layers()[:-1], strict=True)
        for (own, _), (other, _) in pairs:
            own.load_state_dict(other.state_dict())
    network = FoldedNetwork(model, torch.bfloat16)
    assert network.shared == shared
    images = helpers.images(2, seed=6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        clean = network(images)
        images[0, 1, 100, 130] = float("nan")
        found = network(images)
    for a, b in zip(found, clean, strict=True):
        assert a[0].isnan().any()
        assert torch.equal(a[1], b[1])
    assert not found[0][0].isnan().all()  # a cell of map_st reads a part of the image


@needs_amx
def test_a_predictor_says_what_computes(small):
    name = TorchBackend(small, torch.bfloat16, CPU).name
    assert name == "folded torch network, AMX convolutions"
