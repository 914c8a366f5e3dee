"""The folded detector in torch.

The fast path of a CPU, and, in channels_last, of a GPU that cannot run the kernels. It has the
arithmetic of the detector with fewer passes over memory: the difference between teacher and student
is one convolution over their concatenated features, and no 384-channel intermediate is normalised.
In float32 on a CPU it is handed to the compiled convolutions (`folded_native.py`); where these are
missing the large convolutions still take fewer multiplications (`fast_conv.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.fast import folding
from efficientad.fast.folded_native import NativeNetwork
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN_LAYERS, TEACHER_CHANNELS, decoder_sizes
from efficientad.ops import compiled_conv as native_conv
from efficientad.ops.differentiable_conv import convolve


def is_compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled convolutions compute the network in this dtype, there."""
    return dtype == torch.float32 and device.type == "cpu" and native_conv.available()


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
        if not is_compiled(self.st_weight.dtype, self.st_weight.device):
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


@torch.no_grad()
def _folded_tensors(detector: EfficientAD) -> dict[str, Tensor]:
    """Weights and biases in float64, OIHW, by the name of the buffer that holds them."""
    tensors = {}
    for name, network in (("teacher", detector.teacher), ("student", detector.student)):
        for i in range(1, len(PDN_LAYERS[detector.size])):
            tensors |= _layer(f"{name}{i}", getattr(network, f"conv{i}"))
    for i in range(1, 7):
        tensors |= _layer(f"enconv{i}", getattr(detector.autoencoder.encoder, f"enconv{i}"))
    decoder = detector.autoencoder.decoder
    for i in range(1, 8):
        tensors |= _layer(f"deconv{i}", getattr(decoder, f"deconv{i}"))
    weight, bias = folding.normalized_teacher(detector)
    last = folding.last_conv(detector.student)
    student_weight, student_bias = last.weight.double(), last.bias.double()
    c = TEACHER_CHANNELS
    tensors["st_weight"] = torch.cat([weight, -student_weight[:c]], dim=1)
    tensors["st_bias"] = bias - student_bias[:c]
    tensors["ae_weight"] = -student_weight[c:]
    tensors["ae_bias"] = decoder.deconv8.bias.double() - student_bias[c:]
    tensors["deconv8_weight"] = decoder.deconv8.weight.double()
    return tensors


def _layer(name: str, conv: nn.Conv2d) -> dict[str, Tensor]:
    return {f"{name}_weight": conv.weight.double(), f"{name}_bias": conv.bias.double()}
