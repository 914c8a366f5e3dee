"""Statistics, quantiles and threshold against numpy and torch, and the command that sets them."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientad import EfficientAD, calibrate
from efficientad.data.datasets import DataSet, Sample
from efficientad.model.calibration import (
    ChannelStatistics,
    MapFile,
    quantile_values,
    set_quantiles_from_maps,
    split_good_images,
    threshold_from_scores,
)
from efficientad.model.good_images import GoodImageWarning
from efficientad.results.plain_path import predict
from efficientad.training.pictures import TrainingImages

pytestmark = pytest.mark.usefixtures("light_networks", "unmeasured")


def write_images(folder, n, size=(256, 256), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(helpers.images(n, *size, seed=seed)):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_channel_statistics_are_the_population_values_in_any_order():
    """A mean of 500 sigma is where the one-pass float32 formula loses its digits."""
    torch.manual_seed(0)
    features = torch.randn(7, 5, 9, 11) + 500
    forward, backward = ChannelStatistics(5), ChannelStatistics(5)
    forward.add(features[:3])
    forward.add(features[3:])
    for image in features.flip(0):
        backward.add(image[None])
    flat = features.double().transpose(0, 1).flatten(1)
    for statistics in (forward, backward):
        mean, std = statistics.result()
        torch.testing.assert_close(mean, flat.mean(1), rtol=1e-14, atol=0)
        torch.testing.assert_close(std, flat.std(1, correction=0), rtol=1e-10, atol=0)


def test_channel_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        ChannelStatistics(5).result()


@pytest.mark.parametrize("options", [{}, {"border": "anomalib"}, {"padding": True}])
def test_quantiles_follow_the_border_rule(options):
    model = EfficientAD("S", image_size=(256, 260), **options)
    model.set_statistics(torch.zeros(384), torch.ones(384))
    torch.manual_seed(1)
    h, w = model.feature_size()
    maps = torch.rand(40, 2, h, w) * torch.tensor([0.3, 0.2])[:, None, None]
    file = MapFile(h, w)
    file.add(maps[:33, 0], maps[:33, 1])
    file.add(maps[33:, 0], maps[33:, 1])
    set_quantiles_from_maps(model, file)
    file.close()
    expected = []
    for kind in range(2):
        values = maps[:, kind]
        if model.border != "nelson":  # written out: pad, resize, then all pixels
            pad = (4,) * 4 if model.border == "anomalib" else (0,) * 4
            values = F.interpolate(F.pad(values[:, None], pad), (256, 260), mode="bilinear")
        assert torch.equal(quantile_values(model, maps[:, kind]).flatten(), values.flatten())
        expected += np.quantile(values.numpy().astype(np.float64), [0.9, 0.995]).tolist()
    np.testing.assert_array_max_ulp(model.quantiles.numpy(), np.float32(expected), maxulp=1)


def test_anomalib_quantiles_count_the_frame():
    """A fifth of every padded map is exact zero, so the quantiles are lower than nelson's."""
    maps = torch.full((1, 56, 56), 2.0)
    values = quantile_values(EfficientAD("S", border="anomalib"), maps)
    assert (values == 0).float().mean().item() == pytest.approx(0.207, abs=0.02)


def test_threshold_lets_through_the_stated_share():
    scores = np.random.default_rng(0).permutation(200) / 100
    for rate, exceed in [(0.0, 0), (0.004, 0), (0.005, 1), (0.01, 2), (0.1, 20), (0.5, 100)]:
        threshold = threshold_from_scores(scores, rate)
        assert threshold in scores
        assert (scores > threshold).sum() == exceed
    assert threshold_from_scores([3.0], 0.01) == 3.0
    assert threshold_from_scores([1.0, 1.0, 1.0], 0.5) == 1.0


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([], 0.01, "at least one score"),
        ([1.0, float("nan")], 0.01, "not finite"),
        ([1.0], 1.0, "false_positive_rate is 1.0"),
        ([1.0], -0.1, "false_positive_rate is -0.1"),
    ],
)
def test_bad_thresholds_are_named(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold_from_scores(scores, rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 10)
    return folder


def test_calibrate_a_new_detector_from_a_folder(folder):
    torch.manual_seed(0)
    model = calibrate(EfficientAD("S"), folder, batch_size=5)
    assert model.calibrated
    train, validation = split_good_images(folder, True)
    assert (len(train), len(validation)) == (9, 1)
    facts = model.provenance["calibration"]
    assert facts["images_for_statistics"] == 9
    assert facts["images_for_quantiles"] == facts["threshold_rests_on"] == 1
    pixels = [torch.from_numpy(np.array(Image.open(p))) for p in (*train, *validation)]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = model.teacher(model.normalize(images[:9])).double()
        torch.testing.assert_close(
            model.teacher_mean.view(-1).double(), features.mean((0, 2, 3)), rtol=1e-5, atol=1e-7
        )
        maps = model.distance_maps(images[9:])
        scores = model(images[9:]).score
    expected = [np.quantile(m.double().numpy(), q) for m in maps for q in (0.9, 0.995)]
    np.testing.assert_allclose(model.quantiles.numpy(), expected, rtol=1e-4)
    assert model.threshold == pytest.approx(scores.max().item(), rel=1e-3)


def test_a_detector_with_statistics_keeps_them_and_uses_every_image(folder):
    torch.manual_seed(0)
    model = EfficientAD("S")
    model.set_statistics(torch.full((384,), 0.01), torch.full((384,), 0.05))
    before = copy.deepcopy(model.teacher_mean)
    calibrate(model, folder)
    assert torch.equal(model.teacher_mean, before)
    assert model.provenance["calibration"]["images_for_quantiles"] == 10
    calibrate(model, sorted(folder.iterdir())[:3], statistics=True)
    assert not torch.equal(model.teacher_mean, before)


def test_a_data_sets_own_split_is_kept(folder):
    paths = sorted(folder.iterdir())
    samples = tuple(Sample(p) for p in paths)
    dataset = DataSet(folder, "loco", "x", samples[:9], samples[9:])
    assert split_good_images(dataset, False) == (paths[:9], paths[9:])


def test_calibration_is_deterministic_in_batch_size_and_threads(folder):
    torch.manual_seed(0)
    model = EfficientAD("S")
    results = []
    paths = sorted(folder.iterdir())[:4]
    for batch_size, workers in [(1, 0), (2, 3), (2, 1)]:
        other = calibrate(copy.deepcopy(model), paths, batch_size=batch_size, workers=workers)
        results.append((other.quantiles, other.teacher_mean, other.threshold))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
    assert torch.equal(results[1][0], results[2][0])
    assert results[1][2] == results[2][2]


def test_unreadable_images_are_left_out_and_reported(folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    paths = [*sorted(folder.iterdir())[:3], bad]
    model = EfficientAD("S")
    model.set_statistics(torch.zeros(384), torch.ones(384))
    failed = []
    calibrate(model, paths, on_error=lambda i, source, error: failed.append(source))
    assert failed == [bad]
    assert model.provenance["calibration"]["images_for_quantiles"] == 3
    with pytest.raises(ValueError, match=r"bad\.png"):
        calibrate(model, paths)
    with pytest.raises(ValueError, match="none of the 1 images for the map quantiles"):
        calibrate(model, [bad], on_error=lambda *_: None)


def test_a_detector_is_as_it_was_after_an_error(folder, tmp_path, monkeypatch):
    model = EfficientAD("S")
    model.set_statistics(torch.full((384,), 0.01), torch.full((384,), 0.05))
    model.set_quantiles(0.1, 0.2, 0.3, 0.4)
    model.threshold = 0.25
    before = copy.deepcopy(model)
    paths = sorted(folder.iterdir())[:3]

    def fail(scores, rate):
        raise KeyboardInterrupt

    def unchanged() -> bool:
        names = ("teacher_mean", "teacher_std", "quantiles", "affine")
        assert all(torch.equal(getattr(model, n), getattr(before, n)) for n in names)
        return model.calibrated and model.threshold == 0.25 and not model.provenance

    with pytest.raises(ValueError, match="false_positive_rate is 1; it must be in"):
        calibrate(model, tmp_path / "nowhere", false_positive_rate=1)  # before any image
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr("efficientad.model.calibration.threshold_from_scores", fail)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, paths, statistics=True)
    assert unchanged()
    raw = EfficientAD("S")
    (tmp_path / "bad.png").write_bytes(b"no image")
    held_out = split_good_images(paths[:2], True)[1]
    assert len(held_out) == 1
    names = [tmp_path / "bad.png" if path in held_out else path for path in paths[:2]]
    with pytest.raises(ValueError, match="none of the 1 images for the map quantiles"):
        calibrate(raw, names, on_error=lambda *_: None)
    assert not raw.has_statistics
    assert torch.equal(raw.teacher_std, torch.ones_like(raw.teacher_std))


def test_map_file_reads_back_what_was_added_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    file = MapFile(3, 4)
    maps = torch.rand(70, 2, 3, 4)
    file.add(maps[:, 0], maps[:, 1])
    for _ in range(2):
        chunks = list(file.chunks())
        assert [len(c) for c in chunks] == [32, 32, 6]
        assert torch.equal(torch.cat(chunks), maps)
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_images_trained_on_are_recognised_after_copying_and_lots_are_compared(tmp_path):
    """Digests of the training's reading and of the calibration's agree, resized pictures, too."""
    first = write_images(tmp_path / "monday", 3, (280, 300), seed=1)
    write_images(tmp_path / "tuesday", 2, (280, 300), seed=2)
    trained = TrainingImages(first[:2], (256, 256))
    for i in range(2):
        trained[i]
    detector = helpers.detector()
    detector.provenance["training"] = {"known_pictures": trained.known()}
    Image.open(first[0]).save(tmp_path / "tuesday" / "copy.bmp")
    folders = [tmp_path / "monday", tmp_path / "tuesday"]
    with pytest.warns(GoodImageWarning, match=r"^3 of 6 good images .*copy\.bmp"):
        calibrate(detector, iter(folders))
    facts = detector.provenance["calibration"]
    assert facts["trained_on"] == 3
    assert [(lot["folder"], lot["images"]) for lot in facts["lots"]] == [
        (str(folders[0]), 3),
        (str(folders[1]), 3),
    ]
    assert facts["scores"] == sorted(facts["scores"])
    assert facts["scores"][-1] == detector.threshold
    assert (len(facts["scores"]), facts["above_threshold"]) == (6, 0)


@pytest.mark.parametrize("region", [False, True])
def test_map_means_are_kept_beside_the_scores_and_are_those_of_a_prediction(tmp_path, region):
    paths = write_images(tmp_path, 4, (280, 300), seed=1)
    detector = helpers.detector()
    if region:
        detector.set_region(np.pad(np.ones((100, 90), bool), ((80, 76), (60, 106))))
    calibrate(detector, paths, statistics=False)
    facts = detector.provenance["calibration"]
    found = sorted((p.score, p.map_mean()) for p in predict(detector, paths, map_size="input"))
    assert len(facts["map_means"]) == len(found) == 4
    assert [mean for _, mean in found] == pytest.approx(facts["map_means"], abs=1e-6)
    assert len(set(facts["map_means"])) == 4
