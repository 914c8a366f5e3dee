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
    rates = {1: (1.0, 0.4, 9.0), 3: (0.6, 0.5, 12.0)}  # bfloat16, float32, copy by threads

    def measured(device):
        assert device == "cpu"
        half, single, copied = rates[torch.get_num_threads()]
        return [
            {"kind": "ceiling", "dtype": "bfloat16", "tflops": half},
            {"kind": "ceiling", "dtype": "float32", "tflops": single},
            {"kind": "ceiling", "dtype": "float32", "gb_s": copied},
        ]

    monkeypatch.setattr(module, "measure_ceilings", measured)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = module.ceilings()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found.tflops == {"bfloat16": 1.0, "float32": 0.5}
    assert found.gb_s == 12.0


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
