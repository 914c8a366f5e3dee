"""Distillation: Algorithm 3's step, exact resume, damaged photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_distill import FACTS, SMALL, draw_photos, make_run
from safetensors.torch import load_file

from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.teachers import teacher_facts
from efficientad.distillation.distiller import Distillation, update_average
from efficientad.distillation.photos import normalize
from efficientad.distillation.recipe import initial_pdn
from efficientad.model.networks import PDN
from efficientad.utils.run_state import load_state, save_state


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return draw_photos(tmp_path_factory.mktemp("photos"))


def test_one_step_is_algorithm_3s(photos, tmp_path):
    recipe = replace(SMALL, crop=44, schedule="constant", warmup=0, weight_decay=0.01)
    run = make_run(recipe, photos, tmp_path)
    images, source = run.data.load_batch(0)
    model = initial_pdn(recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.01)
    features = model(normalize(images, torch.device("cpu")))
    raw = torch.from_numpy(source).permute(0, 3, 1, 2).float()
    mean, std = (v.view(1, -1, 1, 1) for v in (run.data.target_mean, run.data.target_std))
    loss = ((features - (raw - mean) / std) ** 2).sum() / features.numel()
    loss.backward()
    optimizer.step()
    assert run.update(images, source).item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), parameter, rtol=0, atol=1e-7)
    assert run.step == 1


def test_average_by_hand(photos, tmp_path):
    run = make_run(replace(SMALL, ema=0.5), photos, tmp_path)
    expected = run.model.conv4.bias.detach().double().clone()
    for step in range(4):
        run.update(*run.data.load_batch(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * run.model.conv4.bias.detach().double()
    torch.testing.assert_close(run.average["conv4.bias"].double(), expected, rtol=1e-5, atol=1e-9)
    assert not torch.equal(run.average["conv4.bias"], run.model.conv4.bias)
    update_average(run.average, run.model, 0.0)
    assert torch.equal(run.average["conv4.bias"], run.model.conv4.bias)


def test_training_lowers_the_held_out_loss(photos, tmp_path):
    run = make_run(replace(SMALL, steps=24, crop=44, ema=0.5, bank=1), photos, tmp_path)
    before = run.held_out_loss()
    lines: list[str] = []
    teacher = run.run(every=24, log=lines.append)
    assert run.curve[-1]["held_out_inner"] < 0.9 * before[1]
    assert run.curve[-1]["step"] == 24
    assert "step 24 of 24" in lines[-1]
    inner = _inner_loss(teacher, run)
    assert run.curve[-1]["held_out_inner"] == pytest.approx(inner, rel=1e-4)


@torch.no_grad()
def _inner_loss(teacher: PDN, run: Distillation) -> float:
    """The held-out loss over inner cells through the unpadded network, the deployed one."""
    features = teacher(normalize(run.data.held_images, torch.device("cpu")))
    targets = torch.cat(run.data.held_targets)[..., 4:-4, 4:-4].float()
    return ((features - targets) ** 2).mean().item()


def test_an_ended_run_is_written_again_with_its_sources(photos, tmp_path):
    recipe, out = replace(SMALL, steps=2), tmp_path / "t.safetensors"
    make_run(recipe, photos, tmp_path).run(out, log=lambda line: None)
    assert "sources" not in teacher_facts(out)
    before = load_file(out)
    out.unlink()
    sources = {"photos": [{"file": "a.jpg", "licence": "CC0-1.0"}], "backbone": "ours"}
    ended = make_run(recipe, photos, tmp_path, resume=True, sources=sources)
    ended.run(out, log=lambda line: None)
    assert teacher_facts(out)["sources"] == sources
    assert all(torch.equal(value, before[name]) for name, value in load_file(out).items())


@pytest.mark.parametrize("bank", [0, 1])
def test_a_broken_run_equals_an_unbroken_one_bit_for_bit(photos, tmp_path, bank):
    recipe = replace(SMALL, bank=bank)
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole = make_run(recipe, photos, folders[0], workers=2)
    whole.run(folders[0] / "t.safetensors", every=4, log=lambda line: None)

    broken = make_run(recipe, photos, folders[1])
    steps = iter(range(100))
    broken.run(every=4, log=lambda line: None, stop=lambda: next(steps) == 1)
    assert broken.step == 2
    torch.manual_seed(99)
    resumed = make_run(recipe, photos, folders[1], resume=True)
    assert resumed.step == 2
    resumed.run(folders[1] / "t.safetensors", every=4, log=lambda line: None)

    tensors, facts = load_state(folders[0] / "run.state")
    other, other_facts = load_state(folders[1] / "run.state")
    assert set(tensors) == set(other)
    for name, value in tensors.items():
        assert torch.equal(value, other[name]), name
    losses = [[{k: v for k, v in row.items() if k != "seconds"} for row in f["curve"]]
              for f in (facts, other_facts)]  # fmt: skip
    assert [row["held_out"] for row in losses[0]] == [row["held_out"] for row in losses[1]]
    files = [load_file(folder / "t.safetensors") for folder in folders]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_a_state_of_another_run_is_refused(photos, tmp_path):
    run = make_run(SMALL, photos, tmp_path)
    run.save()
    with pytest.raises(ValueError, match="is of another run: its recipe is"):
        make_run(replace(SMALL, lr=1e-4), photos, tmp_path, resume=True)
    with pytest.raises(ValueError, match="is of another run: its photos is"):
        make_run(SMALL, photos[1:], tmp_path, resume=True)
    with pytest.raises(ValueError, match="is of another run: its backbone is"):
        make_run(SMALL, photos, tmp_path, resume=True, backbone_facts={**FACTS, "sha256": "1"})
    tensors, facts = load_state(run.state)
    save_state(run.state, {k: v for k, v in tensors.items() if k != "model.conv1.bias"}, facts)
    with pytest.raises(ValueError, match=r"run\.state is damaged: 'model\.conv1\.bias'"):
        make_run(SMALL, photos, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no such file"):
        make_run(SMALL, photos, tmp_path / "elsewhere", resume=True)


def test_a_run_may_end_earlier_or_later_than_planned(photos, tmp_path):
    run = make_run(SMALL, photos, tmp_path)
    run.run(every=4, until=2, log=lambda line: None)
    shorter = make_run(replace(SMALL, steps=3), photos, tmp_path, resume=True)
    shorter.run(tmp_path / "t.safetensors", every=4, log=lambda line: None)
    facts = teacher_facts(tmp_path / "t.safetensors")
    assert facts["recipe"]["steps"] == 3
    assert facts["result"]["planned_before"] == [{"steps": 4, "until": 2}]
    longer = make_run(SMALL, photos, tmp_path, resume=True)
    assert longer.planned == [{"steps": 4, "until": 2}, {"steps": 3, "until": 3}]
    with pytest.raises(ValueError, match="is at step 3 already, of 2"):
        make_run(replace(SMALL, steps=2), photos, tmp_path, resume=True)


def test_a_run_that_diverges_stops_and_keeps_its_state(photos, tmp_path):
    run = make_run(replace(SMALL, lr=1e20, schedule="constant", warmup=0), photos, tmp_path)
    run.save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="lower the rate"):
        run.run(tmp_path / "t.safetensors", every=3, log=lambda line: None)
    assert load_state(run.state)[1]["step"] == 0
    load_teacher(tmp_path / "t.safetensors")


@pytest.mark.parametrize("bank", [0, 1])
def test_damaged_photos_are_left_out_and_counted(photos, tmp_path, bank):
    for i, path in enumerate(photos):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 3] if i in (2, 5) else data)
    mixed = sorted(tmp_path.iterdir())
    run = make_run(replace(SMALL, bank=bank, held_out=2), mixed, tmp_path)
    run.run(tmp_path / "t.safetensors", every=4, log=lambda line: None)
    assert sorted(path.name for path in run.data.failed) == ["2.png", "5.png"]
    assert teacher_facts(tmp_path / "t.safetensors")["result"]["failed"] == 2
    damaged = [mixed[2], mixed[5]]
    with pytest.raises(ValueError, match=r"none of (the )?2 photos (can|could) be read"):
        make_run(replace(SMALL, bank=bank, held_out=0), damaged, tmp_path / "bad")


def test_too_few_photos(photos, tmp_path):
    with pytest.raises(ValueError, match="1 photo found; distillation needs many"):
        make_run(SMALL, photos[:1], tmp_path)
    with pytest.raises(ValueError, match="held-out is 8; it must be from 0 to 7"):
        make_run(replace(SMALL, held_out=8), photos, tmp_path)
