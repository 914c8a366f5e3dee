"""The folded detector in torch.

The fast path of a CPU, and, in channels_last, of a GPU that cannot run the kernels. It has the
arithmetic of the detector with fewer passes over memory: the difference between teacher and student
is one convolution over their concatenated features, and no 384-channel intermediate is normalised.
On a CPU it is handed to the compiled convolutions in float32, and where there is AMX in bfloat16
(`compiled_network.py`); where these are missing the large convolutions of float32 still take fewer
multiplications (`ops/differentiable_conv.py`).

Where teacher and student have the same inner layers, as after the instant schedule, a CPU computes
these once, and the last layers of both become one on the same features.

In 16 bits the first layer of teacher and student sees image and filters as two numbers each, their
sum nearly float32: rounding there shifts whole images alike, and was measured to be nearly all of
the error (docs/precision.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.fast.compiled_network import AmxNetwork, NativeNetwork
from efficientad.fast.folding import exact_last, exact_layers
from efficientad.model.detector import EfficientAD
from efficientad.model.global_term import HiddenTerm
from efficientad.model.networks import (
    PDN_LAYERS,
    TEACHER_CHANNELS,
    decoder_sizes,
    same_inner_layers,
)
from efficientad.ops import amx_conv, compiled_conv
from efficientad.ops.differentiable_conv import convolve


def compiled_network(
    dtype: torch.dtype, device: torch.device
) -> type[NativeNetwork] | type[AmxNetwork] | None:
    """What computes the network in this dtype there in compiled convolutions, or None."""
    if device.type != "cpu":
        return None
    if dtype == torch.bfloat16:
        return AmxNetwork if amx_conv.available() else None
    return NativeNetwork if dtype == torch.float32 and compiled_conv.available() else None


def network_name(dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> str:
    """What a user is told computes. shared: the inner layers of teacher and student."""
    network = compiled_network(dtype, device)
    compiled = "" if network is None else f", {network.name}"
    once = ", inner layers shared" if shared else ""
    return f"folded torch network{compiled}{once}"


class FoldedNetwork(nn.Module):
    """Distance maps of normalised images, in one computing dtype.

    Args:
        detector: its weights are read, not changed.
        dtype: of weights and activations; the distances are summed in at least float32.
        device: of the weights; None is the detector's.
    """

    deconv8_weight: Tensor
    shared: bool  # whether the inner layers of teacher and student are computed once

    def __init__(
        self,
        detector: EfficientAD,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.padding = detector.size, detector.padding
        self.dtype, self.device = dtype, torch.device(device or detector.affine.device)
        self._split = dtype if dtype.itemsize == 2 else None
        self._register(detector)

    def _register(self, detector: EfficientAD) -> None:
        """Make the buffers, and of them the compiled network."""
        self.shared = self._shares(detector)
        tensors = _folded_tensors(detector, self.shared)
        for name in list(dict(self.named_buffers())):
            delattr(self, name)
        for name, value in self._in_parts(tensors).items():
            layout = {"memory_format": torch.channels_last} if value.dim() == 4 else {}
            buffer = value.to(self.device, self.dtype, copy=True).contiguous(**layout)
            self.register_buffer(name, buffer)
        self._native = self._compiled(tensors)

    def _shares(self, detector: EfficientAD) -> bool:
        """On a CPU alone: a CUDA graph holds on to its buffers whatever is loaded next."""
        return self.device.type == "cpu" and same_inner_layers(detector.teacher, detector.student)

    def _in_parts(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, with the first layers' filters as `_parts` of images needs them."""
        tensors = dict(tensors)
        if self._split is not None:
            for name in tensors.keys() & {"teacher1_weight", "student1_weight"}:
                high, low = _parts(tensors[name], self._split)
                tensors[name] = torch.cat([high, high, low], 1)
        return tensors

    def _compiled(self, tensors: dict[str, Tensor]) -> NativeNetwork | AmxNetwork | None:
        """The network in compiled convolutions, where they compute in its dtype."""
        network = compiled_network(self.deconv8_weight.dtype, self.deconv8_weight.device)
        if network is None:
            return None
        tensors = {name: value.cpu() for name, value in tensors.items()}
        return network(tensors, self.size, self.padding, self.shared)

    @torch.no_grad()
    def reload(self, detector: EfficientAD) -> None:
        """Take over the weights of another detector of the same size, in place.

        Unless one of the two has inner layers to share and the other has not.

        Raises:
            ValueError: a detector of another size or padding.
        """
        if (detector.size, detector.padding) != (self.size, self.padding):
            raise ValueError(
                f"the detector is EfficientAD-{detector.size} with padding={detector.padding}; "
                f"this network is {self.size} with padding={self.padding}: build a new one"
            )
        if self._shares(detector) != self.shared:
            self._register(detector)
            return
        tensors = _folded_tensors(detector, self.shared)
        for name, value in self._in_parts(tensors).items():
            getattr(self, name).copy_(value)
        self._native = self._compiled(tensors)

    def forward(self, x: Tensor, whole: HiddenTerm | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W), channels_last -> map_st, map_ae (N, h, w), float32.

        Images for a 16-bit network are float32. whole: the detector's global term.
        """
        if self._native is not None:
            return self._native(x, whole)
        height, width = x.shape[-2:]
        first = x
        if self._split is not None:
            x, low = _parts(x, self._split)
            first = torch.cat([x, low, x], 1)
        teacher = student = self._trunk(first, "teacher")
        joined = teacher
        if not self.shared:
            student = self._trunk(first, "student")
            joined = torch.cat([teacher, student], 1)
        decoded = self._autoencoder(x, (height, width))
        st = _mean_square(self._conv(joined, "st"))
        if whole is not None:
            st += whole(student.permute(0, 2, 3, 1))
        ae = self._conv(student, "ae")
        ae += F.conv2d(decoded, self.deconv8_weight, None, padding=1)
        return st, _mean_square(ae)

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


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x rounded to `dtype`, and what is missing, rounded too."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def _mean_square(difference: Tensor) -> Tensor:
    """Channel mean of squares of (N, C, h, w), summed in at least float32."""
    wide = torch.promote_types(difference.dtype, torch.float32)
    norm = torch.linalg.vector_norm(difference, dim=1, dtype=wide)
    return norm.square_().div_(difference.shape[1])


def _folded_tensors(detector: EfficientAD, shared: bool) -> dict[str, Tensor]:
    """Weights and biases in float64, OIHW, by the name of the buffer that holds them.

    shared: teacher and student read the same features; "st" reads them once.
    """
    layers = exact_layers(detector)
    teacher, student, autoencoder, bias = exact_last(detector)
    c = TEACHER_CHANNELS
    if shared:
        layers = {name: layer for name, layer in layers.items() if not name.startswith("student")}
        layers["st"] = teacher + student[:c], bias[:c]
    else:
        layers["st"] = torch.cat([teacher, student[:c]], dim=1), bias[:c]
    layers["ae"] = student[c:], bias[c:]
    tensors = {f"{name}_weight": weight for name, (weight, _) in layers.items()}
    tensors |= {f"{name}_bias": bias for name, (_, bias) in layers.items()}
    return tensors | {"deconv8_weight": autoencoder}
