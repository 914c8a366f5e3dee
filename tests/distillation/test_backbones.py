"""Backbones: the ResNet-18 trunk and PatchCore's features, each against a plain recomputation."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from efficientad.distillation.backbones import (
    PatchCoreFeatures,
    ResNet18Trunk,
    check_backbone,
    load_backbone,
)

TRUNK = "resnet18_layer1-3_bnfolded_fp16.safetensors"


def _random_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in ResNet18Trunk().state_dict().items():
        scale = 0.05 if name.endswith("bias") else (1.5 / math.prod(value.shape[1:])) ** 0.5
        weights[name] = torch.randn(value.shape, generator=generator) * scale
    return weights


def _plain_trunk(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The trunk written out from torchvision's ResNet-18, in float64."""
    w = {name: value.double() for name, value in w.items()}

    def conv(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    x = F.max_pool2d(conv(x.double(), "conv1", 2, 3).clamp_min(0), 3, 2, 1)
    kept = {}
    for layer, first_stride in ((1, 1), (2, 2), (3, 2)):
        for block in (0, 1):
            name, stride = f"layer{layer}.{block}", first_stride if block == 0 else 1
            y = conv(x, f"{name}.conv1", stride, 1).clamp_min(0)
            y = conv(y, f"{name}.conv2", 1, 1)
            changes = f"{name}.downsample.0.weight" in w
            x = (y + (conv(x, f"{name}.downsample.0", stride, 0) if changes else x)).clamp_min(0)
        kept[layer] = x
    _, _, height, width = kept[2].shape
    both = torch.cat([kept[2], F.interpolate(kept[3], (height, width), mode="bilinear")], 1)
    out = torch.empty_like(both)
    for i in range(height):
        for j in range(width):
            near = both[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            out[:, :, i, j] = near.mean(dim=(2, 3))
    return out


def test_trunk_equals_the_plain_recomputation(tmp_path):
    weights = _random_weights()
    save_file(weights, tmp_path / "trunk.safetensors")
    backbone = load_backbone(tmp_path / "trunk.safetensors")
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = _plain_trunk(weights, x)
    with torch.no_grad():
        found = backbone(x)
    assert found.shape == (2, 384, 8, 12)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training


class _Tiny(nn.Module):
    """The rooms of a ResNet with small layers: layer2 at 1/8 of the image, layer3 at 1/16."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4).eval()
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(2)
        self.layer1 = nn.Conv2d(4, 4, 1)
        self.layer2 = nn.Conv2d(4, channels[0], 3, 2, 1)
        self.layer3 = nn.Conv2d(channels[0], channels[1], 3, 2, 1)


def _plain_patchcore(net: _Tiny, x: Tensor) -> Tensor:
    """PatchCore cell by cell: 3x3 patches (channel slowest), resized, pooled to 1024 and 384."""
    layer2 = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))
    layer3 = net.layer3(layer2)
    _, _, height, width = layer2.shape
    stacked = []
    for features in (layer2, layer3):
        _, channels, h, w = features.shape
        padded = F.pad(features, (1, 1, 1, 1))
        patches = torch.stack(
            [padded[0, :, i : i + 3, j : j + 3].reshape(-1) for i in range(h) for j in range(w)]
        )
        grid = patches.t().reshape(1, channels * 9, h, w)
        grid = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
        vectors = grid[0].flatten(1).t()  # [cells, 9 C]
        stacked.append(F.adaptive_avg_pool1d(vectors[:, None], 1024)[:, 0])
    both = torch.stack(stacked, dim=1).reshape(height * width, 1, -1)
    return F.adaptive_avg_pool1d(both, 384)[:, 0].t().reshape(1, 384, height, width)


@pytest.mark.parametrize("channels", [(16, 32), (128, 256)])
def test_patchcore_features_equal_the_plain_recomputation(channels):
    net = _Tiny(channels).eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = PatchCoreFeatures(net)(x)
        expected = torch.cat([_plain_patchcore(net, image[None]) for image in x])
    assert found.shape == (2, 384, 8, 12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_real_trunk_gives_384_channels_on_64_cells(shared_data):
    path = shared_data / "backbone" / TRUNK
    backbone = load_backbone(path)
    check_backbone(backbone)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = backbone(x)
    expected = _plain_trunk(backbone.state_dict(), x)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"gives \(1, 3, 128, 128\) for a 512x512 image"):
        check_backbone(nn.AvgPool2d(4))


def test_a_state_dict_file_is_read_without_running_code(tmp_path):
    torch.save(_random_weights(), tmp_path / "trunk.pth")
    assert isinstance(load_backbone(tmp_path / "trunk.pth"), ResNet18Trunk)
    torch.save(ResNet18Trunk(), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth cannot be read as a backbone"):
        load_backbone(tmp_path / "module.pth")


def test_a_wide_resnet_without_torchvision_names_the_package(tmp_path):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    save_file({"layer3.22.conv3.weight": torch.zeros(1)}, tmp_path / "wide.safetensors")
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_backbone(tmp_path / "wide.safetensors")


def test_the_wide_resnet_gives_384_channels(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.save(models.wide_resnet101_2(weights=None).state_dict(), tmp_path / "wide.pth")
    backbone = load_backbone(tmp_path / "wide.pth")
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 384, 8, 8)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such backbone file: .*none\.safetensors"):
        load_backbone(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty", "cannot be read as a backbone"),
        ("text", "cannot be read as a backbone"),
        ("cut", "cannot be read as a backbone"),
        ("other", "is no known backbone"),
        ("missing", r"layer1\.1\.conv2\.bias is missing"),
        ("more", r"fc\.weight is not known"),
        ("shape", r"conv1\.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)"),
        ("nan", r"layer2\.0\.conv1\.bias has a NaN"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, damage, message):
    weights, path = _random_weights(), tmp_path / "trunk.safetensors"
    if damage == "other":
        weights = {"features.0.weight": torch.zeros(3)}
    elif damage == "missing":
        del weights["layer1.1.conv2.bias"]
    elif damage == "more":
        weights["fc.weight"] = torch.zeros(10, 512)
    elif damage == "shape":
        weights["conv1.weight"] = weights["conv1.weight"][:, :1].clone()
    elif damage == "nan":
        weights["layer2.0.conv1.bias"][3] = math.nan
    save_file(weights, path)
    data = path.read_bytes()
    if damage in ("empty", "text", "cut"):
        path.write_bytes({"empty": b"", "text": b"hello, world", "cut": data[:-9]}[damage])
    with pytest.raises(ValueError, match=message):
        load_backbone(path)
