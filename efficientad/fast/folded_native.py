"""The folded detector in compiled convolutions on a CPU.

The arithmetic of `folded_network.FoldedNetwork` in float32, all images channels last. Teacher and
student share the first layer's patches and lie side by side in one image, so nothing is joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficientad.model.networks import PDN_LAYERS, decoder_sizes
from efficientad.ops.compiled_conv import Layer, mean_square, resize


class NativeNetwork:
    """Distance maps of normalised images, float32; the filters are transformed here, once.

    Args:
        tensors: folded weights and biases in float64 by name, see `FoldedNetwork`.
        size: "S" or "M". padding: whether the PDN is the padded one.
    """

    def __init__(self, tensors: dict[str, Tensor], size: str, padding: bool) -> None:
        def layer(name: str, **options) -> Layer:
            return Layer(tensors[f"{name}_weight"], tensors.get(f"{name}_bias"), **options)

        self._padding = padding
        rows = [
            {
                "padding": row.padding if padding else 0,
                "relu": row.relu,
                "pool": row.pool,
                "pool_padding": int(padding),
            }
            for row in PDN_LAYERS[size][:-1]
        ]
        first = (
            torch.cat([tensors[f"{name}1_{part}"] for name in ("teacher", "student")])
            for part in ("weight", "bias")
        )
        self._first = Layer(*first, **rows[0])
        self._pairs = [
            [layer(f"{name}{i}", **options) for name in ("teacher", "student")]
            for i, options in enumerate(rows[1:], start=2)
        ]
        self._st, self._ae = layer("st"), layer("ae")
        encoder = [layer(f"enconv{i}", step=2, padding=1, relu=True) for i in range(1, 6)]
        self._encoder = [*encoder, layer("enconv6")]
        self._decoder = [
            layer(f"deconv{i}", padding=2 if i < 7 else 1, relu=True) for i in range(1, 8)
        ]
        self._last = layer("deconv8", padding=1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W), channels_last -> map_st, map_ae (N, h, w)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        features = self._features(x)
        st = self._st(features)
        ae = self._ae(features[..., -self._ae.channels :])
        self._last(self._decoded(x), ae, add=True)
        return mean_square(st), mean_square(ae)

    def _features(self, x: Tensor) -> Tensor:
        """The teacher's and, behind them, the student's features, (N, h, w, C + C')."""
        x = self._first(x)
        for teacher, student in self._pairs:
            widths = [teacher.out_channels, student.out_channels]
            y = x.new_empty(len(x), *teacher.size(*x.shape[1:3]), sum(widths))
            sources, targets = x.split([teacher.channels, student.channels], 3), y.split(widths, 3)
            teacher(sources[0], targets[0])
            student(sources[1], targets[1])
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
