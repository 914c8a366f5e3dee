"""Schedules, and the short one: its steps, its exact resume, what `fit` makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_training import thin_detector, write_pictures

from efficientad.training import closed_form, fitting, short
from efficientad.training import settings as training_settings
from efficientad.training.fitting import fit
from efficientad.training.losses import hard_loss, standardized
from efficientad.training.pictures import PictureSource, TrainingImages, to_rgb
from efficientad.training.schedules import ASKED, SETTINGS, choose_schedule
from efficientad.training.settings import Settings, TrainingError, TrainingStopped
from efficientad.training.short import ShortTrainer, brightened
from efficientad.training.start import start_from_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("short") / "good", 5)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(closed_form, "CELLS", 5000)


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setattr(
        fitting,
        "new_detector",
        lambda size, padding, image_size, seed, teacher: thin_detector(
            size, seed, padding=padding, image_size=image_size
        ),
    )


def trainer(folder: Path, steps: int = 6, **options) -> ShortTrainer:
    settings = Settings(**SETTINGS["short"] | {"steps": steps, **options}, log_every=2)
    detector = thin_detector()
    start_from_teacher(detector)
    images = TrainingImages(sorted(folder.iterdir()), (256, 256))
    batch = max(settings.batch_size, short.AUTOENCODER_IMAGES)
    source = PictureSource(images, None, seed=settings.seed, batch_size=batch, augment=brightened)
    return ShortTrainer(detector, source, settings)


def same_bits(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# ---- which schedule --------------------------------------------------------------------------


def asked(**given):
    return {
        **dict.fromkeys(ASKED),
        "warm_start": False,
        "resume": False,
        "evaluate_every": 0,
    } | given


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, "short"),
        ({"learning_rate": 1e-3, "batch_size": 4, "resume": "auto", "evaluate_every": 9}, "short"),
        ({"steps": 100}, "paper"),
        ({"penalty": "photos"}, "paper"),
        ({"warm_start": True}, "paper"),
    ],
)
def test_without_a_name_a_cpu_takes_the_short_one(given, chosen):
    assert choose_schedule(None, "cpu", asked(**given)) == (chosen, CPU)


def test_a_named_schedule_computes_where_it_can(monkeypatch):
    monkeypatch.setattr(
        "efficientad.training.schedules.choose_device",
        lambda name: torch.device("cuda:0" if name in ("auto", "cuda") else name),
    )
    assert choose_schedule(None, "auto", asked())[0] == "paper"
    assert choose_schedule("paper", "auto", asked())[1].type == "cuda"
    for name in ("short", "instant"):
        assert choose_schedule(name, "auto", asked()) == (name, CPU)
        with pytest.raises(ValueError, match=f"device is 'cuda:0'; schedule '{name}' computes"):
            choose_schedule(name, "cuda", asked())


def test_what_a_schedule_cannot_use_is_refused():
    assert choose_schedule("short", "cpu", asked(steps=5, resume=True)) == ("short", CPU)
    for given, words in (
        ({"penalty": "photos"}, "penalty is 'photos'; schedule 'short' starts from the teacher"),
        ({"warm_start": True}, "warm_start is True; schedule 'short'"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_schedule("short", "cpu", asked(**given))
    with pytest.raises(
        ValueError, match="schedule is 'fast'; it must be one of paper, short, inst"
    ):
        choose_schedule("fast", "cpu", asked())


# ---- the steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 9])
def test_the_losses_are_those_of_changed_images(folder, batch):
    made = trainer(folder, batch_size=batch)
    made.prepare()
    pictures = made.source(0)
    detector, image = made.detector, to_rgb(pictures.augmented, CPU)
    with torch.no_grad():
        x = detector.normalize(image)
        target = standardized(detector, detector.teacher(x[:batch]))
        hard = hard_loss((target - detector.student(x[:batch])[:, :384]).square(), 0.999)
        # The autoencoder's target is of the image as it is.
        unchanged = detector.normalize(to_rgb(pictures.image[:8], CPU))
        target = standardized(detector, detector.teacher(unchanged))
        mean = (target - detector.autoencoder(x[:8])).square().mean()
        found = made.losses(made.inputs(pictures))
    torch.testing.assert_close(found, torch.stack([hard, mean]), rtol=1e-4, atol=1e-6)


def test_pictures_are_images_of_another_brightness(folder):
    source = trainer(folder).source
    factors = []
    for step in range(6):
        pictures = source(step)
        assert pictures.photo is None
        for image, changed in zip(pictures.image, pictures.augmented, strict=True):
            image = image.float() / 255
            factor = float(changed.sum() / image.sum())
            torch.testing.assert_close(changed, (factor * image).clamp(0, 1), rtol=0.03, atol=0.03)
            factors.append(factor)
    assert max(factors) <= closed_form.GAINS[1] + 1e-3
    assert min(factors) >= closed_form.GAINS[0] - 0.02  # a clipped picture is darker
    assert max(factors) - min(factors) > 0.05


def test_the_rates_are_one_cycle(folder):
    made = trainer(folder, steps=100)
    rates, others = zip(*(made.rates(step) for step in range(100)), strict=True)
    assert max(rates) == rates[9] == pytest.approx(3e-4)
    assert rates[:10] == tuple(sorted(rates[:10]))
    assert rates[9:] == tuple(sorted(rates[9:], reverse=True))
    assert rates[0] < 1e-4
    assert rates[-1] < 1e-8
    assert others == pytest.approx([rate / 0.3 for rate in rates])


def test_steps_change_first_half_and_autoencoder_and_the_end_solves_the_second(folder, monkeypatch):
    made = trainer(folder, steps=20, learning_rate=1e-2)
    made.prepare()
    detector = made.detector
    start = {name: value.clone() for name, value in detector.state_dict().items()}
    made.run()
    assert made.history[-1]["loss"] < made.history[0]["loss"]
    assert made.history[-1]["autoencoder"] < made.history[0]["autoencoder"]
    assert set(made.history[0]) == {"step", "loss", "hard", "autoencoder", "learning_rate"}
    trained = {name: value.clone() for name, value in detector.state_dict().items()}
    last = "student.conv4.weight"
    assert not torch.equal(trained[last][:384], start[last][:384])
    assert torch.equal(trained[last][384:], start[last][384:])
    for name in ("student.conv1.weight", "autoencoder.encoder.enconv1.weight"):
        assert not torch.equal(trained[name], start[name])
    with monkeypatch.context() as patch:
        patch.setattr(detector.teacher, "forward", None)  # nothing of it is asked again
        patch.setattr(closed_form, "teacher_features", None)
        made.finish()
    ended = detector.state_dict()
    for name, value in trained.items():
        if name in (last, "student.conv4.bias"):
            assert torch.equal(ended[name][:384], value[:384])
            assert not torch.equal(ended[name][384:], value[384:])
        elif name != "quantiles":
            assert torch.equal(ended[name], value), name


@pytest.mark.parametrize(
    ("factor", "weight"), [(1.0, 1.0), (0.5, 0.5625), (0.0, short.LEAST_WEIGHT), (-1.0, 0.05)]
)
def test_the_autoencoders_weight_is_the_square_of_what_it_explains(
    folder, tmp_path, factor, weight
):
    made = trainer(folder)
    made.prepare()
    detector = made.detector
    detector.eval()
    detector.autoencoder.forward = lambda x: factor * standardized(detector, detector.teacher(x))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    held_out = [*sorted(folder.iterdir())[:2], broken]
    assert short.autoencoder_weight(detector, held_out) == pytest.approx(weight, abs=1e-5)
    assert short.autoencoder_weight(detector, [broken]) == short.LEAST_WEIGHT


def test_outside_of_the_region_the_autoencoder_may_explain_nothing(folder):
    made = trainer(folder)
    made.prepare()
    detector = made.detector
    detector.eval()
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[:, :128] = True
    detector.set_region(region)
    outside = ~detector.region_cells

    def left(x):
        return standardized(detector, detector.teacher(x)).masked_fill(outside, 100.0)

    detector.autoencoder.forward = left
    paths = sorted(folder.iterdir())[:1]
    assert short.autoencoder_weight(detector, paths) == pytest.approx(1, abs=1e-5)
    detector.set_region(None)
    assert short.autoencoder_weight(detector, paths) == short.LEAST_WEIGHT


def test_a_state_of_another_autoencoder_is_refused(folder, tmp_path, monkeypatch):
    made = trainer(folder)
    made.prepare()
    made.save(tmp_path / "state")
    monkeypatch.setattr(ShortTrainer, "recipe", {"autoencoder": {"images": 4}})
    with pytest.raises(TrainingError, match="of a training with autoencoder "):
        trainer(folder).resume(tmp_path / "state")


@pytest.mark.usefixtures("thin")
def test_a_resumed_training_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "save", lambda *_: None)
    options = {"schedule": "short", "steps": 6, "log_every": 2, "checkpoint_every": 2}
    whole = fit(folder, checkpoint=tmp_path / "whole", **options)

    def stop(what, done, total):
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(TrainingStopped, match="stopped at step 3; the state is in"):
        fit(folder, checkpoint=tmp_path / "state", progress=stop, **options)
    resumed = fit(folder, checkpoint=tmp_path / "state", resume=True, **options)
    assert same_bits(whole, resumed)
    assert resumed.provenance["training"]["resumed_at_step"] == 3
    again = fit(folder, checkpoint=tmp_path / "state", resume=True, **options)
    assert same_bits(whole, again)  # all its steps were done
    with pytest.raises(TrainingError, match="schedule"):
        fit(folder, checkpoint=tmp_path / "state", resume=True, **options | {"schedule": "paper"})


@pytest.mark.usefixtures("thin")
def test_a_resumed_training_takes_the_threads_of_its_state(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "save", lambda *_: None)
    options = {"schedule": "short", "steps": 2, "checkpoint": tmp_path / "state"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first = fit(folder, threads=1, **options)
        resumed = fit(folder, resume=True, **options)
        told = fit(folder, resume=True, threads=2, **options)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    used = [made.provenance["training"]["threads"] for made in (first, resumed, told)]
    assert used == [1, 1, 2]
    assert same_bits(first, resumed)


@pytest.mark.usefixtures("thin")
def test_the_number_of_threads_is_measured_unless_it_is_given(folder, monkeypatch):
    monkeypatch.setattr(fitting, "save", lambda *_: None)
    monkeypatch.setattr(training_settings, "fastest_threads", lambda work: work() or 1)
    assert fit(folder, schedule="short", steps=1).provenance["training"]["threads"] == 1
    with pytest.raises(ValueError, match="threads is 0; it must be an integer >= 1"):
        fit(folder, threads=0)


@pytest.mark.usefixtures("thin")
def test_fit_on_a_cpu_is_short_by_default(folder, monkeypatch, recwarn):
    monkeypatch.setitem(SETTINGS["short"], "steps", 2)
    found = fit(folder, device="cpu")
    assert not recwarn.list
    facts = found.provenance["training"]
    assert facts["schedule"] == "short"
    assert (facts["steps"], facts["batch_size"], facts["learning_rate"]) == (2, 2, 3e-4)
    assert facts["ridge"]["second half"] == closed_form.SECOND_RIDGE
    assert found.calibrated
    assert short.LEAST_WEIGHT <= found.autoencoder_weight < 1
