"""The command line: exit codes, what is printed, what is written, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import helpers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import efficientad as ead
from efficientad.cli.main import main
from efficientad.data import decoding
from efficientad.evaluation.evaluation import Evaluation

pytestmark = pytest.mark.usefixtures("light_networks")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "widget.safetensors"
    model = helpers.detector()
    model.threshold = 0.5
    ead.save(model, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(helpers.images(3, 280, 300, seed=8)):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def test_predict_writes_everything(model_file, images, tmp_path, capsys):
    assert run("predict", model_file, images, "--out", tmp_path / "out") == 0
    assert "3 images" in capsys.readouterr().out
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    expected = {f"overlays/{i}.png" for i in range(3)} | {f"maps/{i}.tiff" for i in range(3)}
    assert names == expected | {
        "overlays",
        "maps",
        "scores.csv",
        "scores.json",
        "report.html",
        "progress.jsonl",
    }
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    results = list(ead.predict(ead.load(model_file), sorted(images.iterdir())))
    scores = [r.score for r in results]
    # The fast path does not round a resized image to whole levels; the reference does.
    bound = 0.02 * max(0.1, *(float(abs(r.anomaly_map).max()) for r in results))
    assert [r["score"] for r in document["images"]] == pytest.approx(scores, abs=bound)
    assert run("predict", model_file, images, "--out", tmp_path / "plain", "--reference") == 0
    document = json.loads((tmp_path / "plain" / "scores.json").read_text())
    assert [r["score"] for r in document["images"]] == pytest.approx(scores)


def test_some_failed_inputs_give_1_and_are_listed(model_file, images, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 nothing")
    code = run("predict", model_file, images / "0.png", bad, "--out", tmp_path / "out")
    assert code == 1
    assert f"failed: {bad}" in capsys.readouterr().err
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [f["path"] for f in document["failed"]] == [str(bad)]
    assert len(document["images"]) == 1


@pytest.mark.parametrize("path", ["fast", "reference", "tiles"])
def test_a_picture_that_is_too_large_fails_alone(path, model_file, images, tmp_path, monkeypatch):
    """Of pixels, of a side and of memory; the others are scored."""
    monkeypatch.setenv("EFFICIENTAD_MAX_MEGAPIXELS", "0.2")
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (width, height) in {"a.png": (600, 500), "b.png": (32_800, 1)}.items():
        Image.new("RGB", (width, height)).save(folder / name)
    for i in (0, 1):
        (folder / f"c{i}.png").write_bytes((images / f"{i}.png").read_bytes())
    read = decoding._pixels

    def short_of_memory(image, *rest):
        if image.size == (300, 280) and str(image.fp.name).endswith("c1.png"):
            raise MemoryError
        return read(image, *rest)

    monkeypatch.setattr(decoding, "_pixels", short_of_memory)
    more = {"fast": (), "reference": ("--reference",), "tiles": ("--tiles", "48")}[path]
    assert run("predict", model_file, folder, "--out", tmp_path / "out", *more) == 1
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    reasons = {f["path"].rpartition("/")[2]: f["reason"] for f in document["failed"]}
    assert reasons["a.png"].startswith("it has 600x500 pixels, 0 megapixels, and the limit is 0.2")
    assert reasons["c1.png"] == "there is no memory for its pixels"
    if path == "fast":
        assert "32800x1 pixels, and a side may have at most 32768" in reasons["b.png"]
    elif path == "tiles":
        assert "an image that is cut into tiles must be at least as high" in reasons["b.png"]
    scored = [row["path"].rpartition("/")[2] for row in document["images"]]
    assert scored == (["b.png", "c0.png"] if path == "reference" else ["c0.png"])


def test_pictures_that_are_not_read_are_counted(model_file, images, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.npy", "c.NEF"):
        (folder / name).write_bytes((images / "0.png").read_bytes())
    assert run("predict", model_file, folder, "--out", tmp_path / "out") == 0
    note = "Pictures left out because their kind is not read: 1 .nef (raw files of cameras), 1 .npy"
    assert f"note: {note}" in capsys.readouterr().err
    assert note in (tmp_path / "out" / "report.html").read_text()


def test_fail_on_anomaly_gives_3(model_file, images, tmp_path):
    common = (
        "predict",
        model_file,
        images / "0.png",
        "--out",
        tmp_path,
        "--no-maps",
        "--no-overlays",
    )
    assert run(*common, "--threshold", -1e9) == 0
    assert run(*common, "--threshold", -1e9, "--fail-on-anomaly") == 3
    assert run(*common, "--threshold", 1e9, "--fail-on-anomaly") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "MODEL", "nowhere"), "nowhere"),
        (("predict", "nowhere", "IMAGES"), "nowhere"),
        (("predict", "MODEL", "IMAGES", "--device", "gpu"), "device is 'gpu'"),
        (("predict", "IMAGES/0.png", "IMAGES"), "is a PNG image; expected"),
        (("predict", "MODEL", "IMAGES", "--threshold", "nan"), "--threshold is nan"),
        (("predict", "MODEL", "IMAGES", "--threshold", "inf"), "--threshold is inf"),
        (("predict", "MODEL", "IMAGES", "--tiles", "32", "--reference"), "leave out --reference"),
        (("predict", "MODEL", "IMAGES", "--reference", "--dtype", "float16"), "leave one out"),
        (("predict", "MODEL", "IMAGES", "--batch-size", "0"), "--batch-size is 0"),
        (("predict", "MODEL", "IMAGES", "--workers", "0"), "--workers is 0"),
        (("predict", "MODEL", "IMAGES", "--workers", "-3"), "--workers is -3"),
        (("evaluate", "MODEL", "IMAGES", "--batch-size", "0"), "--batch-size is 0"),
        (("evaluate", "MODEL", "IMAGES"), "no test images"),
        (("calibrate", "MODEL", "IMAGES", "--workers", "-1"), "--workers is -1"),
        (("convert", "MODEL", "OUT/x.safetensors"), "already"),
        (("calibrate", "MODEL", "IMAGES", "--fpr", "2"), "false_positive_rate is 2"),
        (("calibrate", "MODEL", "IMAGES", "--border", "paper"), "misaligned"),
        (("calibrate", "MODEL", "IMAGES/0.png", "--layout", "mvtec"), "--layout and --category"),
    ],
)
def test_wrong_usage_gives_2_and_says_why(model_file, images, tmp_path, capsys, arguments, message):
    places = {"MODEL": model_file, "IMAGES": images, "OUT": tmp_path}
    arguments = [
        str(places[a.partition("/")[0]]) + "".join(a.partition("/")[1:])
        if a.partition("/")[0] in places
        else a
        for a in arguments
    ]
    before = model_file.read_bytes()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"efficientad {arguments[0]}: error: ")
    assert "Traceback" not in error
    assert model_file.read_bytes() == before


def test_fail_on_anomaly_needs_a_threshold(images, tmp_path, capsys):
    path, out = tmp_path / "no_threshold.safetensors", tmp_path / "out"
    ead.save(helpers.detector(), path)
    assert run("predict", path, images, "--out", out, "--fail-on-anomaly") == 2
    error = capsys.readouterr().err
    assert "give --threshold" in error
    assert f"efficientad calibrate {path} GOOD_IMAGES" in error
    assert not out.exists()
    common = ("predict", path, images / "0.png", "--out", out, "--no-maps", "--no-overlays")
    assert run(*common, "--fail-on-anomaly", "--threshold", -1e9) == 3


@pytest.mark.parametrize(
    ("asked", "sizes"), [((), None), (("--batch-size", 1), (1,)), (("--batch-size", 6), (1, 4, 6))]
)
def test_batch_size_reaches_the_fast_path(model_file, images, tmp_path, monkeypatch, asked, sizes):
    seen = []

    def predictor(detector, **options):
        seen.append(options["batch_sizes"])
        raise ValueError("seen")

    monkeypatch.setattr("efficientad.fast.predictor.FastPredictor", predictor)
    assert run("predict", model_file, images, "--out", tmp_path / "out", *asked) == 2
    assert seen == [sizes]
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_its_notes(model_file, tmp_path, monkeypatch, capsys):
    for part in ("train/good", "test/good"):
        (tmp_path / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "0.png")
    result = Evaluation("widget", {"images": 1}, notes=["No figures of the pixels: a reason."])
    monkeypatch.setattr("efficientad.evaluation.evaluation.evaluate", lambda *_, **__: result)
    assert run("evaluate", model_file, tmp_path, "--out", tmp_path / "out") == 0
    assert "note: No figures of the pixels: a reason.\n" in capsys.readouterr().err


def test_no_cuda_is_named_with_the_remedy(model_file, images, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("predict", model_file, images, "--device", "cuda") == 2
    assert "torch sees 0 CUDA devices; use 'cpu' or 'auto'" in capsys.readouterr().err


@pytest.mark.usefixtures("unmeasured")
def test_an_uncalibrated_model_names_the_command_that_helps(images, tmp_path, capsys):
    path = tmp_path / "raw.safetensors"
    ead.save(ead.EfficientAD("S"), path)
    assert run("predict", path, images, "--out", tmp_path / "out") == 2
    assert "efficientad calibrate MODEL GOOD_IMAGES" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("calibrate", path, images) == 0
    printed = capsys.readouterr().out
    assert "from 1 good images" in printed
    assert "cannot show a rate of 0.01" in printed
    assert ead.load(path).calibrated
    assert run("predict", path, images, "--out", tmp_path / "out") == 0


@pytest.mark.usefixtures("unmeasured")
def test_calibrate_does_not_replace_another_file(model_file, images, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    other.write_text("mine")
    assert run("calibrate", model_file, images / "0.png", "--out", other) == 2
    assert "--force" in capsys.readouterr().err
    assert other.read_text() == "mine"
    assert run("calibrate", model_file, images / "0.png", "--out", other, "--force") == 0


@pytest.mark.usefixtures("unmeasured")
def test_calibrate_shows_the_rate_of_each_folder(model_file, images, tmp_path, capsys):
    days = [tmp_path / "monday", tmp_path / "day 2"]
    for day, names in zip(days, (("0.png", "1.png"), ("2.png",)), strict=True):
        day.mkdir()
        for name in names:
            (day / name).write_bytes((images / name).read_bytes())
    out = tmp_path / "out.safetensors"
    assert run("calibrate", model_file, *days, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "0 of the 3 good images are above it; with 95% confidence at most 63%" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(str(tmp_path))]
    assert [row[-4:-1] for row in rows] == [
        ["2", "0", rows[0][-2]],
        ["1", "0", rows[1][-2]],
    ]
    assert {rows[0][-2], rows[1][-2]} & {"1", "2"}
    assert run("info", out) == 0
    assert "'scores': [" in capsys.readouterr().out


@pytest.mark.usefixtures("unmeasured")
def test_calibrate_refuses_folders_with_more_than_good_images(model_file, images, tmp_path, capsys):
    for name in ("set/train/good", "set/test/scratch", "other/ok", "other/broken"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes((images / "0.png").read_bytes())
    out = tmp_path / "out.safetensors"
    common = ("calibrate", model_file, "--out", out, images)
    assert run(*common, tmp_path / "set") == 2
    assert "has the layout mvtec; of several folders each" in capsys.readouterr().err
    assert run(*common, tmp_path / "other") == 2
    assert "--layout folder" in capsys.readouterr().err
    assert run(*common, tmp_path / "set", "--layout", "mvtec") == 2
    assert not out.exists()
    assert run(*common, tmp_path / "other", "--layout", "folder") == 0


def test_long_lists_are_counted_in_info(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    model = ead.EfficientAD("S")
    model.provenance = {"calibration": {"scores": [0.5] * 40, "few": [1, 2]}}
    ead.save(model, path)
    assert run("info", path) == 0
    assert "{'scores': '40 values', 'few': [1, 2]}" in capsys.readouterr().out
    assert run("info", path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["provenance: calibration"]["scores"] == [0.5] * 40


def test_a_teacher_alone_is_no_detector(tmp_path, images, capsys):
    path = tmp_path / "teacher.safetensors"
    save_file(ead.EfficientAD("S").teacher.state_dict(), path)
    assert run("predict", path, images) == 2
    assert "--teacher" in capsys.readouterr().err


def test_info(model_file, capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert "folded torch network" in printed or "triton kernels" in printed
    assert "frame path" in printed
    assert "non-commercial research use only" in printed
    assert run("info", model_file, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["size"] == "EfficientAD-S"
    assert facts["threshold"] == 0.5
    assert facts["fast path"].startswith(("folded torch network", "triton kernels"))


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    assert "predict" in capsys.readouterr().out


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "efficientad", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"efficientad {ead.__version__}"


@pytest.mark.usefixtures("unmeasured")
def test_evaluate_on_real_screws(shared_data, tmp_path, capsys):
    """Real greyscale images with masks at four times their size; a part of the test folders."""
    source = shared_data / "mvtec_screw_256"
    root = tmp_path / "screw"
    for part, count in [("train/good", 5), ("test/good", 3), ("test/scratch_head", 3)]:
        (root / part).mkdir(parents=True)
        for path in sorted((source / part).iterdir())[:count]:
            (root / part / path.name).symlink_to(path)
    (root / "ground_truth").symlink_to(source / "ground_truth")
    model = tmp_path / "screw.safetensors"
    ead.save(ead.EfficientAD("S"), model)
    assert run("calibrate", model, root) == 0
    assert run("evaluate", model, root, "--out", tmp_path / "out", "--maps") == 0
    assert "pixel AU-ROC" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert document["metrics"]["images"] == 6
    assert 0 < document["metrics"]["pixel AU-ROC"] < 1
    map_file = next((tmp_path / "out" / "maps").rglob("*.tiff"))
    import tifffile

    assert np.shape(tifffile.imread(map_file)) == (256, 256)
