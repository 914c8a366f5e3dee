"""Evaluation: metrics against scikit-learn, files on disk, what is missing and what is said."""

from __future__ import annotations

import csv
import json

import helpers
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import efficientad as ead
from efficientad.data.datasets import DataSet, Sample
from efficientad.data.layouts import open_dataset

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    return helpers.detector()


def save_image(path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory):
    """Six test images of 256x300; the anomalous ones carry a loud square, masked at 512x600."""
    root = tmp_path_factory.mktemp("data") / "widget"
    images = helpers.images(8, 256, 300, seed=40)
    for i in range(2):
        save_image(root / "train" / "good" / f"{i}.png", images[i])
    for i in range(3):
        save_image(root / "test" / "good" / f"{i}.png", images[2 + i])
    for i in range(3):
        image = images[5 + i].clone()
        y, x = 60 + 40 * i, 200 - 50 * i
        image[:, y : y + 24, x : x + 30] = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
        save_image(root / "test" / "square" / f"{i}.png", image)
        mask = np.zeros((512, 600), np.uint8)
        mask[2 * y : 2 * y + 48, 2 * x : 2 * x + 60] = 255
        path = root / "ground_truth" / "square" / f"{i}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope="module")
def result(model, mvtec, tmp_path_factory):
    model.threshold = 0.3
    out = tmp_path_factory.mktemp("out")
    evaluation = ead.evaluate(model, mvtec, out=out, maps=True, overlays=True, batch_size=4)
    return evaluation, out


def test_metrics_against_scikit_learn(model, mvtec, result):
    evaluation, _ = result
    labels = [s.label for s in evaluation.samples]
    assert labels == [0, 0, 0, 1, 1, 1]
    metrics = evaluation.metrics
    assert metrics["image AU-ROC"] == pytest.approx(roc_auc_score(labels, evaluation.scores))
    assert metrics["image AP"] == pytest.approx(average_precision_score(labels, evaluation.scores))
    assert metrics["image AU-ROC, square"] == metrics["image AU-ROC"]
    dataset = open_dataset(mvtec)
    values, masks = [], []
    for sample in dataset.test:
        resized = Image.open(sample.path).resize((256, 256), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            anomaly_map, _ = model.anomaly_map(*model.distance_maps(image), (512, 600))
        values.append(anomaly_map.flatten().numpy())
        masks.append(dataset.read_mask(sample).ravel())
    expected = roc_auc_score(np.concatenate(masks), np.concatenate(values))
    assert metrics["pixel AU-ROC"] == pytest.approx(expected, abs=1e-4)
    assert 0 <= metrics["AU-PRO, FPR 0.05"] <= metrics["AU-PRO, FPR 0.3"] <= 1
    flags = [score > 0.3 for score in evaluation.scores]
    assert metrics["false alarms"] == sum(flags[:3])
    assert metrics["missed defects"] == 3 - sum(flags[3:])


def test_everything_is_on_disk(result):
    evaluation, out = result
    tiff = tifffile.imread(out / "maps" / "widget" / "test" / "square" / "1.tiff")
    assert tiff.dtype == np.float32
    assert tiff.shape == (256, 300)  # the image's own size, whatever the masks'
    assert Image.open(out / "overlays" / "square" / "1.png").size == (300, 256)
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["score"]) for r in rows] == evaluation.scores
    document = json.loads((out / "scores.json").read_text())
    assert document["metrics"]["image AU-ROC"] == evaluation.metrics["image AU-ROC"]
    assert document["score_rule"] == "max"
    assert (out / "report.html").stat().st_size > 10_000
    assert not list(out.rglob("*.part"))


def test_unreadable_images_and_masks_are_listed_not_fatal(model, mvtec, tmp_path):
    dataset = open_dataset(mvtec)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    first, *rest = dataset.test
    last = Sample(rest[-1].path, 1, "square", (broken,))
    changed = DataSet(
        mvtec,
        "mvtec",
        "widget",
        dataset.train,
        dataset.validation,
        (Sample(broken, 0), first, *rest[:-1], last),
    )
    evaluation = ead.evaluate(model, changed, out=tmp_path / "out")
    assert [path for path, _ in evaluation.failed] == [str(broken), str(last.path)]
    assert "mask" in evaluation.failed[1][1]
    assert len(evaluation.scores) == 5
    assert "broken.png" in (tmp_path / "out" / "report.html").read_text()


def test_missing_masks_are_listed_with_what_they_cost(model, mvtec, tmp_path):
    dataset = open_dataset(mvtec)
    good, first, second, third = dataset.test[0], *dataset.test[3:]
    bare = [Sample(s.path, 1, "square") for s in (second, third)]

    def some(*test):
        return DataSet(mvtec, "mvtec", "widget", (), (), test, notes=("A remark.",))

    evaluation = ead.evaluate(model, some(good, first, *bare), out=tmp_path)
    note = (
        "No figures of the pixels: 2 of 3 defective test images have no mask: square/1.png, "
        "square/2.png."
    )
    assert evaluation.notes == ["A remark.", note]
    assert "pixel AU-ROC" not in evaluation.metrics
    assert note in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "scores.json").read_text())["notes"] == evaluation.notes
    evaluation = ead.evaluate(model, some(good, bare[0]))
    assert evaluation.notes[1] == "No figures of the pixels: no defective test image has a mask."
    evaluation = ead.evaluate(model, some(good, first))
    assert evaluation.notes == ["A remark."]
    assert "pixel AU-ROC" in evaluation.metrics


def remasked(model, mvtec, tmp_path, masks, good=3):
    """The evaluation with other masks for the defective pictures: images, bytes, None: the own."""
    dataset = open_dataset(mvtec)
    test = list(dataset.test[:good])
    for number, (sample, mask) in enumerate(zip(dataset.test[3:], masks, strict=True)):
        path = tmp_path / f"{number}.png"
        if isinstance(mask, bytes):
            path.write_bytes(mask)
        elif mask is not None:
            mask.save(path)
        test.append(sample if mask is None else Sample(sample.path, 1, "square", (path,)))
    changed = DataSet(mvtec, "mvtec", "widget", (), (), tuple(test))
    return ead.evaluate(model, changed, out=tmp_path / "out")


def test_an_empty_mask_costs_the_pixels_of_its_picture_alone(model, mvtec, tmp_path):
    black = Image.new("L", (600, 512))
    evaluation = remasked(model, mvtec, tmp_path, [black, None, None])
    assert evaluation.notes == [
        "Masks that mark nothing though their picture is defective; its pixels do not count: "
        "square/0.png."
    ]
    assert (evaluation.failed, len(evaluation.scores)) == ([], 6)
    dataset = open_dataset(mvtec)
    rest = DataSet(mvtec, "mvtec", "w", (), (), (*dataset.test[:3], *dataset.test[4:]))
    alone = ead.evaluate(model, rest).metrics
    for name in ("pixel AU-ROC", "AU-PRO, FPR 0.3"):
        assert evaluation.metrics[name] == alone[name]
    note = evaluation.notes[0]
    assert note in (tmp_path / "out" / "report.html").read_text()


def test_masks_that_are_drawn_otherwise_give_the_same_figures(model, mvtec, tmp_path):
    plain = ead.evaluate(model, mvtec)
    masks = [np.asarray(Image.open(s.masks[0])) for s in open_dataset(mvtec).test[3:]]
    palette = Image.fromarray((masks[0] == 0).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    alpha = Image.fromarray(np.dstack([np.zeros((512, 600, 3), np.uint8), masks[1]]))
    soft = Image.fromarray(masks[2]).resize((1800, 1536), Image.Resampling.BILINEAR)
    evaluation = remasked(model, mvtec, tmp_path, [palette, alpha, soft.resize((600, 512))])
    assert evaluation.metrics == plain.metrics
    assert evaluation.notes == []
    inverted = [Image.fromarray(255 - mask) for mask in masks]
    evaluation = remasked(model, mvtec, tmp_path, inverted)
    (note,) = evaluation.notes
    assert note.endswith("they mark what is good: square/0.png, square/1.png, square/2.png.")


def test_a_turned_mask_fails_its_own_picture(model, mvtec, tmp_path):
    turned = Image.new("L", (512, 600), 255)
    evaluation = remasked(model, mvtec, tmp_path, [None, turned, b"damaged"])
    assert [path.rpartition("/")[2] for path, _ in evaluation.failed] == ["1.png", "2.png"]
    assert "turned by a quarter" in evaluation.failed[0][1]
    assert "2.png" in evaluation.failed[1][1]
    assert len(evaluation.scores) == 4
    assert evaluation.metrics["pixel AU-ROC"] is not None


def test_every_undefined_figure_has_its_reason(model, mvtec, tmp_path):
    black = [Image.new("L", (600, 512))] * 3
    evaluation = remasked(model, mvtec, tmp_path, black)
    reason = "no mask that was read marks a defect, or none leaves a good pixel"
    pixels = ("pixel AU-ROC", "pixel F1-max", "AU-PRO, FPR 0.3", "AU-PRO, FPR 0.05", "AUPIMO")
    assert evaluation.undefined == dict.fromkeys(pixels, reason)
    assert f"Undefined, because {reason}: pixel AU-ROC," in (
        tmp_path / "out" / "report.html"
    ).read_text().replace("&#x27;", "'")
    no_good = remasked(model, mvtec, tmp_path, [None] * 3, good=0)
    assert no_good.undefined["image AU-ROC"] == "no good test image was scored"
    assert no_good.undefined["image AU-ROC, square"] == "no good test image was scored"
    assert no_good.undefined["AUPIMO"] == "no good test image was scored"
    assert no_good.metrics["pixel AU-ROC"] is not None
    good = DataSet(mvtec, "mvtec", "widget", (), (), open_dataset(mvtec).test[:3])
    assert ead.evaluate(model, good).undefined["image AP"] == "no defective test image was scored"
    for result in (evaluation, no_good):
        assert set(result.undefined) == {k for k, v in result.metrics.items() if v is None}


def test_images_that_differ_in_the_suffix_keep_their_own_pictures(model, mvtec, tmp_path):
    sample = open_dataset(mvtec).test[3]
    image = Image.open(sample.path)
    paths = [tmp_path / f"square/0.{suffix}" for suffix in ("bmp", "png")]
    paths[0].parent.mkdir()
    image.save(paths[0])
    image.transpose(Image.Transpose.ROTATE_180).save(paths[1])
    test = tuple(Sample(path, 1, "square") for path in paths)
    data = DataSet(tmp_path, "mvtec", "widget", (), (), test)
    ead.evaluate(model, data, out=tmp_path / "out", maps=True, overlays=True)
    folder = tmp_path / "out" / "maps" / "widget" / "test" / "square"
    first, second = (tifffile.imread(folder / f"0.{s}.tiff") for s in ("bmp", "png"))
    assert np.abs(first - second).max() > 1e-3
    pictures = sorted(p.name for p in (tmp_path / "out" / "overlays" / "square").iterdir())
    assert pictures == ["0.bmp.png", "0.png.png"]


def test_a_data_set_without_test_images_is_refused(model, mvtec):
    dataset = open_dataset(mvtec / "train" / "good", "folder")
    with pytest.raises(ValueError, match=r"no test images; `predict`"):
        ead.evaluate(model, dataset)
