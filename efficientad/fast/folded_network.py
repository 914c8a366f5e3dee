"""The folded detector in torch.

The fast path of a CPU, and, in channels_last, of a GPU that cannot run the kernels. It has the
arithmetic of the detector with fewer passes over memory: the difference between teacher and student
is one convolution over their concatenated features, and no 384-channel intermediate is normalised.
In float32 on a CPU it is handed to the compiled convolutions (`NativeNetwork`); where these are
missing the large convolutions still take fewer multiplications (`ops/differentiable_conv.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.fast.folding import exact_last, exact_layers
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN_LAYERS, TEACHER_CHANNELS, decoder_sizes
from efficientad.ops import compiled_conv
from efficientad.ops.compiled_conv import Layer, mean_square, resize
from efficientad.ops.differentiable_conv import convolve


def is_compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled convolutions compute the network in this dtype, there."""
    return dtype == torch.float32 and device.type == "cpu" and compiled_conv.available()


def network_name(dtype: torch.dtype, device: torch.device) -> str:
    """What a user is told computes."""
    compiled = ", compiled convolutions" if is_compiled(dtype, device) else ""
    return f"folded torch network{compiled}"


class FoldedNetwork(nn.Module):
    """Distance maps of normalised images, in one computing dtype.

    Args:
        detector: its weights are read, not changed.
        dtype: of weights and activations; the distances are summed in at least float32.
        device: of the weights; None is the detector's.
    """

    deconv8_weight: Tensor

    def __init__(
        self,
        detector: EfficientAD,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.padding = detector.size, detector.padding
        device = detector.affine.device if device is None else device
        tensors = _folded_tensors(detector)
        for name, value in tensors.items():
            layout = {"memory_format": torch.channels_last} if value.dim() == 4 else {}
            self.register_buffer(name, value.to(device, dtype, copy=True).contiguous(**layout))
        self._native = self._compiled(tensors)

    def _compiled(self, tensors: dict[str, Tensor]) -> NativeNetwork | None:
        """The network in compiled convolutions, where they compute in its dtype."""
        if not is_compiled(self.deconv8_weight.dtype, self.deconv8_weight.device):
            return None
        tensors = {name: value.cpu() for name, value in tensors.items()}
        return NativeNetwork(tensors, self.size, self.padding)

    @torch.no_grad()
    def reload(self, detector: EfficientAD) -> None:
        """Take over the weights of another detector of the same size, in place.

        Raises:
            ValueError: a detector of another size or padding.
        """
        if (detector.size, detector.padding) != (self.size, self.padding):
            raise ValueError(
                f"the detector is EfficientAD-{detector.size} with padding={detector.padding}; "
                f"this network is {self.size} with padding={self.padding}: build a new one"
            )
        tensors = _folded_tensors(detector)
        for name, value in tensors.items():
            getattr(self, name).copy_(value)
        self._native = self._compiled(tensors)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W), channels_last -> map_st, map_ae (N, h, w), float32."""
        if self._native is not None:
            return self._native(x)
        height, width = x.shape[-2:]
        teacher, student = self._trunk(x, "teacher"), self._trunk(x, "student")
        decoded = self._autoencoder(x, (height, width))
        st = self._conv(torch.cat([teacher, student], 1), "st")
        ae = self._conv(student, "ae")
        ae += F.conv2d(decoded, self.deconv8_weight, None, padding=1)
        return _mean_square(st), _mean_square(ae)

    def _trunk(self, x: Tensor, name: str) -> Tensor:
        for i, row in enumerate(PDN_LAYERS[self.size][:-1], start=1):
            padding = row.padding if self.padding else 0
            x = self._conv(x, f"{name}{i}", padding=padding, relu=True)
            if row.pool:
                x = F.avg_pool2d(x, 2, 2, padding=int(self.padding))
        return x

    def _conv(self, x: Tensor, name: str, *, padding: int = 0, relu: bool = False) -> Tensor:
        """A PDN layer. Where the processor has only its float units, with fewer multiplications."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
            return convolve(x, weight, bias, relu=relu).permute(0, 3, 1, 2)
        y = F.conv2d(x, weight, bias, padding=padding)
        return F.relu_(y) if relu else y

    def _autoencoder(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        def conv(x: Tensor, name: str, **options) -> Tensor:
            return F.conv2d(
                x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), **options
            )

        for i in range(1, 6):
            x = F.relu_(conv(x, f"enconv{i}", stride=2, padding=1))
        x = conv(x, "enconv6")
        rows, cols = (decoder_sizes(length, self.padding) for length in image_size)
        for i in range(1, 8):
            x = F.interpolate(x, size=(rows[i - 1], cols[i - 1]), mode="bilinear")
            x = F.relu_(conv(x, f"deconv{i}", padding=2 if i < 7 else 1))
        return x


def _mean_square(difference: Tensor) -> Tensor:
    """Channel mean of squares of (N, C, h, w), summed in at least float32."""
    wide = torch.promote_types(difference.dtype, torch.float32)
    norm = torch.linalg.vector_norm(difference, dim=1, dtype=wide)
    return norm.square_().div_(difference.shape[1])


def _folded_tensors(detector: EfficientAD) -> dict[str, Tensor]:
    """Weights and biases in float64, OIHW, by the name of the buffer that holds them."""
    layers = exact_layers(detector)
    teacher, student, autoencoder, bias = exact_last(detector)
    c = TEACHER_CHANNELS
    layers["st"] = torch.cat([teacher, student[:c]], dim=1), bias[:c]
    layers["ae"] = student[c:], bias[c:]
    tensors = {f"{name}_weight": weight for name, (weight, _) in layers.items()}
    tensors |= {f"{name}_bias": bias for name, (_, bias) in layers.items()}
    return tensors | {"deconv8_weight": autoencoder}


class NativeNetwork:
    """`FoldedNetwork` in compiled convolutions on a CPU, float32; transforms the filters, once.

    All images are channels last. Teacher and student share the first layer's patches and lie side
    by side in one image, so nothing is joined.

    Args:
        tensors: folded weights and biases in float64 by name, see `_folded_tensors`.
        size: "S" or "M". padding: whether the PDN is the padded one.
    """

    def __init__(self, tensors: dict[str, Tensor], size: str, padding: bool) -> None:
        def layer(name: str, **options) -> Layer:
            return Layer(tensors[f"{name}_weight"], tensors.get(f"{name}_bias"), **options)

        self._padding = padding
        rows: list[dict[str, Any]] = [
            {
                "padding": row.padding if padding else 0,
                "relu": row.relu,
                "pool": row.pool,
                "pool_padding": int(padding),
            }
            for row in PDN_LAYERS[size][:-1]
        ]
        weight, bias = (
            torch.cat([tensors[f"{name}1_{part}"] for name in ("teacher", "student")])
            for part in ("weight", "bias")
        )
        self._first = Layer(weight, bias, **rows[0])
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
