"""The training step as a CUDA graph, against the same steps launched one by one.

Run with `pytest --device cuda`; skipped elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from helpers_training import thin_trainer, write_pictures

from efficientad.training import trainer as trainer_module
from efficientad.training.settings import determinism

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_pictures(root / "good", 5)
    write_pictures(root / "photos", 4, seed=1)
    return root


class Launched:
    """In the graph's place: every step is launched as it is."""

    def __init__(self, eager, optimizer, parameters, example) -> None:
        self.eager = eager

    def __call__(self, inputs):
        return self.eager(inputs)


def trained(folder, device, steps: int = STEPS, **options):
    """A trainer after `steps` of STEPS steps."""
    trainer = thin_trainer(folder, STEPS, device=device, log_every=1, **options)
    trainer.prepare()
    if steps:
        run(trainer, steps)
    return trainer


def run(trainer, stop: int) -> None:
    def progress(what, done, total):
        if done == stop < total:
            raise StopIteration

    try:
        trainer.run(progress=progress)
    except StopIteration:
        assert trainer.step == stop


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_graph_takes_the_same_steps(batch_size, folder, cuda, monkeypatch):
    graph = trained(folder, cuda, batch_size=batch_size)
    monkeypatch.setattr(trainer_module, "GraphStep", Launched)
    launched = trained(folder, cuda, batch_size=batch_size)
    for a, b in zip(graph.history, launched.history, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    start = trained(folder, cuda, steps=0, batch_size=batch_size)
    columns = (graph._parameters, launched._parameters, start._parameters)
    with torch.no_grad():
        for name, a, b, before in zip(graph._names, *columns, strict=True):
            moved = float((b - before).abs().max())
            assert moved > 0, name
            assert float((a - b).abs().max()) <= 0.05 * moved, name


def test_resume_gives_the_same_bits(folder, cuda, tmp_path):
    with determinism(True, cuda):
        whole = trained(folder, cuda)
        part = trained(folder, cuda, steps=3)
        part.save(tmp_path / "state")
        resumed = thin_trainer(folder, STEPS, device=cuda, log_every=1)
        resumed.resume(tmp_path / "state")
        run(resumed, STEPS)
    for name, a, b in zip(whole._names, whole._parameters, resumed._parameters, strict=True):
        assert torch.equal(a, b), name


def test_on_another_device_than_the_current_one(folder, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    there, here = trained(folder, other), trained(folder, cuda)
    for a, b in zip(there._parameters, here._parameters, strict=True):
        assert torch.allclose(a.cpu(), b.cpu(), atol=1e-3)
