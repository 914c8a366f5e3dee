"""The accuracy runs: figures equal the evaluation's, normalisations, the table, the yardstick."""

from __future__ import annotations

import dataclasses
import json
import types
from functools import partial

import helpers_training
import numpy as np
import pytest
import torch
from PIL import Image

from bench import record
from bench.report import training_curves
from bench.training import accuracy, brightness, global_term, nearest_neighbour, scores
from efficientad.data.images import load_batches
from efficientad.data.layouts import open_dataset
from efficientad.evaluation import evaluation
from efficientad.evaluation.metrics import image_metrics
from efficientad.model.global_term import student_means
from efficientad.results.plain_path import RawMaps, distance_maps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten good parts, three good and three bad to test, masks at twice the size."""
    root = tmp_path_factory.mktemp("data") / "part"
    helpers_training.write_pictures(root / "train" / "good", 10)
    helpers_training.write_pictures(root / "test" / "good", 3, seed=0)
    helpers_training.write_pictures(root / "test" / "dot", 3, seed=0)
    (root / "ground_truth" / "dot").mkdir(parents=True)
    for path in sorted((root / "test" / "dot").iterdir()):
        pixels = np.array(Image.open(path))
        pixels[15:28, 12:30] = (255, 0, 255)
        Image.fromarray(pixels).save(path)
        mask = np.zeros((80, 100), np.uint8)
        mask[30:56, 24:60] = 255
        Image.fromarray(mask).save(root / "ground_truth" / "dot" / f"{path.stem}_mask.png")
    return open_dataset(root)


def test_a_run_continues_and_agrees_with_the_evaluation(dataset, tmp_path, monkeypatch):
    """Twice the same command: the second finds the state, and the table has no row twice."""

    def thin(size, padding, image_size, seed, teacher):
        return helpers_training.thin_detector(size, seed)

    monkeypatch.setattr("efficientad.training.fitting.new_detector", thin)
    monkeypatch.setattr("efficientad.training.fitting.save", lambda detector, path: None)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    table = tmp_path / "table.json"
    words = [str(dataset.root), "--name", "dots", "--out", str(tmp_path / "run"), "--steps", "4"]
    words += ["--json", str(table), "--log-every", "2", "--evaluate-every", "4"]
    words += ["--curve-part", "3", "--hard-quantile", "0"]
    measured, measure = [], accuracy.measure
    monkeypatch.setattr(accuracy, "measure", lambda d, data: measured.append(d) or measure(d, data))
    rows = accuracy.run(accuracy.parser().parse_args(words))
    again = accuracy.run(accuracy.parser().parse_args(words))
    others = [f"dots, maps: {name}" for name in accuracy.NORMALIZATIONS[1:]]
    others.append("dots, score: mean of the 10 largest cells")
    assert [row["name"] for row in rows] == ["dots", *others]
    assert [row["score"] for row in rows] == ["max"] * len(accuracy.NORMALIZATIONS) + [10]
    assert json.loads(table.read_text()) == again
    assert [r["image_auroc"] for r in again] == [r["image_auroc"] for r in rows]

    metrics = evaluation.evaluate(measured[0], dataset).metrics
    assert rows[0]["image_auroc"] == metrics["image AU-ROC"]
    assert rows[0]["pixel_auroc"] == pytest.approx(metrics["pixel AU-ROC"], abs=1e-12)
    assert rows[0]["aupro"] == pytest.approx(metrics["AU-PRO, FPR 0.3"], abs=1e-12)
    assert rows[0]["steps"] == 4
    assert rows[0]["hard_quantile"] == 0
    assert rows[0]["test_images"] == 6
    curve = record.read(tmp_path / "results" / "training_dots.json")
    assert [row["step"] for row in curve["rows"]] == [2, 4]
    assert curve["rows"][1]["metrics"]["images"] == 2  # every third of the test images
    assert 0 < curve["rows"][0]["cpu_seconds"] <= curve["rows"][1]["cpu_seconds"]
    assert 0 < curve["rows"][0]["seconds"] <= curve["rows"][1]["seconds"]


def test_pictures_of_trainings(tmp_path):
    """Every results file of a training, and the teacher's; three panels where it was measured."""
    pytest.importorskip(
        "matplotlib", reason="pictures need matplotlib: pip install efficientad[report]"
    )
    terms = {"hard": 3.0, "penalty": 0.0, "autoencoder": 1.0, "student_autoencoder": 0.1}
    metrics = {"images": 4, "image AU-ROC": 0.7, "pixel AU-ROC": 0.9}
    rows = [{"step": i, "hard": 3.0} for i in (10, 20)]
    about = {"data": "dots", "training": {"hard_quantile": 0.999}}
    record.write(tmp_path / "training_plain.json", about, rows)
    rows = [{**row, **terms, "metrics": metrics, "quantiles": [0.3, 0.6, 0.1, 0.2]} for row in rows]
    about["training"]["hard_quantile"] = 0.0
    record.write(tmp_path / "training_measured.json", about, rows)
    teacher = [{"step": i, "train": 1.0, "held_out": 0.9, "held_out_inner": 0.8} for i in (1, 2)]
    found = {"what": "distillation of efficientad/teacher.safetensors", "curve": teacher}
    (tmp_path / "teacher_small_distillation.json").write_text(json.dumps(found))
    training_curves.main(["--results", str(tmp_path), "--out", str(tmp_path / "pictures")])
    widths = {p.stem: Image.open(p).width for p in (tmp_path / "pictures").iterdir()}
    assert set(widths) == {"training_plain", "training_measured", "teacher_small_distillation"}
    assert widths["training_measured"] > 2.5 * widths["training_plain"]


def test_normalizations(dataset):
    detector = helpers_training.thin_detector()
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_quantiles(0.2, 0.5, 0.1, 0.4)
    raws = [RawMaps(i, (8, 8), torch.full((1, 4, 4), float(i)), torch.eye(4)[None]) for i in (1, 3)]
    assert accuracy.normalization("quantiles", detector, raws) == pytest.approx(
        [0.2, 0.5, 0.1, 0.4]
    )
    assert accuracy.normalization("none", detector, raws) == [0, 1, 0, 1]
    # One map alone: its own scores, whatever the other says.
    loud = [RawMaps(i, (8, 8), torch.eye(4)[None] * i, 9 * torch.ones(1, 4, 4)) for i in (1, 3)]
    one = detector
    one.set_quantiles(*accuracy.normalization("student-teacher alone", detector, loud))
    map_st = 0.1 * (3 - 0.2) / 0.3
    assert one.anomaly_map(loud[1].map_st, loud[1].map_ae, (4, 4))[0].max().item() == pytest.approx(
        0.5 * map_st, abs=1e-5
    )
    one.set_quantiles(0.2, 0.5, 0.1, 0.4)
    cells_st, cells_ae = np.repeat([1.0, 3.0], 16), np.tile(np.eye(4).ravel(), 2)
    wanted = []
    for cells in (cells_st, cells_ae):
        wanted += [cells.mean(), cells.mean() + cells.std(ddof=1)]
    assert accuracy.normalization("gaussian", detector, raws) == pytest.approx(wanted)


def test_measuring_leaves_the_detector_as_it_was(dataset):
    detector = helpers_training.thin_detector()
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_quantiles(0.2, 0.5, 0.1, 0.4)
    before = detector.quantiles.clone()
    found = accuracy.measure(detector, dataset)
    assert torch.equal(detector.quantiles, before)
    detector.set_quantiles(0, 1, 0, 1)
    metrics = evaluation.evaluate(detector, dataset).metrics
    assert found["none"]["image_auroc"] == metrics["image AU-ROC"]
    assert (detector.score, detector.threshold) == ("max", None)
    assert found["none"]["pixel_auroc"] == pytest.approx(metrics["pixel AU-ROC"], abs=1e-12)
    assert found["none"] != found["quantiles"]
    detector.set_quantiles(0, 1e6, 0.1, 0.4)
    metrics = evaluation.evaluate(detector, dataset).metrics
    assert found["autoencoder alone"]["image_auroc"] == metrics["image AU-ROC"]
    assert found["autoencoder alone"] != found["none"]


@pytest.fixture
def trained(monkeypatch):
    """A detector that these programs load, and a predictor that computes plainly."""
    detector = helpers_training.thin_detector()
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_quantiles(0.2, 0.5, 0.1, 0.4)
    detector.provenance = {"training": {"teacher": "one", "schedule": "instant"}}

    def predictor(found, **_):
        maps = partial(distance_maps, found)
        return types.SimpleNamespace(distance_maps=maps, device="cpu", facts={"backend": "plain"})

    for module in (scores, brightness, global_term):
        monkeypatch.setattr(module, "load", lambda path: detector)
        monkeypatch.setattr(module, "FastPredictor", predictor)
    return detector


def test_brightness_is_measured_and_taken_out(dataset, tmp_path, trained, monkeypatch):
    """A map that is the brightness finds what is bright, and nothing once the mean is the same."""

    def level(detector, sources):
        for index, image in enumerate(sources):
            value = torch.full((1, 4, 4), float(image.mean()) / 255)
            yield RawMaps(index, image.shape[:2], value, torch.ones(1, 4, 4))

    monkeypatch.setitem(globals(), "distance_maps", level)
    read = brightness.read_image
    good = {sample.path for sample in dataset.test if not sample.label}
    monkeypatch.setattr(
        brightness,
        "read_image",
        lambda path: brightness.scaled(read(path), 0.5 if path in good else 1.0),
    )
    table = tmp_path / "table.json"
    words = ["part.safetensors", str(dataset.root), "--name", "dots", "--json", str(table)]
    rows = brightness.run(brightness.parser().parse_args(words))
    assert json.loads(table.read_text()) == rows
    assert [row["normalization"] for row in rows] == list(brightness.MAPS)
    student = rows[1]
    assert student["brightness_auroc"] == student["image_auroc"] == 1.0
    assert student["image_auroc_same_mean"] < 0.95
    assert student["maximum_by_brightness"]["0.9"] == pytest.approx(0.9, abs=0.01)
    assert student["maximum_by_brightness"]["1.1"] == pytest.approx(1.1, abs=0.01)
    assert rows[0]["maximum_by_brightness"] == {}
    assert trained.quantiles.tolist() == pytest.approx([0.2, 0.5, 0.1, 0.4])


def test_scores_of_a_trained_detector(dataset, tmp_path, trained):
    """A row for each, of the same maps; the row of a score is that of a detector that keeps it."""
    table = tmp_path / "table.json"
    words = ["part.safetensors", str(dataset.root), "--name", "dots", "--json", str(table)]
    rows = scores.run(scores.parser().parse_args([*words, "--scores", "max", "10", "2000"]))
    assert json.loads(table.read_text()) == rows
    assert [row["score"] for row in rows] == ["max", 10, 2000]
    assert rows[1]["name"] == "dots, score: mean of the 10 largest cells"
    for row in rows:
        trained.score = row["score"]
        metrics = evaluation.evaluate(trained, dataset).metrics
        assert row["image_auroc"] == metrics["image AU-ROC"]
    assert rows[0]["image_auroc"] != rows[2]["image_auroc"]


@torch.no_grad()
def test_a_detector_is_measured_with_and_without_a_global_term(
    dataset, tmp_path, trained, monkeypatch
):
    monkeypatch.setattr("efficientad.model.global_term.FEWEST_IMAGES", 5)
    held_out = dataclasses.replace(dataset, validation=dataset.train[:4])
    monkeypatch.setattr(global_term, "open_dataset", lambda *_: held_out)
    made, with_term = [], global_term.with_term
    monkeypatch.setattr(
        global_term, "with_term", lambda *words: made.append(with_term(*words)) or made[0]
    )
    table = tmp_path / "table.json"
    words = ["part.safetensors", str(dataset.root), "--name", "dots", "--json", str(table)]
    rows = global_term.run(global_term.parser().parse_args(words))
    assert json.loads(table.read_text()) == rows
    names = ("without", "with", "alone")
    assert [row["name"] for row in rows] == [f"dots, global term: {name}" for name in names]
    metrics = evaluation.evaluate(trained, dataset).metrics
    assert rows[0]["image_auroc"] == metrics["image AU-ROC"]
    assert rows[0]["pixel_auroc"] == pytest.approx(metrics["pixel AU-ROC"], abs=1e-6)
    term, distances = made[0].global_term, []
    for batch in load_batches([sample.path for sample in dataset.test], (256, 256), batch_size=1):
        means = student_means(trained.student(trained.normalize(batch.images)))
        distances.append(term.distance(means).item())
    labels = [sample.label for sample in dataset.test]
    assert rows[2]["image_auroc"] == image_metrics(labels, distances).au_roc
    assert rows[1]["image_auroc"] > 0.5
    assert 0 <= rows[1]["good_above_threshold"] <= rows[1]["defective_above_threshold"] <= 1


def test_without_masks_there_are_no_figures_of_the_pixels(dataset):
    test = tuple(dataclasses.replace(sample, masks=()) for sample in dataset.test)
    bare = dataclasses.replace(dataset, test=test)
    detector = helpers_training.thin_detector()
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_quantiles(0.2, 0.5, 0.1, 0.4)
    found = accuracy.measure(detector, bare)["quantiles"]
    assert found["image_auroc"] == accuracy.measure(detector, dataset)["quantiles"]["image_auroc"]
    assert found["pixel_auroc"] is None
    assert found["aupro"] is None


def test_rows_are_replaced_by_kind_and_name(tmp_path):
    table = tmp_path / "table.json"
    accuracy.add_rows(table, [{"kind": "yardstick", "name": "a", "v": 1}])
    accuracy.add_rows(table, [{"kind": "efficientad", "name": "a", "v": 2}])
    accuracy.add_rows(table, [{"kind": "yardstick", "name": "a", "v": 3}])
    assert [(r["kind"], r["v"]) for r in json.loads(table.read_text())] == [
        ("efficientad", 2),
        ("yardstick", 3),
    ]


def test_nearest_distance_and_bank():
    generator = torch.Generator().manual_seed(0)
    cells, bank = (torch.randn(n, 7, generator=generator) for n in (9, 23))
    wanted = torch.cdist(cells.double(), bank.double()).amin(1)
    torch.testing.assert_close(
        nearest_neighbour.nearest_distance(cells, bank).double(), wanted, atol=1e-5, rtol=1e-5
    )
    features = torch.arange(5 * 2 * 12.0).view(5, 1, 2, 3, 4)
    drawn = nearest_neighbour.draw_bank(iter(features), 5, 14, seed=1)
    assert drawn.shape == (14, 2)
    all_cells = {tuple(c) for x in features for c in x[0].flatten(1).T.tolist()}
    assert {tuple(c) for c in drawn.tolist()} <= all_cells
    assert len({tuple(c) for c in drawn.tolist()}) == 14  # drawn without putting back


def test_patch_distances_find_what_no_good_image_has(dataset):
    """Features: the pixels themselves, so that only the dots are far from every good cell."""

    def pixels_of(paths):
        for path in paths:
            pixels = np.array(Image.open(path).convert("RGB"), dtype=np.float32) / 255
            yield torch.from_numpy(pixels).permute(2, 0, 1)[None]

    found = nearest_neighbour.patch_nearest_neighbour(pixels_of, dataset, bank=6000)
    assert found["image_auroc"] == 1
    assert found["pixel_auroc"] > 0.99
