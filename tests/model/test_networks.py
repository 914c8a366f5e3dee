"""Layer tables, size algebra and receptive field (arXiv 2303.14535, Tables 6-8 and 16)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientad.model.detector import EfficientAD
from efficientad.model.networks import (
    PDN,
    PDN_LAYERS,
    Autoencoder,
    decoder_sizes,
    feature_size,
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "teacher", "student", "total"),
    [("S", 2_694_144, 4_267_392, 8_057_856), ("M", 8_026_624, 11_615_488, 20_738_432)],
)
def test_parameter_counts(size, teacher, student, total):
    model = EfficientAD(size)
    assert count(model.teacher) == teacher
    assert count(model.student) == student
    assert count(model.autoencoder) == 1_096_320
    assert count(model) == total
    assert not any(p.requires_grad for p in model.teacher.parameters())


def convolution_sizes(module: nn.Module, image: torch.Tensor) -> list[tuple[int, int, int]]:
    """(multiply-accumulates, out height, in height) of every convolution for one image."""
    seen = []

    def record(conv, inputs, output):
        macs = output[0].numel() * conv.weight[0].numel()
        seen.append((macs, output.shape[-2], inputs[0].shape[-2]))

    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(record)
    module(image)
    return seen


@pytest.mark.parametrize(
    ("size", "padding", "giga_macs"),
    [
        ("S", False, 37.947),
        ("M", False, 117.705),
        ("S", True, 46.636),
        ("M", True, 143.692),
    ],
)
def test_macs(size, padding, giga_macs):
    model = EfficientAD(size, padding=padding).to("meta")
    seen = []
    image = torch.empty(1, 3, 256, 256, device="meta")
    for net in (model.teacher, model.student, model.autoencoder):
        seen += convolution_sizes(net, image)
    assert sum(macs for macs, _, _ in seen) / 1e9 == pytest.approx(giga_macs, abs=5e-4)


def test_intermediate_sizes_of_the_small_network():
    sizes = convolution_sizes(PDN("S").to("meta"), torch.empty(1, 3, 256, 256, device="meta"))
    assert [out for _, out, _ in sizes] == [253, 123, 59, 56]
    assert [inp for _, _, inp in sizes] == [256, 126, 61, 59]


@pytest.mark.parametrize(("size", "flops"), [("S", 75.8946e9), ("M", 235.4102e9)])
def test_profiler_flops_are_the_papers(size, flops):
    model = EfficientAD(size).eval()
    image = torch.zeros(1, 3, 256, 256)
    with torch.no_grad(), torch.profiler.profile(with_flops=True) as profile:
        for net in (model.teacher, model.student, model.autoencoder):
            net(image)
    counted = sum(e.flops for e in profile.key_averages() if e.key == "aten::conv2d")
    assert counted == pytest.approx(flops, rel=1e-5)


def test_size_law_for_every_height():
    """The formula equals running convolutions and pools as index arithmetic, for 256..4096."""
    for h in range(256, 4097):
        unpadded = ((h - 3) // 2 - 3) // 2 - 2 - 3
        padded = (h + 6 - 3 + 2) // 2
        padded = (padded + 6 - 3 + 2) // 2 - 3
        assert feature_size(h) == unpadded
        assert feature_size(h, padding=True) == padded
        assert decoder_sizes(h)[-1] == unpadded


@pytest.mark.parametrize("size", ["S", "M"])
@pytest.mark.parametrize("padding", [False, True])
def test_output_shapes(size, padding):
    pdn = PDN(size, padding=padding).to("meta")
    for h, w in [(256, 256), (257, 300), (500, 777), (33, 41)]:
        shape = pdn(torch.empty(2, 3, h, w, device="meta")).shape
        assert shape == (2, 384, feature_size(h, padding), feature_size(w, padding))


@pytest.mark.parametrize("size", ["S", "M"])
def test_padded_output_cropped_by_four_is_the_unpadded_one(size):
    torch.manual_seed(0)
    unpadded = PDN(size).eval()
    padded = PDN(size, padding=True).eval()
    padded.load_state_dict(unpadded.state_dict())
    image = torch.randn(1, 3, 101, 90)
    with torch.no_grad():
        difference = padded(image)[..., 4:-4, 4:-4] - unpadded(image)
    assert difference.abs().max() <= 1e-6


def test_receptive_field_is_33_with_stride_4():
    """One changed pixel changes exactly the cells whose window [4i, 4i + 32] contains it."""
    torch.manual_seed(0)
    pdn = PDN("S").double().eval()
    for conv in (m for m in pdn.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data.abs_()  # positive weights and inputs: nothing cancels, no ReLU closes
        conv.bias.data.abs_()
    image = torch.rand(1, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        before = pdn(image)
        for y, x in [(0, 0), (32, 33), (37, 12), (64, 69), (31, 4)]:
            changed = image.clone()
            changed[0, :, y, x] += 1.0
            hit = (pdn(changed) != before).any(1)[0]
            rows = torch.arange(hit.shape[0])
            cols = torch.arange(hit.shape[1])
            expected = ((4 * rows <= y) & (y <= 4 * rows + 32))[:, None] & (
                (4 * cols <= x) & (x <= 4 * cols + 32)
            )
            assert torch.equal(hit, expected)


def test_last_layers_have_no_activation():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 256, 256)
    autoencoder = Autoencoder().eval()
    with torch.no_grad():
        assert (PDN("S")(image[..., :64, :64]) < 0).any()
        assert (PDN("M")(image[..., :64, :64]) < 0).any()
        assert (autoencoder.encoder(image) < 0).any()
        assert (autoencoder(image) < 0).any()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (500, 777), (512, 2048)])
def test_autoencoder_grid_is_the_pdns(shape, padding):
    image = torch.empty(1, 3, *shape, device="meta")
    expected = PDN("S", padding=padding).to("meta")(image).shape
    assert Autoencoder(padding).to("meta").eval()(image).shape == expected


def test_decoder_sizes_at_256():
    assert decoder_sizes(256) == (3, 8, 15, 32, 63, 127, 56)
    assert decoder_sizes(256, padding=True)[-1] == 64


@pytest.mark.parametrize("shape", [(255, 256), (256, 255), (64, 64)])
def test_images_below_256_are_refused_with_the_reason(shape):
    with pytest.raises(ValueError, match=rf"{shape[0]}x{shape[1]}.*at least 256.*bottleneck"):
        Autoencoder()(torch.zeros(1, 3, *shape))
    with pytest.raises(ValueError, match="at least 256"):
        EfficientAD("S").distance_maps(torch.zeros(1, 3, *shape))
    with pytest.raises(ValueError, match="at least 256"):
        EfficientAD("S", image_size=shape)


def test_autoencoder_is_deterministic_in_eval_and_drops_out_in_training():
    torch.manual_seed(0)
    autoencoder = Autoencoder().eval()
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        first = autoencoder(image)
        assert torch.equal(first, autoencoder(image))
        autoencoder.train()
        assert not torch.equal(autoencoder(image), autoencoder(image))


def test_decoder_resizes_bilinearly_without_align_corners_or_antialias(monkeypatch):
    calls = []
    genuine = F.interpolate

    def spy(x, **options):
        calls.append(options)
        return genuine(x, **options)

    monkeypatch.setattr(F, "interpolate", spy)
    Autoencoder().to("meta").eval()(torch.empty(1, 3, 256, 256, device="meta"))
    assert [c["size"][0] for c in calls] == [3, 8, 15, 32, 63, 127, 56]
    assert all(c["mode"] == "bilinear" for c in calls)
    assert not any(c.get("align_corners") or c.get("antialias") for c in calls)


def test_padded_pool_divides_by_four_at_the_border():
    """AvgPool counts padded zeros: of constant ones, the first pool's corner window is 1/4."""
    pdn = PDN("S", padding=True)
    with torch.no_grad():
        for conv in (m for m in pdn.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.zero_()
            conv.bias.zero_()
        pdn.conv1.bias.fill_(1.0)
    captured = {}
    pdn.conv2.register_forward_hook(lambda m, inputs, out: captured.update(x=inputs[0]))
    with torch.no_grad():
        pdn(torch.zeros(1, 3, 64, 64))
    pooled = captured["x"][0, 0]
    assert pooled[0, 0] == 0.25
    assert pooled[0, 5] == 0.5
    assert pooled[5, 5] == 1.0


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match=r"size is 'L'.*'S'.*'M'"):
        PDN("L")


@pytest.mark.parametrize(("size", "depth"), [("S", 4), ("M", 6)])
def test_layers_are_the_convolutions_of_the_table_in_order(size, depth):
    network = PDN(size, 12)
    convs, rows = zip(*network.layers(), strict=True)
    assert convs == tuple(network.children())
    assert rows == PDN_LAYERS[size]
    assert len(convs) == depth
    assert network.last is convs[-1]
    assert network.last.out_channels == 12
