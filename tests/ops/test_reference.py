"""The fused operations: composed they are the detector, and each holds on hand-made cases."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F

from efficientad.ops import reference


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "padding", "shape"),
    [
        ("S", False, (256, 256)),
        pytest.param("S", True, (256, 256), marks=pytest.mark.slow),
        pytest.param("M", False, (256, 256), marks=pytest.mark.slow),
        pytest.param("M", True, (256, 320), marks=pytest.mark.slow),
        pytest.param("S", False, (300, 413), marks=pytest.mark.slow),
    ],
)
def test_composed_operations_are_the_detector(size, padding, shape):
    model = helpers.detector(size, padding=padding, image_size=shape).double()
    image = helpers.images(2 if shape == (256, 256) and size == "S" else 1, *shape, seed=5).double()
    expected = model(image)
    anomaly_map, score = helpers.compose(model, image, reference)
    assert (anomaly_map - expected.anomaly_map).abs().max() <= 1e-10
    assert (score - expected.score).abs().max() <= 1e-10


def test_pack_normalises_before_the_border():
    image = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    packed = reference.pack(image, mean, std, channels_last=True, border=3, dtype=torch.float32)
    assert packed.shape == (2, 11, 13, 4)
    assert torch.equal(packed[:, 3:-3, 3:-3, :3], (image.float() / 255 - mean) / std)
    assert torch.equal(packed[..., 3], torch.zeros(2, 11, 13))
    packed[:, 3:-3, 3:-3] = 0
    assert not packed.any()
    chw = reference.pack(
        image.permute(0, 3, 1, 2).float() / 255, mean, std, channels_last=False, border=3
    )
    assert chw.dtype == torch.float16


def test_relu_comes_before_the_pool():
    """One window of -4, 0, 0, 4: ReLU then average is 1, the other order 0."""
    x = torch.tensor([-4.0, 0.0, 0.0, 4.0]).view(1, 2, 2, 1)
    out = reference.conv_relu_pool([x], [torch.ones(1, 1, 1, 1)], [torch.zeros(1)])
    assert out[0].item() == 1.0


def test_odd_extents_drop_the_last_row_and_column():
    x = torch.rand(1, 5, 7, 2)
    weight, bias = torch.rand(3, 1, 1, 2), torch.rand(3)
    clean = reference.conv_relu_pool([x], [weight], [bias])[0]
    assert clean.shape == (1, 2, 3, 3)
    x[:, 4] = torch.nan
    x[:, :, 6] = torch.nan
    assert torch.equal(reference.conv_relu_pool([x], [weight], [bias])[0], clean)


def test_networks_are_not_mixed():
    x = [torch.rand(1, 6, 6, 2), torch.rand(1, 6, 6, 5)]
    weight = [torch.randn(3, 3, 3, 2), torch.randn(4, 3, 3, 5)]
    bias = [torch.randn(3), torch.randn(4)]
    both = reference.conv_relu(x, weight, bias, padding=1)
    assert [y.shape for y in both] == [(1, 6, 6, 3), (1, 6, 6, 4)]
    for i in range(2):
        expected = F.relu(
            F.conv2d(x[i].permute(0, 3, 1, 2), weight[i].permute(0, 3, 1, 2), bias[i], padding=1)
        )
        torch.testing.assert_close(both[i].permute(0, 3, 1, 2), expected)


def test_fp8_results_saturate_and_keep_nan():
    x = torch.tensor([1.0, 1000.0, -1000.0, torch.nan, torch.inf]).half().view(1, 1, 5, 1)
    out = reference.conv_relu(
        [x],
        [torch.ones(1, 1, 1, 1)],
        [torch.zeros(1)],
        relu=False,
        scale=[torch.tensor([0.5])],
        out_dtype=torch.float8_e4m3fn,
    )[0].float()
    assert out.flatten()[:3].tolist() == [0.5, 448.0, -448.0]
    assert out.flatten()[3:].isnan().all()


def test_pair_distance_by_hand():
    """1x1 filters, two channels: every number of the two maps worked out."""
    one = torch.ones(1, 1, 1, 1)
    weight_student = -torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    weight_ae = torch.zeros(2, 3, 3, 1)
    weight_ae[:, 1, 1, 0] = torch.tensor([1.0, 10.0])
    maps = reference.pair_distance(
        5 * one,
        2 * one,
        7 * one,
        torch.tensor([1.0, 1.0]).view(2, 1, 1, 1),
        weight_student,
        weight_ae,
        torch.tensor([0.5, 0.0, 0.0, 1.0]),
    )
    st = ((5 - 2 + 0.5) ** 2 + (5 - 4) ** 2) / 2
    ae = ((7 - 6) ** 2 + (70 - 8 + 1) ** 2) / 2
    assert [m.item() for m in maps] == [st, ae]


@pytest.mark.parametrize("scaled", [False, True])
def test_pair_distance_is_its_two_parts(scaled):
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 8, 9, 6), (2, 8, 9, 5), (2, 5, 6, 7)]
    shapes += [(3, 4, 4, 6), (6, 4, 4, 5), (3, 3, 3, 7), (6,)]
    teacher, student, decoded, w_teacher, w_student, w_ae, bias = (
        torch.randn(shape, generator=generator) for shape in shapes
    )
    scale = torch.rand(6, generator=generator) + 0.5 if scaled else None
    want = reference.pair_distance(
        teacher, student, decoded, w_teacher, w_student, w_ae, bias, scale=scale
    )
    st, second = reference.student_distance(
        teacher, student, w_teacher, w_student, bias, scale=scale
    )
    ae = reference.autoencoder_distance(decoded, second, w_ae, bias, scale=scale)
    torch.testing.assert_close((st, ae), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "size", "count"), [(128, 56, 112), (128, 64, 128), (4, 8, 4), (9, 15, 9)]
)
def test_resize_reads_is_what_interpolate_reads(length, size, count):
    reads = reference.resize_reads(length, size)
    assert len(reads) == count
    x = torch.eye(length).view(1, 1, length, length)
    weights = F.interpolate(x, size=(size, length), mode="bilinear")[0, 0]
    assert set(weights.abs().sum(0).nonzero().flatten().tolist()) <= set(reads)
    poisoned = torch.full((1, 1, length, 1), torch.nan)
    poisoned[:, :, reads] = 1.0
    assert F.interpolate(poisoned, size=(size, 1), mode="bilinear").isfinite().all()


def test_partial_maps_are_summed():
    st, ae = torch.rand(3, 2, 8, 9), torch.rand(3, 2, 8, 9)
    affine = torch.tensor([2.0, 3.0, -1.0, 0.5])
    parts = reference.anomaly_map(st, ae, affine, (40, 50), padding=4)
    whole = reference.anomaly_map(st.sum(0), ae.sum(0), affine, (40, 50), padding=4)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[0].amax((1, 2)))


def test_resize_commutes_with_the_affine_map():
    st, ae = torch.rand(2, 56, 56), torch.rand(2, 56, 56)
    one = torch.tensor([0.7, 0.4, -0.3, -0.3])
    whole, _ = reference.anomaly_map(st, ae, one, (256, 256), padding=4)
    up = [F.interpolate(F.pad(m[:, None], (4,) * 4), (256, 256), mode="bilinear") for m in (st, ae)]
    assert (whole - (0.7 * up[0] + 0.4 * up[1] - 0.3)[:, 0]).abs().max() <= 1e-6
