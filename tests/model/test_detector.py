"""The detector: calibration state, border rules, precision, export (paper, Algorithm 2)."""

from __future__ import annotations

import copy
import math
import warnings

import helpers
import pytest
import torch
import torch.nn.functional as F

from efficientad import AnomalyOutput, EfficientAD, UncalibratedError
from efficientad.utils.devices import full_float32


@pytest.fixture(scope="module")
def model() -> EfficientAD:
    return helpers.detector()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return helpers.images(2, seed=7)


@pytest.fixture(scope="module")
def raw(model, image):
    with torch.no_grad():
        return model.distance_maps(image)


def with_rule(model: EfficientAD, **rule) -> EfficientAD:
    """A copy under another border rule with the same quantiles, to compare the rules alone."""
    other = copy.deepcopy(model)
    quantiles = other.quantiles.tolist()
    other.set_map_rule(**rule)
    other.set_quantiles(*quantiles)
    return other


@torch.no_grad()
def test_forward_is_algorithm_2_written_out(model, image):
    """Each step as the paper states it, with nelson's frame and none of the package's maths."""
    x = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    teacher = (model.teacher(x) - model.teacher_mean) / model.teacher_std
    student = model.student(x)
    st = ((teacher - student[:, :384]) ** 2).sum(1) / 384
    ae = ((model.autoencoder(x) - student[:, 384:]) ** 2).sum(1) / 384
    qa_st, qb_st, qa_ae, qb_ae = model.quantiles.tolist()
    combined = 0.5 * (0.1 * (st - qa_st) / (qb_st - qa_st)) + 0.5 * (
        0.1 * (ae - qa_ae) / (qb_ae - qa_ae)
    )
    expected = F.interpolate(F.pad(combined[:, None], (4, 4, 4, 4)), (256, 256), mode="bilinear")
    out = model(image)
    assert isinstance(out, AnomalyOutput)
    assert out.score.shape == (2,)
    assert out.anomaly_map.shape == (2, 256, 256)
    assert out.map_st.shape == out.map_ae.shape == (2, 56, 56)
    torch.testing.assert_close(out.map_st, st, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.anomaly_map, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.score, expected.amax((1, 2, 3)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_first_student_half_pairs_with_the_teacher(model, image, raw):
    swapped = copy.deepcopy(model)
    for name in ("weight", "bias"):
        value = getattr(swapped.student.conv4, name)
        value.data = torch.cat(value.data.chunk(2)[::-1])
    st, ae = swapped.distance_maps(image)
    assert (st - raw[0]).abs().max() > 0.1 * raw[0].mean()
    assert (ae - raw[1]).abs().max() > 0.1 * raw[1].mean()


@torch.no_grad()
def test_normalisation_sends_qa_to_0_and_qb_to_a_tenth_without_clamping(model):
    qa_st, qb_st, qa_ae, qb_ae = model.quantiles.tolist()
    for fraction, expected in [(0.0, 0.0), (1.0, 0.1), (-3.0, -0.3), (25.0, 2.5)]:
        st = torch.full((1, 56, 56), qa_st + fraction * (qb_st - qa_st))
        ae = torch.full((1, 56, 56), qa_ae + fraction * (qb_ae - qa_ae))
        anomaly_map, _ = model.anomaly_map(st, ae, (256, 256))
        assert anomaly_map[0, 128, 128].item() == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_border_rules_agree_inside_and_differ_in_the_frame(model, image, raw):
    nelson, _ = model.anomaly_map(*raw, (256, 256))
    anomalib, _ = with_rule(model, border="anomalib").anomaly_map(*raw, (256, 256))
    inside = (..., slice(18, 238), slice(18, 238))
    assert (nelson[inside] - anomalib[inside]).abs().max() < 1e-5
    qa_st, qb_st, qa_ae, qb_ae = model.quantiles.tolist()
    frame = 0.5 * (0.1 * (0 - qa_st) / (qb_st - qa_st) + 0.1 * (0 - qa_ae) / (qb_ae - qa_ae))
    assert frame < 0
    # 4 cells are 16 pixels; the outer 13 or so lie between padded cells alone.
    assert torch.equal(nelson[:, :13], torch.zeros_like(nelson[:, :13]))
    torch.testing.assert_close(anomalib[:, :13], torch.full_like(anomalib[:, :13], frame))
    assert (nelson - anomalib)[:, :, 14:17].abs().max() > 1e-3


@torch.no_grad()
def test_anomalib_order_pad_resize_normalise_combine(model, raw):
    """anomalib pads and resizes each raw map before it normalises; ours combines first."""
    ours, score = with_rule(model, border="anomalib").anomaly_map(*raw, (300, 277))
    qa_st, qb_st, qa_ae, qb_ae = model.quantiles.tolist()
    resized = [
        F.interpolate(F.pad(m[:, None], (4,) * 4), (300, 277), mode="bilinear")[:, 0] for m in raw
    ]
    theirs = 0.5 * 0.1 * (resized[0] - qa_st) / (qb_st - qa_st) + 0.5 * 0.1 * (
        resized[1] - qa_ae
    ) / (qb_ae - qa_ae)
    assert (ours - theirs).abs().max() <= 1e-5
    assert (score - theirs.amax((1, 2))).abs().max() <= 1e-5


@torch.no_grad()
def test_nelson_score_is_never_negative_and_others_can_be(model):
    qa_st, _, qa_ae, _ = model.quantiles.tolist()
    low = [torch.full((1, 56, 56), 0.5 * q) for q in (qa_st, qa_ae)]
    assert model.anomaly_map(*low, (256, 256))[1].item() == 0.0
    assert with_rule(model, border="anomalib").anomaly_map(*low, (256, 256))[1].item() < 0


@torch.no_grad()
def test_maximum_is_taken_after_the_resize():
    """An isolated cell keeps 0.875 squared of its peak at exactly x4."""
    model = EfficientAD("S")
    model.set_statistics(torch.zeros(384), torch.ones(384))
    model.set_quantiles(0.0, 0.05, 0.0, 0.05)  # slope 1 per map: combined = st + ae
    st = torch.zeros(1, 56, 56)
    st[0, 20, 31] = 1.0
    _, score = model.anomaly_map(st, torch.zeros_like(st), (256, 256))
    assert score.item() == pytest.approx(0.765625, abs=1e-6)


@torch.no_grad()
def test_paper_rule_pads_no_map():
    model = helpers.detector(padding=True)
    assert (model.border, model.map_padding) == ("paper", 0)
    st, ae = model.distance_maps(helpers.images(1, seed=3))
    assert st.shape == (1, 64, 64)
    anomaly_map, _ = model.anomaly_map(st, ae, (256, 256))
    qa_st, qb_st, qa_ae, qb_ae = model.quantiles.tolist()
    resized = [F.interpolate(m[:, None], (256, 256), mode="bilinear")[:, 0] for m in (st, ae)]
    expected = 0.05 * (resized[0] - qa_st) / (qb_st - qa_st) + 0.05 * (resized[1] - qa_ae) / (
        qb_ae - qa_ae
    )
    assert (anomaly_map - expected).abs().max() <= 1e-5


def test_paper_rule_is_refused_for_the_unpadded_network():
    with pytest.raises(ValueError, match=r"misaligned.*'nelson' or 'anomalib'"):
        EfficientAD("S", border="paper")
    with pytest.raises(ValueError, match="misaligned"):
        EfficientAD("S").set_map_rule(border="paper")
    with pytest.raises(ValueError, match=r"map_padding is 4.*'paper' pads no map"):
        EfficientAD("S", padding=True, border="paper", map_padding=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"border": "mirror"}, "border is 'mirror'.*'nelson', 'anomalib', 'paper'"),
        ({"map_padding": -1}, "map_padding is -1"),
        ({"map_padding": 1.5}, "map_padding is 1.5"),
        ({"score_size": "full"}, "score_size is 'full'"),
        ({"image_size": 256}, "image_size is 256.*height, width"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientAD("S", **options)


def test_map_padding_defaults():
    assert EfficientAD("S").map_padding == 4
    assert EfficientAD("S", padding=True, border="nelson").map_padding == 0
    assert EfficientAD("S", padding=True, border="anomalib", map_padding=4).map_padding == 4


def test_an_uncalibrated_detector_gives_maps_and_names_the_remedy(image):
    model = EfficientAD("S")
    with torch.no_grad():
        assert model.distance_maps(image)[0].shape == (2, 56, 56)
        with pytest.raises(UncalibratedError, match=r"efficientad calibrate MODEL GOOD_IMAGES"):
            model(image)
        with pytest.raises(UncalibratedError, match="channel statistics and the map quantiles"):
            model.anomaly_map(torch.zeros(1, 56, 56), torch.zeros(1, 56, 56), (256, 256))
    model.set_statistics(torch.zeros(384), torch.ones(384))
    with pytest.raises(UncalibratedError, match="calibrated: the map quantiles are"):
        model(image)


def test_changing_the_rule_uncalibrates_and_keeping_it_does_not(model):
    changed = copy.deepcopy(model)
    changed.threshold = 0.2
    changed.set_map_rule(border="nelson", map_padding=4, image_size=(256, 256))
    assert changed.calibrated
    assert changed.threshold == 0.2
    for rule in ({"border": "anomalib"}, {"map_padding": 0}, {"image_size": (320, 256)}):
        changed = copy.deepcopy(model)
        changed.threshold = 0.2
        changed.set_map_rule(**rule)
        assert not changed.calibrated
        assert changed.threshold is None
        assert changed.has_statistics


def test_new_statistics_uncalibrate(model):
    changed = copy.deepcopy(model)
    changed.set_statistics(torch.ones(384), torch.ones(384))
    assert changed.has_statistics
    assert not changed.calibrated


def test_equal_quantiles_are_resolved_with_a_warning():
    model = EfficientAD("S")
    model.set_statistics(torch.zeros(384), torch.ones(384))
    with pytest.warns(UserWarning, match="st map are both 0.3.*constant"):
        model.set_quantiles(0.3, 0.3, 0.1, 0.2)
    constant = torch.full((1, 56, 56), 0.3), torch.full((1, 56, 56), 0.1)
    anomaly_map, score = model.anomaly_map(*constant, (256, 256))
    assert torch.isfinite(anomaly_map).all()
    assert abs(score.item()) < 0.01


def test_bad_statistics_and_quantiles_are_refused():
    model = EfficientAD("S")
    one = torch.ones(384)
    with pytest.raises(ValueError, match="mean has 3 entries; it must have 384"):
        model.set_statistics(torch.zeros(3), one)
    with pytest.raises(ValueError, match="std has a NaN"):
        model.set_statistics(one, one * math.nan)
    with pytest.raises(ValueError, match="negative"):
        model.set_statistics(one, -one)
    with pytest.raises(ValueError, match=r"qb_ae is 0.1 and qa_ae is 0.2"):
        model.set_quantiles(0.1, 0.2, 0.2, 0.1)
    with pytest.raises(ValueError, match="qa_st is nan"):
        model.set_quantiles(math.nan, 0.2, 0.2, 0.3)


def test_a_dead_teacher_channel_gets_std_one():
    model = EfficientAD("S")
    std = torch.ones(384)
    std[5] = 0
    with pytest.warns(UserWarning, match="1 of 384 teacher channels are constant"):
        model.set_statistics(torch.zeros(384), std)
    assert model.teacher_std[0, 5, 0, 0] == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 256, 256), r"shape \(3, 256, 256\).*\(N, 3, H, W\)"),
        (torch.zeros(1, 1, 256, 256), r"shape \(1, 1, 256, 256\)"),
        (torch.zeros(1, 3, 256, 256, dtype=torch.uint8), r"dtype torch.uint8.*0\.\.1"),
    ],
)
def test_bad_images_are_named(model, bad, message):
    with pytest.raises(ValueError, match=message):
        model(bad)


@torch.no_grad()
def test_rows_of_a_batch_are_independent(model, image):
    both = model(image)
    assert torch.allclose(both.score[1:], model(image[1:]).score, atol=1e-5)
    broken = image.clone()
    broken[0, 1, 100, 100] = math.nan
    out = model(broken)
    assert out.score[0].isnan()
    assert torch.equal(out.score[1], both.score[1])


@torch.no_grad()
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_gives_a_nan_score(model, image, raw, value):
    for which in range(2):
        maps = [m.clone() for m in raw]
        maps[which][0, 3, 50] = value
        _, score = model.anomaly_map(*maps, (256, 256))
        assert score[0].isnan()
        assert score[1].isfinite()
        # also where a downscale skips the cell
        assert model.anomaly_map(*maps, (9, 9))[1][0].isnan()
    broken = copy.deepcopy(model)
    broken.student.conv2.weight.data[3, 4, 1, 1] = value
    assert broken(image).score.isnan().all()


@torch.no_grad()
def test_non_square_and_larger_images(model):
    out = model(helpers.images(1, 256, 512))
    assert out.map_st.shape == (1, 56, 120)
    assert out.anomaly_map.shape == (1, 256, 512)
    assert model.feature_size((500, 777)) == (117, 187)


# Bounds of the map, times max(0.1, largest |map value|): maximum and RMS.
BOUNDS = {
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lower_precision_on_the_device(model, image, dtype, device):
    """Against float32 on the CPU. One image: on a CPU half convolutions take 14 s and more."""
    low = copy.deepcopy(model).to(device, dtype)
    for name in ("teacher_mean", "teacher_std", "quantiles", "affine", "image_mean"):
        assert torch.equal(getattr(low, name).cpu(), getattr(model, name)), name
    reference = model(image[:1])
    with full_float32():
        out = low(image[:1].to(device, dtype))
    assert out.anomaly_map.dtype == torch.float32
    scale = max(0.1, reference.anomaly_map.abs().max().item())
    error = out.anomaly_map.cpu() - reference.anomaly_map
    maximum, rms = BOUNDS[dtype]
    assert error.abs().max() <= maximum * scale
    assert error.square().mean().sqrt() <= rms * scale
    assert torch.equal(low.float().affine.cpu(), model.affine)


@torch.no_grad()
def test_double_agrees_with_float(model, image):
    double = copy.deepcopy(model).double()
    out = double(image.double())
    assert out.anomaly_map.dtype == torch.float64
    assert (out.anomaly_map - model(image).anomaly_map).abs().max() <= 1e-4


@torch.no_grad()
def test_channels_last(model, image):
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    out = last(image.to(memory_format=torch.channels_last))
    assert (out.anomaly_map - model(image).anomaly_map).abs().max() <= 1e-4


@torch.no_grad()
def test_export_with_a_dynamic_batch(model, image, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image,), dynamic_shapes={"image": {0: batch}})
    torch.export.save(program, tmp_path / "detector.pt2")
    loaded = torch.export.load(tmp_path / "detector.pt2").module()
    for n in (1, 3):
        x = helpers.images(n, seed=20 + n)
        out, expected = loaded(x), model(x)
        assert isinstance(out, AnomalyOutput)
        assert (out.anomaly_map - expected.anomaly_map).abs().max() <= 1e-4
        assert (out.score - expected.score).abs().max() <= 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_compile(model, image):
    out = torch.compile(model, fullgraph=True)(image)
    assert (out.anomaly_map - model(image).anomaly_map).abs().max() <= 1e-4


@torch.no_grad()
def test_forward_copies_no_constant_and_reads_nothing_on_the_host(model):
    """On the meta device a read of a value fails, and a constant made in forward is on the CPU."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.name() in {"aten::_to_copy", "aten::_local_scalar_dense", "aten::lift_fresh"}:
                made.append(func.name())
            elif isinstance(out, torch.Tensor) and out.device.type != "meta":
                made.append(func.name())
            return out

    meta = copy.deepcopy(model)
    meta.to("meta")
    with Watch():
        out = meta(torch.empty(2, 3, 256, 256, device="meta"))
    assert out.anomaly_map.shape == (2, 256, 256)
    assert made == []


def test_state_dict_round_trip_restores_the_calibration(model, image):
    other = EfficientAD("S")
    other.load_state_dict(model.state_dict())
    assert other.calibrated
    with torch.no_grad():
        assert torch.equal(other(image).score, model(image).score)
    fresh = EfficientAD("S")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(fresh.state_dict())
    assert not other.has_statistics
    assert not other.calibrated


@torch.no_grad()
def test_folding_the_statistics_into_the_last_convolution_is_exact(model, image):
    x = model.normalize(image)
    folded = copy.deepcopy(model.teacher)
    std = model.teacher_std.view(-1)
    folded.conv4.weight.data /= std[:, None, None, None]
    folded.conv4.bias.data = (folded.conv4.bias.data - model.teacher_mean.view(-1)) / std
    expected = (model.teacher(x) - model.teacher_mean) / model.teacher_std
    assert (folded(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_large_difference_in_half_does_not_overflow():
    from efficientad.ops.reference import distance_map

    a = torch.zeros(1, 384, 1, 1, dtype=torch.float16)
    b = a.clone()
    b[0, 0] = 300
    assert distance_map(a, b).item() == pytest.approx(90_000 / 384)
