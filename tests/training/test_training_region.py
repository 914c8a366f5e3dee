"""A region at training: losses, statistics and regressions take its cells, the file keeps it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_training import thin_detector, thin_trainer, write_pictures

from efficientad import fit
from efficientad.model.region import index_of, of_cells
from efficientad.training import closed_form, losses
from efficientad.training.losses import StepInputs, step_losses
from efficientad.training.pictures import TrainingImages
from efficientad.training.settings import TrainingError
from efficientad.training.short import ShortTrainer

MASK = np.zeros((256, 256), dtype=bool)
MASK[60:150, 40:200] = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_pictures(root / "good", 4)
    write_pictures(root / "photos", 2, seed=1)
    return root


def test_the_terms_are_those_of_the_cells_in_the_region():
    detector = thin_detector().eval()
    detector.set_region(MASK)
    inputs = StepInputs(*torch.rand(3, 2, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    cells = index_of(detector.region_cells)
    found = step_losses(detector, inputs, 0.9, cells)
    teacher, again = (losses.teacher_features(detector, x) for x in inputs[:2])
    student, other, photo = (detector.student(detector.normalize(x)) for x in inputs[:3])
    autoencoder = detector.autoencoder(detector.normalize(inputs.augmented))
    inside = detector.region_cells
    t, a, s_st, ae, s_ae = (
        x[:, :, inside] for x in (teacher, again, student[:, :384], autoencoder, other[:, 384:])
    )
    rows = (t - s_st).square().flatten(1)
    hard = torch.stack([r[r >= r.quantile(0.9)].mean() for r in rows]).mean()
    wanted = [hard, photo[:, :384].square().mean(), (a - ae).square().mean()]
    wanted.append((ae - s_ae).square().mean())
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-6)
    everywhere = step_losses(detector, inputs, 0.9, torch.arange(56 * 56))
    torch.testing.assert_close(everywhere, step_losses(detector, inputs, 0.9), rtol=1e-5, atol=0)


def test_statistics_are_those_of_the_cells_in_the_region(folder):
    trainer = thin_trainer(folder, 1, photos=False)
    detector = trainer.detector
    detector.set_region(MASK)
    trainer.cells = index_of(detector.region_cells)
    trainer.prepare()
    features = torch.cat(list(trainer._features.values()))[:, :, detector.region_cells]
    torch.testing.assert_close(detector.teacher_mean.flatten(), features.mean((0, 2)))


def test_the_closed_form_samples_the_cells_of_the_region(folder, monkeypatch):
    detector = thin_detector(seed=3)
    detector.set_region(MASK)
    images = TrainingImages(sorted((folder / "good").iterdir()), detector.image_size)
    seen = []

    def watched(x, conv, cells, read=closed_form.patches):
        seen.append(cells)
        return read(x, conv, cells)

    monkeypatch.setattr(closed_form, "patches", watched)
    closed_form.solve_last_layers(detector, images, seed=3, cells=20_000)
    inside = set(index_of(detector.region_cells).tolist())
    taken = torch.cat(seen).tolist()
    assert set(taken) <= inside
    assert len(set(taken)) > 0.8 * len(inside)
    wanted = 20_000 * len(inside) / 56**2
    assert wanted <= len(taken) / 3 <= 1.1 * wanted + 4  # inputs, decoder and teacher read each


def test_the_short_schedules_losses_are_those_of_the_region(folder):
    trainer = thin_trainer(folder, 1, photos=False)
    detector = trainer.detector
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_region(MASK)
    short = ShortTrainer(detector, trainer.source, trainer.settings)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    detector.eval()  # without dropout
    teacher = losses.teacher_features(detector, image)
    found = short.losses(StepInputs(image, image, None, teacher))
    x = detector.normalize(image)
    distances = of_cells((teacher - detector.student(x)[:, :384]).square(), short.cells)
    wanted = losses.hard_loss(distances, short.settings.hard_quantile)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=0)
    inside = of_cells((teacher - detector.autoencoder(x)).square(), short.cells)
    torch.testing.assert_close(found[1], inside.mean(), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fit_keeps_the_region_and_a_state_belongs_to_it(folder, tmp_path):
    options = {"steps": 2, "schedule": "paper", "device": "cpu", "dtype": "float32", "score": 10}
    state = tmp_path / "state"
    detector = fit(folder / "good", region=MASK, checkpoint=state, **options)
    assert torch.equal(detector.region, torch.from_numpy(MASK))
    assert detector.score == 10
    assert detector.threshold == max(detector.provenance["calibration"]["scores"])
    share = float(MASK.mean())
    for made_from in ("training", "calibration"):
        assert detector.provenance[made_from]["inspected"] == pytest.approx(share, abs=1e-6)
    assert detector.calibrated
    for other in (None, np.roll(MASK, 8, 0)):
        with pytest.raises(TrainingError, match="is of a training with region"):
            fit(folder / "good", region=other, checkpoint=state, resume=True, **options)


def test_fit_refuses_a_region_of_another_aspect(folder):
    with pytest.raises(ValueError, match=r"region is 90x30 pixels and .* is 50x40"):
        fit(folder / "good", region=np.ones((30, 90), bool))
    with pytest.raises(ValueError, match="region is float64"):
        fit(folder / "good", region=np.ones((40, 50)))
