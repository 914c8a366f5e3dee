"""The training loop: the batched step, exact resume, what ends up in the file, bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import helpers_training
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_training import thin_detector, thin_trainer, write_pictures

from efficientad import EfficientAD, load
from efficientad.checkpoint import teachers
from efficientad.cli.train import _Course, add_train, run_train
from efficientad.data.layouts import open_dataset
from efficientad.model.good_images import GoodImageWarning
from efficientad.model.networks import PDN
from efficientad.ops import differentiable_conv
from efficientad.training import fitting as training
from efficientad.training.fitting import fit
from efficientad.training.losses import StepInputs, step_losses
from efficientad.training.settings import PenaltyWarning, Settings, TrainingError, TrainingStopped
from efficientad.training.trainer import Trainer
from efficientad.utils import run_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("training")
    write_pictures(root / "good", 6)
    write_pictures(root / "photos", 5, seed=1, size=(70, 90))
    return root


@pytest.fixture
def thin(monkeypatch):
    """`fit` with thin networks and any teacher."""
    monkeypatch.setattr(
        training,
        "new_detector",
        lambda size, padding, image_size, seed, teacher: thin_detector(
            size, padding=padding, image_size=image_size
        ),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.detector.state_dict().items() if k != "quantiles"}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the step --------------------------------------------------------------------------------


def plain_losses(detector, image, augmented, photo, quantile=0.999):
    """Algorithm 1 as the paper writes it: three student passes, nothing shared."""
    mean, std = detector.teacher_mean, detector.teacher_std
    image, augmented, photo = (detector.normalize(x) for x in (image, augmented, photo))
    with torch.no_grad():
        target = (detector.teacher(image) - mean) / std
        target_augmented = (detector.teacher(augmented) - mean) / std
    distances = (target - detector.student(image)[:, :384]).square()
    limit = torch.quantile(distances.flatten(), quantile)
    hard = distances[distances >= limit].mean()
    penalty = detector.student(photo)[:, :384].square().mean()
    autoencoder = detector.autoencoder(augmented)
    return torch.stack(
        [
            hard,
            penalty,
            (target_augmented - autoencoder).square().mean(),
            (autoencoder - detector.student(augmented)[:, 384:]).square().mean(),
        ]
    )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("size", "padding"), [("S", False), ("S", True), ("M", False)])
def test_batched_step_has_the_gradients_of_the_plain_one(size, padding, own, monkeypatch):
    """In float64, with the same dropout."""
    monkeypatch.setattr(differentiable_conv, "serves", lambda x: own)
    detector = thin_detector(size, padding=padding, image_size=(256, 270)).double()
    detector.set_statistics(torch.linspace(-1, 1, 384), torch.linspace(0.05, 0.2, 384))
    torch.manual_seed(3)
    pictures = torch.rand(3, 1, 3, 256, 270, dtype=torch.float64)
    detector.train()
    parameters = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    torch.manual_seed(7)
    expected = plain_losses(detector, *pictures)
    expected_gradients = torch.autograd.grad(expected.sum(), parameters)
    torch.manual_seed(7)
    found = step_losses(detector, StepInputs(*pictures), 0.999)
    gradients = torch.autograd.grad(found.sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert all(p.grad is None for p in detector.teacher.parameters())


def test_gradients_of_the_students_term_reach_the_autoencoder():
    detector = thin_detector()
    terms = step_losses(detector, StepInputs(*torch.rand(3, 1, 3, 256, 256)), 0.999)
    gradient = torch.autograd.grad(terms[3], detector.autoencoder.decoder.deconv8.weight)[0]
    assert gradient.abs().max() > 0


def test_a_batch_has_the_mean_of_the_losses_of_its_images():
    detector = thin_detector().double()
    torch.manual_seed(3)
    inputs = torch.rand(3, 2, 3, 256, 256, dtype=torch.float64)
    both = step_losses(detector, StepInputs(*inputs), 0.999)
    one = [step_losses(detector, StepInputs(*inputs[:, i : i + 1]), 0.999) for i in (0, 1)]
    torch.testing.assert_close(both, (one[0] + one[1]) / 2, rtol=1e-12, atol=0)


def test_two_steps_are_those_of_a_plain_loop(folder):
    """Adam with weight decay in the gradient, the rate of each step, the augmented image."""
    trainer = thin_trainer(folder, 2, log_every=1, learning_rate=1e-2)
    trainer.prepare()
    detector = thin_detector()
    detector.set_statistics(trainer.detector.teacher_mean, trainer.detector.teacher_std)
    parameters = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-5)
    losses = []
    for step, rate in enumerate((1e-2, 1e-3)):  # 95 % of 2 steps: after the first
        found = trainer.source(step)
        image, photo = (x.permute(0, 3, 1, 2).float() / 255 for x in (found.image, found.photo))
        detector.train()
        optimizer.param_groups[0]["lr"] = rate
        with trainer.seeded(step):
            terms = plain_losses(detector, image, found.augmented.permute(0, 3, 1, 2), photo)
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
        losses.append(terms.sum().item())
    trainer.run()
    assert [e["loss"] for e in trainer.history] == pytest.approx(losses, rel=1e-4)
    assert [e["learning_rate"] for e in trainer.history] == [1e-2, 1e-3]
    found, expected = (
        torch.cat([p.detach().flatten() for p in ps]) for ps in (trainer._parameters, parameters)
    )
    # Adam's first steps have the size of the rate whatever the gradient: a gradient near zero may
    # differ in sign. The second step alone moves every other weight by about 1e-3.
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.02


# ---- the same result again -------------------------------------------------------------------


def unbroken(folder, steps, **options):
    trainer = thin_trainer(folder, steps, **options)
    trainer.prepare()
    before = weights(trainer)
    trainer.run()
    assert not torch.equal(before["student.conv4.weight"], weights(trainer)["student.conv4.weight"])
    return trainer


@pytest.mark.parametrize("batch_size", [1, 2])
def test_resume_gives_the_bits_of_an_unbroken_training(folder, tmp_path, batch_size):
    """Interrupted between two entries of the history, in the middle of a pass over the images."""
    expected = unbroken(folder, 5, batch_size=batch_size, log_every=2)

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if done == 4:
            raise Stop

    first = thin_trainer(folder, 5, batch_size=batch_size, log_every=2)
    first.prepare()
    torch.rand(3)  # the generators outside do not matter
    with pytest.raises(Stop):
        first.run(checkpoint=tmp_path / "state", checkpoint_every=3, progress=stop, workers=0)
    second = thin_trainer(folder, 5, batch_size=batch_size, log_every=2)
    second.resume(tmp_path / "state")
    assert second.step == 3
    second.run(workers=3)
    assert_same_bits(weights(second), weights(expected))
    assert second.history == expected.history
    assert [e["step"] for e in second.history] == [2, 4, 5]


def test_caches_threads_evaluation_and_outer_generators_change_nothing(folder):
    expected = unbroken(folder, 4)
    other = thin_trainer(folder, 4, feature_budget=0)
    other.source.images._room = 0
    other.prepare(workers=0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    seen = []

    def evaluate():
        seen.append((other.step, other.detector.autoencoder.decoder.training))
        return {"metrics": {}}

    other.run(workers=0, evaluate=evaluate, evaluate_every=2)
    assert seen == [(2, False), (4, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(weights(other), weights(expected))
    third = thin_trainer(folder, 4, seed=43)
    third.prepare()
    third.run()
    assert not torch.equal(third._parameters[0], expected._parameters[0])


def test_kill_and_resume(folder, tmp_path):
    """SIGKILL at some step; what is on the disk continues to the bits of an unbroken training."""
    for name in ("good", "photos"):
        (tmp_path / name).symlink_to(folder / name)
    steps = 60
    process = subprocess.Popen(
        [sys.executable, helpers_training.__file__, str(tmp_path), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(helpers_training.__file__).parent.parent), "PATH": ""},
    )
    for line in process.stdout:
        if line.split() == ["training", "8"]:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = thin_trainer(tmp_path, steps)
        resumed.resume(tmp_path / "state")
        assert 6 <= resumed.step < steps
        stop = resumed.step + 4
        expected = thin_trainer(tmp_path, steps)
        expected.prepare()
        for trainer in (resumed, expected):
            with pytest.raises(StopIteration):
                trainer.run(progress=lambda what, done, total: done < stop or next(iter(())))
    finally:
        torch.set_num_threads(threads)
    assert resumed.step == expected.step == stop
    assert_same_bits(weights(resumed), weights(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 42; here it is 1"),
        ({"batch_size": 2}, "batch_size 1; here it is 2"),
        ({"identity": {"teacher": "another"}}, "teacher None"),
    ],
)
def test_a_state_of_another_training_is_refused(folder, tmp_path, change, message):
    trainer = unbroken(folder, 1)
    trainer.save(tmp_path / "state")
    with pytest.raises(TrainingError, match=message):
        thin_trainer(folder, 1, **change).resume(tmp_path / "state")
    thin_trainer(folder, 1, identity={"value_range": None}).resume(tmp_path / "state")
    ranged = unbroken(folder, 1, identity={"value_range": [0, 4095]})
    ranged.save(tmp_path / "ranged")
    with pytest.raises(TrainingError, match=r"value_range \[0, 4095\]; here it is None"):
        thin_trainer(folder, 1).resume(tmp_path / "ranged")
    fewer = thin_trainer(folder, 1)
    fewer.source.images.paths.pop()
    with pytest.raises(TrainingError, match="other images"):
        fewer.resume(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        thin_trainer(folder, 1).resume(tmp_path / "state")


def test_full_disk_leaves_the_last_state(folder, tmp_path, monkeypatch):
    trainer = thin_trainer(folder, 4)
    trainer.prepare()
    save_file, calls = run_state.save_file, []

    def fill(tensors, path, header):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, header)

    monkeypatch.setattr(run_state, "save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(checkpoint=tmp_path / "state", checkpoint_every=2)
    again = thin_trainer(folder, 4)
    again.resume(tmp_path / "state")
    assert again.step == 2
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def interrupted_in(monkeypatch, step: int, times: int = 1) -> None:
    """Ctrl-C while this step is under way."""
    whole_step = Trainer._eager

    def one(self, inputs):
        for _ in range(times if self.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return whole_step(self, inputs)

    monkeypatch.setattr(Trainer, "_eager", one)


@pytest.fixture
def foreground():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_finishes_the_step_and_writes_the_state(folder, tmp_path, monkeypatch):
    """And what continues from it has the bits of an unbroken training."""
    expected = unbroken(folder, 5)
    with monkeypatch.context() as patch:
        interrupted_in(patch, 2)
        first = thin_trainer(folder, 5)
        first.prepare()
        with pytest.raises(TrainingStopped, match=r"stopped at step 3; the state is in .*state"):
            first.run(checkpoint=tmp_path / "state")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    second = thin_trainer(folder, 5)
    second.resume(tmp_path / "state")
    assert second.step == 3
    seen = []
    second.run(progress=lambda what, done, total: seen.append(done))
    assert seen == [3, 4, 5]  # the first is where it was resumed
    assert_same_bits(weights(second), weights(expected))
    assert second.history == expected.history


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_leaves_the_older_state(folder, tmp_path, monkeypatch):
    interrupted_in(monkeypatch, 3, times=2)
    trainer = thin_trainer(folder, 5)
    trainer.prepare()
    with pytest.raises(TrainingStopped, match="stopped at step 3; no state of that step"):
        trainer.run(checkpoint=tmp_path / "state", checkpoint_every=2)
    again = thin_trainer(folder, 5)
    again.resume(tmp_path / "state")
    assert again.step == 2


def test_ctrl_c_in_an_evaluation_keeps_the_entry(folder, tmp_path):
    trainer = thin_trainer(folder, 5)
    trainer.prepare()

    def evaluate():
        raise KeyboardInterrupt

    with pytest.raises(TrainingStopped, match="stopped at step 3"):
        trainer.run(checkpoint=tmp_path / "state", evaluate=evaluate, evaluate_every=3)
    again = thin_trainer(folder, 5)
    again.resume(tmp_path / "state")
    assert [e["step"] for e in again.history] == [2, 3]


def test_loss_that_is_not_finite_stops_the_training(folder):
    trainer = thin_trainer(folder, 4)
    trainer.prepare()
    with torch.no_grad():
        trainer.detector.student.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite by step 2"):
        trainer.run()


# ---- fit -------------------------------------------------------------------------------------


def quiet_fit(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PenaltyWarning)
        return fit(*arguments, **options)


def test_fit_calibrates_and_says_what_it_did(folder, tmp_path, thin):
    """A plain folder; one unreadable image and one unreadable photo; every layer of the record."""
    write_pictures(tmp_path / "good", 12)
    write_pictures(tmp_path / "photos", 2, seed=1)
    (tmp_path / "good" / "004.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "000.png").write_bytes(b"no picture")
    entries = []
    options = {
        "steps": 4,
        "checkpoint": tmp_path / "state",
        "penalty": tmp_path / "photos",
        "log_every": 2,
        "device": "cpu",
    }
    detector = fit(tmp_path / "good", on_history=entries.append, **options)
    facts, calibration = detector.provenance["training"], detector.provenance["calibration"]
    assert detector.calibrated
    assert not detector.training
    assert facts["images"] + facts["images_held_out"] in (11, 12)
    assert {Path(path).name for path, _ in facts["unreadable"]} == {"004.png", "000.png"}
    assert calibration["images_for_quantiles"] in (1, 2)  # 2 held out
    assert facts["pretraining_penalty"] == "2 photos"
    assert facts["resumed_at_step"] is None
    assert [e["step"] for e in entries] == [2, 4]
    history = json.loads((tmp_path / "state.history.json").read_text())
    assert history == entries
    assert facts["last_losses"] == entries[-1]
    json.dumps(detector.provenance)
    again = fit(tmp_path / "good", resume=True, **options)
    assert again.provenance["training"]["resumed_at_step"] == 4
    assert torch.equal(again.quantiles, detector.quantiles)


@pytest.mark.parametrize(("size", "same"), [("S", 3), ("M", 4)])
def test_warm_start_copies_the_inner_layers_that_fit(size, same):
    """PDN-M's fifth layer is wider in the student than in the teacher, the last one too."""
    detector = thin_detector("S") if size == "S" else EfficientAD("M")
    before = {name: value.clone() for name, value in detector.student.state_dict().items()}
    training.start_from_teacher(detector)
    teacher, student = detector.teacher.state_dict(), detector.student.state_dict()
    for name, value in student.items():
        copied = int(name.split(".")[0].removeprefix("conv")) <= same
        assert torch.equal(value, teacher[name] if copied else before[name]), name


def test_warm_start_is_said_and_a_cold_state_is_not_continued(folder, tmp_path, thin):
    options = {"steps": 2, "penalty": folder / "photos", "checkpoint": tmp_path / "state"}
    with_start = fit(folder / "good", warm_start=True, **options)
    assert with_start.provenance["training"]["warm_start"] is True
    with pytest.raises(TrainingError, match="warm_start"):
        fit(folder / "good", resume=True, **options)


def test_evaluation_while_training(tmp_path, thin):
    write_pictures(tmp_path / "part/train/good", 5)
    write_pictures(tmp_path / "part/test/good", 2, seed=2)
    write_pictures(tmp_path / "part/test/bad", 2, seed=3)
    entries = []
    quiet_fit(tmp_path / "part", steps=2, evaluate_every=1, on_history=entries.append, device="cpu")
    assert [e["step"] for e in entries] == [1, 2]
    for entry in entries:
        assert 0 <= entry["metrics"]["image AU-ROC"] <= 1
        assert len(entry["quantiles"]) == 4


def test_absent_penalty_is_said(folder, thin):
    with pytest.warns(PenaltyWarning, match="no penalty set"):
        detector = fit(folder / "good", steps=1, device="cpu")
    assert detector.provenance["training"]["pretraining_penalty"].startswith("none")
    assert detector.provenance["training"]["last_losses"]["penalty"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"hard_quantile": 1.0}, r"hard_quantile is 1\.0; it must be in"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"image_size": (256, 255)}, "image size is 256x255; height and width must be at least"),
        ({"resume": "yes"}, "resume is 'yes'"),
        ({"resume": True}, "name the checkpoint"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"evaluate_every": 5}, "has no test images"),
        ({"size": "M"}, "the teacher is a PDN-S"),
        ({"size": "M", "teacher": None}, r"only a PDN-S teacher comes with .* \(--teacher\)"),
        ({"teacher": 3}, "teacher is 3; it must be the path of a teacher's file"),
        ({"false_positive_rate": 1}, r"false_positive_rate is 1; it must be in \[0, 1\)"),
        ({"false_positive_rate": "0.1"}, r"false_positive_rate is '0\.1'; it must be in"),
        ({"seed": "a"}, "seed is 'a'; it must be an integer"),
        ({"steps": True}, "steps is True; it must be an integer >= 1"),
        ({"workers": 1.5}, r"workers is 1\.5; it must be an integer >= 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be an integer >= 1"),
        ({"evaluate_every": 2.5}, r"evaluate_every is 2\.5; it must be an integer >= 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a finite number > 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be a finite number > 0"),
        ({"weight_decay": "0"}, "weight_decay is '0'; it must be a finite number >= 0"),
        ({"padding": "no"}, "padding is 'no'; it must be True or False"),
        ({"warm_start": "no"}, "warm_start is 'no'; it must be True or False"),
        ({"deterministic": 1}, "deterministic is 1; it must be True or False"),
        ({"penalty": 3}, "penalty is 3; it must be the path of a folder of photos"),
        ({"out": 3}, "out is 3; it must be the path of a file"),
        ({"resume": 1}, "resume is 1; it must be True"),
    ],
)
def test_bad_arguments(folder, options, message):
    defaults = {"device": "cpu", "steps": 1, "teacher": PDN("S")}
    with pytest.raises(ValueError, match=message):
        quiet_fit(folder / "good", **{**defaults, **options})


def test_what_cannot_be_written_is_found_before_the_work(folder, tmp_path, monkeypatch):
    def work(*arguments):
        raise AssertionError("the training began")

    monkeypatch.setattr(training, "new_detector", work)
    (tmp_path / "file").write_text("mine")
    places = [
        ({"out": tmp_path}, ValueError, "out is .*, a folder; it must name a file"),
        ({"checkpoint": tmp_path}, ValueError, "checkpoint is .*, a folder"),
        ({"checkpoint": tmp_path / "file" / "below" / "state"}, FileNotFoundError, "not a folder"),
        ({"out": tmp_path / "x.training"}, ValueError, "out and checkpoint are both"),
        ({"out": tmp_path / ("x" * 300)}, OSError, "File name too long"),
    ]
    if Path("/proc/self").exists():
        places.append(({"out": "/proc/x.safetensors"}, OSError, "out is .*cannot be written"))
        places.append(({"checkpoint": "/proc/x"}, OSError, "checkpoint is .*cannot be written"))
    for options, error, message in places:
        with pytest.raises(error, match=message):
            fit(folder / "good", device="cpu", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(AssertionError, match="began"):
        fit(folder / "good", device="cpu", checkpoint=tmp_path / "new" / "state")


def test_held_out_images_that_cannot_be_read_are_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "new_detector", lambda *_: pytest.fail("the training began"))
    write_pictures(tmp_path, 12)
    held_out = open_dataset(tmp_path).validation
    assert len(held_out) == 2
    for sample in held_out:
        sample.path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 2 held-out images can be read") as caught:
        fit(tmp_path, device="cpu")
    assert all(str(sample.path) in str(caught.value) for sample in held_out)


def test_bad_data(folder, tmp_path, thin):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in folder"):
        quiet_fit(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        quiet_fit(tmp_path / "nowhere")
    write_pictures(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="has one good image; training needs at least two"):
        quiet_fit(tmp_path / "one")
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "empty" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 1 held-out images can be read"):
        quiet_fit(tmp_path / "empty", device="cpu")
    held_out = open_dataset(tmp_path / "empty").validation[0].path
    held_out.write_bytes((folder / "good" / "000.png").read_bytes())
    with pytest.raises(ValueError, match="none of the 2 training images can be read"):
        quiet_fit(tmp_path / "empty", device="cpu")
    held_out.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 3 photos"):
        quiet_fit(folder / "good", penalty=tmp_path / "empty", steps=1, device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        quiet_fit(folder / "good", penalty=tmp_path / "nowhere", device="cpu")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        quiet_fit(folder / "good", out=tmp_path / "nowhere" / "a.safetensors", device="cpu")
    with pytest.raises(FileNotFoundError):
        quiet_fit(folder / "good", checkpoint=tmp_path / "none", resume=True, device="cpu")


def test_a_detector_that_cannot_be_written_leaves_the_state(folder, tmp_path, monkeypatch, thin):
    def full(detector, path):
        raise OSError(f"{path} cannot be written: disk full")

    monkeypatch.setattr(training, "save", full)
    state = tmp_path / "state"
    with pytest.raises(OSError, match=r"disk full\. The training's state is in .*state"):
        quiet_fit(
            folder / "good", steps=2, device="cpu", out=tmp_path / "a.safetensors", checkpoint=state
        )
    assert state.is_file()


def test_a_checkpoint_is_not_replaced_unasked(folder, tmp_path, thin):
    options = {"steps": 2, "device": "cpu", "checkpoint": tmp_path / "state"}
    quiet_fit(folder / "good", **options)
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(FileExistsError, match=r"resume \(--resume\) .* force \(--force\)"):
        quiet_fit(folder / "good", **{**options, "steps": 1})
    assert (tmp_path / "state").read_bytes() == before
    continued = quiet_fit(folder / "good", resume="auto", **options)
    assert continued.provenance["training"]["resumed_at_step"] == 2
    anew = quiet_fit(folder / "good", force=True, **{**options, "steps": 1})
    assert anew.provenance["training"]["resumed_at_step"] is None
    assert (tmp_path / "state").read_bytes() != before


def test_held_out_copies_of_training_images_are_named(tmp_path, thin):
    """Every picture is there twice, so those held out are trained on unless both are held out."""
    good = write_pictures(tmp_path / "good", 8)
    for path in sorted(good.iterdir()):
        (good / f"copy_{path.name}").write_bytes(path.read_bytes())
    with pytest.warns(GoodImageWarning, match="^2 of 2 good images are among those .* trained on"):
        detector = quiet_fit(good, steps=20, device="cpu")
    assert detector.provenance["calibration"]["trained_on"] == 2
    known = detector.provenance["training"]["known_pictures"]
    assert (known["pictures"], len(known["digests"])) == (8, 8)


def train(*words) -> int:
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="command"))
    common = ["--steps", "4", "--log-every", "1", "--device", "cpu"]
    return run_train(parser.parse_args(["train", *map(str, words), *common]))


@pytest.mark.usefixtures("foreground")
def test_the_command_stops_and_resumes_and_says_so(folder, tmp_path, thin, monkeypatch, capsys):
    monkeypatch.setattr(training, "save", lambda detector, path: None)
    out, state = tmp_path / "a.safetensors", tmp_path / "a.training"
    words = (folder / "good", "--out", out)
    with monkeypatch.context() as patch:
        interrupted_in(patch, 1)
        assert train(*words, "--resume") == 130
    printed = capsys.readouterr()
    assert f"no state in {state}: the training starts anew" in printed.out
    assert printed.out.count("non-commercial research use only") == 1
    assert f"stopped at step 2; the state is in {state}, continue with --resume" in printed.err
    with pytest.raises(FileExistsError, match=r"--resume.*--force"):
        train(*words)
    assert train(*words, "--resume") == 0
    printed = capsys.readouterr().out
    assert "resumed at step 2\nstep 3/4" in printed
    assert "images cannot show a rate of 0.01; the threshold is the highest" in printed
    assert "held-out q_b - q_a: student-teacher " in printed
    assert "with 95% confidence at most" in printed
    assert "fit worst; is a bad part among them?\n  " in printed
    assert (tmp_path / "a.scores.png").is_file()
    (tmp_path / "a.scores.png").unlink()
    assert "anew" not in printed
    assert train(*words, "--force", "--no-picture") == 0
    printed = capsys.readouterr().out
    assert "resumed" not in printed
    assert "fit worst" not in printed
    assert not (tmp_path / "a.scores.png").exists()


def test_the_live_line_says_loss_and_spread_on_a_terminal_alone(capsys):
    seen = []

    class Screen:
        terminal = True

        def __call__(self, what, done, total, said=""):
            seen.append((what, done, said))

    course = _Course(10, False, Screen())
    course.progress("channel statistics", 1, 2)
    course.progress("training", 0, 10)
    entry = {"step": 2, "loss": 0.5, "quantiles": [0.1, 0.3, 0.2, 0.6]}
    course.entry(entry | {"metrics": {"image AU-ROC": 0.9}})
    course.progress("training", 3, 10)
    assert seen == [
        ("channel statistics", 1, ""),
        ("training", 0, ""),
        ("training", 3, "loss 0.5000  q_b-q_a 0.2, 0.4"),
    ]
    printed = capsys.readouterr().out
    assert "q_b - q_a student-teacher 0.2, autoencoder 0.4\n" in printed
    assert printed.startswith("step 2/10  loss 0.5000  ")
    assert "left\n" in printed
    Screen.terminal = False
    course.progress("training", 4, 10)
    assert len(seen) == 3


def test_the_licence_of_the_teacher_is_in_the_provenance(folder, tmp_path, thin):
    license = quiet_fit(folder / "good", steps=1, device="cpu").provenance["teacher_license"]
    assert license == teachers.default_teacher_facts()["license"]
    assert "non-commercial research use only" in license
    assert teachers.teacher_license(teachers.default_teacher()) == license
    own = PDN("S")
    assert teachers.teacher_license(own) is None
    teachers.save_teacher(tmp_path / "own.safetensors", own.state_dict(), size="S", license="mine")
    torch.save(own.state_dict(), tmp_path / "own.pth")
    assert teachers.teacher_license(tmp_path / "own.safetensors") == "mine"
    assert teachers.teacher_license(tmp_path / "own.pth") is None
    options = {"steps": 1, "device": "cpu", "teacher": tmp_path / "own.pth"}
    assert "teacher_license" not in quiet_fit(folder / "good", **options).provenance


def test_settings_are_checked():
    with pytest.raises(ValueError, match="log_every is 0"):
        Settings(log_every=0)
    settings = Settings(seed=np.int64(3), learning_rate=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["learning_rate"] == 0.5


@pytest.mark.slow
def test_the_real_networks_from_the_command_line(folder, tmp_path, capsys):
    """PDN-S for two steps: the file that comes out is loaded, checked and used."""
    torch.manual_seed(0)
    write_pictures(tmp_path / "good", 3)
    torch.save(PDN("S").state_dict(), tmp_path / "teacher.pth")
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="command"))
    out = tmp_path / "detector.safetensors"
    words = ["train", tmp_path / "good", "--out", out, "--teacher", tmp_path / "teacher.pth"]
    words += ["--penalty", folder / "photos", "--steps", "2", "--log-every", "1"]
    options = parser.parse_args([*map(str, words), "--device", "cpu"])
    assert run_train(options) == 0
    printed = capsys.readouterr().out
    assert "2 good images to train on, 1 held out" in printed
    assert "step 2/2" in printed
    detector = load(out)
    assert detector.calibrated
    assert detector(torch.rand(1, 3, 256, 256)).score.isfinite().all()
    with pytest.raises(ValueError, match="exists"):
        run_train(options)


@pytest.mark.slow
def test_a_full_size_step_equals_the_plain_one_in_float32():
    """What the training computes on a CPU, against the plain step, for PDN-S itself."""
    from efficientad import EfficientAD

    torch.manual_seed(0)
    detector = EfficientAD("S")
    detector.set_statistics(torch.zeros(384), torch.full((384,), 0.05))
    pictures = F.interpolate(torch.rand(3, 3, 20, 20), size=256, mode="bilinear")[:, None]
    parameters = [*detector.student.parameters(), *detector.autoencoder.parameters()]
    expected = plain_losses(detector, *pictures)
    expected_gradients = torch.autograd.grad(expected.sum(), parameters)
    found = step_losses(detector, StepInputs(*pictures), 0.999)
    gradients = torch.autograd.grad(found.sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        # A ReLU at zero or an element at the quantile may fall to the other side.
        assert (a - b).norm() <= 2e-2 * b.norm()
