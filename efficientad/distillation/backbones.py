"""Networks a PDN is distilled from.

A backbone maps a normalised image (N, 3, 512, 512) to 384 channels on a 64x64 grid, which is the
grid of a padded PDN at 256x256 (paper, Algorithm 3 and its Psi).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.distillation.efficientnet_lite import build, is_efficientnet_lite
from efficientad.model.networks import TEACHER_CHANNELS
from efficientad.utils.file_kinds import kind_of_file

BACKBONE_SIZE = 512  # pixels
GRID = 64  # cells
_KNOWN = (
    "an EfficientNet-Lite0 or Lite1 (safetensors with batch norm folded into biases, or the "
    "published state dict, .pth), a ResNet-18 trunk (safetensors: conv1, layer1, layer2, layer3 "
    "with batch norm folded) or torchvision's wide_resnet101_2 state dict (.pth)"
)


class _Block(nn.Module):
    """A basic residual block whose batch norms are folded into its convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


class ResNet18Trunk(nn.Module):
    """conv1 and layer1..layer3 of a ResNet-18; layer2 and layer3 side by side, 384 channels.

    layer3 is resized to layer2's grid (bilinear), and every cell becomes the mean of its 3x3
    neighbourhood, as PatchCore describes a patch. Outside the image there are no cells: a border
    cell is the mean of those that exist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised image (N, 3, H, W) -> (N, 384, H / 8, W / 8), for H and W multiples of 16."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, 1)
        layer2 = self.layer2(self.layer1(x))
        layer3 = F.interpolate(self.layer3(layer2), size=layer2.shape[-2:], mode="bilinear")
        return F.avg_pool2d(torch.cat([layer2, layer3], 1), 3, 1, 1, count_include_pad=False)


class PatchCoreFeatures(nn.Module):
    """PatchCore's features of a WideResNet-101, the paper's Psi, as nelson1425 computes them.

    network: torchvision's `wide_resnet101_2`, or any module with its conv1, bn1, relu, maxpool and
    layer1..layer3. Patches of 3x3 cells of layer2 and of layer3 (resized to layer2's grid) are
    pooled to 1024 values each, and the 2048 of both to 384.
    """

    pooled = 1024

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Normalised image (N, 3, H, W) -> (N, 384, H / 8, W / 8)."""
        net: Any = self.network
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        layer2 = net.layer2(x)
        layer3 = net.layer3(layer2)
        grid = layer2.shape[-2:]
        # An image at a time: the patches of layer3 are 151 MB in float32.
        rows = [self._pool(a[None], b[None], grid) for a, b in zip(layer2, layer3, strict=True)]
        return torch.cat(rows)

    def _pool(self, layer2: Tensor, layer3: Tensor, grid: torch.Size) -> Tensor:
        pooled = []
        for features in (layer2, layer3):
            patches = F.unfold(features, 3, padding=1)  # [1, 9 C, h w], C slowest as in PatchCore
            patches = patches.unflatten(2, features.shape[-2:])
            if patches.shape[-2:] != grid:
                patches = F.interpolate(patches, size=grid, mode="bilinear")
            vectors = patches.flatten(2).transpose(1, 2)  # [1, h w, 9 C]
            pooled.append(F.adaptive_avg_pool1d(vectors, self.pooled))
        both = F.adaptive_avg_pool1d(torch.cat(pooled, 2), TEACHER_CHANNELS)
        return both.transpose(1, 2).unflatten(2, grid)


def load_backbone(path: str | os.PathLike) -> nn.Module:
    """The frozen backbone of a weights file, float32, on the CPU, in eval mode.

    path: an EfficientNet-Lite0 or Lite1 (see `efficientnet_lite`), a ResNet-18 trunk in
    safetensors, or the state dict of torchvision's wide_resnet101_2 (.pth or safetensors), for
    which torchvision must be installed. Recognised by its names.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: another network, wrong shapes, or values that are not finite.
        ImportError: a WideResNet without torchvision.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such backbone file: {path}; expected {_KNOWN}")
    weights = _read(path)
    if "layer3.22.conv3.weight" in weights:
        network = _wide_resnet101()
        weights = {k: v for k, v in weights.items() if not k.startswith(("fc.", "layer4."))}
        backbone: nn.Module = PatchCoreFeatures(network)
    elif "layer3.1.conv2.weight" in weights:
        network = backbone = ResNet18Trunk()
    elif is_efficientnet_lite(weights):
        try:
            network, weights = build(weights)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no known backbone: {error}; expected {_KNOWN}") from None
        backbone = network
    else:
        raise ValueError(f"{path} is no known backbone; expected {_KNOWN}")
    _fill(network, weights, path)
    return backbone.requires_grad_(False).eval()


def check_backbone(backbone: nn.Module, device: torch.device | str = "cpu") -> None:
    """Raise ValueError unless a 512x512 image gives (1, 384, 64, 64)."""
    with torch.no_grad():
        got = tuple(backbone(torch.zeros(1, 3, BACKBONE_SIZE, BACKBONE_SIZE, device=device)).shape)
    expected = (1, TEACHER_CHANNELS, GRID, GRID)
    if got != expected:
        raise ValueError(f"the backbone gives {got} for a 512x512 image; expected {expected}")


def _read(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:9] == b"{":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name).float() for name in file.keys()}
        read = torch.load(path, map_location="cpu", weights_only=True)
        return {
            k.removeprefix("module."): v.float() for k, v in read.items() if isinstance(v, Tensor)
        }
    except Exception as error:  # readers of damaged files raise nearly everything
        kind = kind_of_file(path)
        found = error if kind is None or kind == "a zip archive" else f"it is {kind}"
        raise ValueError(f"{path} cannot be read as a backbone ({found}); expected {_KNOWN}") from (
            None
        )


def _wide_resnet101() -> nn.Module:
    try:
        from torchvision.models import wide_resnet101_2
    except ImportError as error:
        raise ImportError(
            "a WideResNet-101 backbone needs torchvision: pip install torchvision"
        ) from error
    network = wide_resnet101_2(weights=None)
    network.layer4, network.fc = nn.Identity(), nn.Identity()
    return network


@torch.no_grad()
def _fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    state = network.state_dict()
    counters = "num_batches_tracked"  # unused, and not in older files
    problems = [f"{k} is missing" for k in state if k not in weights and not k.endswith(counters)]
    problems += [f"{name} is not known" for name in weights if name not in state]
    for name, value in weights.items():
        if name in state and value.shape != state[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, not {tuple(state[name].shape)}")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} has a NaN or infinite entry")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} is not the expected backbone: {'; '.join(problems[:3])}{more}")
    network.load_state_dict(dict(weights), strict=False)
