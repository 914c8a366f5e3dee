"""The step of the short schedule as a plain loop, and what its least time is made of."""

from __future__ import annotations

import pytest
import torch
from helpers_training import thin_detector, write_pictures

from bench.training import step as module
from bench.training.step import PlainStep, cost
from efficientad.training.closed_form import solve_last_layers
from efficientad.training.pictures import PictureSource, TrainingImages
from efficientad.training.schedules import SETTINGS
from efficientad.training.settings import Settings
from efficientad.training.short import AUTOENCODER_IMAGES, ShortTrainer, brightened
from efficientad.training.start import start_from_teacher


def test_flop_and_bytes_of_what_is_computed():
    a, b = torch.ones(8, 16), torch.ones(16, 4)

    def step():
        return (a.T.T @ b).view(4, 8).relu()

    assert cost(step) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4) + 4 * 2 * (8 * 4))


def test_the_better_of_one_thread_and_all_is_what_the_machine_can_do(monkeypatch):
    seconds = {1: iter([0.5, 0.1]), 3: iter([0.25, 0.2])}  # a convolution, a copy
    monkeypatch.setattr(module, "least", lambda call: next(seconds[torch.get_num_threads()]))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = module.machine("bfloat16")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    flop = 2 * 2 * 256 * 122**2 * 128 * 16
    assert found == pytest.approx((flop / 0.25, 2 * module.COPIED / 0.1))


def test_the_plain_step_has_the_trainers_losses(tmp_path):
    folder = write_pictures(tmp_path / "good", 3)
    images = TrainingImages(sorted(folder.iterdir()), (256, 256))
    settings = Settings(**SETTINGS["short"] | {"steps": 10})
    source = PictureSource(images, None, seed=1, batch_size=AUTOENCODER_IMAGES, augment=brightened)
    one, other = thin_detector(), thin_detector()
    for detector in (one, other):
        start_from_teacher(detector)
        solve_last_layers(detector, images, autoencoder=False, seed=1, cells=500)
    trainer = ShortTrainer(one, source, settings)
    one.student.train()
    one.autoencoder.train()
    plain = PlainStep(other, trainer)
    for step in range(2):
        expected = trainer.one_step(source(step)).sum().item()
        assert plain(source(step), step) == pytest.approx(expected, rel=1e-4)
