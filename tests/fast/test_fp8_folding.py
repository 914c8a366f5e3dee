"""Folded weights in fp8: the chain against fp8 written out by hand, the choice of scales, NaN."""

from __future__ import annotations

import copy
import functools
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers_fp8 import e4m3, interpret_fp8_exactly, interpreted_small

from efficientad import EfficientAD
from efficientad.fast.folding import fold
from efficientad.fast.folding_fp8 import LAYERS, MARGIN, activation_steps, fold_fp8, last_fp8_layer
from efficientad.fast.fused_network import Plan, distance_maps, run_plainly, trunk
from efficientad.model.networks import PDN_LAYERS
from efficientad.ops import reference

FP8 = torch.float8_e4m3fn
PIXELS = (44, 52)  # 3 x 5 cells


def power_of_two(value: float) -> float:
    return 2.0 ** math.ceil(math.log2(value))


@functools.cache
@torch.no_grad()
def model(size: str = "S", padding: bool = False) -> EfficientAD:
    """Random weights in float64, whose student and decoder answer as the teacher does."""
    torch.manual_seed(0)
    made = EfficientAD(size, padding=padding).double()
    x = (helpers.images(2, *PIXELS).double() - made.image_mean) / made.image_std
    teacher, student = made.teacher(x), made.student(x)
    last = made.student.last
    last.weight.data *= 0.5 * teacher.std() / student.std()
    made.set_statistics(teacher.mean((0, 2, 3)), teacher.std((0, 2, 3), correction=0))
    made.set_quantiles(0, 1, 0, 1)
    return made


class Case:
    """One image: as the kernels get it, as the networks see it, and a decoder's output."""

    def __init__(self, size: str = "S", padding: bool = False) -> None:
        self.model = model(size, padding)
        self.plan = Plan(size, padding, (256, 256), self.model.map_padding)
        image = helpers.images(1, *PIXELS)
        means = (v.float().flatten() for v in (self.model.image_mean, self.model.image_std))
        border = self.plan.border
        options = {"channels_last": False, "border": border, "dtype": torch.float16}
        self.packed = reference.pack(image, *means, **options)
        inner = self.packed[:, border : border + PIXELS[0], border : border + PIXELS[1], :3]
        self.image = inner.permute(0, 3, 1, 2).double()
        generator = torch.Generator().manual_seed(0)
        cells = [-(-n // 4) - (0 if padding else 8) for n in PIXELS]
        self.decoded = torch.randn(1, *cells, 64, generator=generator).half()
        self.largest = [torch.zeros(2) for _ in PDN_LAYERS[size][1:]]
        for k, network in enumerate((self.model.teacher, self.model.student)):
            for i, x in enumerate(activations(network, self.image)):
                self.largest[i][k] = x.amax()

    def maps(self, weights, operations=reference, images: int = 1):
        packed, decoded = (t.repeat(images, 1, 1, 1) for t in (self.packed, self.decoded))
        return self.maps_of(weights, packed, decoded, operations)

    def maps_of(self, weights, packed, decoded, operations=reference):
        features = trunk(self.plan, weights, packed, operations, run_plainly)
        return [m.sum(0) for m in distance_maps(weights, features, decoded, operations)]


def activations(network, x, weight=lambda i, conv: conv.weight, stored=lambda i, x: x):
    """What a PDN's layers but the last give, on given filters and after what storing does."""
    for i, (conv, row) in enumerate(network.layers()[:-1], start=1):
        x = F.relu(F.conv2d(x, weight(i, conv), conv.bias, padding=conv.padding))
        x = F.avg_pool2d(x, 2, 2, padding=int(network.padding)) if row.pool else x
        x = stored(i, x)
        yield x


def rounded(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    steps = steps[:, None, None, None]
    return e4m3(weight / steps) * steps


def by_hand(case: Case, last: int):
    """Both distance maps in float64 on values rounded to e4m3, or to float16 after layer `last`.

    Activations are multiples of s, filters of t per output channel; both are powers of two, the
    smallest for which MARGIN times the largest activation, and every weight, is at most 448.
    """
    teacher, student = case.model.teacher, case.model.student
    inputs, steps = [], []
    for k, network in enumerate((teacher, student)):
        s = [power_of_two(MARGIN * float(v[k]) / 448) for v in case.largest]

        def weight(i, conv):
            if not 2 <= i <= last:
                return conv.weight.half().double()
            return rounded(conv.weight, top(conv.weight, 448))

        def stored(i, x, s=s):
            return e4m3(x / s[i - 1]) * s[i - 1] if i < last else x.half().double()

        *_, x = activations(network, case.image, weight, stored)
        inputs.append(x)
        steps.append(s[-1])
    teacher, student = teacher.last, student.last
    std, mean = case.model.teacher_std.flatten(), case.model.teacher_mean.flatten()
    w_teacher, b_teacher = teacher.weight / std[:, None, None, None], (teacher.bias - mean) / std
    w_student, deconv8 = student.weight, case.model.autoencoder.decoder.deconv8
    w_autoencoder = deconv8.weight.half().double()
    if last == len(case.largest) + 1:  # one factor for both operands of each difference
        own = top(w_student * steps[1], 448)
        others = torch.cat([top(w_teacher * steps[0], 448), top(deconv8.weight, 2**15)])
        both = torch.maximum(own, others)
        w_teacher = rounded(w_teacher, both[:384] / steps[0])
        w_student = rounded(w_student, both / steps[1])
    else:
        w_teacher, w_student = w_teacher.half().double(), w_student.half().double()
    first = F.conv2d(inputs[0], w_teacher, b_teacher)
    st, ae = F.conv2d(inputs[1], w_student, student.bias).chunk(2, dim=1)
    decoded = case.decoded.permute(0, 3, 1, 2).double()
    second = F.conv2d(decoded, w_autoencoder, deconv8.bias, padding=1)
    return (first - st).square().mean(1), (second - ae).square().mean(1)


def top(weight: torch.Tensor, limit: float) -> torch.Tensor:
    rows = weight.flatten(1).abs().amax(1) / limit
    return torch.tensor([power_of_two(float(v)) for v in rows], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "padding", "layers"),
    [
        ("S", False, "second"),
        ("S", False, "inner"),
        ("S", False, "all"),
        ("S", True, "all"),
        ("M", False, "inner"),
        ("M", True, "all"),
    ],
)
def test_the_chain_is_fp8_written_by_hand(size, padding, layers, monkeypatch):
    """In float64: sums in float32 would round some activations to the other neighbour."""
    case = Case(size, padding)
    expected = by_hand(case, last_fp8_layer(size, layers))
    weights = fold_fp8(case.model, case.largest, layers)
    monkeypatch.setattr(reference, "_wide", lambda x: x.double())
    found = case.maps(weights)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_layers_have_their_dtypes():
    ones = [torch.ones(2)] * 5
    for layers, last in (("second", 2), ("inner", 5), ("all", 6)):
        weights = fold_fp8(model("M"), ones, layers)
        kinds = [w[0].dtype for w, _ in weights.trunk] + [weights.last[0].dtype]
        assert kinds == [FP8 if 2 <= i <= last else torch.float16 for i in range(1, 7)]
        scaled = [scales is not None for scales in weights.trunk_scales]
        assert scaled == [2 <= i <= last for i in range(1, 6)]
        assert (weights.last_scale is not None) == (layers == "all")
        assert weights.last[2].dtype == weights.encoder[0][0].dtype == torch.float16
        for (filters, biases), scales in zip(weights.trunk, weights.trunk_scales, strict=True):
            for pair in (filters, biases, *([scales] if scales else [])):
                assert pair[1].data_ptr() == pair[0].data_ptr() + pair[0].nbytes
    with pytest.raises(ValueError, match="fp8_layers is 'third'; it must be 'second' or 'inner'"):
        fold_fp8(model("M"), ones, "third")


# ---- scales ----------------------------------------------------------------------------------


def test_a_large_filter_does_not_spoil_the_others():
    """Nor does a filter of zeros; every weight is within half a step of a 3-bit mantissa."""
    own = copy.deepcopy(model())
    weight = own.student.conv3.weight.data
    weight[7] *= 1e4
    weight[9] = 0
    folded = fold_fp8(own, [torch.ones(2)] * 3, "inner")
    (_, filters), (_, scale) = folded.trunk[2][0], folded.trunk_scales[2]
    read = power_of_two(MARGIN / 448)  # of layer 2's activations
    stored = filters.float() * (scale / read)[:, None, None, None]
    expected = weight.permute(0, 2, 3, 1)
    largest = expected.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert ((stored - expected).abs() <= expected.abs() / 16 + largest * 2.0**-17).all()
    assert (filters[9].float() == 0).all()
    used = filters.float().abs().amax(dim=(1, 2, 3))
    assert (used[torch.arange(256) != 9] > 200).all()


def test_activations_up_to_the_margin_do_not_saturate():
    largest = torch.logspace(-8, 8, 1001, dtype=torch.float64)
    for value in largest:
        s = activation_steps(torch.stack([value, value / 3]), 2)
        for k, v in enumerate((float(value), float(value) / 3)):
            assert 224 < MARGIN * v / s[k] <= 448
            assert math.frexp(s[k])[0] == 0.5
    assert activation_steps(torch.tensor([0.0, 448 / MARGIN]), 2) == [1.0, 1.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"layer 3 are \[1.0, (nan|inf)\]"):
            activation_steps(torch.tensor([1.0, bad]), 3)


def test_the_first_layer_stores_what_the_margin_promises():
    """Four times the calibration's largest value comes out as it is, not saturated."""
    weights = fold_fp8(model(), [torch.ones(2)] * 3, "second")
    filters, biases = weights.trunk[0]
    s = power_of_two(MARGIN / 448)
    for i in range(2):
        filters[i].zero_()
        biases[i].copy_(torch.linspace(0, 8, 128) / s)
    image = torch.zeros(1, 6, 6, 4).half()
    first = reference.first_conv_relu_pool(image, filters, biases, out_dtype=FP8)
    values = first[0].float()[0, 0, 0] * s
    exact = torch.linspace(0, 8, 128)
    inside = exact <= MARGIN
    assert ((values - exact).abs() <= exact / 16)[inside].all()
    assert values.max() == 448 * s


def test_float16_filters_stay_finite_beside_small_activations():
    """A teacher that hardly answers must not blow up its filters, nor the autoencoder's."""
    for layers in LAYERS:
        weights = fold_fp8(model(), [torch.full((2,), 1e-12)] * 3, layers)
        for filters in (*weights.trunk[0][0], weights.last[2]):
            assert torch.isfinite(filters).all()
            assert filters.abs().max() <= 2**15
    exact, read = fold(model(), torch.float64), weights.last_scale[384:, None, None, None]
    restored = weights.last[2].double() * read
    assert (restored - exact.last[2]).abs().max() <= exact.last[2].abs().max() * 2.0**-11


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_a_damaged_image_gives_nan_and_leaves_its_neighbour_alone(layers):
    case = Case()
    weights = fold_fp8(case.model, case.largest, layers)
    whole = case.maps(weights, images=2)
    packed, decoded = (t.repeat(2, 1, 1, 1) for t in (case.packed, case.decoded))
    for value in (math.nan, math.inf, -math.inf):
        packed[1, 20, 22, 1] = value
        found = case.maps_of(weights, packed, decoded)
        for a, b in zip(found, whole, strict=True):
            assert torch.equal(a[0], b[0])
            assert a[1].isnan().any()
            assert not a[1].isinf().any()


# ---- kernels ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("layers", "padding"), [("second", False), ("all", True)])
def test_interpreted_kernels_give_the_definition(layers, padding, device, monkeypatch):
    """Sums in another order round some activations to the other neighbour, hence the bound."""
    if device != "cpu":
        pytest.skip("the whole network on the device: tests/fast/test_fp8_cuda.py")
    interpret_fp8_exactly(monkeypatch)
    case = Case("S", padding)
    weights = fold_fp8(case.model, case.largest, layers)
    expected = case.maps(weights)
    for a, b in zip(case.maps(weights, interpreted_small()), expected, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max()
