"""Large images in tiles: the window, the definition, and the fast path that must equal it."""

from __future__ import annotations

import json
import threading

import helpers
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

import efficientad as ead
from efficientad.cli.main import main
from efficientad.data import decoding, tiff_parts
from efficientad.fast.backends import TorchBackend
from efficientad.fast.predictor import FastPredictor
from efficientad.fast.tiling import (
    axis_weights,
    axis_window,
    check_tiles,
    frame_pixels,
    predict_large,
    tile_starts,
    tiled_anomaly_map,
)
from efficientad.model.networks import feature_size
from efficientad.results.report import thumbnail

BOUND = 1e-4  # float32, of max(0.1, largest |map|)
TILE = (256, 256)
FRAME = (18, 18)


class Light(TorchBackend):
    """In the network's place where a test is not about it: distances are local brightness."""

    most = 0  # tiles held at once

    def distance_maps(self, packed):
        Light.most = max(Light.most, len(packed))
        brightness = F.avg_pool2d(packed.permute(0, 3, 1, 2).float().abs(), 12)
        rows, cols = (length // 4 - 8 for length in packed.shape[1:3])
        maps = F.interpolate(brightness, size=(rows, cols), mode="bilinear")
        return maps[:, 0].contiguous(), maps[:, 1].contiguous()


class LightPredictor(FastPredictor):
    torch_backend = Light


def light(model: ead.EfficientAD, **options) -> FastPredictor:
    return LightPredictor(model, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    model = helpers.detector()
    model.threshold = 0.08
    return model


@pytest.fixture(scope="module")
def predictor(model) -> FastPredictor:
    return light(model)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return helpers.frames(1, height, width, seed)[0]


def tile_map(predictor: FastPredictor):
    """One tile's map as the definition takes it: images (1, 3, h, w) of bytes."""

    def run(image: torch.Tensor) -> torch.Tensor:
        frame = image[0].permute(1, 2, 0).contiguous().numpy()
        return predictor(frame, map_size="input").anomaly_map[None]

    return run


def as_bytes(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)


# ---- the window ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overlap"), [(256, 0), (257, 0), (700, 32), (512, 128), (999, 1)]
)
def test_tiles_cover_an_axis_exactly(length, overlap):
    starts = tile_starts(length, 256, overlap)
    assert starts[0] == 0
    assert starts[-1] + 256 == length
    assert starts == sorted(set(starts))
    steps = np.diff(starts)
    assert (steps[:-1] == 256 - overlap).all()
    assert (steps <= 256 - overlap).all()


def test_the_window_is_one_inside_and_falls_linearly_over_the_overlap():
    window = axis_window(300, 256, 2000, 32)
    assert torch.equal(window[32:-32], torch.ones(192, dtype=torch.float64))
    ramp = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    assert torch.equal(window[:32], ramp)
    assert torch.equal(window[-32:], ramp.flip(0))
    # At the image's own edges it stays 1.
    assert torch.equal(axis_window(0, 256, 256, 32), torch.ones(256, dtype=torch.float64))
    assert axis_window(0, 256, 2000, 32)[0] == 1
    assert axis_window(1744, 256, 2000, 32)[-1] == 1


def test_the_ramp_begins_behind_the_frame_as_far_as_there_is_room():
    window = axis_window(300, 256, 2000, 48, 18)
    assert not window[:18].any()
    assert torch.equal(window[18:30], (torch.arange(12, dtype=torch.float64) + 0.5) / 12)
    assert torch.equal(window[30:226], torch.ones(196, dtype=torch.float64))
    narrow = axis_window(300, 256, 2000, 20, 18)  # half of the overlap, then a step
    assert not narrow[:10].any()
    assert torch.equal(narrow[10:246], torch.ones(236, dtype=torch.float64))


@pytest.mark.parametrize("overlap", [0, 1, 2, 17, 36, 37, 48, 128])
@pytest.mark.parametrize("frame", [0, 18])
@pytest.mark.parametrize("length", [256, 257, 300, 464, 465, 1000])
def test_weights_add_up_to_one_at_every_pixel(length, frame, overlap):
    starts, weights = axis_weights(length, 256, overlap, frame)
    total, covered = torch.zeros(length, dtype=torch.float64), torch.zeros(length)
    for start, one in zip(starts, weights, strict=True):
        total[start : start + 256] += one
        covered[start : start + 256] += 1
    assert (total - 1).abs().max() <= 1e-12
    alone = covered == 1
    for start, one in zip(starts, weights, strict=True):
        assert (one[alone[start : start + 256]] == 1).all()


def test_the_frame_is_what_the_padded_cells_reach():
    for length in (256, 257, 300, 512):
        cells = feature_size(length)
        padded = F.pad(torch.zeros(1, 1, cells, cells), (4,) * 4, value=1.0)
        reached = F.interpolate(padded, size=(length, length), mode="bilinear")[0, 0, length // 2]
        assert int((reached[: length // 2] > 0).sum()) == frame_pixels(length, cells, 4)
    assert frame_pixels(256, 56, 4) == 18
    assert frame_pixels(256, 64, 0) == 0


def test_arguments_that_fit_nothing():
    with pytest.raises(ValueError, match=r"overlap is 129; it must be 0 to 128 pixels"):
        check_tiles((700, 700), TILE, 129)
    with pytest.raises(ValueError, match=r"overlap is -1; it must be 0 to 128"):
        check_tiles((700, 700), TILE, -1)
    with pytest.raises(ValueError, match=r"overlap is 3\.5; it must be an integer"):
        check_tiles((700, 700), TILE, 3.5)
    with pytest.raises(ValueError, match=r"the image is 255x700 and the tiles 256x256.*plain call"):
        check_tiles((255, 700), TILE, 32)


# ---- the definition --------------------------------------------------------------------------


def test_a_constant_map_stays_constant():
    for overlap in (0, 7, 48, 128):
        blended, score = tiled_anomaly_map(
            lambda x: torch.full((1, *x.shape[-2:]), 0.37), torch.zeros(3, 600, 411), TILE, overlap
        )
        assert blended.shape == (600, 411)
        assert (blended - 0.37).abs().max() <= 1e-6
        assert abs(float(score) - 0.37) <= 1e-6


def test_a_map_of_the_image_itself_is_reproduced():
    """Tiles that agree where they overlap blend to the same thing."""
    image = torch.rand(1, 500, 777, generator=torch.Generator().manual_seed(0))
    blended, score = tiled_anomaly_map(lambda x: x[:, 0], image, TILE, 48, FRAME)
    assert (blended - image[0]).abs().max() <= 1e-6
    assert score == blended.max()


def test_a_defect_on_a_seam_does_not_fade_in_the_frames():
    """Both tiles' frames lie on the seam; without the margin they would be blended in."""

    def one_inside_a_zero_frame(x):
        return F.pad(torch.ones(1, 220, 220), (18,) * 4)

    image = torch.zeros(3, 256, 700)
    blended, _ = tiled_anomaly_map(one_inside_a_zero_frame, image, TILE, 48, FRAME)
    assert (blended[18:-18, 18:-18] - 1).abs().max() <= 1e-6
    plain, _ = tiled_anomaly_map(one_inside_a_zero_frame, image, TILE, 32)
    assert plain[18:-18, 18:-18].min() == 0


# ---- the fast path ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "overlap", "batch"),
    [((256, 256), 48, None), ((256, 600), 48, 3), ((333, 411), 0, 2), ((700, 611), 128, 5)],
)
def test_fast_equals_the_definition(predictor, shape, overlap, batch):
    frame = picture(*shape)
    found = predict_large(predictor, frame, overlap=overlap, batch=batch)
    expected, score = tiled_anomaly_map(tile_map(predictor), as_bytes(frame), TILE, overlap, FRAME)
    assert found.anomaly_map.shape == shape
    scale = max(0.1, float(expected.abs().max()))
    assert (found.anomaly_map - expected).abs().max() <= 1e-6 * scale
    assert abs(found.score - score) <= 1e-6 * scale
    assert found.score == found.anomaly_map.max()
    assert found.source_size == shape
    assert found.threshold == 0.08
    assert found.cpu().is_anomalous == bool(score > 0.08)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"padding": True, "image_size": (256, 288)}, marks=pytest.mark.slow),
    ],
)
def test_the_network_in_tiles_equals_the_detector_in_tiles(options):
    model = helpers.detector(**options)
    tile, padding = model.image_size, model.padding
    predictor = FastPredictor(model, device="cpu", dtype="float32")
    frame = picture(256, 400, seed=3)
    frames = [frame_pixels(n, feature_size(n, padding), model.map_padding) for n in tile]
    expected, score = tiled_anomaly_map(
        lambda x: model(x).anomaly_map, as_bytes(frame).float() / 255, tile, 32, tuple(frames)
    )
    found = predict_large(predictor, frame, overlap=32)
    scale = max(0.1, float(expected.abs().max()))
    assert (found.anomaly_map - expected).abs().max() <= BOUND * scale
    assert abs(found.score - score) <= BOUND * scale


def test_moving_the_image_by_a_tile_step_moves_the_map(predictor):
    step = 256 - 48
    wide = picture(256, 256 + 3 * step)
    first = predict_large(predictor, wide[:, : 256 + 2 * step]).anomaly_map
    second = predict_large(predictor, wide[:, step:]).anomaly_map
    inner = slice(step + 48, 2 * step)  # the middle tile of the first, the first of the second
    difference = first[:, inner] - second[:, inner.start - step : inner.stop - step]
    assert difference.abs().max() <= 1e-6
    assert first[:, inner].std() > 1e-3


def test_nothing_but_the_map_grows_with_the_image(model):
    """Tiles are cut as views and held a batch at a time, however many there are."""
    predictor = light(model, batch_sizes=(1, 2))
    held = []
    original = predictor.predict_frames

    def counted(frames, **options):
        held.append(len(frames))
        assert all(np.shares_memory(f, image) for f in frames)
        return original(frames, **options)

    predictor.predict_frames = counted
    for shape, tiles in [((256, 256), 1), ((700, 1100), 4 * 6)]:
        held.clear()
        Light.most = 0
        image = picture(*shape)
        predict_large(predictor, image, overlap=48)
        assert sum(held) == tiles
        assert max(held) <= 2
        assert Light.most <= 2


def test_nan_in_any_tile_is_a_nan_score(predictor, monkeypatch):
    class Broken(Light):
        calls = 0

        def distance_maps(self, packed):
            st, ae = super().distance_maps(packed)
            Broken.calls += 1
            if Broken.calls == 2:
                st[0, 0, 0] = torch.nan  # in the frame of an inner edge: its weight is 0
            return st, ae

    monkeypatch.setattr(predictor.engine.backend, "__class__", Broken)
    found = predict_large(predictor, picture(256, 600)).cpu()
    assert Broken.calls > 2
    assert np.isnan(found.score)
    assert found.is_anomalous is True


def test_threads_share_a_predictor(predictor):
    frames = [picture(300, 500, seed=i) for i in range(4)]
    expected = [predict_large(predictor, f).anomaly_map for f in frames]
    found = [None] * 4

    def run(i):
        found[i] = predict_large(predictor, frames[i]).anomaly_map

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bad_arguments(predictor):
    with pytest.raises(ValueError, match="batch is 0; it must be an integer of at least 1"):
        predict_large(predictor, picture(300, 300), batch=0)
    with pytest.raises(ValueError, match=r"the image is 200x900 and the tiles 256x256"):
        predict_large(predictor, picture(200, 900))
    with pytest.raises(ValueError, match=r"overlap is 200; it must be 0 to 128"):
        predict_large(predictor, picture(300, 900), overlap=200)


def test_real_pictures_in_a_file(predictor, tmp_path):
    from PIL import Image

    frame = picture(300, 400)
    Image.fromarray(frame).save(tmp_path / "a.png")
    found = predict_large(predictor, tmp_path / "a.png")
    assert torch.equal(found.anomaly_map, predict_large(predictor, frame).anomaly_map)
    assert found.overlay().size == (400, 300)


def test_a_large_tiff_is_read_tile_by_tile(predictor, tmp_path, monkeypatch):
    """The same map and pictures, and the file is not decoded as a whole."""
    monkeypatch.setattr(tiff_parts, "LEAST_PIXELS", 1)
    monkeypatch.setattr(decoding, "_pixels", None)
    frame = picture(400, 700)
    tifffile.imwrite(
        tmp_path / "a.tif", frame, photometric="rgb", compression="zlib", tile=(64, 64)
    )
    expected = predict_large(predictor, frame, overlap=48).cpu()
    found = predict_large(predictor, tmp_path / "a.tif", overlap=48).cpu()
    assert isinstance(found.image, tiff_parts.TiffParts)
    assert found.source_size == (400, 700)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    assert found.score == expected.score
    np.testing.assert_array_equal(np.asarray(found.overlay()), np.asarray(expected.overlay()))
    pictures = [
        thumbnail(p.image, p.anomaly_map, 0.08, side=side)
        for p in (found, expected)
        for side in (16, 192)
    ]
    assert pictures[:2] == pictures[2:]


def test_the_command_writes_of_parts_what_it_writes_of_the_whole(model, tmp_path, monkeypatch):
    ead.save(model, tmp_path / "a.safetensors")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(256, 400), photometric="rgb", rowsperstrip=32)
    words = ["predict", str(tmp_path / "a.safetensors"), str(path), "--tiles", "48"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(tiff_parts, "LEAST_PIXELS", 1)
    assert main([*words, "--out", str(tmp_path / "parts")]) == 0
    for name in ("scores.json", "report.html", "overlays/a.png", "maps/a.tiff"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def vanish(*_, **__):
        path.unlink()
        return []

    monkeypatch.setattr("efficientad.results.prediction.Prediction.regions", vanish)
    assert main([*words, "--out", str(tmp_path / "gone"), "--no-overlays"]) == 1
    document = json.loads((tmp_path / "gone" / "scores.json").read_text())
    assert document["images"] == []
    assert "scored, but not readable again" in document["failed"][0]["reason"]
