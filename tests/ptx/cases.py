"""Every kernel at small shapes: arguments, the launch and what the definition gives.

A case is called with the architecture and gives (launch, inputs, results, wanted). Sizes are odd
and no multiples of a tile, so that a last block is ragged; tiles are those of the tables, for few
pixels or, where a case says large, for many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from efficientad.kernels import (
    anomaly_map,
    autoencoder_distance,
    bottleneck,
    conv,
    first_conv,
    pack,
    pair_distance,
    resize_conv,
    strided_conv,
)
from efficientad.kernels.grouped import from_table
from efficientad.ops import reference

F16, BF16, F8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
ARCHITECTURES = (80, 89, 90, 120)
EARLY = ", early"  # behind a name: as `launching.overlapped` starts it
STARTED_EARLY = ("strided", "resize", "bottleneck", "conv")
LARGE = 2**24  # pixels, for a table's last row


class Draw:
    """Tensors with a storage of their own each, the same at every call."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.tensors: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def __call__(self, *shape: int, dtype=torch.float32, scale: float = 1.0, relu=False) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return self.keep((values.relu() if relu else values).to(dtype))

    def filters(self, cout: int, kernel: int, cin: int, dtype) -> Tensor:
        scale = 4.0 if dtype == F8 else (kernel * kernel * cin) ** -0.5
        return self(cout, kernel, kernel, cin, dtype=dtype, scale=scale)

    def factors(self, count: int, depth: int, dtype) -> Tensor | None:
        """Of fp8 products, which are large."""
        return self.keep(torch.full((count,), 0.25 * depth**-0.5)) if dtype == F8 else None


def results(**wanted: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors full of NaN, wanted)."""
    return {k: torch.full(w.shape, float("nan")).to(w.dtype) for k, w in wanted.items()}, wanted


def split(tensor: Tensor | None, counts: tuple[int, ...]) -> list[Tensor] | None:
    return None if tensor is None else list(tensor.split(counts))


def convolution(
    arch, dtype, n, h, w, cin, couts, kernel, *, pool=False, large=False, out_dtype=None, **options
):
    """`conv_relu` or `conv_relu_pool`."""
    draw = Draw()
    x = [draw(n, h, w, cin, dtype=dtype, relu=True) for _ in couts]
    weight = split(draw.filters(sum(couts), kernel, cin, dtype), couts)
    bias = split(draw(sum(couts), scale=0.3), couts)
    options |= {"out_dtype": out_dtype}
    if (scale := draw.factors(sum(couts), kernel**2 * cin, dtype)) is not None:
        options["scale"] = split(scale, couts)
    name = "conv_relu_pool" if pool else "conv_relu"
    wanted = getattr(reference, name)(x, weight, bias, **options)
    outs, wanted = results(**{f"y{i}": y for i, y in enumerate(wanted)})
    tile = conv.choose_tile(arch, LARGE, couts, pool) if large else None

    def run() -> None:
        getattr(conv, name)(
            x, weight, bias, out=list(outs.values()), target=arch, tile=tile, **options
        )

    return run, draw.tensors, outs, wanted


def first(arch, dtype, n, h, w, couts, *, large=False, **options):
    draw = Draw()
    x = draw(n, h, w, 4, dtype=F16 if dtype == F8 else dtype)
    x[..., 3] = 0
    weight = split(draw(sum(couts), 4, 4, 4, dtype=x.dtype, scale=0.15), couts)
    bias = split(draw(sum(couts), scale=0.3), couts)
    options["out_dtype"] = dtype
    wanted = reference.first_conv_relu_pool(x, weight, bias, **options)
    outs, wanted = results(**{f"y{i}": y for i, y in enumerate(wanted)})
    tile = from_table(first_conv.TILES, arch, LARGE) if large else None

    def run() -> None:
        first_conv.first_conv_relu_pool(
            x, weight, bias, out=list(outs.values()), target=arch, tile=tile, **options
        )

    return run, draw.tensors, outs, wanted


def packed(arch, dtype, n, h, w, channels_last, border, *, image=torch.uint8):
    draw = Draw()
    values = torch.rand(n, h, w, 3, generator=draw.generator)
    values = (255 * values).to(image) if image == torch.uint8 else values.to(image)
    x = draw.keep(values if channels_last else values.permute(0, 3, 1, 2).contiguous())
    mean = draw.keep(torch.tensor([0.485, 0.456, 0.406]))
    std = draw.keep(torch.tensor([0.229, 0.224, 0.225]))
    options = {"channels_last": channels_last, "border": border}
    outs, wanted = results(y=reference.pack(x, mean, std, dtype=dtype, **options))

    def run() -> None:
        pack.pack(x, mean, std, out=outs["y"], target=arch, **options)

    return run, draw.tensors, outs, wanted


def pair(arch, dtype, n, h, w, ct, cs, ca, kernel, c, *, part="both", large=False):
    """`pair_distance`, `student_distance` or `autoencoder_distance`."""
    draw = Draw()
    decoder = F16 if dtype == F8 else dtype
    oh, ow = h - kernel + 1, w - kernel + 1
    teacher = draw(n, h, w, ct, dtype=dtype, relu=True)
    student = draw(n, h, w, cs, dtype=dtype, relu=True)
    weights = draw.filters(c, kernel, ct, dtype), draw.filters(2 * c, kernel, cs, dtype)
    autoencoder = draw(n, oh, ow, ca, dtype=decoder, relu=True)
    w_ae = draw.filters(c, 3, ca, decoder)
    bias = draw(2 * c, scale=0.3)
    scale = draw.factors(2 * c, kernel**2 * (ct + cs), dtype)
    tile = None
    if part == "both":
        arguments = (teacher, student, autoencoder, *weights, w_ae, bias)
        function, definition = pair_distance.pair_distance, reference.pair_distance
        tile = pair_distance.choose_tile(arch, LARGE if large else n * oh * ow, c)
        parts = c // (tile.bn + tile.bn_tail)
    elif part == "student":
        arguments = (teacher, student, *weights, bias)
        function, definition = pair_distance.student_distance, reference.student_distance
        parts = c // pair_distance.choose_tile(arch, 0, c, split=True).bn
    else:
        second = draw(n, oh, ow, c)
        arguments = (autoencoder, second, w_ae, bias)
        function = autoencoder_distance.autoencoder_distance
        definition = reference.autoencoder_distance
        shape = from_table(autoencoder_distance.TILES, arch, n * oh * ow)
        parts = c // autoencoder_distance.constants(shape, arch, c, ca)["BN"]
    maps = definition(*arguments, scale=scale)
    maps = maps if isinstance(maps, tuple) else (maps,)
    _, wanted = results(**{f"map{i}": y for i, y in enumerate(maps)})
    outs = {
        k: torch.full((parts, *y.shape[1:]) if y.shape[0] == 1 and y.ndim == 4 and y.shape[-1] != c
                      else y.shape, float("nan"))
        for k, y in wanted.items()
    }  # fmt: skip

    def run() -> None:
        out = tuple(outs.values())
        function(*arguments, scale=scale, out=out if len(out) > 1 else out[0], target=arch,
                 tile=tile)  # fmt: skip

    return run, draw.tensors, outs, wanted


def strided(arch, dtype, n, h, w, cin, cout, kernel, *, border=0, large=False, **options):
    draw = Draw()
    x = draw(n, h, w, cin, dtype=dtype)
    x = x[:, border : h - border, border : w - border]
    weight = draw.filters(cout, kernel, cin, dtype)
    bias = draw(cout, scale=0.3)
    outs, wanted = results(y=reference.strided_conv_relu(x, weight, bias, **options))
    tile = from_table(strided_conv.TILES, arch, LARGE) if large else None

    def run() -> None:
        strided_conv.strided_conv_relu(
            x, weight, bias, out=outs["y"], target=arch, tile=tile, **options
        )

    return run, draw.tensors, outs, wanted


def resized(arch, dtype, n, h, w, cin, cout, kernel, size, *, limit=0, rows=None, **options):
    """`limit`: pixels of the table's row; `rows`: the rows and columns that are computed."""
    draw = Draw()
    x = draw(n, h, w, cin, dtype=dtype)
    weight = draw.filters(cout, kernel, cin, dtype)
    bias = draw(cout, scale=0.3)
    if rows is not None:
        chosen = draw.keep(torch.tensor(rows, dtype=torch.int32))
        options |= {"rows": chosen, "cols": draw.keep(chosen.clone())}
    outs, wanted = results(y=reference.resize_conv_relu(x, weight, bias, size, **options))
    if rows is not None:
        outs["y"].zero_()
    tile = from_table(resize_conv.TILES, arch, limit)

    def run() -> None:
        resize_conv.resize_conv_relu(
            x, weight, bias, size, out=outs["y"], target=arch, tile=tile, **options
        )

    return run, draw.tensors, outs, wanted


def squeezed(arch, dtype, n, cin, c, cout):
    draw = Draw()
    arguments = (
        draw(n, 8, 8, cin, dtype=dtype, relu=True),
        draw.filters(c, 8, cin, dtype),
        draw(c, scale=0.3),
        draw.filters(cout, 4, c, dtype),
        draw(cout, scale=0.3),
    )
    outs, wanted = results(y=reference.bottleneck(*arguments))

    def run() -> None:
        bottleneck.bottleneck(*arguments, out=outs["y"], target=arch)

    return run, draw.tensors, outs, wanted


def mapped(arch, parts, n, h, w, size, padding, *, dtype=torch.float32, region=False, large=False):
    draw = Draw()
    st, ae = (draw.keep(draw(parts, n, h, w).abs()) for _ in range(2))
    affine = draw.keep(torch.tensor([0.4, 0.3, -0.2, 0.05]))
    options = {"padding": padding, "map_dtype": dtype}
    masks = None
    if region:
        pick = [torch.rand(*shape, generator=draw.generator) > 0.3 for shape in (size, (h, w))]
        masks = tuple(draw.keep(mask.to(torch.uint8)) for mask in pick)
        wanted = reference.anomaly_map(st, ae, affine, size, region=tuple(pick), **options)
    else:
        wanted = reference.anomaly_map(st, ae, affine, size, **options)
    outs, wanted = results(map=wanted[0], score=wanted[1])
    tile = from_table(anomaly_map.TILES, arch, LARGE) if large else None

    def run() -> None:
        anomaly_map.anomaly_map(
            st, ae, affine, size, out=(outs["map"], outs["score"]), region=masks, target=arch,
            tile=tile, **options,
        )  # fmt: skip

    return run, draw.tensors, outs, wanted


BOTH = {  # in float16 and bfloat16
    "pack": partial(packed, n=2, h=9, w=13, channels_last=True, border=0),
    "first": partial(first, n=1, h=20, w=24, couts=(64, 64)),
    "conv": partial(convolution, n=1, h=8, w=9, cin=64, couts=(128, 128), kernel=3),
    "pool": partial(convolution, n=1, h=10, w=9, cin=64, couts=(128, 128), kernel=4, pool=True),
    "pair": partial(pair, n=1, h=8, w=9, ct=64, cs=128, ca=64, kernel=3, c=256),
    "student": partial(pair, n=1, h=7, w=8, ct=64, cs=64, ca=64, kernel=3, c=128, part="student"),
    "last": partial(pair, n=1, h=9, w=8, ct=64, cs=64, ca=64, kernel=2, c=256, part="last"),
    "strided": partial(strided, n=2, h=9, w=11, cin=32, cout=32, kernel=4),
    "resize": partial(resized, n=1, h=4, w=5, cin=64, cout=64, kernel=4, size=(7, 9)),
    "bottleneck": partial(squeezed, n=3, cin=64, c=64, cout=64),
}
FLOAT16 = {  # further shapes and tiles
    "pack of channels first": partial(
        packed, n=1, h=8, w=15, channels_last=False, border=3, image=torch.float32
    ),
    "first padded": partial(first, n=2, h=15, w=13, couts=(64, 64), pool_padding=1),
    "first large": partial(first, n=1, h=31, w=29, couts=(128, 128), large=True),
    "conv padded": partial(
        convolution, n=2, h=7, w=8, cin=64, couts=(128, 128), kernel=3, padding=1
    ),
    "conv large": partial(
        convolution, n=1, h=14, w=13, cin=64, couts=(256, 256), kernel=3, large=True
    ),
    "conv of two widths": partial(
        convolution, n=1, h=12, w=15, cin=64, couts=(128, 256), kernel=1, large=True
    ),
    "conv narrow": partial(
        convolution, n=1, h=8, w=9, cin=32, couts=(16, 16), kernel=3, relu=False
    ),
    "pool padded": partial(
        convolution,
        n=1,
        h=8,
        w=9,
        cin=64,
        couts=(128, 128),
        kernel=4,
        pool=True,
        padding=3,
        pool_padding=1,
    ),
    "pool wide": partial(
        convolution, n=1, h=13, w=14, cin=128, couts=(256, 256), kernel=4, pool=True, large=True
    ),
    "pair large": partial(pair, n=1, h=13, w=14, ct=64, cs=64, ca=64, kernel=2, c=384, large=True),
    "pair of M": partial(pair, n=1, h=12, w=12, ct=128, cs=192, ca=64, kernel=1, c=128),
    "strided image": partial(strided, n=1, h=22, w=24, cin=4, cout=32, kernel=4, border=3),
    "strided deep": partial(
        strided, n=1, h=8, w=8, cin=64, cout=64, kernel=8, stride=1, padding=0, relu=False
    ),
    "strided large": partial(strided, n=1, h=17, w=19, cin=32, cout=64, kernel=4, large=True),
    "strided middle": partial(strided, n=1, h=18, w=18, cin=64, cout=64, kernel=4),
    "resize middle": partial(
        resized, n=1, h=6, w=5, cin=64, cout=64, kernel=4, size=(9, 8), limit=8192
    ),
    "resize large": partial(
        resized, n=1, h=7, w=8, cin=64, cout=64, kernel=3, size=(13, 15), limit=LARGE, padding=1
    ),
    "resize some": partial(
        resized,
        n=2,
        h=5,
        w=5,
        cin=64,
        cout=64,
        kernel=4,
        size=(11, 11),
        rows=[0, 1, 3, 4, 7, 9, 11],
    ),
    "map": partial(mapped, parts=3, n=2, h=9, w=11, size=(37, 41), padding=4),
    "map of one part": partial(mapped, parts=1, n=1, h=8, w=9, size=(30, 33), padding=2),
    "map scaled down": partial(mapped, parts=1, n=1, h=40, w=40, size=(23, 21), padding=0),
    "map in float16": partial(
        mapped, parts=3, n=1, h=8, w=9, size=(30, 33), padding=2, dtype=F16, region=True
    ),
    "map large": partial(mapped, parts=1, n=3, h=9, w=9, size=(48, 50), padding=4, large=True),
}
FLOAT8 = {
    "first": partial(first, n=1, h=20, w=24, couts=(64, 64)),
    "conv": partial(convolution, n=1, h=8, w=9, cin=128, couts=(128, 128), kernel=3),
    "conv to float16": partial(
        convolution, n=1, h=8, w=9, cin=64, couts=(128, 128), kernel=3, out_dtype=F16, padding=1
    ),
    "pool": partial(convolution, n=1, h=10, w=9, cin=128, couts=(128, 128), kernel=4, pool=True),
    "pair": partial(pair, n=1, h=8, w=9, ct=128, cs=128, ca=64, kernel=3, c=256),
    "student": partial(pair, n=1, h=7, w=8, ct=128, cs=128, ca=64, kernel=3, c=128, part="student"),
    "last": partial(pair, n=1, h=9, w=8, ct=64, cs=64, ca=64, kernel=2, c=256, part="last"),
}
CASES: dict[str, Callable] = {
    **{name: partial(case, dtype=F16) for name, case in BOTH.items()},
    **{f"{name}, bf16": partial(case, dtype=BF16) for name, case in BOTH.items()},
    **{
        name: case if name.startswith("map") else partial(case, dtype=F16)
        for name, case in FLOAT16.items()
    },
    **{f"{name}, fp8": partial(case, dtype=F8) for name, case in FLOAT8.items()},
}


def cases(arch: int) -> list[str]:
    """Those that the architecture can run."""
    return [name for name in CASES if arch >= 89 or not name.endswith("fp8")]
