"""The PDN kernels against `efficientad.ops.reference`: numbers, tails, what they read and write.

Every input lies inside a larger buffer of NaN and every result, filled with NaN, inside one of a
sentinel, so that a read or a write past an edge fails; the `test_wrong_...` tests prove it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from helpers_pdn import (
    BF16,
    F8,
    F16,
    Guarded,
    Memory,
    close,
    first_layer,
    joined,
    layer,
    pair_arguments,
    place,
    random,
    result,
)
from torch import Tensor

from bench.census import pdn as census_pdn
from efficientad.kernels import autoencoder_distance, conv, first_conv, grouped, pack, pair_distance
from efficientad.kernels.common import target_of
from efficientad.kernels.conv import conv_relu, conv_relu_pool
from efficientad.kernels.first_conv import first_conv_relu_pool
from efficientad.kernels.grouped import Tile, accumulate_conv
from efficientad.ops import reference

SMALL = Tile(32, 16, 32, warps=4, stages=2)  # 32 pixels (pooled: 8), 16 channels, 16 of K
TARGETS = (80, 90)  # filters by pointers, filters by TMA


def skip_unless_possible(device, dtype=F16, target=80) -> None:
    if device == "cpu":
        if dtype == BF16:
            pytest.skip("the interpreter's bfloat16 tl.dot is silently wrong")
        return
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < max(target, grouped.FP8_MIN_TARGET if dtype == F8 else 80):
        pytest.skip(f"the device is sm_{major}{minor}")


@pytest.fixture(autouse=True)
def _forget_guards():
    yield
    Guarded.all.clear()


@pytest.fixture
def memory(device, monkeypatch):
    """Makes an access beside a guarded tensor an error; on a GPU that is the sanitizer's work."""
    if device != "cpu":
        return None
    from triton.runtime import interpreter

    watched = Memory(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watched)
    return watched


# --- pack -------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(n: int, h: int, w: int, dtype, channels_last: bool, strided: bool, device) -> Tensor:
    """(n, h, w, 3) or (n, 3, h, w), with `strided` a slice of a larger batch that skips rows."""
    g = torch.Generator().manual_seed(n + h)
    shape = (n, h, w, 3) if channels_last else (n, 3, h, w)
    x = torch.randint(0, 256, shape, generator=g)
    x = x.to(torch.uint8) if dtype == torch.uint8 else (x / 255).to(dtype)
    if not strided:
        return x.to(device) if dtype == torch.uint8 else place(x, device)
    larger = torch.full([2 * length + 3 for length in shape], 99).to(dtype)
    if dtype != torch.uint8:
        larger[:] = torch.nan
    view = larger[tuple(slice(1, 1 + 2 * length, 2) for length in shape)]
    view.copy_(x)
    return larger.to(device)[tuple(slice(1, 1 + 2 * length, 2) for length in shape)]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 17, 15), (3, 4, 64), (17, 3, 5)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, F16, torch.float32], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_pack_is_bit_equal(size, channels_last, dtype, strided, device, memory):
    x = image(*size, dtype, channels_last, strided, device)
    mean, std = place(torch.tensor(MEAN), device), place(torch.tensor(STD), device)
    n, h, w = size
    for border, out_dtype in ((0, F16), (3, F16), (1, BF16)):
        if device == "cpu" and out_dtype == BF16:
            continue  # the interpreter truncates
        out = result((n, h + 2 * border, w + 2 * border, 4), out_dtype, device)
        options = {"channels_last": channels_last, "border": border, "dtype": out_dtype}
        pack.pack(x, mean, std, **options, out=out.tensor)
        want = reference.pack(x.cpu(), mean.cpu(), std.cpu(), **options)
        assert torch.equal(out.check().cpu(), want)
    assert pack.pack(x, mean, std, channels_last=channels_last).dtype == F16


def test_pack_keeps_nan_in_its_pixel(device):
    x = image(2, 5, 6, torch.float32, True, False, device)
    x[1, 2, 3, 1] = torch.nan
    x[0, 4, 5, 2] = torch.inf
    y = pack.pack(x, x.new_tensor(MEAN), x.new_tensor(STD), channels_last=True, border=2)
    assert (~y.isfinite()).nonzero().tolist() == [[0, 6, 7, 2], [1, 4, 5, 1]]


def test_wrong_pack_extent_is_seen(device):
    x = image(1, 5, 6, torch.float32, True, False, device)
    mean, std = x.new_tensor(MEAN), x.new_tensor(STD)
    out = result((1, 5, 6, 4), F16, device)
    pack._launch(x, mean, std, out.tensor, True, 0, (6, 6))
    with pytest.raises(AssertionError, match="outside"):
        out.check()
    out = result((1, 6, 6, 4), F16, device)
    pack._launch(x, mean, std, out.tensor, True, 0, (6, 6))
    with pytest.raises(AssertionError, match="must not be read"):
        out.check()


# --- first layer ------------------------------------------------------------------------------

FIRST_CASES = [  # n, h, w, couts, pool_padding; 8 pooled pixels a tile
    (1, 5, 5, (16,), 0),  # one pooled pixel
    (1, 5, 18, (16, 16), 0),  # tile - 1, odd width
    (1, 6, 21, (32, 32), 0),  # tile + 1, odd height
    (3, 9, 14, (16, 16), 0),
    (2, 8, 9, (16, 16), 1),
    (17, 4, 5, (16, 16), 1),
]


def first_size(n, h, w, pool_padding) -> tuple[int, int, int]:
    return n, (h - 3 + 2 * pool_padding) // 2, (w - 3 + 2 * pool_padding) // 2


@pytest.mark.parametrize("case", FIRST_CASES)
@pytest.mark.parametrize("bn", [16, 32])  # a tile in one network, a tile across both
def test_first_conv_relu_pool(case, bn, device, memory):
    n, h, w, couts, pad = case
    arguments = first_layer(n, h, w, couts, device)
    want = reference.first_conv_relu_pool(**arguments, pool_padding=pad)
    if (h - 3) % 2 and not pad:
        arguments["x"][:, -1] = torch.nan  # pooling floors: nothing needs this row
    if (w - 3) % 2 and not pad:
        arguments["x"][:, :, -1] = torch.nan
    out = [result((*first_size(n, h, w, pad), c), F16, device) for c in couts]
    first_conv_relu_pool(
        **arguments, pool_padding=pad, out=[o.tensor for o in out], tile=Tile(32, bn, 128, 4, 1)
    )
    close([o.check() for o in out], want)


@pytest.mark.parametrize("target", TARGETS)
def test_first_conv_with_the_tables_tiles(target, device):
    skip_unless_possible(device, target=target)
    arguments = first_layer(2, 11, 13, (128, 128), device)
    want = reference.first_conv_relu_pool(**arguments, pool_scale=1.0)
    got = first_conv_relu_pool(**arguments, pool_scale=1.0, target=target)
    close(got, want)
    with pytest.raises(AssertionError):
        close(got[::-1], want)  # the networks are told apart


def test_wrong_first_conv_extent_is_seen(device):
    arguments = first_layer(1, 8, 9, (16,), device)
    options = {"target": None, "tile": SMALL, "pool_padding": 0, "pool_scale": 0.25}
    n, h, w = first_size(1, 8, 9, 0)
    out = result((n, h, w, 16), F16, device)
    first_conv._launch(**arguments, out=[out.tensor], out_size=(h + 1, w), **options)
    with pytest.raises(AssertionError, match="outside"):
        out.check()
    out = result((n, h + 1, w, 16), F16, device)
    first_conv._launch(**arguments, out=[out.tensor], out_size=(h + 1, w), **options)
    with pytest.raises(AssertionError, match="must not be read"):
        out.check()


# --- convolution ------------------------------------------------------------------------------

CONV_CASES = [  # n, h, w, cin, couts, k, padding, relu; 32 pixels a tile
    (1, 4, 4, 16, (16,), 4, 0, True),  # one pixel
    (1, 1, 31, 16, (16, 32), 1, 0, True),
    (1, 1, 33, 32, (32, 16), 1, 0, False),
    (1, 34, 3, 16, (16, 16), 3, 0, True),
    (2, 7, 5, 32, (16, 48), 3, 1, True),
    (3, 7, 6, 16, (32, 32), 4, 0, False),
    (17, 4, 5, 16, (16, 16), 4, 0, True),
    (1, 3, 5, 16, (16, 16), 4, 3, True),  # the padding is wider than the image
]
POOL_CASES = [  # n, h, w, cin, couts, k, padding, pool_padding; 8 pooled pixels a tile
    (1, 5, 5, 16, (16,), 4, 0, 0),  # one pooled pixel
    (1, 5, 18, 16, (16, 32), 4, 0, 0),  # tile - 1, odd width
    (1, 5, 20, 32, (32, 16), 3, 0, 0),  # tile + 1, odd height
    (2, 8, 9, 32, (16, 16), 4, 0, 0),
    (3, 5, 4, 16, (32, 32), 4, 3, 1),
    (1, 4, 7, 16, (16, 16), 1, 0, 1),
    (17, 4, 5, 16, (16, 16), 3, 0, 0),
]


def conv_size(h, w, k, padding) -> tuple[int, int]:
    return h - k + 1 + 2 * padding, w - k + 1 + 2 * padding


@pytest.mark.parametrize("case", CONV_CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_conv_relu(case, target, device, memory):
    skip_unless_possible(device, target=target)
    n, h, w, cin, couts, k, padding, relu = case
    arguments = layer(n, h, w, cin, couts, k, device)
    want = reference.conv_relu(**arguments, padding=padding, relu=relu)
    out = [result((n, *conv_size(h, w, k, padding), c), F16, device) for c in couts]
    options = {"padding": padding, "relu": relu, "target": target, "tile": SMALL}
    conv_relu(**arguments, **options, out=[o.tensor for o in out])
    close([o.check() for o in out], want)


@pytest.mark.parametrize("case", POOL_CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_conv_relu_pool(case, target, device, memory):
    skip_unless_possible(device, target=target)
    n, h, w, cin, couts, k, padding, pool_padding = case
    arguments = layer(n, h, w, cin, couts, k, device)
    options = {"padding": padding, "pool_padding": pool_padding}
    want = reference.conv_relu_pool(**arguments, **options)
    size = conv_size(h, w, k, padding)
    for x in arguments["x"]:  # pooling floors: nothing needs the last row or column
        if size[0] % 2 and not pool_padding:
            x[:, -1] = torch.nan
        if size[1] % 2 and not pool_padding:
            x[:, :, -1] = torch.nan
    pooled = [(length + 2 * pool_padding) // 2 for length in size]
    out = [result((n, *pooled, c), F16, device) for c in couts]
    conv_relu_pool(**arguments, **options, target=target, tile=SMALL, out=[o.tensor for o in out])
    close([o.check() for o in out], want)


@pytest.mark.parametrize(
    ("target", "pool", "large"),  # every tile of the tables
    [
        (86, False, False), (86, True, False), (80, False, True), (80, True, False),
        (90, False, False), (90, False, True), (90, True, False),
    ],
)  # fmt: skip
def test_conv_with_the_tables_tiles(target, pool, large, device, monkeypatch):
    skip_unless_possible(device, target=target)
    if large:  # as if a handful of pixels were a large batch
        monkeypatch.setattr(conv, "PLAIN_TILES", {a: r[-1:] for a, r in conv.PLAIN_TILES.items()})
    function = conv_relu_pool if pool else conv_relu
    oracle = getattr(reference, function.__name__)
    for couts in ((256, 256), (128, 384)):
        arguments = layer(2, 7, 19, 64, couts, 1, device)
        got = function(**arguments, target=target)
        want = oracle(**arguments)
        close(got, want)
        if couts[0] == couts[1]:
            with pytest.raises(AssertionError):
                close(got[::-1], want)


@pytest.mark.parametrize("pool", [False, True])
def test_wrong_conv_extent_is_seen(pool, device):
    arguments = layer(1, 8, 9, 16, (16,), 3, device)
    size = (3, 3) if pool else (6, 7)
    wrong = (size[0] + 1, size[1])
    options = {"scale": None, "target": None, "tile": SMALL, "padding": 0, "relu": True}
    options["pool"] = pool
    out = result((1, *size, 16), F16, device)
    conv._launch(**arguments, out=[out.tensor], conv_size=(6, 7), out_size=wrong, **options)
    with pytest.raises(AssertionError, match="outside"):
        out.check()
    out = result((1, *wrong, 16), F16, device)
    conv._launch(**arguments, out=[out.tensor], conv_size=(6, 7), out_size=wrong, **options)
    with pytest.raises(AssertionError, match="must not be read"):
        out.check()


def test_a_stray_access_is_seen(memory, device):
    if memory is None:
        pytest.skip("compute-sanitizer sees it on a GPU")
    arguments = layer(1, 8, 9, 16, (16,), 3, device)
    out = result((1, 6, 7, 16), F16, device)
    with pytest.raises(Exception, match="a guard was touched"):
        conv._launch(
            **arguments, scale=None, out=[out.tensor], conv_size=(6, 7), out_size=(7, 7),
            target=None, tile=SMALL, padding=0, relu=True,
        )  # fmt: skip


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F8], ids=str)
def test_conv_dtypes(pool, dtype, device):
    skip_unless_possible(device, dtype)
    arguments = layer(2, 6, 7, 32, (16, 32), 3, device, dtype)
    scale = None
    if dtype == F8:
        scale = joined([torch.linspace(0.5, 2, len(w)) for w in arguments["weight"]], device)
    function = conv_relu_pool if pool else conv_relu
    oracle = getattr(reference, function.__name__)
    for out_dtype in (F16, dtype):
        if device == "cpu" and out_dtype == F8:
            continue  # the interpreter's rounding to fp8 loses the carry: 1.97 becomes 1
        want = oracle(**arguments, scale=scale, out_dtype=out_dtype)
        got = function(**arguments, scale=scale, out_dtype=out_dtype)
        close(got, want)


def test_fp8_result_saturates_and_infinity_becomes_nan(device):
    skip_unless_possible(device, F8)
    arguments = layer(1, 1, 3, 16, (16,), 1, device)
    arguments["weight"][0].copy_(torch.eye(16).view(16, 1, 1, 16))
    arguments["bias"][0].zero_()
    values = [448.0, 5000.0, -5000.0, 0.0]
    if device != "cpu":  # the interpreter writes 384 for NaN
        values += [torch.inf, -torch.inf, torch.nan]
    for value in values:
        arguments["x"][0].zero_()
        arguments["x"][0][..., 0] = value
        options = {"relu": False, "out_dtype": F8}
        got = conv_relu(**arguments, **options, tile=SMALL)[0][..., 0].float()
        want = reference.conv_relu(**arguments, **options)[0][..., 0].float()
        assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1)), value


# --- pair distance ----------------------------------------------------------------------------

PAIR_CASES = [  # n, h, w, ct, cs, ca, k; 32 pixels a tile
    (1, 4, 4, 16, 32, 16, 4),  # one pixel
    (1, 1, 33, 32, 16, 32, 1),  # the autoencoder's taps are the longer: its tiles go first
    (2, 7, 8, 32, 32, 16, 4),
    (17, 2, 3, 16, 16, 16, 1),
]
PAIR_TILES = [(SMALL, 80), (SMALL, 90), (Tile(32, 32, 32, 4, 2, bn_tail=16), 90)]


STUDENT_PART = ("teacher", "student", "weight_teacher", "weight_student", "bias")


def summed(maps) -> list[Tensor]:
    return [m.sum(0, keepdim=True) for m in maps]


@pytest.mark.parametrize("case", PAIR_CASES)
@pytest.mark.parametrize(("tile", "target"), PAIR_TILES)
def test_pair_distance(case, tile, target, device, memory):
    skip_unless_possible(device, target=target)
    n, h, w, _, _, _, k = case
    arguments = pair_arguments(*case, 48, device)
    slices = 48 // (tile.bn + tile.bn_tail)
    shape = (slices, n, h - k + 1, w - k + 1)
    out = [result(shape, torch.float32, device) for _ in range(2)]
    pair_distance.pair_distance(**arguments, out=[o.tensor for o in out], target=target, tile=tile)
    got, want = summed([o.check() for o in out]), reference.pair_distance(**arguments)
    close(got, want)
    with pytest.raises(AssertionError):
        close(got[::-1], want)
    if memory is not None:  # the kind with the longer sum is launched first
        low, high = Guarded.span(out[1 if k == 1 else 0].tensor)
        assert low <= memory.first_store < high


@pytest.mark.parametrize(("target", "large"), [(80, False), (90, False), (90, True)])
def test_pair_distance_with_the_tables_tiles(target, large, device, monkeypatch):
    skip_unless_possible(device, target=target)
    if large:
        tiles = {a: r[-1:] for a, r in pair_distance.TILES.items()}
        monkeypatch.setattr(pair_distance, "TILES", tiles)
    arguments = pair_arguments(1, 9, 15, 64, 128, 64, 1, 384, device)
    got = pair_distance.pair_distance(**arguments, target=target)
    assert len(got[0]) == (1 if large else 3)
    want = reference.pair_distance(**arguments)
    close(summed(got), want)
    # The student's halves are told apart.
    halves = arguments["weight_student"].roll(384, 0)
    swapped = reference.pair_distance(**{**arguments, "weight_student": halves})
    with pytest.raises(AssertionError):
        close(summed(got), swapped)


@pytest.mark.parametrize("case", PAIR_CASES)
@pytest.mark.parametrize(("tile", "target"), PAIR_TILES[:2])
def test_pair_distance_in_two_parts(case, tile, target, device):
    skip_unless_possible(device, target=target)
    n, h, w, _, _, _, k = case
    arguments = pair_arguments(*case, 48, device)
    slices, size = 48 // tile.bn, (h - k + 1, w - k + 1)
    out = [result((slices, n, *size), torch.float32, device) for _ in range(2)]
    second = result((n, *size, 48), torch.float32, device)
    options = {"target": target, "tile": tile}
    pair_distance.student_distance(
        *(arguments[name] for name in STUDENT_PART), out=(out[0].tensor, second.tensor), **options
    )
    second.check()
    autoencoder_distance.autoencoder_distance(
        arguments["autoencoder"], second.tensor, arguments["weight_autoencoder"],
        arguments["bias"], out=out[1].tensor, **options,
    )  # fmt: skip
    want = reference.pair_distance(**arguments)
    close(summed([o.check() for o in out]), want)


@pytest.mark.parametrize("dtype", [F16, F8], ids=str)
@pytest.mark.parametrize("target", [80, 90])
def test_two_parts_with_the_tables_tiles(dtype, target, device):
    skip_unless_possible(device, dtype, target)
    if dtype == F8 and target == 80:
        pytest.skip("sm_80 has no fp8")
    arguments = pair_arguments(1, 9, 15, 64, 128, 64, 1, 384, device, dtype)
    scale = place(torch.linspace(0.5, 2, 768), device) if dtype == F8 else None
    options = {"scale": scale, "target": target}
    st, second = pair_distance.student_distance(
        *(arguments[name] for name in STUDENT_PART), **options
    )
    ae = autoencoder_distance.autoencoder_distance(
        arguments["autoencoder"], second, arguments["weight_autoencoder"], arguments["bias"],
        **options,
    )  # fmt: skip
    want = reference.pair_distance(**arguments, scale=scale)
    close(summed((st, ae)), want)
    with pytest.raises(AssertionError):
        close(summed((ae, st)), want)


def test_pair_distance_in_fp8(device):
    skip_unless_possible(device, F8, 90)
    arguments = pair_arguments(2, 6, 7, 32, 32, 16, 4, 48, device, F8)
    scale = place(torch.linspace(0.5, 2, 96), device)
    want = reference.pair_distance(**arguments, scale=scale)
    for tile, target in PAIR_TILES[1:]:
        got = pair_distance.pair_distance(**arguments, scale=scale, target=target, tile=tile)
        close(summed(got), want)


def test_pair_distance_in_bfloat16(device):
    skip_unless_possible(device, BF16)
    arguments = pair_arguments(2, 6, 7, 32, 32, 16, 4, 48, device, BF16)
    got = pair_distance.pair_distance(**arguments)
    close(summed(got), reference.pair_distance(**arguments))


def test_wrong_pair_extent_is_seen(device):
    arguments = pair_arguments(1, 6, 7, 16, 16, 16, 4, 16, device)
    inputs = [arguments[name] for name in ("teacher", "student", "autoencoder")]
    weights = [arguments["weight_" + name] for name in ("teacher", "student", "autoencoder")]
    for shape, message in (((1, 1, 3, 4), "outside"), ((1, 1, 4, 4), "must not be read")):
        out = [result(shape, torch.float32, device) for _ in range(2)]
        maps = [o.tensor for o in out]
        pair_distance._launch(
            *inputs, weights, arguments["bias"], None, maps, (4, 4), target_of(inputs[0]), SMALL
        )
        for o in out:
            with pytest.raises(AssertionError, match=message):
                o.check()


# --- properties -------------------------------------------------------------------------------


def runs(device) -> dict:
    """Per kernel: arguments of a batch of 3, and a function of them that gives its results."""

    def convolve(function, arguments, **options):
        return function(**arguments, **options, tile=SMALL)

    def pair(arguments):
        maps = pair_distance.pair_distance(**arguments, tile=SMALL)
        return [m.movedim(1, 0) for m in maps]  # images first

    return {
        "first": (
            first_layer(3, 7, 8, (16, 16), device),
            lambda a: convolve(first_conv_relu_pool, a, pool_padding=1),
        ),
        "conv": (layer(3, 5, 6, 16, (16, 32), 3, device), lambda a: convolve(conv_relu, a)),
        "pool": (
            layer(3, 5, 6, 16, (16, 32), 3, device),
            lambda a: convolve(conv_relu_pool, a, padding=1, pool_padding=1),
        ),
        "pair": (pair_arguments(3, 4, 5, 16, 16, 16, 3, 32, device), pair),
    }


def activations(arguments: dict) -> list[Tensor]:
    if "teacher" in arguments:
        return [arguments[name] for name in ("teacher", "student", "autoencoder")]
    x = arguments["x"]
    return list(x) if isinstance(x, list) else [x]


def with_activations(arguments: dict, new: list[Tensor]) -> dict:
    if "teacher" in arguments:
        return {**arguments, "teacher": new[0], "student": new[1], "autoencoder": new[2]}
    return {**arguments, "x": new if isinstance(arguments["x"], list) else new[0]}


@pytest.mark.parametrize("name", ["first", "conv", "pool", "pair"])
def test_images_of_a_batch_are_independent(name, device):
    arguments, run = runs(device)[name]
    together = run(arguments)
    for order in ([2, 0, 1], [1], [2, 2]):
        moved = with_activations(arguments, [x[order].clone() for x in activations(arguments)])
        for a, b in zip(run(moved), together, strict=True):
            if name == "pair" and device == "cpu":
                # The interpreter's numpy product rounds a row by its place in the tile.
                torch.testing.assert_close(a, b[order], rtol=2e-6, atol=0)
            else:
                assert torch.equal(a, b[order])


@pytest.mark.parametrize("name", ["first", "conv", "pool", "pair"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_image_alone(name, value, device):
    arguments, run = runs(device)[name]
    clean = run(arguments)
    count = len(activations(arguments))
    for network in range(count):
        changed = [x.clone() for x in activations(arguments)]
        changed[network][1, 1, 1, 2] = value
        spoilt = run(with_activations(arguments, changed))
        touched = []
        for i, (a, b) in enumerate(zip(spoilt, clean, strict=True)):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            if not torch.equal(a[1], b[1]):
                touched.append(i)
                assert not a[1].isfinite().all()
        # The student's input feeds both maps and the first layer's image both networks.
        both = [0, 1] if name == "first" or (name == "pair" and network == 1) else [network]
        assert touched == ([1] if name == "pair" and network == 2 else both)


@pytest.mark.parametrize("name", ["first", "conv", "pool"])
def test_a_nan_weight_spoils_its_channel_alone(name, device):
    arguments, run = runs(device)[name]
    clean = run(arguments)
    arguments["weight"][1][3, 0, 1, 2] = torch.nan
    spoilt = run(arguments)
    assert torch.equal(spoilt[0], clean[0])
    others = [c for c in range(clean[1].shape[-1]) if c != 3]
    assert torch.equal(spoilt[1][..., others], clean[1][..., others])
    assert spoilt[1][..., 3].isnan().any()


def test_an_empty_batch_is_an_empty_result(device):
    for arguments, run in runs(device).values():
        empty = run(with_activations(arguments, [x[:0] for x in activations(arguments)]))
        assert all(len(y) == 0 for y in empty)


@triton.jit
def _far_kernel(
    x_ptr, w_ptr, y_ptr, height, width, image, CIN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    near = x_ptr - image.to(tl.int64) * height * width * CIN
    m = tl.arange(0, BM)
    y = m * 0
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc, _ = accumulate_conv(
        acc, acc, near, y + image, y, m, height, width,
        w_ptr, None, 0, 1, CIN, 1, 0, False, False, False, BN, BK,
    )  # fmt: skip
    tl.store(y_ptr + m[:, None] * BN + tl.arange(0, BN)[None, :], acc)


def test_offsets_do_not_overflow(device):
    g = torch.Generator().manual_seed(0)
    x, w = random(g, 16, 16).to(F16).to(device), random(g, 16, 16).to(F16).to(device)
    y = torch.full((16, 16), torch.nan, device=device)
    # Image 2047 of 1024 x 1024 x 16 begins 2^35 elements in.
    _far_kernel[(1,)](x, w, y, 1024, 1024, 2047, CIN=16, BM=16, BN=16, BK=16)
    close(y, x.float() @ w.float().T)


# --- arguments and tables ---------------------------------------------------------------------


def test_bad_arguments_are_named(device):
    good = layer(1, 4, 4, 16, (16, 16), 1, device)

    def refuses(match, function=conv_relu, target=90, **changes):
        with pytest.raises(ValueError, match=match):
            function(**{**good, **changes}, target=target)

    for name in ("weight", "bias"):
        refuses(rf"{name}\[1\].*torch.cat", **{name: good[name][::-1]})
    odd = torch.zeros(257, dtype=F16, device=device)[1:].view(1, 4, 4, 16)
    refuses(r"x\[0\] starts 2 bytes", x=[odd, odd])
    refuses("3 networks", **layer(1, 4, 4, 16, (16, 16, 16), 1, device))
    refuses("sm_75", target=75)
    fp8 = layer(1, 4, 4, 32, (16, 16), 1, device, F8)
    refuses("fp8 needs sm_89", target=86, **fp8)
    refuses("8 channels; they must be a multiple of 16", **layer(1, 4, 4, 8, (16,), 1, device))
    refuses("multiples of 16", **layer(1, 4, 4, 16, (24,), 1, device))
    narrow = first_layer(1, 5, 5, (16, 32), device)
    refuses("must be equal", first_conv_relu_pool, **narrow)
    pair = pair_arguments(1, 4, 4, 32, 32, 16, 4, 16, device, F8)
    with pytest.raises(ValueError, match=r"teacher.*fp8 needs sm_89"):
        pair_distance.pair_distance(**pair, target=80)


def test_newer_devices_take_the_nearest_older_row():
    pairs = ((80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (121, 120))
    assert [(t, grouped.architecture(t)) for t, _ in pairs] == list(pairs)
    with pytest.raises(ValueError, match="sm_75"):
        grouped.architecture(75)


@pytest.mark.parametrize("target", sorted(autoencoder_distance.TILES))
def test_both_launches_in_turn_give_as_many_partial_maps(target):
    (_, tile), *_ = autoencoder_distance.TILES[target]
    last = autoencoder_distance.constants(tile, target, 384, 64)["BN"]
    assert pair_distance.choose_tile(target, 10**9, 384, split=True).bn == last


def test_tile_tables():
    tables = (conv.PLAIN_TILES, conv.POOL_TILES, first_conv.TILES, pair_distance.TILES)
    for table, arch in itertools.product(tables, grouped.ARCHITECTURES):
        limits = [limit for limit, _ in table[arch]]
        assert limits[-1] is None
        assert limits[:-1] == sorted(limits[:-1])
    one, many = 59 * 59, 32 * 59 * 59
    assert conv.choose_tile(90, one, (256, 256), False).bn == 128
    assert conv.choose_tile(90, many, (256, 256), False).bn == 256
    assert conv.choose_tile(90, many, (384, 768), False).bm == 256
    assert pair_distance.choose_tile(90, 15 * 56 * 56, 384).bn_tail == 0
    assert pair_distance.choose_tile(90, 16 * 56 * 56, 384).bn_tail == 128
    assert pair_distance.choose_tile(90, 16 * 56 * 56, 256).bn_tail == 0


@pytest.mark.parametrize("arch", grouped.ARCHITECTURES)
def test_census_cases_fill_the_kernels_arguments(arch):
    for case in census_pdn.cases(arch):
        names = set(case.function.arg_names) - {"PDL"}  # which has a default
        assert {*case.signature, *case.constexprs} == names, case
        assert set(case.divisible_by_16) <= set(case.signature), case
