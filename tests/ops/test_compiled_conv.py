"""The compiled convolutions: against the definition in float64, levels, borders, NaN, threads."""

from __future__ import annotations

import multiprocessing
import os
import threading

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers_memory import at_the_end_of_a_page

from efficientad import FastPredictor
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.ops import compiled_conv, native
from efficientad.ops.compiled_conv import Layer, filter_gradient, mean_square, resize

pytestmark = pytest.mark.skipif(
    not compiled_conv.available(), reason="efficientad._native is not built"
)
TOLERANCE = 1e-5  # of the largest output, or of 1
LEVELS = ("portable", "avx2", "avx512")
SENTINEL = 12345.0
CASES = [
    # channels, outputs, kernel, step, padding, pool, pool padding, images, height, width
    (16, 8, 3, 1, 0, False, 0, 2, 3, 3),
    (16, 8, 3, 1, 1, False, 0, 1, 23, 17),
    (20, 33, 4, 1, 3, True, 1, 3, 9, 22),
    (17, 70, 3, 1, 1, True, 1, 2, 8, 9),
    (129, 40, 4, 1, 2, False, 0, 1, 9, 7),
    (300, 32, 4, 1, 0, False, 0, 1, 4, 4),
    (64, 96, 4, 1, 0, True, 0, 1, 33, 30),
    (32, 24, 4, 1, 3, True, 1, 1, 2, 1),
    (3, 40, 4, 1, 0, True, 0, 1, 21, 26),
    (3, 128, 4, 1, 3, True, 1, 2, 12, 11),
    (5, 7, 3, 1, 0, False, 0, 1, 3, 5),
    (3, 32, 4, 2, 1, False, 0, 2, 20, 23),
    (130, 5, 4, 2, 1, False, 0, 1, 9, 6),
    (64, 64, 8, 1, 0, False, 0, 1, 8, 9),
    (300, 64, 1, 1, 0, False, 0, 2, 5, 7),
]


@pytest.fixture
def settings():
    """settings(level, threads) for the compiled code; skips a level the processor has not."""
    before = torch.get_num_threads()

    def choose(level: str = "", threads: int | None = None) -> None:
        module = native.module()
        if level and level not in module.levels():
            pytest.skip(f"this processor has no {level} (it has {module.levels()})")
        module.set_level(level)
        if threads is not None:
            torch.set_num_threads(threads)
            native.set_threads(threads)

    yield choose
    choose("", before)
    native.set_threads(0)


def example(channels, outputs, kernel, n, rows, columns):
    torch.manual_seed(channels + kernel)
    x = torch.randn(n, rows, columns, channels)
    weight = torch.randn(outputs, channels, kernel, kernel) / kernel
    return x, weight, torch.randn(outputs)


def by_definition(x, weight, bias, step, padding, relu, pool, pool_padding):
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias, step, padding)
    y = y.relu() if relu else y
    y = F.avg_pool2d(y, 2, 2, pool_padding) if pool else y
    return y.permute(0, 2, 3, 1)


def close(found, expected) -> bool:
    limit = TOLERANCE * expected.abs().max().clamp(min=1)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= limit)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "step", "padding", "pool", "pool_padding", "n", "h", "w"),
    CASES,
)
def test_layers(
    channels, outputs, kernel, step, padding, pool, pool_padding, n, h, w, level, settings
):
    settings(level)
    x, weight, bias = example(channels, outputs, kernel, n, h, w)
    for relu in (False, True):
        arguments = (step, padding, relu, pool, pool_padding)
        names = ("step", "padding", "relu", "pool", "pool_padding")
        layer = Layer(weight, bias, **dict(zip(names, arguments, strict=True)))
        found = layer(x)
        assert close(found, by_definition(x, weight, bias, *arguments))
        assert found.shape[1:3] == layer.size(h, w)


def test_the_avx_levels_give_the_same_bits(settings):
    layers = []
    for channels, outputs, kernel, step, padding, pool, pool_padding, n, h, w in CASES:
        x, weight, bias = example(channels, outputs, kernel, n, h, w)
        options = {"padding": padding, "pool": pool, "pool_padding": pool_padding, "relu": True}
        layers.append((Layer(weight, bias, step=step, **options), x))
    strips = [(torch.randn(2, 20, 20, 40), torch.randn(2, 21 - k, 21 - k, 70), k) for k in (3, 4)]
    results = []
    for level in ("avx2", "avx512"):
        settings(level)
        gradients = [filter_gradient(rows, outputs, kernel) for rows, outputs, kernel in strips]
        results.append([layer(x) for layer, x in layers] + gradients)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("sizes", [(16, 8, 2, 23, 17), (5, 7, 1, 4, 4), (130, 70, 2, 30, 25)])
def test_filter_gradient(kernel, sizes, level, settings):
    settings(level)
    channels, outputs, n, h, w = sizes
    x = example(channels, outputs, kernel, n, h, w)[0]
    gradient = torch.randn(n, h - kernel + 1, w - kernel + 1, outputs)
    shape = (outputs, channels, kernel, kernel)
    moved = [t.double().permute(0, 3, 1, 2) for t in (x, gradient)]
    expected = torch.nn.grad.conv2d_weight(moved[0], shape, moved[1])
    assert close(filter_gradient(x, gradient, kernel), expected)


@pytest.mark.parametrize(("channels", "padding", "pool_padding"), [(3, 0, 0), (40, 3, 1)])
def test_pooling_inside_is_pooling_apart(channels, padding, pool_padding):
    x, weight, bias = example(channels, 40, 4, 2, 31, 28)
    inside = Layer(weight, bias, padding=padding, relu=True, pool=True, pool_padding=pool_padding)(
        x
    )
    y = Layer(weight, bias, padding=padding, relu=True)(x)
    apart = F.avg_pool2d(y.permute(0, 3, 1, 2), 2, 2, pool_padding).permute(0, 2, 3, 1)
    # The tiles lie otherwise where the pooling begins outside the image.
    assert torch.equal(inside, apart) if pool_padding == 0 else close(inside, apart)


def test_adding_to_what_is_there():
    x, weight, bias = example(40, 50, 3, 1, 9, 10)
    there = torch.randn(1, 7, 8, 50)
    found = there.clone()
    assert Layer(weight, bias, relu=True)(x, found, add=True) is found
    expected = by_definition(x, weight, bias, 1, 0, False, False, 0) + there
    assert close(found, expected.relu())


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("channels", [3, 40])
def test_a_nan_reaches_every_output_that_reads_it_and_no_further_than_its_tiles(
    channels, kernel, settings
):
    for level in native.module().levels():
        settings(level)
        x, weight, bias = example(channels, 40, kernel, 2, 25, 26)
        layer = Layer(weight, bias, relu=True)
        clean = layer(x)
        x[1, 11, 13, 1] = float("nan")
        found = layer(x).isnan()
        touched = torch.zeros(25 - kernel + 1, 26 - kernel + 1, dtype=torch.bool)
        touched[11 - kernel + 1 : 12, 13 - kernel + 1 : 14] = True
        assert found[1][touched].all()
        tiles = touched
        if channels >= compiled_conv.FEW_CHANNELS:  # whole tiles of 4x4
            tiles = torch.zeros_like(touched)
            tiles[(11 - kernel + 1) // 4 * 4 : 12, (13 - kernel + 1) // 4 * 4 : 16] = True
        assert not found[1][~tiles].any()
        assert not found[0].any()
        assert torch.equal(layer(x)[1][~tiles], clean[1][~tiles])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("channels", [3, 24])
def test_windows_of_larger_tensors(channels, pool):
    """Input and output are windows; around the input lie NaNs, around the output a sentinel."""
    x, weight, bias = example(channels, 41, 4, 2, 14, 15)
    layer = Layer(weight, bias, padding=1, relu=True, pool=pool)
    expected = layer(x)
    around = torch.full((4, 20, 21, channels + 7), float("nan"))
    window = around[1:3, 2:16, 3:18, 4 : 4 + channels]
    window.copy_(x)
    n, h, w, k = expected.shape
    canvas = torch.full((n + 2, h + 3, w + 4, k + 5), SENTINEL)
    target = canvas[1:-1, 1:-2, 2:-2, 3:-2]
    target.fill_(float("nan"))
    assert layer(window, target) is target
    assert torch.equal(target, expected)
    target.fill_(SENTINEL)
    assert (canvas == SENTINEL).all()


@pytest.mark.parametrize("channels", [3, 17, 40])
def test_nothing_is_touched_behind_the_last_value(channels, settings):
    """In a child process, which touching it would kill."""
    for level in native.module().levels():
        settings(level, threads=1)
        x, weight, bias = example(channels, 41, 4, 1, 11, 12)
        layer = Layer(weight, bias, padding=1)
        expected = layer(x)
        last, out = at_the_end_of_a_page(x), at_the_end_of_a_page(expected)
        last.copy_(x)

        def work(layer=layer, last=last, out=out, expected=expected) -> None:
            os._exit(0 if torch.equal(layer(last, out), expected) else 1)

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        assert child.exitcode == 0


def test_bits_depend_neither_on_threads_nor_on_the_batch(settings):
    cases = [(40, 200, 4, 5, 40, 37), (3, 64, 4, 3, 70, 66), (64, 300, 3, 2, 9, 9)]
    for case in cases:
        x, weight, bias = example(*case)
        layer = Layer(weight, bias, relu=True, pool=True)
        settings(threads=1)
        expected = layer(x)
        for threads in (2, 3, 8):
            settings(threads=threads)
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x[1:2]), expected[1:2])


def test_several_python_threads_at_once(settings):
    settings(threads=2)
    x, weight, bias = example(40, 64, 4, 2, 60, 61)
    layer = Layer(weight, bias)
    expected, wrong = layer(x), []

    def work() -> None:
        wrong.extend(i for i in range(10) if not torch.equal(layer(x), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (33, 16), (15, 31)])
@pytest.mark.parametrize("source", [(1, 1), (4, 4), (16, 33), (31, 15)])
def test_resize(source, size):
    x = torch.randn(2, *source, 19)
    expected = F.interpolate(x.double().permute(0, 3, 1, 2), size=size, mode="bilinear")
    found = resize(x, size)
    assert found.shape == (2, *size, 19)
    assert (found - expected.permute(0, 2, 3, 1)).abs().max() <= 1e-5
    windows = torch.randn(2, *source, 40)
    assert torch.equal(resize(windows[..., 3:22], size), resize(windows[..., 3:22].clone(), size))


@pytest.mark.parametrize("channels", [1, 16, 19, 384])
def test_mean_square(channels, settings):
    x = torch.randn(2, 7, 90, channels)
    expected = x.double().square().mean(3)
    for threads in (1, 2):
        settings(threads=threads)
        assert (mean_square(x) - expected).abs().max() <= 1e-6 * expected.max()
    x[1, 3, 4, 0] = float("nan")
    assert mean_square(x).isnan().nonzero().tolist() == [[1, 3, 4]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x: layer(x.double()), "x is torch.float64 on cpu; it must be float32"),
        (lambda layer, x: layer(x[0]), r"x has shape \(8, 9, 20\); it must be \(N, H, W, 20\)"),
        (lambda layer, x: layer(x[..., :3]), r"it must be \(N, H, W, 20\)"),
        (lambda layer, x: layer(x[:, :2]), "too small for a kernel of 3 with padding 0"),
        (lambda layer, x: layer(x.expand(1, 8, 9, 20).transpose(2, 3).contiguous().transpose(2, 3)),
         "its channels must lie side by side"),
        (lambda layer, x: layer(x, x), r"out has shape \(1, 8, 9, 20\); it must be"),
        (lambda layer, x: layer(x, add=True), "add is True; it needs `out`"),
        (lambda layer, x: filter_gradient(x, x, 3), r"gradient has shape \(1, 8, 9, 20\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    layer = Layer(torch.rand(7, 20, 3, 3), torch.rand(7))
    with pytest.raises(ValueError, match=message):
        call(layer, torch.rand(1, 8, 9, 20))


# ---- the network of them ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return helpers.detector("S")


@pytest.mark.parametrize(
    ("size", "padding"),
    [("S", False), ("S", True), pytest.param("M", False, marks=pytest.mark.slow)],
)
def test_the_compiled_network_is_the_one_in_torch(size, padding, small, monkeypatch):
    plain_small = (size, padding) == ("S", False)
    model = small if plain_small else helpers.detector(size, padding=padding)
    images = model.normalize(helpers.images(2, seed=5))
    images = images.contiguous(memory_format=torch.channels_last)
    compiled = FoldedNetwork(model, torch.float32)
    monkeypatch.setattr(compiled_conv, "available", lambda: False)
    plain = FoldedNetwork(model, torch.float32)
    with torch.no_grad():
        found, expected = compiled(images), plain(images)
        single = compiled(images[1:])
    for a, b, c in zip(found, expected, single, strict=True):
        assert not torch.equal(a, b)  # two ways indeed
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=0.1)
        assert torch.equal(a[1:], c)


def test_other_dtypes_are_left_to_torch(small):
    assert FoldedNetwork(small, torch.float32)._native is not None
    assert FoldedNetwork(small, torch.float64)._native is None


def test_a_nan_in_one_frame_makes_its_score_nan(small):
    """And leaves the other frame of the batch its bits."""
    predictor = FastPredictor(small, device="cpu", dtype="float32")
    images = helpers.images(2, seed=6)
    clean = predictor.detect(images)
    images[0, 1, 100, 130] = float("nan")
    found = predictor.detect(images)
    assert found.score[0].isnan()
    assert found.anomaly_map[0].isnan().any()
    assert torch.equal(found.score[1], clean.score[1])
    assert torch.equal(found.anomaly_map[1], clean.anomaly_map[1])
