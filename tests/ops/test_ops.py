"""The operators: backends, fakes, messages, and the whole forward pass through the kernels."""

from __future__ import annotations

import types
from functools import partial

import helpers
import pytest
import torch

from efficientad.ops import fused, operators, reference

HALF = torch.float16


def cases(device: str = "cpu", dtype: torch.dtype = HALF):
    """Operation -> arguments on which it runs, small; weights are consecutive views."""
    torch.manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def group(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        parts = [randn(*shape) * 0.1 for shape in shapes]
        return list(torch.cat(parts).split([len(p) for p in parts]))

    def bias(*lengths: int) -> list[torch.Tensor]:
        return list(torch.randn(sum(lengths), device=device).split(list(lengths)))

    mean, std = torch.tensor([0.4, 0.5, 0.6], device=device), torch.ones(3, device=device)
    image = torch.rand(2, 3, 9, 11, device=device)
    two = [randn(2, 9, 10, 32), randn(2, 9, 10, 32)]
    affine = torch.tensor([1.0, 2.0, -0.5, 0.1], device=device)
    maps = torch.rand(3, 2, 6, 7, device=device), torch.rand(3, 2, 6, 7, device=device)
    return {
        "pack": ((image, mean, std), {"channels_last": False, "border": 3, "dtype": dtype}),
        "first_conv_relu_pool": (
            (randn(2, 9, 11, 4), group((16, 4, 4, 4), (16, 4, 4, 4)), bias(16, 16)),
            {"pool_padding": 1},
        ),
        "conv_relu": (
            (two, group((16, 3, 3, 32), (32, 3, 3, 32)), bias(16, 32)),
            {"padding": 1, "relu": False},
        ),
        "conv_relu_pool": (
            (two, group((16, 4, 4, 32), (16, 4, 4, 32)), bias(16, 16)),
            {"padding": 0},
        ),
        "pair_distance": (
            (
                *two,
                randn(2, 6, 7, 16),
                *(randn(16, 4, 4, 32) * 0.1, randn(32, 4, 4, 32) * 0.1, randn(16, 3, 3, 16) * 0.1),
                bias(32)[0],
            ),
            {},
        ),
        "strided_conv_relu": ((two[0], randn(16, 4, 4, 32) * 0.1, bias(16)[0]), {}),
        "resize_conv_relu": (
            (two[0], randn(16, 4, 4, 32) * 0.1, bias(16)[0], (7, 12)),
            {"padding": 2},
        ),
        "bottleneck": (
            (
                randn(2, 8, 8, 16),
                *(randn(16, 8, 8, 16) * 0.1, bias(16)[0]),
                *(randn(16, 4, 4, 16) * 0.1, bias(16)[0]),
            ),
            {},
        ),
        "anomaly_map": (
            (*maps, affine, (20, 30)),
            {"padding": 4, "map_dtype": torch.float16},
        ),
    }


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_every_operation_is_covered():
    assert set(cases()) == set(fused.OPERATIONS)
    for name in fused.OPERATIONS:
        assert callable(getattr(reference, name))
        assert getattr(torch.ops.efficientad, name) is not None


@pytest.mark.parametrize("name", fused.OPERATIONS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_backends_give_the_definition(name, backend, device):
    arguments, options = cases(device)[name]
    expected = flat(getattr(reference, name)(*arguments, **options))
    found = flat(getattr(fused, name)(*arguments, **options, backend=backend))
    for mine, definition in zip(found, expected, strict=True):
        if name == "pair_distance":
            mine, definition = mine.sum(0), definition.sum(0)
        assert mine.dtype == definition.dtype
        assert mine.shape == definition.shape
        error = (mine.float() - definition.float()).abs().max()
        tolerance = 0.0 if backend == "torch" or name == "pack" else 2e-3
        assert error <= tolerance * definition.float().abs().max()


@pytest.mark.parametrize("name", fused.OPERATIONS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fakes_agree_with_the_operators(name, backend, device):
    """Shapes and dtypes under fake tensors, which is what torch.compile and export see."""
    arguments, options = cases(device)[name]
    call = getattr(fused, name)
    real = flat(call(*arguments, **options, backend=backend))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_arguments, fake_options = torch.utils._pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, (arguments, options)
        )
        fake = flat(call(*fake_arguments, **fake_options, backend=backend))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", ["conv_relu", "anomaly_map"])
def test_operators_pass_torchs_own_check(name, monkeypatch):
    recorded = []
    genuine = operators.OPERATORS[name]
    record = {name: lambda *a: recorded.append(a) or genuine(*a)}
    monkeypatch.setattr(fused, "OPERATORS", operators.OPERATORS | record)
    arguments, options = cases()[name]
    getattr(fused, name)(*arguments, **options, backend="torch")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(genuine, recorded[0], test_utils=tests)


def test_compile_sees_one_node():
    arguments, options = cases()["conv_relu"]

    def step(x, weight, bias):
        return fused.conv_relu(x, weight, bias, **options, backend="torch")[1] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), step(*arguments))


def test_backend_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("EFFICIENTAD_BACKEND", raising=False)
    assert fused.choose_backend(cpu) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend is 'triton' and the tensors are on cpu"):
        fused.choose_backend(cpu, "triton")
    monkeypatch.setenv("EFFICIENTAD_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"EFFICIENTAD_BACKEND is 'cuda'.*triton, torch"):
        fused.choose_backend(cpu)
    assert fused.choose_backend(cpu, "torch") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("EFFICIENTAD_BACKEND", "")
    assert fused.choose_backend(torch.device("cuda:0")) == "triton"
    assert fused.choose_backend(torch.device("cuda:0"), "torch") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert fused.choose_backend(torch.device("cuda:0")) == "torch"
    with pytest.raises(ValueError, match="from sm_80 on"):
        fused.choose_backend(torch.device("cuda:0"), "triton")


def change(name: str, position, value, **options):
    """The case's arguments with one replaced; (i, j) replaces entry j of sequence i."""
    arguments, defaults = cases()[name]
    arguments = list(arguments)
    if isinstance(position, tuple):
        sequence = list(arguments[position[0]])
        sequence[position[1]] = value(sequence[position[1]])
        arguments[position[0]] = sequence
    elif position is not None:
        arguments[position] = value(arguments[position])
    return arguments, {**defaults, **options}


@pytest.mark.parametrize(
    ("name", "position", "value", "options", "message"),
    [
        ("pack", 0, lambda t: t.int(), {}, r"image has dtype torch.int32; it must be uint8"),
        ("pack", 0, lambda t: t[0], {}, r"image has shape \(3, 9, 11\); it must be \(any, 3"),
        ("pack", 1, lambda t: t[:2], {}, r"mean has shape \(2,\); it must be \(3\)"),
        ("pack", None, None, {"border": -1}, "border is -1"),
        ("pack", None, None, {"dtype": torch.int8}, "dtype is torch.int8"),
        ("conv_relu", 0, lambda x: x[:1], {}, "entries per argument are x 1, weight 2"),
        ("conv_relu", (0, 1), lambda t: t[:1], {}, r"x\[1\] has shape \(1, 9, 10, 32\)"),
        ("conv_relu", (0, 1), lambda t: t.float(), {}, r"x\[1\] has dtype torch.float32"),
        ("conv_relu", (0, 1), lambda t: t[..., :16].clone(), {}, r"x\[1\] has shape .*, 16\);"),
        ("conv_relu", (1, 1), lambda t: t[:, :1, :1].clone(), {}, r"weight\[1\] .* weight\[0\]"),
        ("conv_relu", (0, 0), lambda t: t.transpose(1, 2), {}, r"x\[0\] has strides .*contiguous"),
        ("conv_relu", (1, 0), lambda t: t.float(), {}, r"weight\[0\] has dtype torch.float32"),
        ("conv_relu", (1, 0), lambda t: t[:, :2, :2], {}, "contiguous"),
        ("conv_relu", (1, 0), lambda t: t[:, :2, :2].clone(), {}, "2x2 filters"),
        ("conv_relu", (2, 1), lambda t: t.half(), {}, r"bias\[1\] has dtype torch.float16"),
        ("conv_relu", (2, 1), lambda t: t[:3], {}, r"bias\[1\] has shape \(3,\); it must be \(32"),
        ("conv_relu", None, None, {"padding": -1}, "padding is -1"),
        ("conv_relu", None, None, {"scale": [torch.ones(16), torch.ones(32)]}, "scale is given"),
        ("conv_relu_pool", None, None, {"pool_padding": 2}, "pool_padding is 2; it must be 0 or 1"),
        ("first_conv_relu_pool", 0, lambda t: t[:, :3], {}, "contiguous"),
        ("first_conv_relu_pool", 0, lambda t: t[:, :3].clone(), {}, "3x11 pixels"),
        ("pair_distance", 1, lambda t: t[:, :8].clone(), {}, r"student has shape \(2, 8"),
        ("pair_distance", 2, lambda t: t[:, :5].clone(), {}, r"autoencoder has shape"),
        ("pair_distance", 4, lambda t: t[:16], {}, r"weight_student has shape .*it must be \(32"),
        ("strided_conv_relu", None, None, {"stride": 3}, "stride is 3; it must be 1 or 2"),
        ("resize_conv_relu", 3, lambda s: (0, 5), {}, r"size is \(0, 5\)"),
        ("resize_conv_relu", None, None, {"rows": torch.arange(3)}, "rows has dtype torch.int64"),
        ("bottleneck", 0, lambda t: t[:, :7].clone(), {}, r"x has shape \(2, 7, 8, 16\)"),
        ("anomaly_map", 1, lambda t: t[:2], {}, r"map_ae has shape \(2, 2, 6, 7\)"),
        ("anomaly_map", 2, lambda t: t[:3], {}, "affine has shape"),
        ("anomaly_map", None, None, {"padding": -1}, "padding is -1"),
        ("anomaly_map", None, None, {"map_dtype": torch.int8}, "map_dtype is torch.int8"),
    ],
)
def test_messages_name_argument_value_and_rule(name, position, value, options, message):
    arguments, options = change(name, position, value, **options)
    with pytest.raises(ValueError, match=message):
        getattr(fused, name)(*arguments, **options, backend="torch")


def test_a_tensor_on_another_device_is_named():
    arguments, options = change("conv_relu", (1, 0), lambda t: t.to("meta"))
    with pytest.raises(ValueError, match=r"weight\[0\] is on meta; it must be on cpu"):
        fused.conv_relu(*arguments, **options)


def test_the_kernels_refuse_float32(device):
    arguments, options = cases(device, torch.float32)["strided_conv_relu"]
    with pytest.raises(ValueError, match=r"has dtype torch.float32; it must be float16 or"):
        fused.strided_conv_relu(*arguments, **options, backend="triton")


def through_ops() -> types.SimpleNamespace:
    """The operators on triton, with the tiles that ship."""
    calls = {name: partial(getattr(fused, name), backend="triton") for name in fused.OPERATIONS}
    return types.SimpleNamespace(**calls)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("where", ["pixel", "weight"])
def test_one_value_that_is_not_finite_reaches_the_score(where, device):
    """Through the whole chain: the image's score is NaN, its neighbour's is what it was."""
    model = helpers.detector().to(device)
    image = helpers.images(2, seed=6).to(device)
    expected = model(image)
    if where == "pixel":
        image[0, 1, 77, 130] = torch.inf
    else:
        model.student.conv2.weight[7, 3, 2, 1] = torch.inf
    operations = through_ops() if device != "cpu" else helpers.interpreted_in_few_programs()
    _, score = helpers.compose(model, image, operations, HALF)
    assert score[0].isnan()
    if where == "weight":
        assert score[1].isnan()
    else:
        scale = max(0.1, expected.anomaly_map[1].abs().max().item())
        assert (score[1] - expected.score[1]).abs() <= 1e-2 * scale


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "padding", "operations"),
    [
        pytest.param("M", False, helpers.interpreted_in_few_programs, marks=pytest.mark.slow),
        pytest.param("M", True, helpers.interpreted_in_few_programs, marks=pytest.mark.slow),
        pytest.param("S", False, through_ops, marks=pytest.mark.slow),
    ],
)
def test_the_forward_pass_through_the_kernels(size, padding, operations, device):
    """Every kernel at its real shapes, in float16, against the float32 detector.

    EfficientAD-S with large tiles: tests/fast/test_predictor_parity.py.
    """
    if device != "cpu":
        operations = through_ops
    model = helpers.detector(size, padding=padding).to(device)
    image = helpers.images(1, seed=5).to(device)
    anomaly_map, score = helpers.compose(model, image, operations(), HALF)
    expected = model(image)
    scale = max(0.1, expected.anomaly_map.abs().max().item())
    error = anomaly_map - expected.anomaly_map
    assert error.abs().max() <= 1e-2 * scale
    assert error.square().mean().sqrt() <= 2e-3 * scale
    assert (score - expected.score).abs().max() <= 1e-2 * scale
