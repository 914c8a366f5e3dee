"""Census cases of the autoencoder and the anomaly map: every tile that a 256x256 image can get.

Imports triton and the kernels, not torch: a compile census needs neither torch nor a GPU. Tiles and
constants come from the launchers' own functions, the network's shapes from `bench.shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.census.case import CensusCase, each_once
from bench.census.pdn import conv_case
from bench.shapes import AUTOENCODER, D6_NEEDED, DECODER, AutoencoderLayer
from efficientad.kernels import anomaly_map, bottleneck, grouped, resize_conv, strided_conv

# Together they meet every row of the tile tables; bf16 differs in the product's name alone.
BATCHES = {"fp16": (1, 4, 32), "bf16": (1, 32)}
PARTS = (1, 3)  # partial maps that `pair_distance` writes


def _case(kernel, config, dtype, function, signature, constexprs, tile) -> CensusCase:
    return CensusCase(
        kernel=kernel,
        config=config,
        dtype=dtype,
        function=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _strided_case(arch: int, layer: AutoencoderLayer, batch: int, dtype: str) -> CensusCase:
    cin = 4 if layer.cin == 3 else layer.cin  # images are packed
    # At 256x256 e6 is part of the bottleneck's kernel; at 512x512 it has 9x9 outputs.
    cells = 9 if layer.name == "e6" else layer.cells
    tile = grouped.from_table(strided_conv.TILES, arch, batch * cells**2)
    values = strided_conv.constants(
        tile, arch, cin, layer.cout, layer.kernel,
        stride=layer.stride, padding=layer.padding, relu=layer.relu,
    )  # fmt: skip
    signature = {
        **dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{dtype}"),
        "bias_ptr": "*fp32",
        **dict.fromkeys(("x_image", "x_row"), "i64"),
        **dict.fromkeys(("height", "width", "out_height", "out_width", "n_pixels"), "i32"),
    }
    shape = f"{cin}->{layer.cout} {layer.kernel}x{layer.kernel}"
    config = f"{shape} {values['BM']}x{values['BN']}x{values['BK']}"
    function = strided_conv._strided_conv_kernel
    return _case("strided_conv_relu", config, dtype, function, signature, values, tile)


def _resize_cases(
    arch: int, layer: AutoencoderLayer, batch: int, dtype: str
) -> Iterator[CensusCase]:
    cells = D6_NEEDED if layer.name == "d6" else layer.cells
    tile = grouped.from_table(resize_conv.TILES, arch, batch * cells**2)
    if isinstance(tile, resize_conv.Apart):
        yield from _apart_cases(arch, layer, tile, dtype)
    else:
        yield _resize_case(layer, tile, dtype)


def _apart_cases(
    arch: int, layer: AutoencoderLayer, tile: resize_conv.Apart, dtype: str
) -> Iterator[CensusCase]:
    """The two launches of a resize apart: its own, and a convolution of one network."""
    resize = resize_conv.resize_constants(layer.cin)
    yield CensusCase(
        kernel="resize_conv_relu",
        config=f"resize alone {resize['BM']}x{resize['BC']}",
        dtype=dtype,
        function=resize_conv._resize_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"),
            **dict.fromkeys(("height", "width", "up_height", "up_width", "n_pixels"), "i32"),
            **dict.fromkeys(("scale_y", "scale_x"), "fp32"),
        },
        constexprs=resize,
        num_warps=4,
        num_stages=1,
    )
    name = f"decoder {layer.kernel}x{layer.kernel}"
    yield conv_case(
        arch, name, tile, dtype, layer.cin, (layer.cout,), layer.kernel, padding=layer.padding
    )


def _resize_case(layer: AutoencoderLayer, tile: grouped.Tile, dtype: str) -> CensusCase:
    some = layer.name == "d6"  # which rows and columns are computed is in two tables
    values = resize_conv.constants(tile, layer.cin, layer.cout, layer.kernel, padding=layer.padding)
    sizes = ("height", "width", "up_height", "up_width", "out_height", "out_width")
    signature = {
        **dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{dtype}"),
        "bias_ptr": "*fp32",
        **dict.fromkeys((*sizes, "n_rows", "n_cols", "n_pixels"), "i32"),
        **dict.fromkeys(("scale_y", "scale_x"), "fp32"),
    }
    constexprs = dict(values)
    if some:
        signature |= dict.fromkeys(("rows_ptr", "cols_ptr"), "*i32")
    else:
        constexprs |= dict.fromkeys(("rows_ptr", "cols_ptr"))
    place = layer.name if layer.name in ("d6", "d7") else "d"  # the others are alike
    config = f"{place} {values['BN']}x{values['BM']}x{values['BK']}"
    function = resize_conv._resize_conv_kernel
    return _case("resize_conv_relu", config, dtype, function, signature, constexprs, tile)


def _bottleneck_cases(arch: int, dtype: str) -> Iterator[CensusCase]:
    tile = grouped.from_table(bottleneck.TILES, arch, 1)
    encode, decode = bottleneck.constants(tile, arch, *(DECODER,) * 3)
    yield _case(
        "bottleneck", f"encode {encode['BN']}x{encode['BM']}x{encode['BK']}", dtype,
        bottleneck._encode_kernel,
        {
            **dict.fromkeys(("x_ptr", "w_ptr"), f"*{dtype}"),
            "part_ptr": "*fp32",
            "n_images": "i32",
        },
        encode, tile,
    )  # fmt: skip
    yield _case(
        "bottleneck", f"decode {decode['BN']}x{decode['BM']}x{decode['C']}", dtype,
        bottleneck._decode_kernel,
        {
            **dict.fromkeys(("w_ptr", "y_ptr"), f"*{dtype}"),
            **dict.fromkeys(("part_ptr", "bias_encoder_ptr", "bias_ptr"), "*fp32"),
            "part": "i64",
            "n_images": "i32",
        },
        decode, tile,
    )  # fmt: skip


def _map_case(
    arch: int, batch: int, parts: int, scan: bool, result: str | None, region: bool = False
) -> CensusCase:
    tile = grouped.from_table(anomaly_map.TILES, arch, batch * 256**2)
    signature = {
        **dict.fromkeys(("st_ptr", "ae_ptr", "affine_ptr", "maxima_ptr"), "*fp32"),
        "part": "i64",
        **dict.fromkeys(("height", "width", "out_height", "out_width", "blocks"), "i32"),
        **dict.fromkeys(("scale_y", "scale_x"), "fp32"),
    }
    constexprs = {"PARTS": parts, "PAD": 4, "SCAN": scan, "BLOCK": tile.bm}
    masks = dict.fromkeys(("region_ptr", "cells_ptr"))
    if region:
        signature |= dict.fromkeys(masks, "*u8")
    else:
        constexprs |= masks
    if result is None:
        constexprs["map_ptr"] = None
    else:
        signature["map_ptr"] = f"*{result}"
    config = f"{parts} parts, {tile.bm} pixels" + (", downscale" if scan else "")
    config += "" if result else ", score only"
    config += ", region" if region else ""
    function = anomaly_map._anomaly_map_kernel
    return _case("anomaly_map", config, result or "fp32", function, signature, constexprs, tile)


def _map_cases(arch: int) -> Iterator[CensusCase]:
    for batch in BATCHES["fp16"]:
        for parts in PARTS:
            yield _map_case(arch, batch, parts, False, "fp32")
    yield _map_case(arch, 1, 3, False, "fp16")
    yield _map_case(arch, 1, 3, True, "fp32")
    yield _map_case(arch, 1, 3, False, None)
    yield _map_case(arch, 1, 3, False, "fp32", region=True)
    yield CensusCase(
        kernel="anomaly_map",
        config=f"score, {anomaly_map.REDUCE_BLOCK} maxima",
        dtype="fp32",
        function=anomaly_map._score_kernel,
        signature={"maxima_ptr": "*fp32", "score_ptr": "*fp32", "blocks": "i32"},
        constexprs={"BLOCK": anomaly_map.REDUCE_BLOCK},
        num_warps=4,
        num_stages=1,
    )


def _all_cases(arch: int) -> Iterator[CensusCase]:
    for dtype, batches in BATCHES.items():
        for batch in batches:
            for layer in AUTOENCODER:
                if layer.name[0] == "e":
                    yield _strided_case(arch, layer, batch, dtype)
                elif layer.name not in ("d1", "d8"):  # parts of `bottleneck` and `pair_distance`
                    yield from _resize_cases(arch, layer, batch, dtype)
        yield from _bottleneck_cases(arch, dtype)
    yield from _map_cases(arch)


def _early(case: CensusCase) -> CensusCase:
    """The kernel as `launching.overlapped` starts it."""
    return replace(case, config=f"{case.config}, early", constexprs=case.constexprs | {"PDL": True})


def cases(arch: int) -> Iterator[CensusCase]:
    """Every shipped configuration for compute capability `arch`, each once.

    From sm_90 on also as kernels that start early, which no predictor does yet.
    """
    found = list(each_once(_all_cases(arch)))
    yield from found
    if arch >= 90:
        halves = [case for case in found if case.dtype == "fp16"]  # bf16's differ in no way
        yield from (_early(case) for case in halves if "PDL" in case.function.arg_names)
