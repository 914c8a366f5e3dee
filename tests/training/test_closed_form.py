"""Last layers in closed form, and `fit` with schedule "instant"."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_training import thin_detector, write_pictures
from PIL import Image
from torch import nn

from efficientad import load
from efficientad.cli.main import main
from efficientad.training import closed_form, fitting
from efficientad.training.closed_form import Moments, filters, patches, set_filters, views
from efficientad.training.fitting import fit
from efficientad.training.losses import trunk
from efficientad.training.pictures import TrainingImages, to_rgb
from efficientad.training.start import start_from_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("closed") / "good", 4)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(closed_form, "CELLS", 2000)


def solved(folder: Path, seed: int = 3, cells: int = 5000, **options):
    """A thin detector with its teacher's inner layers, solved; and its images."""
    detector = thin_detector(seed=seed, **options)
    start_from_teacher(detector)
    images = TrainingImages(sorted(folder.iterdir()), detector.image_size)
    closed_form.solve_last_layers(detector, images, seed=seed, cells=cells)
    return detector, images


def ridge_by_hand(x: torch.Tensor, y: torch.Tensor, ridge: float):
    """Normal equations in float64: weight (targets, inputs) and bias."""
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean(0)
    covariance = (x - mx).T @ (x - mx) / len(x)
    penalty = ridge * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()
    weight = torch.linalg.solve(covariance + penalty, (x - mx).T @ (y - my) / len(x)).T
    return weight, my - weight @ mx


# ---- the regression --------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_a_regression_from_blocks_is_the_one_from_all_rows(ridge, monkeypatch):
    monkeypatch.setattr(closed_form, "_BLOCK", 100)
    monkeypatch.setattr(closed_form, "_COLUMNS", 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(730, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 50
    y = x @ torch.randn(12, 3, generator=generator) + torch.randn(730, 3, generator=generator)
    moments = Moments(x=12, z=1, y=3)
    for first in range(0, 730, 73):
        rows = slice(first, first + 73)
        moments.add(y=y[rows], x=x[rows], z=x[rows, :1])
    assert moments.count == 730
    weight, bias = moments.regress("x", "y", ridge)
    wanted, wanted_bias = ridge_by_hand(x, y, ridge)
    torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, wanted_bias, rtol=1e-4, atol=1e-3)
    residual = y.double() - x.double() @ weight.T - bias
    assert residual.mean(0).abs().max() < 1e-4  # the bias is not penalised


def test_the_stronger_the_penalty_the_nearer_the_mean():
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    moments = Moments(x=4, y=4)
    moments.add(x=x, y=x + 7)
    sizes = [moments.regress("x", "y", ridge)[0].norm().item() for ridge in (0, 0.1, 1, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(2, rel=1e-4)
    assert sizes[-1] < 1e-4
    torch.testing.assert_close(
        moments.regress("x", "y", 1e6)[1].float(), (x + 7).mean(0), rtol=1e-5, atol=1e-5
    )


def test_inputs_that_never_change_give_the_mean():
    moments = Moments(x=3, y=1)
    moments.add(x=torch.full((50, 3), 0.3), y=torch.arange(50.0)[:, None])
    weight, bias = moments.regress("x", "y", 0.2)
    assert torch.isfinite(weight).all()
    assert float((0.3 * weight).sum() + bias) == pytest.approx(24.5, rel=1e-3)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(5, 7, 4), nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(5, 7, 1)], ids=str
)
def test_patches_times_filters_is_the_convolution(conv):
    x = torch.randn(1, 5, 9, 11, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = conv(x)
        cells = torch.tensor([0, 3, whole.shape[3], whole[0, 0].numel() - 1])
        found = F.linear(patches(x, conv, cells), filters(conv), conv.bias)
    torch.testing.assert_close(found, whole[0].flatten(1).T[cells], rtol=1e-5, atol=1e-5)
    other = nn.Conv2d(5, 7, conv.kernel_size, padding=conv.padding)
    set_filters(other, filters(conv), conv.bias)
    assert torch.equal(other.weight, conv.weight)
    assert torch.equal(other.bias, conv.bias)


def test_views_cover_the_cells_that_are_wanted():
    many = [views(1, i, 100, 1000, 3136) for i in range(100)]
    assert all(len(found) == 1 and len(found[0].cells) == 10 for found in many)
    few = views(1, 0, 2, 10_000, 3136)
    assert [len(view.cells) for view in few] == [2500, 2500]
    assert few[0].gain != few[1].gain
    assert not torch.equal(few[0].cells, few[1].cells)
    for view in (*few, *(found[0] for found in many)):
        assert closed_form.GAINS[0] <= view.gain <= closed_form.GAINS[1]
        assert len(set(view.cells.tolist())) == len(view.cells)
        assert view.cells.max() < 3136
    again = views(1, 0, 2, 10_000, 3136)
    for a, b in zip(few, again, strict=True):
        assert torch.equal(a.cells, b.cells)
        assert a.gain == b.gain
    assert views(2, 0, 2, 10_000, 3136)[0].gain != few[0].gain


# ---- the layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [False, True])
def test_the_layers_are_the_regressions(folder, padding):
    detector, images = solved(folder, padding=padding)
    decoder, student, teacher = detector.autoencoder.decoder, detector.student, detector.teacher
    height, width = detector.feature_size()
    rows: dict[str, list] = {"inputs": [], "decoder": [], "teacher": []}
    with torch.no_grad():
        for i in range(len(images)):
            image = to_rgb(torch.tensor(images[i])[None], torch.device("cpu"))
            for gain, cells in views(3, i, len(images), 5000, height * width):
                x = detector.normalize((image * gain).clamp(0, 1))
                features = (teacher(x) - detector.teacher_mean) / detector.teacher_std
                decoded = decoder.inner(detector.autoencoder.encoder(x), detector.image_size)
                windows = F.unfold(trunk(student, x), 4)[0].T, F.unfold(decoded, 3, padding=1)[0].T
                rows["inputs"].append(windows[0][cells])
                rows["decoder"].append(windows[1][cells])
                rows["teacher"].append(features[0].flatten(1).T[cells])
        x, z, y = (torch.cat(values) for values in rows.values())
        weight, bias = ridge_by_hand(z, y, closed_form.DECODER_RIDGE)
        output = z.double() @ weight.T + bias
        student_st = ridge_by_hand(x, y, closed_form.STUDENT_RIDGE)
        student_ae = ridge_by_hand(x, output, closed_form.SECOND_RIDGE)
    wanted = [output]
    wanted += [x.double() @ weight.T + bias for weight, bias in (student_st, student_ae)]
    found = z @ decoder.deconv8.weight.flatten(1).T + decoder.deconv8.bias
    both = x @ student.last.weight.flatten(1).T + student.last.bias
    for a, b in zip((found, *both.split(384, 1)), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=2e-3)
    assert (wanted[1] - y).square().mean() < y.square().mean()


def test_inner_layers_stay_the_teachers(folder):
    detector, _ = solved(folder)
    for (mine, _), (theirs, _) in list(
        zip(detector.student.layers(), detector.teacher.layers(), strict=True)
    )[:-1]:
        assert torch.equal(mine.weight, theirs.weight)


def test_an_unreadable_image_is_left_out(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = TrainingImages(sorted(tmp_path.iterdir()), (256, 256))
    detector = thin_detector()
    closed_form.solve_last_layers(detector, images, seed=0, cells=2000)
    assert [Path(name).name for name, _ in images.failed] == ["broken.png"]
    assert detector.has_statistics
    only = TrainingImages([tmp_path / "broken.png"], (256, 256))
    with pytest.raises(ValueError, match=r"none of the 1 training images can be read.*broken\.png"):
        closed_form.solve_last_layers(thin_detector(), only, seed=0, cells=2000)


def test_images_of_one_colour_are_refused_as_in_any_training(tmp_path):
    for i in range(4):
        Image.new("RGB", (40, 50), (90 + i, 90, 90)).save(tmp_path / f"{i}.png")
    images = TrainingImages(sorted(tmp_path.iterdir()), (256, 256))
    with pytest.raises(ValueError, match=r"4 of 4 good images for training .* of one colour"):
        closed_form.solve_last_layers(thin_detector(), images, seed=0, cells=2000)


# ---- fit and the command ---------------------------------------------------------------------


@pytest.mark.usefixtures("few")
def test_fit_writes_an_ordinary_detector(folder, tmp_path, recwarn):
    out, told = tmp_path / "detector.safetensors", []
    state = tmp_path / "detector.training"
    state.write_bytes(b"of another training")
    found = fit(
        folder, out=out, schedule="instant", progress=lambda *told_now: told.append(told_now)
    )
    assert not recwarn.list  # the pretraining penalty is not missed
    again = fit(folder, schedule="instant", workers=0)
    kept = load(out)
    assert kept.calibrated
    assert kept.threshold == found.threshold
    for name, value in kept.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
    facts = kept.provenance["training"]
    assert facts["schedule"] == "instant"
    assert facts["images"] == 3
    assert facts["gains"] == list(closed_form.GAINS)
    assert "steps" not in facts
    assert told[:3] == [("closed form", i, 3) for i in (1, 2, 3)]
    assert state.read_bytes() == b"of another training"
    assert {p.name for p in tmp_path.iterdir()} == {state.name, out.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "quick"}, "schedule is 'quick'; it must be one of paper, short, instant"),
        ({"steps": 10}, "steps is 10; schedule 'instant' takes no gradient step"),
        ({"batch_size": 2}, "batch_size is 2; schedule 'instant'"),
        ({"penalty": "photos"}, "penalty is 'photos'; schedule 'instant'"),
        ({"warm_start": True}, "warm_start is True; schedule 'instant'"),
        ({"learning_rate": 1e-3}, "learning_rate is 0.001; schedule 'instant'"),
        ({"resume": True}, "resume is True; schedule 'instant'"),
        ({"checkpoint": "state"}, "checkpoint is 'state'; schedule 'instant'"),
        ({"evaluate_every": 5}, "evaluate_every is 5; schedule 'instant'"),
    ],
)
def test_what_has_no_meaning_without_steps_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        fit(folder, **{"schedule": "instant", **options})


@pytest.mark.usefixtures("few")
def test_interrupted_it_leaves_nothing(folder, tmp_path):
    def interrupt(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(folder, out=tmp_path / "a.safetensors", schedule="instant", progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few")
def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "detector.safetensors"
    arguments = ["train", str(folder), "--out", str(out), "--schedule", "instant"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "penalty" not in printed.out + printed.err
    assert f"saved: {out}" in printed.out
    assert load(out).provenance["training"]["schedule"] == "instant"
    assert main([*arguments, "--force", "--steps", "5"]) == 2
    assert "steps is 5; schedule 'instant' takes no gradient step" in capsys.readouterr().err
    assert main(["info", str(out), "--json"]) == 0
    assert "instant" in json.dumps(capsys.readouterr().out)


def test_real_pictures_are_told_from_drawn_over_ones(shared_data, tmp_path):
    """The shipped teacher on twelve real screws: a bright bar is what stands out."""
    good = sorted((Path(shared_data) / "mvtec_screw_256/train/good").iterdir())[:12]
    images = TrainingImages(good, (256, 256))
    detector = fitting.new_detector("S", False, (256, 256), 0, None)
    start_from_teacher(detector)
    closed_form.solve_last_layers(detector, images, seed=0, cells=12_000)
    marked = np.array(images[0])
    marked[100:140, 120:128] = 255
    pair = np.stack([images[0], marked])
    with torch.no_grad():
        maps, _ = detector.distance_maps(to_rgb(torch.from_numpy(pair), torch.device("cpu")))
    assert maps[1].max() > 2 * maps[0].max()
    row, column = divmod(int((maps[1] - maps[0]).argmax()), maps.shape[2])
    assert 100 <= 4 * row + 16 <= 140
    assert 110 <= 4 * column + 16 <= 138
