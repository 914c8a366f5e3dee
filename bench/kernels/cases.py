"""Every fused operation at its real shapes.

The launches of the fast path at 256x256 without padding. Inputs are random, activations behind a
ReLU as in the network: half of them are zero.

Work is counted from the needed outputs (an average over 2x2 drops an odd last row and column):
75.4 GFLOP an image for EfficientAD-S and 233.3 for M with everything summed; the paper counts all
outputs, `shapes.paper_gflop`: 75.9 and 235.4. Bytes: each input and result once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.kernels.case import Case
from bench.kernels.inputs import Inputs
from bench.shapes import AUTOENCODER, BOTH, DECODER, IMAGE, TEACHER, pdn_layers
from efficientad.model.networks import decoder_sizes
from efficientad.ops import reference

MAP_PADDING = 4


def flop(outputs: int, kernel: int, cin: int, cout: int) -> int:
    return 2 * outputs * kernel**2 * cin * cout


# ---- one operation each: (inputs, batch, sizes) -> what a Case holds beside its place -----------


def pack(inputs: Inputs, n: int, height: int, width: int, border: int = 0) -> dict:
    mean = torch.tensor((0.485, 0.456, 0.406), device=inputs.device)
    std = torch.tensor((0.229, 0.224, 0.225), device=inputs.device)
    return {
        "operation": "pack",
        "arguments": (inputs.image(n, height, width, 3), mean, std),
        "options": {"channels_last": True, "border": border, "dtype": inputs.half},
    }


def first_conv_relu_pool(
    inputs: Inputs, n: int, height: int, width: int, couts, pool_padding: int = 0
) -> dict:
    weight = inputs.filters(*[(c, 4, 4, 4) for c in couts], dtype=inputs.half)
    outputs = n * 4 * _pooled(height - 3, pool_padding) * _pooled(width - 3, pool_padding)
    return {
        "operation": "first_conv_relu_pool",
        "arguments": (inputs.packed(n, height, width), weight, inputs.biases(*couts)),
        "options": {"pool_padding": pool_padding, "out_dtype": inputs.dtype},
        "flop": sum(flop(outputs, 4, 3, c) for c in couts),
    }


def conv_relu(
    inputs: Inputs, n: int, height: int, width: int, cin: int, couts, kernel: int, *,
    pool: bool = False, padding: int = 0, pool_padding: int = 0,
) -> dict:  # fmt: skip
    rows, cols = (length - kernel + 1 + 2 * padding for length in (height, width))
    outputs = n * rows * cols
    options: dict[str, Any] = {"padding": padding, "scale": inputs.scales(*couts)}
    if pool:
        outputs = n * 4 * _pooled(rows, pool_padding) * _pooled(cols, pool_padding)
        options["pool_padding"] = pool_padding
    return {
        "operation": "conv_relu_pool" if pool else "conv_relu",
        "arguments": (
            [inputs.activation(n, height, width, cin) for _ in couts],
            inputs.filters(*[(c, kernel, kernel, cin) for c in couts]),
            inputs.biases(*couts),
        ),
        "options": options,
        "flop": sum(flop(outputs, kernel, cin, c) for c in couts),
    }


def conv_relu_pool(*arguments, **options) -> dict:
    """As `conv_relu`, with the average pool behind it."""
    return conv_relu(*arguments, pool=True, **options)


def pair_distance(
    inputs: Inputs, n: int, height: int, width: int, cins: tuple[int, int, int], kernel: int, c: int
) -> dict:
    ct, cs, ca = cins
    rows, cols = height - kernel + 1, width - kernel + 1
    outputs = n * rows * cols
    scale = inputs.scales(2 * c)
    return {
        "operation": "pair_distance",
        "arguments": (
            inputs.activation(n, height, width, ct),
            inputs.activation(n, height, width, cs),
            inputs.activation(n, rows, cols, ca, dtype=inputs.half),
            *inputs.filters((c, kernel, kernel, ct)),
            *inputs.filters((2 * c, kernel, kernel, cs)),
            *inputs.filters((c, 3, 3, ca), dtype=inputs.half),
            *inputs.biases(2 * c),
        ),
        "options": {"scale": scale and scale[0]},
        "flop": flop(outputs, kernel, ct, c) + flop(outputs, kernel, cs, 2 * c)
        + flop(outputs, 3, ca, c),
    }  # fmt: skip


def strided_conv_relu(
    inputs: Inputs, n: int, height: int, width: int, cin: int, cout: int, kernel: int, *,
    stride: int = 2, padding: int = 1, relu: bool = True, border: int = 0,
) -> dict:  # fmt: skip
    """border: x is the interior of a larger packed image."""
    rows, cols = ((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
    if cin == 4:
        x = inputs.packed(n, height + 2 * border, width + 2 * border)
        x = x[:, border : border + height, border : border + width]
    else:
        x = inputs.activation(n, height, width, cin)
    return {
        "operation": "strided_conv_relu",
        "arguments": (x, *inputs.filters((cout, kernel, kernel, cin)), *inputs.biases(cout)),
        "options": {"stride": stride, "padding": padding, "relu": relu},
        "flop": flop(n * rows * cols, kernel, 3 if cin == 4 else cin, cout),
    }


def resize_conv_relu(
    inputs: Inputs, n: int, height: int, width: int, cin: int, cout: int, kernel: int,
    size: tuple[int, int], *, padding: int = 2, read_by: int | None = None,
) -> dict:  # fmt: skip
    """read_by: rows and columns of the resize that reads the result; it needs a part of it."""
    outputs = [length + 2 * padding - kernel + 1 for length in size]
    options: dict[str, Any] = {"padding": padding}
    case: dict[str, Any] = {
        "operation": "resize_conv_relu",
        "arguments": (
            inputs.activation(n, height, width, cin),
            *inputs.filters((cout, kernel, kernel, cin)),
            *inputs.biases(cout),
            size,
        ),
        "options": options,
        "flop": flop(n * outputs[0] * outputs[1], kernel, cin, cout),
    }
    if read_by is not None:
        case["needed"] = tuple(
            torch.tensor(
                reference.resize_reads(length, read_by), dtype=torch.int32, device=inputs.device
            )
            for length in outputs
        )
        options["rows"], options["cols"] = case["needed"]
    return case


def bottleneck(inputs: Inputs, n: int, cin: int, channels: int, cout: int) -> dict:
    return {
        "operation": "bottleneck",
        "arguments": (
            inputs.activation(n, 8, 8, cin),
            *inputs.filters((channels, 8, 8, cin)),
            *inputs.biases(channels),
            *inputs.filters((cout, 4, 4, channels)),
            *inputs.biases(cout),
        ),
        "flop": flop(n, 8, cin, channels) + flop(n * 16, 4, channels, cout),
    }


def anomaly_map(
    inputs: Inputs, n: int, height: int, width: int, parts: int, size: tuple[int, int],
    padding: int = MAP_PADDING,
) -> dict:  # fmt: skip
    maps = [inputs.normal(parts, n, height, width).square_() for _ in range(2)]
    affine = torch.tensor([0.4, 0.3, -0.1, 0.05], device=inputs.device)
    return {
        "operation": "anomaly_map",
        "arguments": (*maps, affine, size),
        "options": {"padding": padding},
    }


def _pooled(length: int, padding: int) -> int:
    return (length + 2 * padding) // 2


# ---- the networks' layers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A launch of the fast path: its place, and the operation's function above."""

    name: str
    size: str
    build: Callable[..., dict]
    arguments: tuple
    options: dict[str, Any] = field(default_factory=dict)
    small: bool = False

    @property
    def operation(self) -> str:
        return self.build.__name__

    def case(
        self, device: str | torch.device, batch: int, dtype: torch.dtype, seed: int = 0
    ) -> Case:
        """The launch at a batch size, with inputs of that seed."""
        inputs = Inputs(device, dtype, seed)
        made = self.build(inputs, batch, *self.arguments, **self.options)
        return Case(
            layer=self.name, size=self.size, batch=batch, dtype=dtype, small=self.small, **made
        )


def layers(size: str, *, parts: int = 3, small: bool = False) -> Iterator[Layer]:
    """The launches of EfficientAD-`size` in order; what both sizes share is marked BOTH.

    parts: partial maps that `pair_distance` leaves to `anomaly_map`.
    small: an eighth of the cells and input channels, for a machine that cannot do the real ones.
    """

    def cells(n: int, least: int = 4) -> int:
        return max(n // 8, least) if small else n

    def channels(n: int) -> int:
        return max(n // 8, 32) if small else n

    image, h = cells(IMAGE), cells(56)
    found = [
        Layer("pack", BOTH, pack, (image, image)),
        *_pdn_layers(size, cells, channels),
        *_autoencoder_layers(cells, channels),
        Layer("map", BOTH, anomaly_map, (h, h, parts, (image, image))),
    ]
    yield from (replace(layer, small=small) for layer in found)


def _pdn_layers(size: str, cells, channels) -> Iterator[Layer]:
    table = pdn_layers(size)
    h = IMAGE
    for i, (outputs, kernel, cin, couts, pool) in enumerate(table, start=1):
        side = cells(h, kernel + 4)
        if i == 1:
            yield Layer("conv1", size, first_conv_relu_pool, (side, side, couts))
        elif i < len(table):
            sizes = (side, side, channels(cin[0]), couts, kernel)
            yield Layer(f"conv{i}", size, conv_relu_pool if pool else conv_relu, sizes)
        else:
            wide = (channels(cin[0]), channels(cin[1]), channels(DECODER))
            yield Layer("pair", size, pair_distance, (side, side, wide, kernel, TEACHER))
        h = outputs // 2 if pool else outputs


def _autoencoder_layers(cells, channels) -> Iterator[Layer]:
    """All but the last, which is part of `pair`; encoder 6 and decoder 1 are one launch."""
    targets = [cells(n) for n in decoder_sizes(IMAGE)]
    h = IMAGE
    for name, outputs, kernel, cin, cout, _, padding, _ in AUTOENCODER[:-1]:
        side, ci = cells(h), 4 if cin == 3 else channels(cin)
        if name == "e6":
            yield Layer("bottleneck", BOTH, bottleneck, (ci, cout, cout))
        elif name[0] == "e":
            yield Layer(name, BOTH, strided_conv_relu, (side, side, ci, cout, kernel))
        elif name != "d1":
            up = targets[int(name[1]) - 1]
            options: dict[str, Any] = {"padding": padding}
            if name == "d6":  # the last resize reads 112 of its 128 rows and columns
                options["read_by"] = targets[6]
            yield Layer(
                name, BOTH, resize_conv_relu, (side, side, ci, cout, kernel, (up, up)), options
            )
        h = outputs
