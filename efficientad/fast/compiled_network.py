"""The folded network in a CPU's compiled convolutions: in float32, and in bfloat16 on AMX.

All images are channels last. Teacher and student share the first layer's patches and lie side by
side in one image, so nothing is joined; if their inner layers are the same, there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficientad.model.global_term import HiddenTerm
from efficientad.model.networks import PDN_LAYERS, decoder_sizes
from efficientad.ops import amx_conv
from efficientad.ops.compiled_conv import Layer, mean_square, resize


class NativeNetwork:
    """`fast.folded_network` in compiled convolutions, float32; transforms the filters, once.

    Args:
        tensors: folded weights and biases by the names of `folded_network`'s buffers, in float64.
        size: "S" or "M". padding: whether the PDN is the padded one.
        shared: whether the teacher's inner layers are the student's too.
    """

    name = "compiled convolutions"

    def __init__(self, tensors: dict[str, Tensor], size: str, padding: bool, shared: bool) -> None:
        def layer(name: str, **options) -> Layer:
            return Layer(tensors[f"{name}_weight"], tensors.get(f"{name}_bias"), **options)

        self._padding = padding
        rows = _inner_rows(size, padding)
        networks = ("teacher",) if shared else ("teacher", "student")
        self._first = Layer(*_first(tensors, networks), **rows[0])
        self._inner = [
            [layer(f"{name}{i}", **options) for name in networks]
            for i, options in enumerate(rows[1:], start=2)
        ]
        self._st, self._ae = layer("st"), layer("ae")
        encoder = [layer(f"enconv{i}", step=2, padding=1, relu=True) for i in range(1, 6)]
        self._encoder = [*encoder, layer("enconv6")]
        self._decoder = [
            layer(f"deconv{i}", padding=2 if i < 7 else 1, relu=True) for i in range(1, 8)
        ]
        self._last = layer("deconv8", padding=1)

    def __call__(self, x: Tensor, whole: HiddenTerm | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W), channels_last -> map_st, map_ae (N, h, w).

        whole: the detector's global term.
        """
        x = x.permute(0, 2, 3, 1).contiguous()
        features = self._features(x)
        own = features[..., -self._ae.channels :]
        st = mean_square(self._st(features))
        if whole is not None:
            st += whole(own)
        ae = self._ae(own)
        self._last(self._decoded(x), ae, add=True)
        return st, mean_square(ae)

    def _features(self, x: Tensor) -> Tensor:
        """The teacher's and, behind them, unless they are the same, the student's features.

        (N, h, w, C + C') or (N, h, w, C).
        """
        x = self._first(x)
        for layers in self._inner:
            widths = [layer.out_channels for layer in layers]
            y = x.new_empty(len(x), *layers[0].size(*x.shape[1:3]), sum(widths))
            sources = x.split([layer.channels for layer in layers], 3)
            for layer, source, target in zip(layers, sources, y.split(widths, 3), strict=True):
                layer(source, target)
            x = y
        return x

    def _decoded(self, x: Tensor) -> Tensor:
        """The autoencoder up to its last layer, (N, h, w, 64) on the features' grid."""
        rows, columns = (decoder_sizes(length, self._padding) for length in x.shape[1:3])
        for layer in self._encoder:
            x = layer(x)
        for layer, size in zip(self._decoder, zip(rows, columns, strict=True), strict=True):
            x = layer(resize(x, size))
        return x


class AmxNetwork:
    """The same in bfloat16 and AMX tiles; arguments as in `NativeNetwork`.

    The first layers see image and filters as two numbers each (docs/precision.md). The differences
    of the last layers are squared as they were summed, in float32.
    """

    name = "AMX convolutions"

    def __init__(self, tensors: dict[str, Tensor], size: str, padding: bool, shared: bool) -> None:
        def layer(name: str, **options) -> amx_conv.Layer:
            weight, bias = tensors[f"{name}_weight"], tensors.get(f"{name}_bias")
            return amx_conv.Layer(weight, bias, **options)

        self._padding = padding
        rows = _inner_rows(size, padding)
        # A layer's padding is a border of the image that it reads.
        self._borders = [row.pop("padding") for row in rows] + [0]
        networks = ("teacher",) if shared else ("teacher", "student")
        self._first = amx_conv.Layer(*_first(tensors, networks), packed=True, **rows[0])
        self._inner = [
            [layer(f"{name}{i}", **options) for name in networks]
            for i, options in enumerate(rows[1:], start=2)
        ]
        self._st, self._ae = layer("st"), layer("ae")
        self._encoder = [layer("enconv1", step=2, relu=True, packed=True)]
        self._encoder += [layer(f"enconv{i}", step=2, relu=True) for i in range(2, 6)]
        self._encoder += [layer("enconv6")]
        self._decoder = [layer(f"deconv{i}", relu=True) for i in range(1, 8)]
        self._last = layer("deconv8")

    def __call__(self, x: Tensor, whole: HiddenTerm | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W), float32, channels_last -> map_st, map_ae (N, h, w).

        whole: as in `NativeNetwork`.
        """
        size = x.shape[2:]
        border = max(self._borders[0], 1)
        packed = amx_conv.pack(x.permute(0, 2, 3, 1), border)
        features = self._features(_inside(packed, border - self._borders[0]))
        st = amx_conv.mean_square((self._st, features))
        own = features[..., -self._ae.channels :]
        if whole is not None:
            st += whole(own)
        decoded = self._decoded(_inside(packed, border - 1), (size[0], size[1]))
        return st, amx_conv.mean_square((self._ae, own), (self._last, decoded))

    def _features(self, x: Tensor) -> Tensor:
        """As `NativeNetwork._features`, of packed images with the first layer's padding."""
        x = _run([self._first], [x], self._borders[1])
        for layers, border in zip(self._inner, self._borders[2:], strict=True):
            x = _run(layers, x.split([layer.channels for layer in layers], 3), border)
        return x

    def _decoded(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Up to the last layer, (N, h + 2, w + 2, 64), of packed images with a border of 1."""
        rows, columns = (decoder_sizes(length, self._padding) for length in image_size)
        for i, layer in enumerate(self._encoder):
            x = _run([layer], [x], int(i < 4))  # the sixth layer has no padding
        *layers, seventh = self._decoder
        *sizes, last = zip(rows, columns, strict=True)
        for layer, size in zip(layers, sizes, strict=True):
            x = layer(amx_conv.resize(x, size, border=2))
        x = amx_conv.resize(x, last, border=1)
        # As wide as the features that the student's last layer reads: read together with them.
        spare = self._st.kernel - self._last.kernel
        return _run([seventh], [x], 1, behind=max(spare, 0))


def _run(layers: Any, sources: Any, border: int, behind: int = 0) -> Tensor:
    """The layers' outputs side by side, zeros around; their memory is `behind` pixels wider."""
    height, width = layers[0].size(*sources[0].shape[1:3])
    shape = (len(sources[0]), height + 2 * border, width + 2 * border + behind)
    widths = [layer.out_channels for layer in layers]
    whole = amx_conv.image(*shape, sum(widths))
    if border:
        whole.zero_()
    inner = whole[:, border : border + height, border : border + width]
    for layer, x, out in zip(layers, sources, inner.split(widths, 3), strict=True):
        layer(x, out)
    return whole[:, :, : width + 2 * border]


def _inside(x: Tensor, cut: int) -> Tensor:
    """Images (N, H, W, C) without so many pixels on every side."""
    return x[:, cut : x.shape[1] - cut, cut : x.shape[2] - cut]


def _inner_rows(size: str, padding: bool) -> list[dict[str, Any]]:
    """A layer's options per PDN layer but the last."""
    return [
        {
            "padding": row.padding if padding else 0,
            "relu": row.relu,
            "pool": row.pool,
            "pool_padding": int(padding),
        }
        for row in PDN_LAYERS[size][:-1]
    ]


def _first(tensors: dict[str, Tensor], networks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Filters and biases of the first layers, one behind the other."""
    weight, bias = (
        torch.cat([tensors[f"{name}1_{part}"] for name in networks]) for part in ("weight", "bias")
    )
    return weight, bias
