"""Parity with published implementations: anomalib's own model file, nelson1425's layer order."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import Tensor, nn

TOLERANCE = 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "padding", "pad_maps", "shape"),
    [
        ("S", False, True, (256, 256)),
        ("S", False, True, (257, 391)),
        pytest.param("S", True, True, (256, 256), marks=pytest.mark.slow),
        pytest.param("S", False, False, (256, 256), marks=pytest.mark.slow),
        pytest.param("M", False, True, (256, 256), marks=pytest.mark.slow),
    ],
)
def test_anomalib(anomalib, size, padding, pad_maps, shape, record_property):
    ours = helpers.detector(
        size,
        padding=padding,
        image_size=shape,
        border="anomalib",
        map_padding=4 if pad_maps else 0,
    )
    theirs = anomalib.EfficientAdModel(
        teacher_out_channels=384,
        model_size=getattr(anomalib.EfficientAdModelSize, size),
        padding=padding,
        pad_maps=pad_maps,
    ).eval()
    state = {
        name.replace("autoencoder.", "ae."): value
        for name, value in ours.state_dict().items()
        if name.startswith(("teacher.", "student.", "autoencoder."))
    }
    state["mean_std.mean"], state["mean_std.std"] = ours.teacher_mean, ours.teacher_std
    for name, value in zip(("qa_st", "qb_st", "qa_ae", "qb_ae"), ours.quantiles, strict=True):
        state[f"quantiles.{name}"] = value
    theirs.load_state_dict(state)
    image = helpers.images(1, *shape, seed=11)
    expected, out = theirs(image), ours(image)
    maps = [m.squeeze(1) for m in theirs.get_maps(image, normalize=False)]
    difference = (out.anomaly_map - expected.anomaly_map.squeeze(1)).abs().max().item()
    record_property("maximum_map_difference", difference)
    assert difference <= TOLERANCE
    assert (out.score - expected.pred_score.view(-1)).abs().max() <= TOLERANCE
    for mine, raw in zip((out.map_st, out.map_ae), maps, strict=True):
        padded = torch.nn.functional.pad(mine[:, None], (ours.map_padding,) * 4)
        resized = torch.nn.functional.interpolate(padded, size=shape, mode="bilinear")[:, 0]
        assert (resized - raw).abs().max() <= TOLERANCE


class Resize(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size=self.size, mode="bilinear")


def nelson_pdn(size: str, out_channels: int) -> nn.Sequential:
    """The published `nn.Sequential` order: convolutions at 0, 3, 6, 8 and, in M, 10, 12."""
    relu, pool = nn.ReLU, lambda: nn.AvgPool2d(2, 2)
    if size == "S":
        return nn.Sequential(
            *[nn.Conv2d(3, 128, 4), relu(), pool()],
            *[nn.Conv2d(128, 256, 4), relu(), pool()],
            *[nn.Conv2d(256, 256, 3), relu()],
            nn.Conv2d(256, out_channels, 4),
        )
    return nn.Sequential(
        *[nn.Conv2d(3, 256, 4), relu(), pool()],
        *[nn.Conv2d(256, 512, 4), relu(), pool()],
        *[nn.Conv2d(512, 512, 1), relu()],
        *[nn.Conv2d(512, 512, 3), relu()],
        *[nn.Conv2d(512, out_channels, 4), relu()],
        nn.Conv2d(out_channels, out_channels, 1),
    )


def nelson_autoencoder() -> nn.Sequential:
    layers: list[nn.Module] = []
    for cin, cout in [(3, 32), (32, 32), (32, 64), (64, 64), (64, 64)]:
        layers += [nn.Conv2d(cin, cout, 4, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 8)]
    for size in (3, 8, 15, 32, 63, 127):
        layers += [Resize(size), nn.Conv2d(64, 64, 4, 1, 2), nn.ReLU(), nn.Dropout(0.2)]
    layers += [Resize(56), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 384, 3, 1, 1)]
    return nn.Sequential(*layers)


def copy_in_order(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy convolution weights in order; returns the target's state dict names."""
    target.load_state_dict(
        dict(zip(target.state_dict(), source.state_dict().values(), strict=True))
    )
    return list(target.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("size", ["S", pytest.param("M", marks=pytest.mark.slow)])
def test_nelson(size):
    """nelson1425's inference: normalise, combine, zero-pad 4, resize to the image, maximum."""
    ours = helpers.detector(size, border="nelson")
    teacher, student = nelson_pdn(size, 384), nelson_pdn(size, 768)
    autoencoder = nelson_autoencoder().eval()
    indices = [0, 3, 6, 8] if size == "S" else [0, 3, 6, 8, 10, 12]
    names = copy_in_order(ours.teacher, teacher)
    assert [int(n.split(".")[0]) for n in names[::2]] == indices
    copy_in_order(ours.student, student)
    names = copy_in_order(ours.autoencoder, autoencoder)
    assert [int(n.split(".")[0]) for n in names[::2]] == [
        *(0, 2, 4, 6, 8, 10),
        *(12, 16, 20, 24, 28, 32),
        *(36, 38),
    ]
    image = helpers.images(1, seed=12)
    x = ours.normalize(image)
    t = (teacher(x) - ours.teacher_mean) / ours.teacher_std
    s = student(x)
    qa_st, qb_st, qa_ae, qb_ae = ours.quantiles
    map_st = torch.mean((t - s[:, :384]) ** 2, dim=1, keepdim=True)
    map_ae = torch.mean((autoencoder(x) - s[:, 384:]) ** 2, dim=1, keepdim=True)
    map_st = 0.1 * (map_st - qa_st) / (qb_st - qa_st)
    map_ae = 0.1 * (map_ae - qa_ae) / (qb_ae - qa_ae)
    combined = nn.functional.pad(0.5 * map_st + 0.5 * map_ae, (4, 4, 4, 4))
    for shape in [(256, 256), (1024, 700)]:
        expected = nn.functional.interpolate(combined, shape, mode="bilinear")[:, 0]
        out, score = ours.anomaly_map(*ours.distance_maps(image), shape)
        assert (out - expected).abs().max() <= TOLERANCE
        assert (score - expected.amax((1, 2))).abs().max() <= TOLERANCE
