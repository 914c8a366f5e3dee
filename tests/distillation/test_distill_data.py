"""What a distillation trains on: the recipe, views of photos, windows, targets, the bank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_distill import SMALL, TinyBackbone, draw_photos, make_targets
from PIL import Image

from efficientad.data.decoding import read_image
from efficientad.distillation.photos import View, draw_view, normalize, show_photo, split_photos
from efficientad.distillation.recipe import Recipe, initial_pdn
from efficientad.model.networks import PDN


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return draw_photos(tmp_path_factory.mktemp("photos"))


def test_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.steps, recipe.batch_size, recipe.lr) == (60_000, 16, 1e-4)
    assert (recipe.weight_decay, recipe.grey, recipe.statistics) == (1e-5, 0.1, 10_000)
    assert {recipe.learning_rate(step) for step in (0, 1, 30_000, 59_999)} == {1e-4}
    assert recipe.crop is None
    assert recipe.ema == 0


def test_cosine_rate_by_hand():
    recipe = Recipe(steps=110, lr=1.0, schedule="cosine", warmup=10)
    rates = [recipe.learning_rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.505)
    assert 0.01 < rates[-1] < 0.011
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"lr": 0}, {"lr": float("nan")}, {"crop": 38}, {"crop": 32}, {"crop": 260},
     {"ema": 1.0}, {"grey": 1.1}, {"schedule": "step"}, {"warmup": 7, "steps": 6}, {"size": "L"},
     {"bank": -1}, {"zoom": 0.0}, {"zoom": 1.1}, {"dtype": "float16"}, {"held_out": -1},
     {"batch_size": 0}],
)  # fmt: skip
def test_impossible_recipes_name_the_argument(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        Recipe(**wrong)


@pytest.mark.parametrize("size", ["S", "M"])
def test_first_weights_neither_fade_nor_grow(size):
    torch.manual_seed(1)
    recipe = Recipe(size=size, crop=36)
    pdn = initial_pdn(recipe)
    torch.manual_seed(2)
    again = initial_pdn(recipe)
    assert all(torch.equal(a, b) for a, b in zip(pdn.parameters(), again.parameters(), strict=True))
    assert not torch.equal(initial_pdn(replace(recipe, seed=1)).conv1.weight, pdn.conv1.weight)
    with torch.no_grad():
        assert 0.02 < pdn(torch.randn(2, 3, 36, 36)).std() < 0.3


def test_grey_and_flip_have_their_probabilities():
    views = [
        draw_view(3, "view", step, item, 0.1, True) for step in range(1000) for item in range(4)
    ]
    grey = np.mean([view.grey for view in views])
    flip = np.mean([view.flip for view in views])
    both = np.mean([view.grey and view.flip for view in views])
    assert abs(grey - 0.1) < 4 * (0.09 / 4000) ** 0.5
    assert abs(flip - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert abs(both - 0.05) < 4 * (0.0475 / 4000) ** 0.5
    plain = [draw_view(3, "view", step, 0, 0.1, False) for step in range(100)]
    assert [view.grey for view in plain] == [view.grey for view in views[:400:4]]
    assert not any(view.flip for view in plain)


def test_zoomed_windows_lie_in_the_photo_and_leave_the_other_draws_alone():
    views = [draw_view(3, "view", step, 0, 0.1, True, 0.25) for step in range(2000)]
    parts = np.array([view.window for view in views])
    assert np.array_equal(parts[:, 2], parts[:, 3])
    assert parts.min() >= 0
    assert (parts[:, 0] + parts[:, 2]).max() <= 1 + 1e-12
    assert (parts[:, 1] + parts[:, 3]).max() <= 1 + 1e-12
    assert 0.25 <= parts[:, 2].min() < 0.26
    assert 0.99 < parts[:, 2].max() <= 1
    assert abs(parts[:, 2].mean() - 0.625) < 4 * 0.75 / 12**0.5 / 2000**0.5
    whole = [draw_view(3, "view", step, 0, 0.1, True) for step in range(2000)]
    assert {view.window for view in whole} == {(0, 0, 1, 1)}
    assert [(v.flip, v.grey) for v in whole] == [(v.flip, v.grey) for v in views]


def test_both_networks_see_the_same_window():
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    large, small = show_photo(photo, View(False, False, (0.5, 0.25, 0.4, 0.4)))
    expected = Image.fromarray(photo[150:270, 100:260])
    for image, size in ((large, 512), (small, 256)):
        resized = np.asarray(expected.resize((size, size), Image.Resampling.BILINEAR))
        assert np.array_equal(image, resized)
    one_pixel, _ = show_photo(photo, View(False, False, (1.0, 1.0, 1e-9, 1e-9)))
    assert (one_pixel == photo[-1, -1]).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("grey", [False, True])
def test_both_networks_see_the_same_view(photos, flip, grey):
    photo = read_image(photos[0])
    large, small = show_photo(photo, View(flip, grey))
    assert large.shape == (512, 512, 3)
    assert small.shape == (256, 256, 3)
    for image, size in ((large, 512), (small, 256)):
        expected = Image.fromarray(photo)
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if grey:
            luma = np.asarray(expected).astype(float) @ [0.299, 0.587, 0.114]
            expected = Image.fromarray(np.repeat(np.rint(luma)[..., None], 3, 2).astype(np.uint8))
        expected = np.asarray(expected.resize((size, size), Image.Resampling.BILINEAR))
        assert abs(image.astype(int) - expected.astype(int)).max() <= grey
        assert bool((image == image[..., :1]).all()) == grey


@pytest.mark.parametrize("size", ["S", "M"])
def test_a_window_gives_the_inner_cells_of_the_padded_network(size):
    """What crop training rests on: cell (i, j) of the window at cell (r, c) is (r+4+i, c+4+j)."""
    pdn = initial_pdn(Recipe(size=size, crop=44)).double()
    padded = PDN(size, padding=True).double()
    padded.load_state_dict(pdn.state_dict())
    x = torch.randn(1, 3, 72, 80, dtype=torch.float64)
    row, column, cells = 2, 5, 3
    with torch.no_grad():
        window = pdn(x[..., 4 * row : 4 * row + 44, 4 * column : 4 * column + 44])
        whole = padded(x)
    inner = whole[..., 4 + row : 4 + row + cells, 4 + column : 4 + column + cells]
    assert window.shape == inner.shape
    assert (window - inner).abs().max() < 1e-12
    assert (window - whole[..., row : row + cells, column : column + cells]).abs().max() > 1e-3


@pytest.mark.parametrize("bank", [0, 2])
def test_windows_of_image_and_target_belong_together(photos, tmp_path, bank):
    """Each row of a batch is found in its own photo, at the same place in image and target."""
    recipe = replace(SMALL, crop=44, bank=bank, grey=0.5, statistics=3)
    data = make_targets(recipe, photos, tmp_path)
    backbone, seen = TinyBackbone(), set()
    for step in range(4):
        images, source = data.load_batch(step)
        targets = data.targets(step, source)
        assert images.shape == (2, 44, 44, 3)
        assert targets.shape == (2, 384, 3, 3)
        for item in range(2):
            row, column = data.window(step, item)
            matches = 0
            for path in data.train:
                for view in (View(f, g) for f in (False, True) for g in (False, True)):
                    large, small = show_photo(read_image(path), view)
                    window = small[4 * row : 4 * row + 44, 4 * column : 4 * column + 44]
                    if not np.array_equal(window, images[item]):
                        continue
                    with torch.no_grad():
                        whole = backbone(normalize([large], torch.device("cpu")))
                    whole = data.normalize_target(whole)
                    cells = whole[0, :, 4 + row : 7 + row, 4 + column : 7 + column]
                    assert (cells - targets[item]).abs().max() < (0.02 if bank else 1e-5)
                    matches += 1
                    seen.add(view)
            assert matches == 1
    assert len(seen) >= 2


def test_whole_photos_without_a_crop(photos, tmp_path):
    data = make_targets(replace(SMALL, crop=None, bank=0), photos, tmp_path)
    images, source = data.load_batch(0)
    assert images.shape == (2, 256, 256, 3)
    assert source.shape == (2, 512, 512, 3)
    assert data.targets(0, source).shape == (2, 384, 64, 64)


@pytest.mark.parametrize("bank", [0, 1])
def test_statistics_equal_float64_numpy(photos, tmp_path, bank):
    data = make_targets(replace(SMALL, bank=bank, grey=0.0, flip=False), photos, tmp_path)
    features = []
    for path in data.train:
        large, _ = show_photo(read_image(path), View(False, False))
        with torch.no_grad():
            found = TinyBackbone()(normalize([large], torch.device("cpu")))
        features.append(found[0].double().numpy().reshape(384, -1))
    stacked = np.concatenate(features, axis=1)
    np.testing.assert_allclose(data.target_mean, stacked.mean(1), rtol=1e-5, atol=1e-6)
    std = stacked.std(1)
    assert std[-1] == 0
    np.testing.assert_allclose(data.target_std, [*std[:-1], 1.0], rtol=1e-5)


def test_a_bank_is_kept_and_made_anew_when_it_is_another(photos, tmp_path):
    first = make_targets(SMALL, photos, tmp_path)
    stamp = (tmp_path / "bank.json").stat().st_mtime_ns
    again = make_targets(replace(SMALL, lr=5e-4), photos, tmp_path)
    assert (tmp_path / "bank.json").stat().st_mtime_ns == stamp
    assert np.array_equal(first.bank.targets, again.bank.targets)
    assert torch.equal(first.target_mean, again.target_mean)
    other = make_targets(replace(SMALL, seed=1), photos, tmp_path)
    assert not np.array_equal(first.load_batch(0)[0], other.load_batch(0)[0])
    assert (tmp_path / "bank.json").stat().st_mtime_ns != stamp


def test_held_out_photos_are_never_trained_on(photos, tmp_path, monkeypatch):
    import efficientad.distillation.targets as module

    train, held_out = split_photos(photos, 3, 0)
    assert sorted(train + held_out) == photos
    assert len(held_out) == 3
    assert split_photos(photos, 3, 1)[1] != held_out
    data = make_targets(replace(SMALL, bank=0, held_out=3), photos, tmp_path)
    read = []
    keep = module.read_or_none
    monkeypatch.setattr(
        module, "read_or_none", lambda path, on_error: read.append(path) or keep(path, on_error)
    )
    for step in range(10):  # 20 photos: four epochs of the five
        data.load_batch(step)
    assert [sorted(read[i : i + 5]) for i in (0, 5, 10, 15)] == [train] * 4
