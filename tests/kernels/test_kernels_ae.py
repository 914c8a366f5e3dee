"""The kernels of the autoencoder and the anomaly map against `efficientad.ops.reference`.

Every input lies inside a larger buffer of NaN and every result, filled with NaN, inside one of a
sentinel, so that a read or a write past an edge fails; the `test_wrong_...` tests show it does.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers_pdn import BF16, F16, TOLERANCE, Guarded, Memory, close, place, random, result
from torch import Tensor
from triton.runtime.errors import InterpreterError

from efficientad.kernels import anomaly_map, bottleneck, resize_conv, strided_conv
from efficientad.kernels.common import target_of
from efficientad.kernels.grouped import ARCHITECTURES, Tile, from_table
from efficientad.kernels.strided_conv import strided_conv_relu
from efficientad.ops import reference

# The interpreter is numpy, which warns of the infinities that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

MAP_TOLERANCE = 1e-5  # greatest error, as a part of the map's greatest value
NAN, INF = float("nan"), float("inf")
DTYPES = [F16, pytest.param(BF16, id="bf16")]
TILES = {
    module: sorted({t for rows in module.TILES.values() for _, t in rows}, key=lambda t: t.bm)
    for module in (strided_conv, resize_conv, anomaly_map)
}


@pytest.fixture(autouse=True)
def _forget_guards():
    yield
    Guarded.all.clear()


def watch_memory(monkeypatch) -> None:
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_interpreter", Memory(interpreter._interpreter))


@pytest.fixture(autouse=True)
def _memory(request, device, monkeypatch):
    """Makes an access beside a guarded tensor an error; on a GPU that is the sanitizer's work.

    Not where a test shows that the numbers alone would tell.
    """
    if device == "cpu" and not request.node.name.startswith("test_wrong"):
        watch_memory(monkeypatch)


@pytest.fixture(params=DTYPES)
def dtype(request, device):
    if request.param is BF16 and device == "cpu":
        pytest.skip("the interpreter's bfloat16 product is wrong; run with --device cuda")
    return request.param


def wide_map(device) -> Tile | None:
    """As `wide`, for maps."""
    return Tile(4096, 1, 0, warps=4, stages=1) if device == "cpu" else None


def wide(bm: int, device) -> Tile | None:
    """A tile of many pixels, which the interpreter runs faster; on a GPU the table's own."""
    return Tile(bm, 64, 128, warps=4, stages=1) if device == "cpu" else None


def convolution(n, h, w, cin, cout, k, device, dtype=F16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, each inside NaN."""
    g = torch.Generator().manual_seed(seed)
    weight = random(g, cout, k, k, cin, scale=(k * k * cin) ** -0.5)
    return (
        place(random(g, n, h, w, cin).to(dtype), device),
        place(weight.to(dtype), device),
        place(random(g, cout, scale=0.3), device),
    )


def fails(launch, *outs: Guarded, match: str = "") -> None:
    """A wrong launch shows in its results."""

    def run():
        launch(*(out.tensor for out in outs))
        for out in outs:
            out.check()

    with pytest.raises(AssertionError, match=match):
        run()


def same_images(got: Tensor, want: Tensor, but: int) -> None:
    """Every image but one is the same, bit for bit; that one is not."""
    others = [i for i in range(len(got)) if i != but]
    assert torch.equal(got[others], want[others])
    assert not torch.equal(got[but], want[but])


# --- strided convolution ------------------------------------------------------------------------

E = {"stride": 2, "padding": 1}  # encoder layers 1 to 5
E6 = {"stride": 1, "padding": 0, "relu": False}
STRIDED = [  # n, h, w, cin, cout, k, options; 15, 16 and 17 pixels are a tile -1, exactly, and +1
    (1, 6, 10, 32, 32, 4, E),
    (2, 2, 8, 64, 32, 4, E),
    (1, 2, 34, 32, 64, 4, E),
    (17, 2, 3, 16, 16, 4, E),
    (3, 9, 13, 64, 64, 4, E),
    (2, 13, 7, 4, 32, 4, E),
    (1, 17, 33, 8, 16, 4, E),
    (1, 32, 32, 4, 32, 4, E),
    (1, 8, 8, 64, 64, 8, E6),
    (2, 9, 11, 32, 16, 8, E6),
    (1, 5, 1, 48, 16, 4, {"stride": 2, "padding": 2}),
]


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strided_conv(case, device, dtype):
    *shape, options = case
    args = convolution(*shape, device, dtype)
    want = reference.strided_conv_relu(*args, **options)
    out = result(want.shape, dtype, device)
    assert strided_conv_relu(*args, **options, out=out.tensor) is out.tensor
    close(out.check(), want)
    assert torch.equal(strided_conv_relu(*args, **options), out.tensor)


@pytest.mark.parametrize("tile", TILES[strided_conv], ids=str)
@pytest.mark.parametrize("cin", [4, 32, 64])
def test_strided_conv_tiles(tile, cin, device, dtype):
    args = convolution(2, 11, 15, cin, 64, 4, device, dtype)
    out = result((2, 5, 7, 64), dtype, device)
    close(strided_conv_relu(*args, out=out.tensor, tile=tile), reference.strided_conv_relu(*args))
    out.check()


def test_strided_conv_reads_a_view(device, dtype):
    """The packed image has a border of 3 that the padded PDN needs and the autoencoder does not."""
    _, weight, bias = convolution(1, 1, 1, 4, 32, 4, device, dtype)
    packed = Guarded((2, 17, 20, 4), dtype, device).tensor  # all NaN
    x = packed[:, 3:-3, 3:-3]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    got = strided_conv_relu(x, weight, bias)
    close(got, reference.strided_conv_relu(x, weight, bias))
    assert torch.equal(got, strided_conv_relu(x.clone(), weight, bias))


def test_strided_conv_checks_a_view(device):
    x, weight, bias = convolution(1, 8, 8, 4, 16, 4, device)
    with pytest.raises(ValueError, match="contiguous"):
        strided_conv_relu(x[:, :, ::2], weight, bias)
    flat = torch.zeros(1 + 8 * 8 * 4, dtype=F16, device=device)
    with pytest.raises(ValueError, match="multiples of 4"):
        strided_conv_relu(flat[1:].view(1, 8, 8, 4), weight, bias)
    with pytest.raises(ValueError, match="12 channels"):
        strided_conv_relu(*convolution(1, 8, 8, 12, 16, 4, device))


def test_wrong_strided_conv_fails(device, monkeypatch):
    """An x or a result whose extent is one too large, and one too small, is noticed."""
    x, weight, bias = convolution(1, 6, 10, 32, 16, 4, device)
    taller = x.as_strided((1, 7, 10, 32), x.stride())
    options = {**E, "relu": True, "target": None, "tile": None}

    def launch(x, size):
        return lambda out: strided_conv._launch(x, weight, bias, out, size, **options)

    shape = (1, 3, 5, 16)
    fails(launch(taller, (3, 5)), result(shape, F16, device), match="must not be read")
    fails(launch(x, (4, 5)), result(shape, F16, device), match="outside")
    fails(launch(x, (2, 5)), result(shape, F16, device), match="not written")
    if device == "cpu":
        watch_memory(monkeypatch)
        for x_i, size in ((taller, (3, 5)), (x, (4, 5))):
            out = result(shape, F16, device).tensor
            with pytest.raises(InterpreterError, match="guard was touched"):
                launch(x_i, size)(out)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_strided_conv_keeps_what_is_not_finite(value, device):
    x, weight, bias = convolution(3, 6, 7, 32, 32, 4, device)
    clean = strided_conv_relu(x, weight, bias)
    x[1, 2, 3, 4] = value
    got, want = (f(x, weight, bias) for f in (strided_conv_relu, reference.strided_conv_relu))
    same_images(got, clean, but=1)
    assert not got[1].isfinite().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf())
    weight[5, 1, 1, 0] = NAN
    assert strided_conv_relu(x, weight, bias)[..., 5].isnan().all()


# --- resize and convolution ---------------------------------------------------------------------

RESIZE = [  # n, h, w, cin, cout, k, size, padding, pixels of a tile
    (1, 1, 1, 64, 64, 4, (3, 3), 2, 16),
    (3, 4, 4, 16, 16, 4, (8, 8), 2, 64),
    (1, 9, 9, 32, 16, 4, (15, 15), 2, 256),
    (2, 9, 4, 16, 48, 4, (15, 8), 2, 256),
    (17, 2, 3, 16, 16, 3, (1, 5), 1, 64),
    (2, 13, 5, 48, 16, 3, (7, 9), 1, 64),
    (1, 16, 16, 16, 16, 4, (32, 32), 2, 1024),
    (1, 33, 33, 16, 16, 4, (63, 63), 2, 4096),
    (1, 64, 64, 16, 16, 4, (127, 127), 2, 16384),
    (1, 128, 128, 16, 16, 3, (56, 56), 1, 2048),
]


@pytest.mark.parametrize("case", RESIZE, ids=str)
def test_resize_conv(case, device, dtype):
    *shape, size, padding, bm = case
    args = (*convolution(*shape, device, dtype), size)
    want = reference.resize_conv_relu(*args, padding=padding)
    out = result(want.shape, dtype, device)
    options = {"padding": padding, "out": out.tensor, "tile": wide(bm, device)}
    assert resize_conv.resize_conv_relu(*args, **options) is out.tensor
    close(out.check(), want)


@pytest.mark.parametrize("tile", TILES[resize_conv], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_resize_conv_tiles(tile, n, device, dtype):
    w = tile.bm // 2 if n == 1 else 5  # 2 n (w + 1) pixels; a tile and 2 for a batch of one
    args = (*convolution(n, 2, 3, 64, 64, 4, device, dtype), (1, w))
    out = result((n, 2, w + 1, 64), dtype, device)
    got = resize_conv.resize_conv_relu(*args, out=out.tensor, tile=tile)
    close(got, reference.resize_conv_relu(*args))
    out.check()


APART = resize_conv.Apart(64, 64, 128, warps=4, stages=4)


@pytest.mark.parametrize("case", RESIZE[1:7], ids=str)
def test_resize_conv_apart(case, device, dtype):
    """The resized image is written; in one case its channels are no power of two."""
    *shape, size, padding, _ = case
    args = (*convolution(*shape, device, dtype), size)
    want = reference.resize_conv_relu(*args, padding=padding)
    out = result(want.shape, dtype, device)
    resize_conv.resize_conv_relu(*args, padding=padding, out=out.tensor, tile=APART)
    close(out.check(), want)


def test_resize_conv_apart_is_right_where_something_is_read_later(device, dtype):
    args = (*convolution(2, 12, 10, 16, 16, 4, device, dtype), (23, 19))
    needed = [reference.resize_reads(24, 11), reference.resize_reads(20, 7)]
    rows, cols = (place(torch.tensor(r, dtype=torch.int32), device) for r in needed)
    want = reference.resize_conv_relu(*args)
    got = resize_conv.resize_conv_relu(*args, rows=rows, cols=cols, tile=APART)
    at = (slice(None), rows.long()[:, None], cols.long())
    close(got[at], want[at])


def test_the_table_says_which_resize_is_apart():
    """On sm_90 layers of 200 pixels or more; nowhere on architectures that were not measured."""
    kinds = {
        (target, pixels): isinstance(
            from_table(resize_conv.TILES, target, pixels), resize_conv.Apart
        )
        for target in ARCHITECTURES
        for pixels in (1, 81, 199, 200, 256, 32767, 32768, 10**6)
    }
    assert kinds == {(t, pixels): t == 90 and pixels >= 200 for t, pixels in kinds}


def test_resize_conv_launches_what_the_table_says(device, monkeypatch):
    launches = []
    real = resize_conv._launch_apart
    monkeypatch.setattr(resize_conv, "_launch_apart", lambda *a: (launches.append(a[-1]), real(*a)))
    for side in (13, 14):  # 14x14 and 15x15 pixels: on sm_90 either side of 200
        args = (*convolution(1, 4, 4, 16, 16, 4, device), (side, side))
        close(resize_conv.resize_conv_relu(*args), reference.resize_conv_relu(*args))
        row = from_table(resize_conv.TILES, target_of(args[0]), (side + 1) ** 2)
        assert launches == [row] * isinstance(row, resize_conv.Apart)
        launches.clear()


@triton.jit
def _source_kernel(low_ptr, high_ptr, weight_ptr, length, size, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    low, high, weight = resize_conv._source(i, length, size, scale)
    tl.store(low_ptr + i, low, mask=i < size)
    tl.store(high_ptr + i, high, mask=i < size)
    tl.store(weight_ptr + i, weight, mask=i < size)


# In the first four a position is a whole number and float32 falls short of it.
LENGTHS = [(13, 11), (75, 9), (129, 99), (42, 10), (1, 3), (4, 8), (9, 15), (16, 32), (33, 63),
           (64, 127), (128, 56), (128, 64), (129, 57), (151, 68), (512, 248), (7, 1)]  # fmt: skip


@pytest.mark.parametrize(("length", "size"), LENGTHS)
def test_resize_reads_the_promised_cells(length, size, device):
    low, high = torch.full((2, size), -1, dtype=torch.int32, device=device)
    weight = torch.empty(size, device=device)
    _source_kernel[(1,)](low, high, weight, length, size, length / size, BLOCK=256)
    assert sorted({*low.tolist(), *high.tolist()}) == reference.resize_reads(length, size)
    exact = torch.tensor([max((i + 0.5) * length / size - 0.5, 0) for i in range(size)])
    assert (low.cpu() + weight.cpu() - exact).abs().max() <= 1e-6 * length
    assert low.tolist() == exact.double().floor().tolist() or length in (13, 75, 129, 42)


def test_resize_conv_computes_what_the_next_layer_reads(device, dtype):
    """Layers 6 and 7 in small: layer 7 reads some rows and columns, layer 6 computes only those."""
    x, weight, bias = convolution(2, 12, 10, 16, 16, 4, device, dtype)
    (n_rows, n_cols), tile = (11, 7), wide(256, device)
    needed = [reference.resize_reads(*pair) for pair in ((24, n_rows), (20, n_cols))]
    rows, cols = (place(torch.tensor(r, dtype=torch.int32), device) for r in needed)
    assert len(rows) < 24
    assert len(cols) < 20
    args, tables = (x, weight, bias, (23, 19)), {"rows": rows, "cols": cols}
    want = reference.resize_conv_relu(*args, **tables)
    out = result(want.shape, dtype, device)
    fails(
        lambda out: resize_conv.resize_conv_relu(*args, **tables, out=out, tile=tile),
        out,
        match="not written",
    )
    computed = torch.zeros(24, 20, 1, dtype=torch.bool, device=device)
    computed[rows.long()[:, None], cols.long()] = True
    assert torch.equal(~out.tensor.isnan(), computed.expand_as(out.tensor))
    close(torch.where(computed, out.tensor, 0), want)

    # The next layer is right although all other cells are NaN, and notices if they are read.
    _, *layer = convolution(1, 1, 1, 16, 16, 3, device, dtype, seed=1)
    options = {"padding": 1, "tile": tile}
    got = resize_conv.resize_conv_relu(out.tensor, *layer, (n_rows, n_cols), **options)
    close(got, reference.resize_conv_relu(want, *layer, (n_rows, n_cols), padding=1))
    got = resize_conv.resize_conv_relu(out.tensor, *layer, (n_rows + 1, n_cols), **options)
    assert got.isnan().any()


@pytest.mark.parametrize("name", ["rows", "cols"])
def test_resize_conv_takes_one_table(name, device):
    args = (*convolution(2, 5, 4, 16, 16, 4, device), (8, 7))
    table = {name: torch.tensor([6, 1, 3], dtype=torch.int32, device=device)}
    want = reference.resize_conv_relu(*args, **table)
    got = torch.zeros_like(want)
    resize_conv.resize_conv_relu(*args, **table, out=got, tile=wide(64, device))
    close(got, want)


def test_wrong_resize_conv_fails(device):
    x, weight, bias = convolution(1, 4, 5, 16, 16, 4, device)
    taller = x.as_strided((1, 5, 5, 16), x.stride())
    options = {"padding": 2, "cols": None, "target": None, "tile": wide(64, device)}

    def launch(x, rows):
        table = torch.arange(rows, dtype=torch.int32, device=device)
        args = (weight, bias)
        return lambda out: resize_conv._launch(x, *args, out, (8, 7), rows=table, **options)

    shape = (1, 9, 8, 16)
    fails(launch(taller, 9), result(shape, F16, device), match="must not be read")
    fails(launch(x, 10), result(shape, F16, device), match="outside")
    fails(launch(x, 8), result(shape, F16, device), match="not written")


def test_resize_conv_checks_its_arguments(device):
    with pytest.raises(ValueError, match="24 channels"):
        resize_conv.resize_conv_relu(*convolution(1, 4, 5, 24, 16, 4, device), (8, 7))
    for shape, size in (((1, 8192, 8192, 64), (8, 8)), ((1, 2**15, 1, 16), (2**15, 1))):
        with pytest.raises(ValueError, match="31 bits"):
            resize_conv._check_extents(shape, size)
    resize_conv._check_extents((1, 1024, 1024, 64), (512, 512))


@pytest.mark.parametrize("value", [NAN, INF])
def test_resize_conv_keeps_what_is_not_finite(value, device):
    x, weight, bias = convolution(3, 4, 5, 16, 16, 4, device)
    kernel, tile = resize_conv.resize_conv_relu, wide(256, device)
    clean = kernel(x, weight, bias, (8, 7), tile=tile)
    x[1, 2, 3, 4] = value
    got = kernel(x, weight, bias, (8, 7), tile=tile)
    want = reference.resize_conv_relu(x, weight, bias, (8, 7))
    same_images(got, clean, but=1)
    assert got[1].isnan().any() or got[1].isinf().any()
    assert torch.equal(got.isfinite(), want.isfinite())
    bias[3] = NAN
    assert kernel(x, weight, bias, (8, 7), tile=tile)[..., 3].isnan().all()


# --- bottleneck -----------------------------------------------------------------------------------


def bottleneck_arguments(n, cin, channels, cout, device, dtype=F16) -> tuple[Tensor, ...]:
    x, *encoder = convolution(n, 8, 8, cin, channels, 8, device, dtype)
    return x, *encoder, *convolution(1, 1, 1, channels, cout, 4, device, dtype, seed=1)[1:]


@pytest.mark.parametrize(
    ("n", "channels"),
    [(1, (64, 64, 64)), (2, (8, 16, 16)), (3, (24, 16, 32)), (17, (64, 32, 16))],
)
def test_bottleneck(n, channels, device, dtype):
    args = bottleneck_arguments(n, *channels, device, dtype)
    out = result((n, 4, 4, channels[2]), dtype, device)
    assert bottleneck.bottleneck(*args, out=out.tensor) is out.tensor
    close(out.check(), reference.bottleneck(*args))
    assert torch.equal(bottleneck.bottleneck(*args), out.tensor)


def test_bottleneck_does_not_depend_on_the_batch(device):
    x, *rest = bottleneck_arguments(17, 16, 16, 16, device)
    got = bottleneck.bottleneck(x, *rest)
    x[5] += 1
    same_images(bottleneck.bottleneck(x, *rest), got, but=5)


def test_wrong_bottleneck_fails(device):
    args = bottleneck_arguments(3, 16, 16, 16, device)
    for images, match in ((2, "not written"), (4, "outside")):
        out = result((3, 4, 4, 16), F16, device)
        fails(
            lambda out, n=images: bottleneck._launch(*args, out, n, target=None, tile=None),
            out,
            match=match,
        )
    with pytest.raises(ValueError, match="power of two"):
        bottleneck.bottleneck(*bottleneck_arguments(1, 16, 48, 16, device))


@pytest.mark.parametrize("value", [NAN, INF])
def test_bottleneck_keeps_what_is_not_finite(value, device):
    x, *rest = bottleneck_arguments(3, 16, 16, 16, device)
    clean = bottleneck.bottleneck(x, *rest)
    x[1, 7, 7, 15] = value
    got = bottleneck.bottleneck(x, *rest)
    same_images(got, clean, but=1)
    assert torch.equal(got.isnan(), reference.bottleneck(x, *rest).isnan())
    assert not got[1].isfinite().all()


# --- anomaly map ----------------------------------------------------------------------------------

MAPS = [  # parts, n, h, w, size, padding
    (1, 1, 56, 56, (256, 256), 4),
    (3, 2, 14, 12, (33, 50), 4),
    (2, 3, 20, 9, (7, 40), 0),
    (5, 17, 3, 4, (5, 6), 1),
    (1, 2, 30, 40, (1, 1), 4),
    (1, 1, 1, 1, (23, 89), 0),
    (3, 1, 8, 8, (32, 32), 0),
]


def maps(parts, n, h, w, device, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """map_st, map_ae and affine, each inside NaN."""
    g = torch.Generator().manual_seed(seed)
    st, ae = (place(torch.rand(parts, n, h, w, generator=g), device) for _ in range(2))
    return st, ae, place(torch.tensor([1.3, 0.7, -0.4, -0.2]), device)


def close_maps(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        greatest = TOLERANCE[F16][0] if a.dtype == F16 else MAP_TOLERANCE
        assert (a.float() - b).abs().max() <= greatest * b.abs().max()


@pytest.mark.parametrize("case", MAPS, ids=str)
@pytest.mark.parametrize("map_dtype", [torch.float32, F16], ids=str)
def test_anomaly_map(case, map_dtype, device):
    *shape, size, padding = case
    args, options = (*maps(*shape, device), size), {"padding": padding, "tile": wide_map(device)}
    want = reference.anomaly_map(*args, padding=padding)
    out = result(want[0].shape, map_dtype, device), result(want[1].shape, torch.float32, device)
    got = anomaly_map.anomaly_map(*args, **options, out=tuple(o.tensor for o in out))
    close_maps([o.check() for o in out], want)
    assert got[0] is out[0].tensor
    # Without a map, the same score.
    no_map, score = anomaly_map.anomaly_map(*args, **options, store_map=False)
    assert no_map is None
    assert torch.equal(score, out[1].tensor)
    # Allocated by the function, and of maps without parts.
    if shape[0] == 1:
        args = (args[0][0], args[1][0], *args[2:])
    again = anomaly_map.anomaly_map(*args, **options, map_dtype=map_dtype)
    assert again[0].dtype == map_dtype
    assert all(torch.equal(a, o.tensor) for a, o in zip(again, out, strict=True))


@pytest.mark.parametrize("tile", TILES[anomaly_map], ids=str)
def test_anomaly_map_tiles(tile, device):
    args = (*maps(3, 2, 9, 9, device), (41, 37))
    close_maps(
        anomaly_map.anomaly_map(*args, padding=4, tile=tile),
        reference.anomaly_map(*args, padding=4),
    )


def test_anomaly_map_takes_the_maximum_of_many_programs(device, monkeypatch):
    monkeypatch.setattr(anomaly_map, "REDUCE_BLOCK", 4)
    args = (*maps(1, 2, 9, 9, device), (41, 37))
    tile = Tile(128, 1, 0, warps=4, stages=1)  # 12 programs an image, the last one a part
    close_maps(
        anomaly_map.anomaly_map(*args, padding=2, tile=tile),
        reference.anomaly_map(*args, padding=2),
    )


@pytest.mark.parametrize("size", [(40, 44), (16, 14), (5, 4)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_anomaly_map_keeps_what_is_not_finite(value, size, device):
    """In any cell, also in one that a downscale skips; the other images are untouched."""
    st, ae, affine = maps(2, 3, 8, 7, device)
    options = {"padding": 2, "tile": wide_map(device)}
    clean = anomaly_map.anomaly_map(st, ae, affine, size, **options)
    for i, (y, x) in enumerate([(0, 0), (7, 6), (3, 2), (4, 5), (1, 3)]):
        broken = st.clone(), ae.clone()
        broken[i % 2][i // 2 % 2, 1, y, x] = value
        got = anomaly_map.anomaly_map(*broken, affine, size, **options)
        want = reference.anomaly_map(*broken, affine, size, padding=2)
        assert got[1].isnan().tolist() == [False, True, False]
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert torch.equal(got[0].isnan(), want[0].isnan())
    _, score = anomaly_map.anomaly_map(*broken, affine, size, **options, store_map=False)
    assert score.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_anomaly_map_in_a_region(case, device):
    """Inside every bit is as without one; NaN in a cell that no inspected pixel sees is not met."""
    *shape, size, padding = case
    args, options = (*maps(*shape, device), size), {"padding": padding, "tile": wide_map(device)}
    g = torch.Generator().manual_seed(5)
    region = torch.rand(size, generator=g) > 0.6
    cells = torch.rand(shape[2:], generator=g) > 0.3
    cells[0, 0] = region[0, 0] = True
    bits = [place(mask.to(torch.uint8), device) for mask in (region, cells)]
    region, cells = region.to(device), cells.to(device)
    whole, _ = anomaly_map.anomaly_map(*args, **options)
    out = result(whole.shape, torch.float32, device), result(whole.shape[:1], torch.float32, device)
    found, score = anomaly_map.anomaly_map(
        *args, **options, region=bits, out=tuple(o.tensor for o in out)
    )
    close_maps(
        [o.check() for o in out],
        reference.anomaly_map(*args, padding=padding, region=(region, cells)),
    )
    assert torch.equal(found[:, region], whole[:, region])
    assert (found[:, ~region] == args[2][2]).all()
    assert torch.equal(score, whole[:, region].amax(1))
    no_map, again = anomaly_map.anomaly_map(*args, **options, region=bits, store_map=False)
    assert no_map is None
    assert torch.equal(again, score)


@pytest.mark.parametrize("size", [(40, 44), (16, 14), (5, 4)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_anomaly_map_keeps_what_is_not_finite_outside_a_region_out(value, size, device):
    st, ae, affine = maps(2, 3, 8, 7, device)
    region, cells = torch.zeros(size, dtype=torch.bool), torch.zeros(8, 7, dtype=torch.bool)
    region[-1, -1], cells[-1, -1] = True, True
    bits = [mask.to(device, torch.uint8) for mask in (region, cells)]
    options = {"padding": 0, "tile": wide_map(device), "region": bits}
    clean = anomaly_map.anomaly_map(st, ae, affine, size, **options)
    st[1, 1, :5, :4] = value
    got = anomaly_map.anomaly_map(st, ae, affine, size, **options)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
    st[1, 1, 7, 6] = value
    got = anomaly_map.anomaly_map(st, ae, affine, size, **options)
    assert got[1].isnan().tolist() == [False, True, False]


def test_anomaly_map_refuses_a_region_of_another_size(device):
    args = (*maps(1, 1, 8, 7, device), (16, 14))
    masks = [torch.ones(shape, dtype=torch.uint8, device=device) for shape in ((16, 14), (7, 8))]
    with pytest.raises(ValueError, match=r"region has shapes .*; the map and its cells have"):
        anomaly_map.anomaly_map(*args, padding=0, region=masks)


def test_anomaly_map_sees_overflow_in_the_sum(device):
    """Finite parts whose combination is not."""
    st, ae, affine = maps(2, 1, 4, 4, device)
    st[:, 0, 1, 2] = 3e38
    got = anomaly_map.anomaly_map(st, ae, affine, (9, 9), padding=0)
    assert got[1].isnan().all()


def test_wrong_anomaly_map_fails(device):
    st, ae, affine = maps(1, 2, 6, 5, device)
    taller = [m.as_strided((1, 2, 7, 5), m.stride()) for m in (st, ae)]
    options = {"padding": 0, "target": None, "tile": None}

    def launch(maps, size):
        return lambda *outs: anomaly_map._launch(*maps, affine, size, *outs, **options)

    for inputs, size, match in (
        (taller, (12, 10), "must not be read"),
        ((st, ae), (13, 10), "outside"),
        ((st, ae), (11, 10), "not written"),
    ):
        outs = result((2, 12, 10), torch.float32, device), result((2,), torch.float32, device)
        fails(launch(inputs, size), *outs, match=match)
