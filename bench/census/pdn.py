"""Census cases of the PDN kernels: every shipped configuration at the shapes of PDN-S and PDN-M.

Imports triton and the kernels, not torch: a compile census needs neither torch nor a GPU. Tiles and
constants come from the launchers' own functions, the networks' shapes from `bench.shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.census.case import CensusCase, each_once
from bench.shapes import DECODER, IMAGE, PDN, TEACHER, PdnLayer
from efficientad.kernels import autoencoder_distance, conv, first_conv, grouped, pack, pair_distance

BATCHES = (1, 32)  # either side of every limit in the tile tables
TRITON_TYPE = {"fp16": "fp16", "bf16": "bf16", "fp8": "fp8e4nv", "uint8": "u8", "fp32": "fp32"}
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp8": 1}
MODES = ("plain", "padded")
_SIZES = ("height", "width", "out_height", "out_width", "n_pixels")


def dtypes(arch: int) -> tuple[str, ...]:
    return ("fp16", "bf16", "fp8") if arch >= grouped.FP8_MIN_TARGET else ("fp16", "bf16")


def _filters(dtype: str, rows: int, cols: int, use_tma: bool) -> str:
    kind = TRITON_TYPE[dtype]
    return f"tensordesc<{kind}[{rows}, {cols}]>" if use_tma else f"*{kind}"


def _pack_cases() -> Iterator[CensusCase]:
    for image, dtype in (("uint8", "fp16"), ("uint8", "bf16"), ("fp32", "fp16"), ("fp16", "fp16")):
        yield CensusCase(
            kernel="pack",
            config=f"{image} image, {pack.BLOCK} pixels",
            dtype=dtype,
            function=pack._pack_kernel,
            signature={
                "image_ptr": f"*{TRITON_TYPE[image]}",
                **{f"stride_{axis}": "i64" for axis in "nyxc"},
                "mean_ptr": "*fp32",
                "std_ptr": "*fp32",
                "out_ptr": f"*{dtype}",
                **dict.fromkeys(("height", "width", "border", "n_pixels"), "i32"),
            },
            constexprs={"SCALE": image == "uint8", "BLOCK": pack.BLOCK},
            num_warps=pack.WARPS,
            num_stages=1,
        )


def _first_case(
    arch: int, size: str, mode: str, couts: tuple[int, int], pixels: int, padded: bool, dtype: str
) -> CensusCase:
    tile = grouped.from_table(first_conv.TILES, arch, pixels)
    values = first_conv.constants(tile, arch, couts, pool_padding=int(padded))
    image = "fp16" if dtype == "fp8" else dtype
    return CensusCase(
        kernel="first_conv_relu_pool",
        config=f"{size} {mode} {tile.bm}x{values['BN']}x64",
        dtype=dtype,
        function=first_conv._first_conv_kernel,
        signature={
            "x_ptr": f"*{image}",
            "w_ptr": f"*{image}",
            "bias_ptr": "*fp32",
            "y_ptr": f"*{TRITON_TYPE[dtype]}",
            "y_delta": "i64",
            **dict.fromkeys(_SIZES, "i32"),
        },
        constexprs=values,
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible_by_16=("y_delta",),
    )


def _conv_case(
    arch: int, name: str, layer: PdnLayer, cin: int, pixels: int, padded: bool, dtype: str
) -> CensusCase:
    tile = conv.choose_tile(arch, pixels, layer.couts, layer.pool)
    return conv_case(
        arch, name, tile, dtype, cin, layer.couts, layer.kernel,
        padding=layer.padding if padded else 0, pool=layer.pool,
        pool_padding=int(padded and layer.pool),  # the pool's quarter is in the weights
    )  # fmt: skip


def conv_case(
    arch: int,
    name: str,
    tile: grouped.Tile,
    dtype: str,
    cin: int,
    couts: tuple[int, ...],
    kernel: int,
    *,
    pool: bool = False,
    **options: Any,
) -> CensusCase:
    """`conv_relu` or, with `pool`, `conv_relu_pool`; options: further ones of `conv.constants`."""
    values = conv.constants(
        tile, arch, ITEMSIZE[dtype], cin, couts, kernel,
        pool=pool, scaled=dtype == "fp8", **options,
    )  # fmt: skip
    return CensusCase(
        kernel="conv_relu_pool" if pool else "conv_relu",
        config=f"{name} {tile.bm}x{values['BN']}x{values['BK']}",
        dtype=dtype,
        function=conv._conv_kernel,
        signature={
            "x_ptr": f"*{TRITON_TYPE[dtype]}",
            "x_delta": "i64",
            "w": _filters(dtype, values["BN"], values["BK"], values["USE_TMA"]),
            "bias_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "y_ptr": f"*{TRITON_TYPE[dtype]}",
            "y_delta": "i64",
            **dict.fromkeys((*_SIZES, "conv_height", "conv_width"), "i32"),
        },
        constexprs=values,
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible_by_16=("x_delta", "y_delta"),
    )


def _pair_case(
    arch: int,
    size: str,
    kernel: int,
    cin: tuple[int, int],
    pixels: int,
    dtype: str,
    split: bool = False,
) -> CensusCase:
    tile = pair_distance.choose_tile(arch, pixels, TEACHER, split=split)
    # The part that does not wait for the autoencoder is given the teacher in its place.
    decoder = "fp16" if dtype == "fp8" and not split else dtype
    channels = (TEACHER, *cin, cin[0] if split else DECODER)
    values = pair_distance.constants(
        tile, arch, ITEMSIZE[dtype], ITEMSIZE[decoder], channels, kernel, scaled=dtype == "fp8",
        split=split,
    )  # fmt: skip
    signature = {
        "teacher_ptr": f"*{TRITON_TYPE[dtype]}",
        "student_ptr": f"*{TRITON_TYPE[dtype]}",
        "autoencoder_ptr": f"*{TRITON_TYPE[decoder]}",
        **dict.fromkeys(("bias_ptr", "scale_ptr", "st_ptr", "ae_ptr"), "*fp32"),
        **dict.fromkeys((*_SIZES, "tiles_per_kind"), "i32"),
    }
    constexprs = dict(values)
    for name, tail, kind, bk in (
        ("w_teacher", "t_tail", dtype, values["BK"]),
        ("w_student", "s_tail", dtype, values["BK"]),
        ("w_autoencoder", "a_tail", decoder, values["BK_AE"]),
    ):
        signature[name] = _filters(kind, tile.bn, bk, values["USE_TMA"])
        if tile.bn_tail:
            signature[tail] = _filters(kind, tile.bn_tail, bk, values["USE_TMA"])
        else:
            constexprs[tail] = None
    return CensusCase(
        kernel="pair_distance",
        config=f"{size} {'in turn ' * split}{tile.bm}x{tile.bn + tile.bn_tail}x{values['BK']}",
        dtype=dtype,
        function=pair_distance._pair_distance_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _last_case(arch: int, pixels: int, dtype: str) -> CensusCase:
    decoder = "fp16" if dtype == "fp8" else dtype
    tile = grouped.from_table(autoencoder_distance.TILES, arch, pixels)
    values = autoencoder_distance.constants(tile, arch, TEACHER, DECODER, scaled=dtype == "fp8")
    return CensusCase(
        kernel="autoencoder_distance",
        config=f"{tile.bm}x{values['BN']}x{values['BK']}",
        dtype=dtype,
        function=autoencoder_distance._autoencoder_distance_kernel,
        signature={
            "x_ptr": f"*{decoder}",
            "w": _filters(decoder, values["BN"], values["BK"], values["USE_TMA"]),
            **dict.fromkeys(("student_ptr", "bias_ptr", "scale_ptr", "ae_ptr"), "*fp32"),
            **dict.fromkeys(("height", "width", "n_pixels"), "i32"),
        },
        constexprs=values,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _network_cases(
    arch: int, size: str, padded: bool, batch: int, dtype: str
) -> Iterator[CensusCase]:
    mode = MODES[padded]
    cells, cin = IMAGE, (3, 3)
    for i, layer in enumerate(PDN[size], start=1):
        cells += 1 - layer.kernel + 2 * padded * layer.padding
        if layer.pool:
            cells = (cells + 2 * padded) // 2
        pixels = batch * cells**2
        if i == 1:
            yield _first_case(arch, size, mode, layer.couts, pixels, padded, dtype)
        elif i < len(PDN[size]):
            if cin[0] != cin[1]:
                raise ValueError("a grouped layer has one input width")
            name = f"{size} {mode} conv{i}"
            yield _conv_case(arch, name, layer, cin[0], pixels, padded, dtype)
        else:
            yield _pair_case(arch, size, layer.kernel, cin, pixels, dtype)
            if batch == 1:
                yield _pair_case(arch, size, layer.kernel, cin, pixels, dtype, split=True)
                yield _last_case(arch, pixels, dtype)
        cin = layer.couts


def _all_cases(arch: int) -> Iterator[CensusCase]:
    yield from _pack_cases()
    for dtype in dtypes(arch):
        for size in PDN:
            for padded in (False, True):
                for batch in BATCHES:
                    yield from _network_cases(arch, size, padded, batch, dtype)


def cases(arch: int) -> Iterator[CensusCase]:
    """Every shipped configuration for compute capability `arch`, each once."""
    return each_once(_all_cases(arch))
